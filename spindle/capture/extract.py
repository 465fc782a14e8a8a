"""Extraction: some nodes of a traced task in, a torch module that computes them out."""

import copy
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from spindle.capture.blocks import BlockModule
from spindle.capture.codes import CodeInput
from spindle.capture.partition import Partition
from spindle.capture.tracing import BLOCK, TracedTask
from spindle.errors import WorkloadError
from spindle.workload import Workload


class OperatorModule(fx.GraphModule):
    """A GraphModule that is sent as its code.

    fx's own way is to trace the code again where it arrives, which fails where a size is computed from the number of
    samples, as of the zeros that an LSTM begins with.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        code = self.graph.python_code(root_module="self")
        own = nn.Module().__dict__.keys()
        state = {name: value for name, value in self.__dict__.items() if name in own}
        return SentModule, (code.src, code.globals, state)


class SentModule(nn.Module):
    """An OperatorModule after its journey: code, what the code names, and the parts of the module."""

    def __init__(self, source: str, names: dict[str, Any], state: dict[str, Any]) -> None:
        """`source` defines `forward(self, ...)`; `state` is what every torch module holds."""
        super().__init__()
        self.__dict__.update(state)
        self._sent = source, names
        found = dict(names)
        exec(compile(source, "<operator>", "exec"), found)
        self._forward = found["forward"]

    def forward(self, *values: Any) -> Any:
        """What the code computes."""
        return self._forward(self, *values)

    def __reduce__(self) -> tuple[Any, ...]:
        return SentModule, (*self._sent, self._state())

    def __deepcopy__(self, memo: dict[int, Any]) -> "SentModule":
        """What the code names is shared by the copies: among it is `torch` itself."""
        return SentModule(*self._sent, copy.deepcopy(self._state(), memo))

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_sent", "_forward")}


@dataclass(frozen=True)
class Extracted:
    """A module, and the nodes that its arguments and results stand for; `inputs` says what each argument is."""

    module: fx.GraphModule
    arguments: tuple[fx.Node, ...]
    inputs: tuple[CodeInput, ...]
    results: tuple[fx.Node, ...]


class Extractor:
    """Copies parts of one traced task into modules of their own, around the workload's own parameters."""

    def __init__(self, workload: Workload, traced: TracedTask, partition: Partition) -> None:
        """Everything extracted shares the modules of `workload`."""
        self.traced = traced
        self.partition = partition
        self.order = {node: index for index, node in enumerate(traced.graph.nodes)}
        self.components = {name: component.module for name, component in workload.components.items()}

    def operator(
        self, results: Iterable[fx.Node], boundary: Collection[fx.Node], updates: Iterable[fx.Node] = ()
    ) -> Extracted:
        """The module that computes `results` from `boundary` nodes, aux values and the number of samples.

        It also writes `updates`, new values of buffers, back where the user's modules keep them.
        """
        return _Copy(self, boundary, aux_are_inputs=True).run(tuple(results), tuple(updates))

    def aux(self, result: fx.Node) -> Extracted:
        """The module that computes one aux value from batch fields and the number of samples (always its first)."""
        return _Copy(self, (), aux_are_inputs=False).run((result,))

    def attribute(self, node: fx.Node) -> torch.Tensor | nn.Module | None:
        """The parameter, buffer, constant or nested graph that an input node of the trace stands for."""
        traced = self.traced
        path = traced.parameters.get(node.name) or traced.buffers.get(node.name)
        if path is not None:
            component, _, name = path.partition(".")
            owner, _, leaf = name.rpartition(".")
            value: torch.Tensor = getattr(self.components[component].get_submodule(owner), leaf)
            return value
        if node.name in traced.constants:
            return traced.constants[node.name]
        return traced.submodules[str(node.target)] if node.op == "get_attr" else None


