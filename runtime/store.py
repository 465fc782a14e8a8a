"""Store: the parameters that one rank holds, and flat buffers for their gradients.

Gradients that ranks reduce, or clip, lie side by side in one buffer a bucket: autograd adds into it, one reduction
sums it. Others are as autograd makes them, and gone after the step: a buffer to clear and to add into would cost two
passes over them.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from spindle.capture.codes import OperatorCode
from spindle.runtime.programs.program import Program


class ParameterStore:
    """Parameters of one rank by the workload's names. `trained` lists those with a gradient, in a fixed order,
    `updated` those of them that this rank's optimizer updates.
    """

    def __init__(self, program: Program, rank: int, codes: Iterable[OperatorCode]) -> None:
        """Takes the parameters out of the rank's codes, where tied ones are one tensor."""
        codes = list(codes)
        self.parameters = _collect_parameters(codes)
        self._buffers = {name: (code.module, inner) for code in codes for inner, name in code.buffers}
        self.bucket: dict[str, Tensor] = {}
        self.loose: list[str] = []  # trained ones whose gradients lie in no buffer
        self.trained: list[str] = []
        self.updated: list[str] = []
        for bucket in program.buckets:
            if rank in bucket.ranks:
                if len(bucket.ranks) > 1 or program.max_grad_norm is not None:
                    self.bucket[bucket.name] = self._flat_gradients(bucket.parameters)
                else:
                    self.loose += bucket.parameters
                self.trained += bucket.parameters
                self.updated += bucket.parameters if bucket.updated_by(rank) else ()

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers by the workload's names, as they stand in the modules now: a forward may put new ones there."""
        return {name: module.get_buffer(inner) for name, (module, inner) in self._buffers.items()}

    def _flat_gradients(self, names: tuple[str, ...]) -> Tensor:
        held = [self.parameters[name] for name in names]
        flat = torch.zeros(sum(p.numel() for p in held), dtype=held[0].dtype, device=held[0].device)
        for parameter, part in zip(held, _views(flat, held), strict=True):
            parameter.grad = part
        return flat

    def complete_gradients(self, names: Iterable[str]) -> None:
        """Zeros for those of `names` that backward did not reach, so that every plan's optimizer steps the same."""
        for name in names:
            parameter = self.parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def zero_gradients(self) -> None:
        """Clear all gradients: buffers in place."""
        for flat in self.bucket.values():
            flat.zero_()
        for name in self.loose:
            self.parameters[name].grad = None

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
            gradient = self.parameters[name].grad
            assert gradient is not None
            found[name] = gradient.detach().cpu().clone()
        return found

    @contextlib.contextmanager
    def without_gradients(self, names: Sequence[str]) -> Iterator[None]:
        """While open these parameters have no gradient, so that an optimiser leaves them alone."""
        kept = [self.parameters[name].grad for name in names]
        for name in names:
            self.parameters[name].grad = None
        try:
            yield
        finally:
            for name, gradient in zip(names, kept, strict=True):
                self.parameters[name].grad = gradient

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of parameters and buffers of this rank, by name."""
        held: Mapping[str, Tensor] = {**self.buffers, **self.parameters}
        return {name: held[name].detach().cpu().clone() for name in names if name in held}


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
