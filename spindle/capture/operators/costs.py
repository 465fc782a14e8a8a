"""Costs: an operator's module and the shapes it reads in; its output shapes, FLOPs, bytes and gradient flags out.

The module runs forward and backward on fake tensors at the full batch: no compute, no memory. FLOPs are the ones that
`torch.utils.flop_counter` knows (matrix products, convolutions, attention); a multiply-add counts as two.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.flop_counter import FlopCounterMode

from spindle.capture.codes import OperatorModule, OperatorPart, computing_in
from spindle.capture.signature import module_signature
from spindle.inputs.compilation import Compilation
from spindle.record.changes.copies import attributes_kept
from spindle.record.on_meta.made_up import MadeUpProducts, made_up
from spindle.record.recording import Aux, Ref, takes_gradient, tree
from spindle.record.substitutes.draws import shapes_only
from spindle.record.substitutes.randomness import Undrawn
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
    parameters that get one, `undrawn` the operations that draw random numbers from no stream of ours. `hidden`: one of
    these parameters, whose gradient an autograd function of the user's own computes on the way, unseen by autograd.
    """

    outputs: tuple[ValueSpec, ...]
    forward_flops: float
    backward_flops: float
    activation_bytes: int
    input_grads: tuple[bool, ...]
    trained: frozenset[str]
    undrawn: frozenset[str] = frozenset()
    hidden: str = ""


class _Counter(FlopCounterMode):
    """Counts FLOPs in all: by module it cannot, where layers differentiate themselves or use inference mode."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)
        self.mod_tracker: Any = _NoTracker()


class _NoTracker(contextlib.nullcontext[None]):
    parents = frozenset({"Global"})


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
    module: OperatorModule,
    part: OperatorPart,
    inputs: Sequence[ValueSpec],
    live: Sequence[bool] | None = None,
    precision: Precision = "fp32",
) -> Cost:
    """Run `module(part, *inputs)` on fake tensors, and backward from the `live` outputs (None: from all that can)."""
    sizes = ShapeEnv()  # boolean masks and .item() make sizes and numbers that only data can tell
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes) as mode, shapes_only():
        state: dict[str, Tensor] = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            if value.is_meta
            else mode.from_tensor(value, static_shapes=True)
            for name, value in _unique_state(module)
        }
        arguments = [torch.empty(i.shape, dtype=i.dtype).requires_grad_(i.needs_grad) for i in inputs]
        return _measured(module, part, state, arguments, live, precision)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, fake tensors do not log what they cannot do: such operators run on a few samples instead."""
    logs = [
        logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
    ]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def measure_on_samples(
    module: OperatorModule,
    part: OperatorPart,
    inputs: Sequence[ValueSpec],
    live: Sequence[bool] | None = None,
    precision: Precision = "fp32",
) -> Cost:
    """What `measure` gives, for a module that fake tensors cannot run through: it really runs, on inputs that are made
    up. Other samples may take other ways through it (experts that these did not choose), so all that can get a gradient
    counts as getting one.
    """
    generator = torch.Generator().manual_seed(0)
    state = {
        name: made_up(value, generator) if value.is_meta else value.detach().clone()
        for name, value in _unique_state(module)
    }
    arguments = [
        torch.randn(i.shape, generator=generator).to(i.dtype).requires_grad_(i.needs_grad)
        if i.dtype.is_floating_point
        else torch.zeros(i.shape, dtype=i.dtype)
        for i in inputs
    ]
    on_meta = any(value.is_meta for _, value in _unique_state(module))
    with MadeUpProducts() if on_meta else contextlib.nullcontext():
        try:
            cost = _measured(module, part, state, arguments, live, precision)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # of torch.func, whose transforms take none
                raise
            cost = _measured(module, part, state, arguments, live, precision, hooked=False)
    return with_all_gradients(cost, module, part, inputs, live)


def with_all_gradients(
    cost: Cost, module: nn.Module, part: OperatorPart, inputs: Sequence[ValueSpec], live: Sequence[bool] | None = None
) -> Cost:
    """The cost where all that can get a gradient counts as getting one: other batches may take other ways through a
    layer, by their shapes or by numbers that the layer is given or draws. It stays where no result is `live`.
    """
    trained = frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    input_grads = tuple(spec.needs_grad for spec in inputs)
    found = replace(cost, trained=trained, input_grads=input_grads)
    if not part.block:
        return found if cost.trained or any(cost.input_grads) else cost
    if not part.nodes[-1].grad or not (trained or any(input_grads)) or (live is not None and not any(live)):
        return cost
    outputs = tuple(replace(spec, needs_grad=spec.dtype.is_floating_point) for spec in cost.outputs)
    return replace(found, outputs=outputs)


def scaled(cost: Cost, factor: float, shapes: Sequence[tuple[int, ...]]) -> Cost:
    """The cost of `factor` times as many samples, whose results have `shapes`."""
    return replace(
        cost,
        outputs=tuple(replace(spec, shape=shape) for spec, shape in zip(cost.outputs, shapes, strict=True)),
        forward_flops=cost.forward_flops * factor,
        backward_flops=cost.backward_flops * factor,
        activation_bytes=int(cost.activation_bytes * factor),
    )