class _Copy:
    """One extraction in progress."""

    def __init__(self, extractor: Extractor, boundary: Collection[fx.Node], *, aux_are_inputs: bool) -> None:
        self.extractor = extractor
        self.partition = extractor.partition
        self.boundary = boundary
        self.aux_are_inputs = aux_are_inputs
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.arguments: list[tuple[fx.Node, CodeInput]] = []
        self.anchor = self.graph.create_node("placeholder", "rows")

    def run(self, results: tuple[fx.Node, ...], updates: tuple[fx.Node, ...] = ()) -> Extracted:
        """Copy all that `results` and `updates` need, in the order of the trace."""
        needed = self._needed((*results, *updates))
        inputs = [node for node in needed if self._input_kind(node) is not None]
        for node in inputs:
            self.copies[node] = self._copy(node)
        self._copy_written(inputs, needed)
        snapshots: dict[fx.Node, fx.Node] = {}
        for node in self.extractor.traced.graph.nodes:
            if node in needed and node not in self.copies:
                self.copies[node] = self._copy(node)
            if node in results and self._is_written_after(node, needed):
                snapshots[node] = self.graph.call_function(torch.ops.aten.clone.default, (self.copies[node],))
        for node in updates:
            if node in self.extractor.traced.mutations:
                self._replace_buffer(node)
        self.graph.output(tuple(snapshots.get(node, self.copies[node]) for node in results))
        for index, node in enumerate(self.graph.nodes):
            node._rename(f"v{index}")
        return Extracted(
            OperatorModule(self.root, self.graph),
            tuple(node for node, _ in self.arguments),
            (CodeInput("rows"), *(kind for _, kind in self.arguments)),
            results,
        )

    def _needed(self, results: Iterable[fx.Node]) -> dict[fx.Node, None]:
        """Nodes to copy, those that are read first standing first: so equal layers take their inputs in one order."""
        needed: dict[fx.Node, None] = {}
        stack = list(reversed(list(results)))
        while stack:
            node = stack.pop()
            if node not in needed:
                needed[node] = None
                if self._input_kind(node) is None and node not in self.extractor.traced.rows:
                    stack.extend(reversed(list(self.extractor.traced.effects.inputs(node))))
        return needed

    def _input_kind(self, node: fx.Node) -> CodeInput | None:
        if node in self.boundary:
            return CodeInput("tensor", node.name)
        field = node.op == "placeholder" and node.name in self.extractor.traced.fields
        if field or (self.aux_are_inputs and node in self.partition.aux and not self._is_view_of_written(node)):
            return CodeInput("aux", node.name)
        return None

    def _is_view_of_written(self, node: fx.Node) -> bool:
        """Views of a batch field that is written to are taken in here, so that they see the writes."""
        effects = self.extractor.traced.effects
        return effects.base[node] is not node and effects.is_written(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        kind = self._input_kind(node)
        if kind is not None:
            self.arguments.append((node, kind))
            last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                return self.graph.create_node("placeholder", f"input_{len(self.arguments)}")
        if node in self.extractor.traced.rows:
            return self.anchor
        if node.op in ("placeholder", "get_attr"):
            value = self.extractor.attribute(node)
            assert value is not None, f"{node.format_node()} is no parameter, buffer, constant or field"
            return self._attribute(value)
        if node.target is BLOCK:
            return self._block(node)
        return self.graph.node_copy(node, self.copies.__getitem__)

    def _attribute(self, value: torch.Tensor | nn.Module) -> fx.Node:
        name = self._fresh("value")
        if isinstance(value, nn.Module):
            self.root.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            self.root.register_parameter(name, value)
        else:
            self.root.register_buffer(name, value)
        return self.graph.create_node("get_attr", name)

    def _fresh(self, prefix: str) -> str:
        """Names count up from 0, so that equal pieces of code read the same."""
        return next(name for i in itertools.count() if not hasattr(self.root, name := f"{prefix}_{i}"))

    def _block(self, node: fx.Node) -> fx.Node:
        tensors, call = node.args
        assert isinstance(call, int)
        assert isinstance(tensors, list | tuple)
        name = self._fresh("block")
        self.root.add_module(name, BlockModule(self.extractor.traced.calls[call]))
        arguments = tuple(self.copies[tensor] for tensor in tensors if isinstance(tensor, fx.Node))
        return self.graph.call_module(name, arguments)

    def _copy_written(self, inputs: Collection[fx.Node], needed: Iterable[fx.Node]) -> None:
        """Inputs that are written to in here are somebody else's memory: write to copies."""
        effects = self.extractor.traced.effects
        executed = (node for node in needed if node not in inputs)
        written = {base for node in executed for base in effects.writes.get(node, ())}
        seen: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            base = effects.base[node]
            if base not in written:
                continue
            if base in seen:
                raise WorkloadError(
                    f"task {self.extractor.traced.task.name!r} writes in place to {base.name!r} of which several views "
                    "are used elsewhere; write to a clone"
                )
            seen[base] = node
            self.copies[node] = self.graph.call_function(torch.ops.aten.clone.default, (self.copies[node],))

    def _is_written_after(self, node: fx.Node, needed: Collection[fx.Node]) -> bool:
        """Whether the memory of a result changes later in here; then its readers want it as it was."""
        effects, order = self.extractor.traced.effects, self.extractor.order
        base = effects.base[node]
        return any(base in effects.writes.get(other, ()) and order[other] > order[node] for other in needed)

    def _replace_buffer(self, node: fx.Node) -> None:
        """Running statistics and the like: write the new value back where the module keeps it."""
        buffer = self.extractor.traced.mutations[node]
        holder = next(
            n for n in self.extractor.traced.graph.nodes if self.extractor.traced.buffers.get(n.name) == buffer
        )
        value = self.extractor.attribute(holder)
        assert value is not None
        target = self.copies.get(holder) or self._attribute(value)
        update = self.graph.call_function(torch.ops.aten.detach.default, (self.copies[node],))
        self.graph.call_function(torch.ops.aten.copy_.default, (target, update))


def parameter_names(module: nn.Module, name_by_id: Mapping[int, str]) -> tuple[tuple[str, str], ...]:
    """Names of a module's parameters inside it, each with the workload's name for the same tensor."""
    return tuple((name, name_by_id[id(p)]) for name, p in module.named_parameters(remove_duplicate=False))


def buffer_names(module: nn.Module, name_by_id: Mapping[int, str]) -> tuple[tuple[str, str], ...]:
    """Names of those of a module's buffers that are the workload's own, as `parameter_names`."""
    buffers = module.named_buffers(remove_duplicate=False)
    return tuple((name, name_by_id[id(b)]) for name, b in buffers if id(b) in name_by_id)
