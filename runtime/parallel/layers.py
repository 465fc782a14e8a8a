"""Layers: Linear layers, embeddings and experts that compute with some of the pieces of their parameters.

- In a tensor-parallel run each rank of a copy computes its part of the features, between a layer cut by outputs and
  one cut by inputs (Megatron-LM, section 3): the former sums the gradient of its input over the copy, the latter its
  output. Heads put their parts of the words side by side; embeddings look up the words that they hold. Experts compute
  their part of each expert's features, and sum what they give.
- What is not cut is computed by all ranks of a copy alike, so each adds its share of the gradient; marked `partial`, it
  sees a part of the features, and its gradients are shares already.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from spindle.capture.codes import OperatorCode
from spindle.record.substitutes.checkpoints import resumed
from spindle.runtime.parallel.names import Held, join, piece_of


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
        before, self.layout = self.layout, layout
        try:
            yield
        finally:
            self.layout = before


class _CutLayer(nn.Module):
    """A layer of which a rank holds some pieces of each parameter that is cut: `weight_0`, `weight_3`, `bias_0`."""

    switch: Switch
    held: dict[str, Held]

    def _part(self, name: str) -> Tensor:
        """What this rank computes with: of a parameter all pieces, or in a layout those of its part."""
        held, layout = self.held[name], self.switch.layout
        indices = held.indices if layout is None else held.parameter.indices(layout.part, layout.parts)
        pieces: list[Tensor] = [self.get_parameter(f"{name}_{index}") for index in indices]
        return pieces[0] if len(pieces) == 1 else join(pieces, held.parameter.piece_dim, held.parameter.packs)


class CutLinear(_CutLayer, nn.Linear):
    """A Linear layer cut by outputs (dim 0) or inputs (dim 1)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """All outputs; or in a layout this rank's part of them, or all of them from its part of the inputs. Where the
        cut is `joined` it takes and gives all features in a layout too.
        """
        layout, cut = self.switch.layout, self.held["weight"].parameter
        if layout is not None and (cut.piece_dim == 0 or cut.joined):
            inputs = _Given.apply(inputs, layout)  # type: ignore[no-untyped-call]
        if cut.piece_dim == 0:
            bias = self._part("bias") if "bias" in self.held else None
            outputs = F.linear(inputs, self._part("weight"), bias)
            joins = layout is not None and cut.joined
            return _Joined.apply(outputs, layout) if joins else outputs  # type: ignore[no-untyped-call]
        if layout is not None and cut.joined:
            inputs = inputs.chunk(layout.parts, -1)[layout.part]
        outputs = F.linear(inputs, self._part("weight"))
        outputs = outputs if layout is None else _Total.apply(outputs, layout)  # type: ignore[no-untyped-call]
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


class CutEmbedding(_CutLayer, nn.Embedding):
    """An embedding cut by words."""

    def forward(self, words: Tensor) -> Tensor:
        """The vectors of all words; in a layout each rank looks up its own words, and the rest is zero to it."""
        layout, weight = self.switch.layout, self._part("weight")
        if layout is None:
            return F.embedding(words, weight, self.padding_idx)
        first = layout.part * len(weight)
        missing = (words < first) | (words >= first + len(weight))
        pad = None if self.padding_idx is None else self.padding_idx - first
        own = F.embedding((words - first).masked_fill(missing, 0), weight, pad if pad in range(len(weight)) else None)
        found: Tensor = _Total.apply(own.masked_fill(missing[..., None], 0), layout)  # type: ignore[no-untyped-call]
        return found


class CutExperts(_CutLayer):
    """Experts of any class, whose own forward finds the parts of its stacked parameters in their place."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """What the experts give; in a layout the sum of what the parts of each give."""
        layout, parts = self.switch.layout, {name: self._part(name) for name in self.held}
        if layout is not None:
            inputs = tuple(_given(value, layout) for value in inputs)
            named = {name: _given(value, layout) for name, value in named.items()}
        self._parameters.update(cast("dict[str, nn.Parameter | None]", parts))
        try:
            outputs: Tensor = super().forward(*inputs, **named)
        finally:
            self._parameters.update(dict.fromkeys(parts))
        return outputs if layout is None else _Total.apply(outputs, layout)  # type: ignore[no-untyped-call]


def _given(value: Any, layout: Layout) -> Any:
    flows = isinstance(value, Tensor) and value.is_floating_point()
    return _Given.apply(value, layout) if flows else value  # type: ignore[no-untyped-call]


_CUT: dict[type[nn.Module], type[_CutLayer]] = {nn.Linear: CutLinear, nn.Embedding: CutEmbedding}


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


class _Joined(torch.autograd.Function):
    """The parts of the last dimension that the ranks of a copy made, side by side; the gradient of the whole is known
    to all of them.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        whole = value.new_zeros(*value.shape[:-1], value.shape[-1] * layout.parts)
        whole.chunk(layout.parts, -1)[layout.part].copy_(value)
        layout.total(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.layout.parts, -1)[ctx.layout.part], None


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

    def around() -> contextlib.AbstractContextManager[None]:
        return switch.to(layout)

    with around(), resumed(around):
        return functional_call(code.module, shared, tuple(arguments))


def cut_codes(codes: Mapping[str, OperatorCode], held: Mapping[str, Held], switch: Switch) -> dict[str, OperatorCode]:
    """Codes whose cut layers hold only the pieces of this rank; `held` tells which, by parameter. Layers are changed in
    place, since several codes may hold one; codes that share a parameter go on to share its pieces.
    """
    pieces: dict[str, nn.Parameter] = {}
    return {name: _cut_code(code, held, switch, pieces) if held else code for name, code in codes.items()}


def _cut_code(
    code: OperatorCode, held: Mapping[str, Held], switch: Switch, pieces: dict[str, nn.Parameter]
) -> OperatorCode:
    parameters: list[tuple[str, str]] = []
    for inner, name in code.parameters:
        if name not in held:
            parameters.append((inner, name))
            continue
        path, _, leaf = inner.rpartition(".")
        layer = code.module.get_submodule(path)
        if layer._parameters.get(leaf) is not None:
            _cut_layer(layer, leaf, held[name], switch, pieces)
        parameters += [(f"{path}.{leaf}_{index}", own) for index, own in held[name].names()]
    return replace(code, parameters=tuple(parameters))


def _cut_layer(layer: nn.Module, leaf: str, held: Held, switch: Switch, pieces: dict[str, nn.Parameter]) -> None:
    """Put pieces in place of one parameter of a layer."""
    if not isinstance(layer, _CutLayer):
        own = type(layer)
        layer.__class__ = _CUT.get(own) or type(f"Cut{own.__name__}", (CutExperts, own), {})
        assert isinstance(layer, _CutLayer)
        layer.switch, layer.held = switch, {}
    layer.held[leaf] = held
    whole = layer.get_parameter(leaf)
    for index, name in held.names():
        if name not in pieces:
            piece = piece_of(whole.detach(), name).clone()
            pieces[name] = nn.Parameter(piece, requires_grad=whole.requires_grad)
        layer.register_parameter(f"{leaf}_{index}", pieces[name])
    layer.register_parameter(leaf, None)
