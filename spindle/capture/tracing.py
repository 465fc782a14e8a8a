"""Tracing: a task function in, one graph of glue and opaque blocks out.

- `torch.export` runs the user's own function on fake tensors with a free batch size: no compute, no memory.
- Regions under `torch.no_grad()` are opened up, their results detached, so that blocks inside them are seen.
- Sizes that equal the batch size become one value, so that no part of the graph needs a tensor only to ask its length.
"""

import itertools
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from spindle.capture.blocks import Block, BlockCall, find_blocks, opaque_block
from spindle.capture.draws import Sites
from spindle.capture.effects import Effects, find_effects
from spindle.capture.export import export
from spindle.capture.parallel import cut_outside
from spindle.capture.randomness import draws, undrawn
from spindle.errors import SpindleWarning, WorkloadError
from spindle.workload import Batch, Task, Workload

BLOCK = torch.ops.spindle.block.default
_CHECKS = frozenset(
    {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
)


@dataclass(frozen=True)
class TracedTask:
    """The graph of one task.

    `parameters`, `buffers`, `constants`, `fields` map graph inputs by node name: to the names of parameters and buffers
    (`component.path`), to tensors, to batch fields. `rows` are the nodes whose value is the batch size. `mutations`
    maps nodes to the buffers that take their value. `draws` tells what the glue (under "") and each call of a block
    draw. `submodules` are the graphs of regions kept closed.
    """

    task: Task
    graph: fx.Graph
    loss: fx.Node
    calls: tuple[BlockCall, ...]
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    constants: Mapping[str, Tensor]
    fields: Mapping[str, str]
    rows: frozenset[fx.Node]
    mutations: Mapping[fx.Node, str]
    effects: Effects
    draws: Sites
    submodules: Mapping[str, nn.Module] = field(default_factory=dict)

    def is_buffer(self, node: fx.Node) -> bool:
        """Whether a node is a buffer of the workload."""
        return node.op == "placeholder" and node.name in self.buffers

    def updates(self) -> frozenset[fx.Node]:
        """Nodes that change a buffer: writes to one, and values that replace one."""
        writes = self.effects.writes.items()
        return frozenset(n for n, bases in writes if any(map(self.is_buffer, bases))) | self.mutations.keys()

    def live(self) -> frozenset[fx.Node]:
        """Nodes that the loss or an update depends on."""
        found: set[fx.Node] = set()
        stack = [self.loss, *self.updates()]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(self.effects.inputs(node))
        return frozenset(found)


def blocks_of(workload: Workload) -> list[Block]:
    """All blocks of all components, their paths beginning with the component's name."""
    return [
        Block(f"{component.name}.{block.path}", block.module)
        for component in workload.components.values()
        for block in (*find_blocks(component.name, component.module, component.layers), *cut_outside(component))
    ]


def trace(
    workload: Workload, task: Task, batch: Batch, untraceable: Mapping[str, Exception] | None = None
) -> TracedTask:
    """Export `task` around the workload's blocks, and around components that are `untraceable` for a reason.

    Raises WorkloadError when the function cannot be traced.
    """
    blocks = blocks_of(workload)
    _refuse_gradient_hooks(workload, blocks)
    program, calls, drawing = export(workload, task, batch, blocks, untraceable or {})
    _warn_of_attention(task, written_out=drawing.writes_out_attention or any(call.written_out for call in calls))
    graph = program.graph
    _open_no_grad_regions(program.graph_module)
    _check_regions(graph, task)
    _refuse_other_draws(graph, task)
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "_opname", "") in _CHECKS:
            graph.erase_node(node)
    inputs: dict[InputKind, dict[str, str]] = {kind: {} for kind in InputKind}
    user_inputs = iter(batch)
    for spec in program.graph_signature.input_specs:
        target = next(user_inputs) if spec.kind is InputKind.USER_INPUT else spec.target
        assert target is not None
        inputs[spec.kind][spec.arg.name] = target
    loss, mutations = _outputs(program, task)
    constants = {node: program.constants[name] for node, name in inputs[InputKind.CONSTANT_TENSOR].items()}
    return TracedTask(
        task=task,
        graph=graph,
        loss=loss,
        calls=tuple(calls),
        parameters=inputs[InputKind.PARAMETER],
        buffers=inputs[InputKind.BUFFER],
        constants=constants,
        fields=inputs[InputKind.USER_INPUT],
        rows=_row_counts(graph, inputs[InputKind.USER_INPUT]),
        mutations=mutations,
        effects=find_effects(graph),
        draws={"": tuple(drawing.found), **{call.scope: call.sites for call in calls}},
        submodules=dict(program.graph_module.named_children()),
    )