def _measured(
    module: OperatorModule,
    part: OperatorPart,
    state: dict[str, Tensor],
    arguments: Sequence[Tensor],
    live: Sequence[bool] | None,
    precision: Precision,
    *,
    hooked: bool = True,
) -> Cost:
    for name, parameter in module.named_parameters():
        state[name] = state[name].detach().requires_grad_(parameter.requires_grad)
    saved: dict[int, int] = {}
    undrawn = Undrawn()
    with (
        attributes_kept(module.modules()),
        _reparametrize_module(module, state),
        undrawn,
    ):  # in backward too: checkpoints compute again there
        with _Counter() as forward, _saved_bytes(saved, hooked=hooked), computing_in(precision, torch.device("cpu")):
            outputs = module(part, *arguments)
        alive = zip(outputs, live or [True] * len(outputs), strict=True)
        ends = [output for output, wanted in alive if takes_gradient(output) and wanted]
        seen = _reached(ends)
        with _Counter() as backward:
            if ends:
                torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
    held = {value.untyped_storage()._cdata for value in (*state.values(), *arguments)}
    kept = sum(size for storage, size in saved.items() if storage not in held)
    if not hooked:
        kept = sum(output.nbytes for output in outputs)
    trained = [name for name, _ in module.named_parameters() if state[name].grad is not None]
    return Cost(
        outputs=tuple(ValueSpec(tuple(o.shape), o.dtype, takes_gradient(o)) for o in outputs),
        forward_flops=float(forward.get_total_flops()),
        backward_flops=float(backward.get_total_flops()),
        activation_bytes=kept if ends else 0,
        input_grads=tuple(argument.grad is not None for argument in arguments),
        trained=frozenset(trained),
        undrawn=frozenset(undrawn.lines),
        hidden=next((name for name in trained if id(state[name]) not in seen), ""),
    )


def _reached(ends: Sequence[Tensor]) -> set[int]:
    """Ids of the leaves that autograd knows to get a gradient from these values."""
    found: set[int] = set()
    stack, seen = [end.grad_fn for end in ends], set[Any]()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            stack += [following for following, _ in node.next_functions]
    return found


def _unique_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _saved_bytes(saved: dict[int, int], *, hooked: bool) -> Any:
    if not hooked:
        return contextlib.nullcontext()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def kind_of(
    label: str,
    module: OperatorModule,
    part: OperatorPart,
    inputs: Sequence[ValueSpec],
    precision: Precision = "fp32",
    compilation: Compilation | None = None,
) -> str:
    """Operator kind: equal for operators that do the same work on the same shapes, in every process and session."""
    parts = [label, precision, *(f"{i.shape}{i.dtype}{i.needs_grad}" for i in inputs), module_signature(module)]
    parts += [_text(module, part), *([str(compilation)] if compilation else [])]
    return f"{label}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:10]}"


def family_of(
    label: str,
    module: OperatorModule,
    part: OperatorPart,
    inputs: Sequence[ValueSpec],
    precision: Precision = "fp32",
    compilation: Compilation | None = None,
) -> str:
    """Operator family: equal for operators that do the same work on inputs of any sizes."""
    calls = ["block" if n.block else getattr(n.function, "__name__", type(n.function).__name__) for n in part.nodes]
    parts = [label, precision, *(f"{len(i.shape)}{i.dtype}" for i in inputs), module_signature(module), *calls]
    parts += [str(compilation)] if compilation else []
    return f"{label}~{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:10]}"


def live_suffix(live: Sequence[bool]) -> str:
    """What a kind ends in where no gradient comes back for some of its outputs."""
    return "" if all(live) else "-" + "".join("gn"[not alive] for alive in live)


def _text(module: OperatorModule, part: OperatorPart) -> str:
    """What a part computes, as text: functions, constants, and where each value comes from."""
    recording, names = part.recording, dict[int, str]()
    for index, number in enumerate(part.inputs):
        names[number] = f"input {index}"
    lines = []

    def named(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            if leaf.index in recording.leaves and leaf.index not in names:
                return module.own.get(recording.leaves[leaf.index], "?")
            return names.get(leaf.index, "?")
        if isinstance(leaf, Aux):
            value = recording.aux[leaf.index]
            return f"aux {tuple(value.shape)} {value.dtype}"
        return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf).__qualname__

    for node in part.nodes:
        name = "block" if node.block else getattr(node.function, "__name__", type(node.function).__name__)
        lines.append(f"{name} {tree(named, node.args)!r} {tree(named, node.kwargs)!r} {node.grad} {node.autocast}")
        names.update({out: f"value {len(names)}" for out in node.outs if out not in names})
    return chr(10).join([*lines, *(names[out] for out in part.outputs)])
