"""Costs: an operator's module and the shapes it reads in; its output shapes, FLOPs, bytes and gradient flags out.

The module runs forward and backward on fake tensors at the full batch: no compute, no memory. FLOPs are those that
`torch.utils.flop_counter` knows (matrix products, convolutions, attention); a multiply-add counts as two.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from spindle.capture.blocks import BlockModule
from spindle.capture.codes import computing_in
from spindle.capture.draws import shapes_only
from spindle.capture.randomness import Undrawn
from spindle.capture.signature import module_signature, structure_signature
from spindle.workload import Precision

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """Shape and dtype of a value at the full batch, and whether a gradient flows through it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the value."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of an operator at the full batch takes.

    `input_grads` tells for each input whether a gradient comes out for it, `trained` names (inside the module) the
    parameters that get one, `undrawn` the operations that draw random numbers from no stream of ours.
    """

    outputs: tuple[ValueSpec, ...]
    forward_flops: float
    backward_flops: float
    activation_bytes: int
    input_grads: tuple[bool, ...]
    trained: frozenset[str]
    undrawn: frozenset[str] = frozenset()


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and weighted sum, counted full (no causal discount): 4 b h q k d."""
    batch, heads, length, head_dim = query
    return 2 * batch * heads * length * key[-2] * (head_dim + value[-1])


def _attention_backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Five products of the forward's size, scores computed anew."""
    return _attention_flops(query, key, rest[0]) * 5 // 2


_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def measure(
    module: nn.Module,
    rows: int,
    inputs: Sequence[ValueSpec],
    live: Sequence[bool] | None = None,
    precision: Precision = "fp32",
) -> Cost:
    """Run `module(rows, *inputs)` on fake tensors, and backward from the `live` outputs (None: from all that can)."""
    sizes = ShapeEnv()  # boolean masks and .item() make sizes and numbers that only data can tell
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes) as mode:
        state: dict[str, Tensor] = {
            name: mode.from_tensor(value, static_shapes=True) for name, value in _unique_state(module)
        }
        for name, parameter in module.named_parameters():
            state[name] = state[name].detach().requires_grad_(parameter.requires_grad)
        arguments = [torch.empty(i.shape, dtype=i.dtype).requires_grad_(i.needs_grad) for i in inputs]
        saved: dict[int, int] = {}
        counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        cpu, undrawn = torch.device("cpu"), Undrawn()
        with counter as forward, _saved_bytes(saved), computing_in(precision, cpu), shapes_only(), undrawn:
            outputs = torch.func.functional_call(module, state, (rows, *arguments))
        ends = [o for o, alive in zip(outputs, live or [True] * len(outputs), strict=True) if o.requires_grad and alive]
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as backward:
            if ends:
                torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
        held = {value.untyped_storage()._cdata for value in (*state.values(), *arguments)}
        kept = sum(size for storage, size in saved.items() if storage not in held)
    return Cost(
        outputs=tuple(ValueSpec(tuple(o.shape), o.dtype, o.requires_grad) for o in outputs),
        forward_flops=float(forward.get_total_flops()),
        backward_flops=float(backward.get_total_flops()),
        activation_bytes=kept if ends else 0,
        input_grads=tuple(argument.grad is not None for argument in arguments),
        trained=frozenset(name for name, _ in module.named_parameters() if state[name].grad is not None),
        undrawn=frozenset(undrawn.names),
    )


def _unique_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _saved_bytes(saved: dict[int, int]) -> Any:
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def kind_of(
    label: str, module: nn.Module, rows: int, inputs: Sequence[ValueSpec], precision: Precision = "fp32"
) -> str:
    """Operator kind: equal for operators that do the same work on the same shapes, in every process and session."""
    parts = [
        label,
        precision,
        str(rows),
        *(f"{i.shape}{i.dtype}{i.needs_grad}" for i in inputs),
        module_signature(module),
    ]
    parts += [structure_signature(m.arguments) for m in module.modules() if isinstance(m, BlockModule)]
    parts.append(getattr(module, "code", ""))
    return f"{label}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:10]}"
