"""Cuts: parameters that tensor parallelism cuts into pieces, and Linear layers that compute with some of them.

- A rank holds the pieces that its slices need, each a parameter of its own with its own group of ranks: so gradients
  are reduced, clipped, updated and saved as those of any parameter, whatever the layouts of the slices that share it.
- In a tensor-parallel run each rank of a copy computes its part of the features, between a layer cut by outputs and
  one cut by inputs (Megatron-LM, section 3): the former sums the gradient of its input over the copy, the latter its
  output.
- What is not cut is computed by all ranks of a copy alike, so each adds its share of the gradient; marked `partial`, it
  sees a part of the features, and its gradients are shares already.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from spindle.capture.codes import Captured, OperatorCode
from spindle.graph import parse_piece, piece_name
from spindle.runtime.programs.program import Program

_PIECE = re.compile(r"@(\d+)/(\d+)/(\d+)")


# -- names ------------------------------------------------------------------------------------------------------------


def joined_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with pieces put together under the parameter's own name. A number a piece, as Adam's step, is one."""
    whole: dict[str, Tensor] = {}
    parts: dict[tuple[str, int], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _PIECE.search(name)
        if found is None:
            whole[name] = tensor
        else:
            index, _, dim = map(int, found.groups())
            parts.setdefault((whole_name(name), dim), {})[index] = tensor
    for (name, dim), pieces in parts.items():
        ordered = [pieces[index] for index in sorted(pieces)]
        whole[name] = torch.cat(ordered, dim) if ordered[0].ndim > dim else ordered[0]
    return whole


def whole_name(name: str) -> str:
    """A name in which no piece is told."""
    return _PIECE.sub("", name)


def piece_of(whole: Tensor, name: str) -> Tensor:
    """The part of a parameter, or of a state of its shape, that `name` names."""
    _, index, count, dim = parse_piece(name)
    if count == 1 or whole.ndim <= dim:
        return whole
    size = whole.shape[dim] // count
    return whole.narrow(dim, index * size, size)


def held_pieces(program: Program, captured: Captured, rank: int) -> dict[str, tuple[int, ...]]:
    """Pieces that the slices of `rank` need of each parameter that is cut."""
    held: dict[str, set[int]] = {}
    for run in (run for run in program.slices if rank in run.ranks):
        copy = run.copy_of(rank)
        for parameter in (p for name in run.operators for p in captured.graph.by_name[name].parameters):
            if parameter.pieces > 1:
                names = parameter.names(copy.index(rank), len(copy))
                held.setdefault(parameter.name, set()).update(parse_piece(name)[1] for name in names)
    return {name: tuple(sorted(indices)) for name, indices in held.items()}


def held_names(program: Program, captured: Captured, rank: int) -> list[str]:
    """Parameters, pieces of parameters and buffers that `rank` holds."""
    pieces = held_pieces(program, captured, rank)
    cut = {p.name: p for op in captured.graph for p in op.parameters if p.pieces > 1}
    names: dict[str, None] = {}
    for code in (captured.codes[name] for name in program.operators_of(rank)):
        for _, name in (*code.parameters, *code.buffers):
            if name in cut:
                names.update((piece_name(name, k, cut[name].pieces, cut[name].piece_dim), None) for k in pieces[name])
            else:
                names[name] = None
    return list(names)


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """This rank's part in a copy of several ranks; `total` sums a tensor over them in place."""

    part: int
    parts: int
    total: Callable[[Tensor], None]


class Switch:
    """What layout the layers of a rank compute in just now; None: all of the features."""

    layout: Layout | None = None

    @contextlib.contextmanager
    def to(self, layout: Layout) -> Iterator[None]:
        """While open, layers compute their part in `layout`."""
        self.layout = layout
        try:
            yield
        finally:
            self.layout = None


class CutLinear(nn.Module):
    """A Linear layer of which a rank holds some of `count` pieces, cut by outputs (dim 0) or inputs (dim 1)."""

    def __init__(self, linear: nn.Linear, dim: int, count: int, held: Sequence[int], switch: Switch) -> None:
        super().__init__()
        self.dim, self.count, self.held, self.switch = dim, count, tuple(held), switch
        self.biased = linear.bias is not None
        for index in held:
            self._keep(f"weight_{index}", linear.weight, dim, index)
            if self.biased and dim == 0:
                self._keep(f"bias_{index}", linear.bias, 0, index)
        if self.biased and dim == 1:
            self.bias = linear.bias

    def _keep(self, name: str, whole: Tensor, dim: int, index: int) -> None:
        piece = whole.detach().chunk(self.count, dim)[index].clone()
        self.register_parameter(name, nn.Parameter(piece, requires_grad=whole.requires_grad))

    def _parts(self, name: str, dim: int, layout: Layout | None) -> Tensor:
        indices: Iterable[int] = self.held if layout is None else _of_part(layout, self.count)
        pieces: list[Tensor] = [self.get_parameter(f"{name}_{index}") for index in indices]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def forward(self, inputs: Tensor) -> Tensor:
        """All outputs, or in a layout this rank's part of them (dim 0), or all of them from its part of the inputs."""
        layout = self.switch.layout
        if self.dim == 0:
            inputs = inputs if layout is None else _Given.apply(inputs, layout)  # type: ignore[no-untyped-call]
            return F.linear(
                inputs, self._parts("weight", 0, layout), self._parts("bias", 0, layout) if self.biased else None
            )
        outputs = F.linear(inputs, self._parts("weight", 1, layout))
        outputs = outputs if layout is None else _Total.apply(outputs, layout)  # type: ignore[no-untyped-call]
        return outputs + self.bias.to(outputs.dtype) if self.biased else outputs


def _of_part(layout: Layout, count: int) -> range:
    share = count // layout.parts
    return range(layout.part * share, (layout.part + 1) * share)


class _Given(torch.autograd.Function):
    """What all ranks of a copy are given alike; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        ctx.layout.total(total)
        return total, None


class _Total(torch.autograd.Function):
    """The sum of what the ranks of a copy made; its gradient is known to all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, layout: Layout) -> Tensor:
        del ctx
        total = value.clone(memory_format=torch.contiguous_format)
        layout.total(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Share(torch.autograd.Function):
    """A parameter that all ranks of a copy use alike: each adds its share of the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parts: int) -> Tensor:
        ctx.parts = parts
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.parts, None


def compute_part(
    code: OperatorCode, arguments: Iterable[Any], layout: Layout, switch: Switch, partial: frozenset[str]
) -> Any:
    """Run an operator's code as part of a copy of several ranks."""
    shared = {
        inner: _Share.apply(code.module.get_parameter(inner), layout.parts)  # type: ignore[no-untyped-call]
        for inner, name in code.parameters
        if "@" not in name and name not in partial
    }
    with switch.to(layout):
        return functional_call(code.module, shared, tuple(arguments))


def cut_codes(
    codes: Mapping[str, OperatorCode], cuts: Mapping[str, tuple[int, int, tuple[int, ...]]], switch: Switch
) -> dict[str, OperatorCode]:
    """Codes whose cut layers hold only the pieces of this rank. `cuts`: count, dimension and pieces held of each
    parameter that is cut, by name. Their modules are changed.
    """
    return {name: _cut_code(code, cuts, switch) if cuts else code for name, code in codes.items()}


def _cut_code(code: OperatorCode, cuts: Mapping[str, tuple[int, int, tuple[int, ...]]], switch: Switch) -> OperatorCode:
    parameters: list[tuple[str, str]] = []
    for inner, name in code.parameters:
        if name not in cuts:
            parameters.append((inner, name))
            continue
        count, dim, held = cuts[name]
        path, _, leaf = inner.rpartition(".")
        layer = code.module.get_submodule(path)
        if isinstance(layer, nn.Linear):
            by_inputs = leaf == "weight" and dim == 1
            owner, _, last = path.rpartition(".")
            setattr(code.module.get_submodule(owner), last, CutLinear(layer, int(by_inputs), count, held, switch))
        parameters += [(f"{path}.{leaf}_{index}", piece_name(name, index, count, dim)) for index in held]
    return replace(code, parameters=tuple(parameters))
