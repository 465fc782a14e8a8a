"""Costs: an operator's module and the shapes it reads in; its output shapes, FLOPs, bytes and gradient flags out.

The module runs forward and backward on fake tensors at the full batch: no compute, no memory. FLOPs are those that
`torch.utils.flop_counter` knows (matrix products, convolutions, attention); a multiply-add counts as two.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


def _grouped_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Rows sorted by expert, times the matrix of their expert; or, in backward, such rows times each other."""
    if len(a) == 3:
        return 2 * a[0] * a[1] * a[2] * b[2] if len(b) == 3 else 2 * a[1] * a[2] * b[1]
    return 2 * a[0] * a[1] * b[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._grouped_mm: _grouped_flops,
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
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes) as mode, shapes_only():
        state: dict[str, Tensor] = {
            name: mode.from_tensor(value, static_shapes=True) for name, value in _unique_state(module)
        }
        arguments = [torch.empty(i.shape, dtype=i.dtype).requires_grad_(i.needs_grad) for i in inputs]
        return _measured(module, rows, state, arguments, live, precision)


def measure_on_samples(
    module: nn.Module,
    samples: int,
    values: Sequence[Tensor],
    inputs: Sequence[ValueSpec],
    live: Sequence[bool] | None = None,
    precision: Precision = "fp32",
) -> Cost:
    """What `measure` gives, at `samples` samples, for a module that fake tensors cannot run through: it really runs, on
    the `values` of its inputs for them. Other samples may take other ways through it (experts that these did not
    choose), so all that can get a gradient counts as getting one.
    """
    state = {name: value.detach().clone() for name, value in _unique_state(module)}
    arguments = [v.detach().requires_grad_(i.needs_grad) for v, i in zip(values, inputs, strict=True)]
    cost = _measured(module, samples, state, arguments, live, precision)
    if not cost.trained and not any(cost.input_grads):
        return cost
    trained = frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    return replace(cost, trained=trained, input_grads=tuple(spec.needs_grad for spec in inputs))


def at_full_batch(cost: Cost, samples: int, rows: int, grown: Sequence[tuple[int, int] | None]) -> Cost:
    """The cost of `rows` samples from that of `samples`. `grown` gives, for each output, the dimension that grows and
    how much of it belongs to a sample.
    """
    outputs = []
    for spec, growth in zip(cost.outputs, grown, strict=True):
        shape = list(spec.shape)
        if growth is not None:
            shape[growth[0]] = growth[1] * rows
        outputs.append(replace(spec, shape=tuple(shape)))
    factor = rows / samples
    return replace(
        cost,
        outputs=tuple(outputs),
        forward_flops=cost.forward_flops * factor,
        backward_flops=cost.backward_flops * factor,
        activation_bytes=int(cost.activation_bytes * factor),
    )


def _measured(
    module: nn.Module,
    rows: int,
    state: dict[str, Tensor],
    arguments: Sequence[Tensor],
    live: Sequence[bool] | None,
    precision: Precision,
) -> Cost:
    for name, parameter in module.named_parameters():
        state[name] = state[name].detach().requires_grad_(parameter.requires_grad)
    saved: dict[int, int] = {}
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    cpu, undrawn = torch.device("cpu"), Undrawn()
    with counter as forward, _saved_bytes(saved), computing_in(precision, cpu), undrawn:
        outputs = torch.func.functional_call(module, state, (rows, *arguments))
    ends = [o for o, alive in zip(outputs, live or [True] * len(outputs), strict=True) if o.requires_grad and alive]
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as backward:
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
