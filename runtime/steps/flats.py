"""Flats: the sharded parameters of one rank. Each flat is a row of numbers of which the rank keeps its range, with its
gradients; the optimizer steps the parts of parameters that lie in it.

- The parameters in the modules are views of a buffer as long as the row. It takes memory from UNSHARD to RESHARD alone:
  between these its storage is emptied, and autograd, which has kept the views, finds the same storage filled again.
- A backward adds to a buffer of zeros, which is scattered after it and then given up. Rows are filled up with zeros to
  a multiple of the ranks.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from spindle.capture.codes import OperatorCode
from spindle.errors import WorkloadError
from spindle.runtime.checkpoints.weights import Readable, put_parameters
from spindle.runtime.comms.transport import Transport, Wait
from spindle.runtime.programs.program import Flat, Program, SliceRun
from spindle.runtime.steps.busy import Together
from spindle.runtime.updates.masters import Numbers
from spindle.values.graph import range_name


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers low..high-1 of a parameter, which a rank keeps from place `start` of its part of a row on."""

    parameter: str
    name: str
    low: int
    high: int
    start: int


def share_of(flat: Flat, shapes: Mapping[str, Sequence[int]]) -> int:
    """How many numbers of a flat each rank keeps."""
    return -(-sum(prod(shapes[name]) for name in flat.parameters) // len(flat.ranks))


def ranges_of(flat: Flat, shapes: Mapping[str, Sequence[int]], rank: int) -> Iterator[Range]:
    """What a rank keeps of the parameters of a flat, in their order."""
    share = share_of(flat, shapes)
    begin = flat.ranks.index(rank) * share
    start = 0
    for name in flat.parameters:
        size = prod(shapes[name])
        low, high = max(begin - start, 0), min(begin + share - start, size)
        if low < high:
            yield Range(name, range_name(name, low, high, shapes[name]), low, high, start + low - begin)
        start += size


def ranges_by_parameter(program: Program, shapes: Mapping[str, Sequence[int]], rank: int) -> dict[str, list[str]]:
    """The names of what a rank keeps of each sharded parameter, none or one."""
    found: dict[str, list[str]] = {}
    for flat in program.flats:
        if rank in flat.ranks:
            found.update((name, []) for name in flat.parameters)
            for own in ranges_of(flat, shapes, rank):
                found[own.parameter].append(own.name)
    return found


class Row:
    """A flat on one rank: `own` and `gradient` are its range and what all ranks' backwards have added to it, `pieces`
    the parts of parameters in it, each with its gradient.
    """

    def __init__(
        self,
        flat: Flat,
        rank: int,
        modules: Mapping[str, nn.Parameter],
        device: torch.device,
        numbers: Numbers | None = None,
    ) -> None:
        """`modules`: the parameters that stand in the modules, by name. `numbers`: types of sums and reductions."""
        numbers = numbers or Numbers()
        self.flat, self.shapes = flat, {name: modules[name].shape for name in flat.parameters}
        self.share = share_of(flat, self.shapes)
        dtype = getattr(torch, flat.dtype)
        self.own = torch.zeros(self.share, dtype=dtype, device=device)
        summed = numbers.summed(dtype)
        self.gradient = torch.zeros_like(self.own, dtype=summed) if flat.trained else None
        self.reduced = numbers.reduced(summed)
        self.whole = torch.empty(0, dtype=dtype, device=device)
        self.parameters: dict[str, nn.Parameter] = {}
        self.pieces: dict[str, nn.Parameter] = {}
        self.ranges = list(ranges_of(flat, self.shapes, rank))
        for each in self.ranges:
            kept = slice(each.start, each.start + each.high - each.low)
            piece = self.pieces[each.name] = nn.Parameter(self.own[kept], requires_grad=flat.trained)
            if self.gradient is not None and not numbers.has_master(piece):
                piece.grad = self.gradient[kept]

    def gradients(self) -> dict[str, Tensor]:
        """What all backwards have added to the gradients of the pieces."""
        assert self.gradient is not None, f"flat {self.flat.name} is frozen"
        return {each.name: self.gradient[each.start : each.start + each.high - each.low] for each in self.ranges}

    def take_over(
        self, modules: Mapping[str, nn.Parameter], weights: Mapping[str, Readable]
    ) -> dict[int, nn.Parameter]:
        """Keep this rank's range of the values that the modules hold, or `weights` for them, and make the parameters
        views of the row; those to put in place of ones on the meta device, by their ids.
        """
        for each in self.ranges:
            value = modules[each.parameter].detach()
            part = weights[each.parameter].read(each.name) if value.is_meta else value.reshape(-1)[each.low : each.high]
            self.own[each.start : each.start + each.high - each.low] = part.to(self.own.device)
        self.whole = self.own.new_empty(self.share * len(self.flat.ranks))
        views = self._views(self.whole)
        replaced: dict[int, nn.Parameter] = {}
        for name, view in views.items():
            parameter = modules[name]
            if parameter.is_meta:
                replaced[id(parameter)] = nn.Parameter(view.new_empty(0), requires_grad=parameter.requires_grad)
                parameter = replaced[id(parameter)]
            parameter.data = view  # so that what fills the row does not count as a change of what autograd has kept
            self.parameters[name] = parameter
        self.release()
        return replaced

    def _views(self, row: Tensor) -> dict[str, Tensor]:
        """The parameters in a buffer as long as the row."""
        parts = torch.split(row, [shape.numel() for shape in self.shapes.values()] + [self.padding])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=False)}

    @property
    def padding(self) -> int:
        """Zeros at the end of the row."""
        return self.share * len(self.flat.ranks) - sum(shape.numel() for shape in self.shapes.values())

    def gather(self, transport: Transport) -> Wait:
        """Start to gather the row."""
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.itemsize)
        return transport.all_gather(self.whole, self.own, self.flat.ranks)

    def release(self) -> None:
        """Give up what was gathered."""
        self.whole.untyped_storage().resize_(0)

    def take_gradients(self) -> Tensor:
        """A buffer of zeros for the gradients of the next backward."""
        row = torch.zeros_like(self.own).repeat(len(self.flat.ranks))
        for name, view in self._views(row).items():
            self.parameters[name].grad = view
        return row

    def check(self) -> None:
        """Raise WorkloadError where a parameter is no longer a view of the row."""
        for name, parameter in self.parameters.items():
            if parameter.untyped_storage()._cdata != self.whole.untyped_storage()._cdata:
                raise WorkloadError(
                    f"component {name.partition('.')[0]!r} shards its parameters, and a module of it lays out {name!r} "
                    "in memory itself, as recurrent layers do on a GPU; register it with shard='nothing' and plan again"
                )