def _warn_of_attention(task: Task, *, written_out: bool) -> None:
    if written_out:
        warnings.warn(
            f"task {task.name!r}: attention with dropout cannot use a fused kernel, since its mask must not depend on "
            "the plan, and takes more time and memory on GPUs; set attention dropout to 0 (attention_dropout=0)",
            SpindleWarning,
            stacklevel=6,
        )


def _refuse_other_draws(graph: fx.Graph, task: Task) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and draws(node.target, node.args, node.kwargs):
            raise undrawn(f"task {task.name!r}{_line_of(node)}", [node.target._schema.name.partition("::")[2]])


def _line_of(node: fx.Node) -> str:
    """The line of a file that a node was traced from, if it is known."""
    lines = [text.strip() for text in node.meta.get("stack_trace", "").splitlines() if text.strip().startswith("File")]
    if not lines:
        return ""
    file, line, *_ = (part.strip() for part in lines[-1].split(","))
    return f", {line} of {os.path.basename(file.split(chr(34))[1])}"


def _refuse_gradient_hooks(workload: Workload, blocks: list[Block]) -> None:
    """A graph does not carry them; parameters of a run are copies. Inside blocks modules keep theirs."""
    for name, parameter in workload.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise WorkloadError(
                f"parameter {name!r} has a gradient hook, which would see the gradients of parts of the batch; "
                "remove it and change gradients in the optimizer"
            )
    inside = {module for block in blocks for module in block.module.modules()}
    for component in workload.components.values():
        for path, module in component.module.named_modules():
            if module not in inside and (module._backward_hooks or module._backward_pre_hooks):
                raise WorkloadError(
                    f"component {component.name!r}: module {path!r} has a backward hook outside of blocks, which a "
                    "traced graph does not carry; remove it, or let layers= name a list of blocks that holds the module"
                )


def _outputs(program: torch.export.ExportedProgram, task: Task) -> tuple[fx.Node, dict[fx.Node, str]]:
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    losses, mutations = [], {}
    for spec, node in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind is OutputKind.BUFFER_MUTATION:
            mutations[node] = spec.target
        elif spec.kind is OutputKind.USER_OUTPUT:
            losses.append(node)
        else:
            raise WorkloadError(
                f"task {task.name!r} changes {spec.target!r} in place; write to tensors it makes itself"
            )
    (loss,) = losses
    return loss, mutations


def _check_regions(graph: fx.Graph, task: Task) -> None:
    for node in graph.nodes:
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            raise WorkloadError(
                f"task {task.name!r} opens an autocast region outside of blocks; "
                'give the workload precision="bf16", or open the region inside the blocks'
            )


def _open_no_grad_regions(module: fx.GraphModule) -> None:
    """Replace each `wrap_with_set_grad_enabled(False, body, ...)` by its body with detached results, innermost last."""
    changed = True
    while changed:
        changed = False
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
                enabled, body, *inputs = node.args
                assert isinstance(body, fx.Node)
                _inline(module, node, module.get_submodule(str(body.target)), inputs, detach=not enabled)
                changed = True


def _inline(module: fx.GraphModule, node: fx.Node, body: nn.Module, inputs: list[Any], *, detach: bool) -> None:
    assert isinstance(body, fx.GraphModule)
    for name, child in body.named_children():  # regions inside the region
        fresh = next(f"{name}_{i}" for i in itertools.count() if not hasattr(module, f"{name}_{i}"))
        module.add_submodule(fresh, child)
        for inner in body.graph.nodes:
            if inner.op == "get_attr" and inner.target == name:
                inner.target = fresh
    names = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    with module.graph.inserting_before(node):
        if detach:  # operations with out= refuse inputs that ask for a gradient
            inputs = [_detached(module.graph, value) for value in inputs]
        environment = dict(zip(names, inputs, strict=True))
        results = module.graph.graph_copy(body.graph, environment)
        assert isinstance(results, tuple | list)
        if detach:
            results = [_detached(module.graph, result) for result in results]
    for user in list(node.users):
        assert user.target.__name__ == "getitem", user.format_node()  # type: ignore[union-attr]
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index, arg-type]
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _detached(graph: fx.Graph, result: Any) -> Any:
    if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), Tensor):
        return result
    node = graph.call_function(torch.ops.aten.detach.default, (result,))
    node.meta = dict(result.meta)
    return node


def _row_counts(graph: fx.Graph, fields: Mapping[str, str]) -> frozenset[fx.Node]:
    symbols = {str(n.meta["val"].shape[0]) for n in graph.nodes if n.op == "placeholder" and n.name in fields}
    return frozenset(
        node
        for node in graph.nodes
        if isinstance(node.meta.get("val"), torch.SymInt) and str(node.meta["val"]) in symbols
    )


assert opaque_block  # registers the operator that BLOCK names
