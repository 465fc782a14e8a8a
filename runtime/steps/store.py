"""Store: the parameters that one rank holds, and flat buffers for their gradients.

- Gradients that ranks reduce, or clip, lie side by side in one buffer a bucket: autograd adds into it, one reduction
  sums it. Others are as autograd makes them, and gone after the step: a buffer to clear and to add into would cost two
  passes over them.
- A parameter to which no backward of a step leads has no gradient in one process, and its optimizer lets it rest. So
  behind the gradients of a bucket that ranks reduce stands a flag for each: whether this rank has added to it.
- A parameter with a master (`spindle.runtime.updates.masters`) has no gradient but while a backward runs; the sum, of
  four bytes a number, lies in the buffer, or is its master's.
- Of sharded parameters the rank holds parts (`spindle.runtime.steps.flats`). Their flags are summed by themselves, over
  all layers at once: a backward scatters its gradients before one knows whether another leads to more.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from spindle.capture.codes import OperatorCode
from spindle.runtime.parallel.names import piece_of
from spindle.runtime.programs.program import Program
from spindle.runtime.steps.flats import Row
from spindle.runtime.updates.masters import Numbers, add_gradient, follow, master_of, named_pairs, write_back
from spindle.values.graph import parse_piece


class ParameterStore:
    """Parameters of one rank by the workload's names. `trained` lists those with a gradient, in a fixed order,
    `updated` those of them that this rank's optimizer updates, `masters` what it steps in place of some of these.
    `on_gradient` is called in a backward with the name of
    each parameter of a reduced bucket whose gradient that backward has completed.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        codes: Iterable[OperatorCode],
        rows: Mapping[str, Row] | None = None,
        numbers: Numbers | None = None,
    ) -> None:
        """Takes the parameters out of the rank's codes, where tied ones are one tensor; parts of sharded ones out of
        its `rows`.
        """
        self.numbers = numbers or Numbers()
        self._sums: dict[str, Tensor] = {}  # gradients of parameters with masters, where they lie in a buffer
        codes = list(codes)
        self.rows = rows or {}
        sharded = {name for row in self.rows.values() for name in row.parameters}
        self.parameters = {name: held for name, held in _collect_parameters(codes).items() if name not in sharded}
        self._buffers = {name: (code.module, inner) for code in codes for inner, name in code.buffers}
        self.bucket: dict[str, Tensor] = {}
        self.reduced: dict[
            str, Tensor
        ] = {}  # gradients that ranks reduce, with a flag for each parameter behind; and flags
        self.reached: set[str] = set()  # parameters of buckets and flats to which a backward of this step has added
        self._members: dict[str, tuple[str, ...]] = {}
        self.loose: list[str] = []  # trained ones whose gradients lie in no buffer
        self.trained: list[str] = []
        self.updated: list[str] = []
        self.on_gradient: Callable[[str], None] | None = None
        for bucket in program.buckets:
            if rank in bucket.ranks:
                if len(bucket.ranks) > 1 or program.max_grad_norm is not None:
                    flat = self._flat_gradients(bucket.parameters)
                    self.bucket[bucket.name] = flat[: len(flat) - len(bucket.parameters)]
                    self._members[bucket.name] = bucket.parameters
                    if len(bucket.ranks) > 1:
                        self.reduced[bucket.name] = flat
                    self._watch({name: self.parameters[name] for name in bucket.parameters})
                else:
                    self.loose += bucket.parameters
                    narrow = {name: self.parameters[name] for name in bucket.parameters}
                    self._watch({n: p for n, p in narrow.items() if self.numbers.has_master(p)})
                self.trained += bucket.parameters
                self.updated += bucket.parameters if bucket.updated_by(rank) else ()
        for row in self.rows.values():
            self.parameters.update(row.pieces)
            if row.gradient is not None:
                self.trained += row.pieces
                self.updated += row.pieces
                self._sums.update(row.gradients())
                self._watch(row.parameters, whole=False)
        for flags in program.flags_by_name.values():
            if rank in flags.ranks:
                device = next(iter(self.rows.values())).own.device
                self.reduced[flags.name] = torch.zeros(len(flags.parameters), device=device)
                self._members[flags.name] = flags.parameters
        narrow = {name: self.parameters[name] for name in self.updated}
        self.masters = {name: master_of(p) for name, p in narrow.items() if self.numbers.has_master(p)}
        for name, master in self.masters.items():
            master.grad = self._sums.get(name)

    def stepped(self, name: str) -> nn.Parameter:
        """What the optimizer steps of a parameter: its master, if this rank keeps one, or itself."""
        held = self.masters.get(name)
        return self.parameters[name] if held is None else held

    def load_masters(self, saved: Mapping[str, Tensor]) -> None:
        """Take masters over from a checkpoint, by parameter; one that no longer goes with its parameter's value, or is
        not there, stays what the parameter is.
        """
        for name, master in self.masters.items():
            whole = saved.get(parse_piece(name).whole)
            if whole is not None:
                master.data.copy_(piece_of(whole, name))
        self.follow(self.masters)

    def round_masters(self, names: Iterable[str]) -> None:
        """Give parameters the values of their masters."""
        write_back(named_pairs(names, self.parameters, self.masters))

    def follow(self, names: Iterable[str]) -> None:
        """Let masters follow what something else than the optimizer has written to their parameters."""
        follow(named_pairs(names, self.parameters, self.masters))

    @property
    def flat_gradients(self) -> list[Tensor]:
        """Gradients of sharded parameters on this rank, a part of each row."""
        return [row.gradient for row in self.rows.values() if row.gradient is not None]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers by the workload's names, as they stand in the modules now: a forward may put new ones there."""
        return {name: module.get_buffer(inner) for name, (module, inner) in self._buffers.items()}

    def _flat_gradients(self, names: tuple[str, ...]) -> Tensor:
        held = [self.parameters[name] for name in names]
        total = sum(p.numel() for p in held)
        flat = torch.zeros(total + len(names), dtype=self.numbers.summed(held[0].dtype), device=held[0].device)
        for name, parameter, part in zip(names, held, _views(flat[:total], held), strict=True):
            if self.numbers.has_master(parameter):
                self._sums[name] = part
            else:
                parameter.grad = part
        return flat

    def _watch(self, parameters: Mapping[str, Tensor], *, whole: bool = True) -> None:
        """Tell `on_gradient`, where it is set, of each parameter to which a backward has added all that it adds. Of
        `whole` ones with masters the gradient goes to its sum.
        """

        def accumulated(name: str, parameter: Tensor) -> None:
            self.reached.add(name)
            if whole and self.numbers.has_master(parameter):
                self._collect(name, parameter)
            if self.on_gradient is not None:
                self.on_gradient(name)

        for name, parameter in parameters.items():
            hook = functools.partial(accumulated, name)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _collect(self, name: str, parameter: Tensor) -> None:
        if name in self._sums:
            add_gradient(parameter, self._sums[name])
        else:
            self.masters[name].grad = add_gradient(parameter, self.masters[name].grad)

    def flag(self, bucket: str) -> Tensor:
        """What is to be reduced of a bucket: its gradients, and behind them the flags, as they are on this rank now. Of
        flags by themselves: these.
        """
        flat, names = self.reduced[bucket], self._members[bucket]
        flags = flat[len(flat) - len(names) :]
        flags.fill_(1)
        if missing := [flags[index] for index, name in enumerate(names) if name not in self.reached]:
            torch._foreach_zero_(missing)  # nothing comes from main memory, which would have the process wait
        return flat

    def unreached(self, names: Iterable[str]) -> list[str]:
        """Those of `names` to whose gradients no rank has added in this step, once all that ranks reduce is; of a
        sharded parameter it has a part. Flags are read only where this rank has not added itself: a device is not
        waited for else.
        """
        asked = {trained_as(name): name for name in names}
        found = [asked[name] for name in self.loose if name in asked and self.stepped(asked[name]).grad is None]
        for bucket, members in self._members.items():
            missing = [name in asked and name not in self.reached for name in members]
            if any(missing):
                flat = self.reduced.get(bucket)
                sums = [0.0] * len(members) if flat is None else flat[len(flat) - len(members) :].tolist()
                found += [asked[name] for name, is_missing, sum_ in zip(members, missing, sums, strict=True)
                          if is_missing and not sum_]  # fmt: skip
        return found

    def zero_gradients(self) -> None:
        """Clear all gradients: buffers in place."""
        self.reached.clear()
        for flat in (*self.bucket.values(), *self.flat_gradients):
            flat.zero_()
        for name in self.loose:
            self.stepped(name).grad = None

    def carrier(self, bucket: str) -> Tensor:
        """The buffer of a bucket's gradients, when these are done with, as room for its parameters."""
        flat, first = self.bucket[bucket], self.parameters[self._members[bucket][0]]
        return flat.view(first.dtype)[: len(flat)]

    def pack(self, names: Sequence[str], flat: Tensor) -> None:
        """Copy parameters side by side into a flat buffer."""
        values = [self.parameters[name].detach() for name in names]
        torch._foreach_copy_(_views(flat, values), values)

    def unpack(self, names: Sequence[str], flat: Tensor) -> None:
        """Copy parameters out of a flat buffer."""
        values = [self.parameters[name].detach() for name in names]
        torch._foreach_copy_(values, _views(flat, values))

    def gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of gradients, by parameter."""
        found: dict[str, Tensor] = {}
        for name in names:
            gradient = self.stepped(name).grad
            assert gradient is not None
            found[name] = gradient.detach().cpu().clone()
        return found

    @contextlib.contextmanager
    def without_gradients(self, names: Sequence[str]) -> Iterator[None]:
        """While open these parameters have no gradient, so that an optimizer leaves them alone."""
        kept = [self.stepped(name).grad for name in names]
        for name in names:
            self.stepped(name).grad = None
        try:
            yield
        finally:
            for name, gradient in zip(names, kept, strict=True):
                self.stepped(name).grad = gradient

    def held(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers of this rank, by name, as they stand: the next step changes them."""
        held: Mapping[str, Tensor] = {**self.buffers, **self.parameters}
        return {name: held[name].detach() for name in names if name in held}

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of parameters and buffers of this rank, by name."""
        return {name: value.cpu().clone() for name, value in self.held(names).items()}


def trained_as(name: str) -> str:
    """The name under which runs train what a rank updates: of a range of a parameter that of the whole."""
    piece = parse_piece(name)
    return name if piece.span is None else piece.whole


def _views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat buffer as tensors of these shapes."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _collect_parameters(codes: Iterable[OperatorCode]) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for code in codes:
        for inner, name in code.parameters:
            parameter = code.module.get_parameter(inner)
            if found.setdefault(name, parameter) is not parameter:
                raise AssertionError(f"parameter {name!r} is two tensors on one rank; its operators were copied apart")
    return found