def make_rows(
    program: Program,
    rank: int,
    codes: Iterable[OperatorCode],
    weights: Mapping[str, Readable],
    device: torch.device,
    numbers: Numbers | None = None,
) -> dict[str, Row]:
    """The flats that a rank keeps a range of, by name; the parameters in its codes are then views of them."""
    codes = list(codes)
    modules = {name: code.module.get_parameter(inner) for code in codes for inner, name in code.parameters}
    # what stays is allocated first, so that it leaves no holes between what comes and goes
    rows = {flat.name: Row(flat, rank, modules, device, numbers) for flat in program.flats if rank in flat.ranks}
    for row in rows.values():
        put_parameters(codes, row.take_over(modules, weights))
    return rows


class Flats:
    """What a rank does with its flats in a step."""

    def __init__(self, rows: Mapping[str, Row], transport: Transport, together: Together | None = None) -> None:
        self.rows, self.transport = rows, transport
        self._together = together or Together(transport.streams)
        self._gathering: dict[str, Wait] = {}
        self._given: dict[str, Tensor] = {}
        self._summing: dict[str, tuple[Tensor, Tensor, Wait]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def unshard(self, name: str) -> None:
        """Start to gather a flat."""
        row, begin = self.rows[name], functools.partial(self.rows[name].gather, self.transport)
        num_bytes = row.whole.numel() * row.whole.itemsize
        self._gathering[name] = self._together.timed(name, "all_gather", row.flat.ranks, num_bytes, begin)

    def wait(self, name: str) -> None:
        """Wait until a flat is there."""
        self._gathering.pop(name)()

    def reshard(self, name: str) -> None:
        """Release a flat."""
        self.rows[name].release()

    def expect(self, run: SliceRun) -> None:
        """Make room for the gradients that the backward of a run gives."""
        for name in run.flats:
            if not set(run.trained).isdisjoint(self.rows[name].flat.parameters):
                self._given[name] = self.rows[name].take_gradients()

    def scatter(self, name: str) -> None:
        """Start to sum what the backward has given, each rank its range; it stays until it is through."""
        row, given = self.rows[name], self._given.pop(name)
        for parameter in row.parameters.values():
            parameter.grad = None
        given = given.to(row.reduced)
        part = torch.empty_like(row.own, dtype=row.reduced)
        begin = functools.partial(self.transport.reduce_scatter, part, given, row.flat.ranks)
        wait = self._together.timed(f"gradients of {name}", "reduce_scatter", row.flat.ranks, given.nbytes, begin)
        self._summing[name] = given, part, wait

    def add(self, name: str) -> None:
        """Wait for the sum, and add it to those of earlier backwards."""
        _, part, wait = self._summing.pop(name)
        wait()
        gradient = self.rows[name].gradient
        assert gradient is not None, f"flat {name} is frozen, but its gradients are summed"
        gradient += part
