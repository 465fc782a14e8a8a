"""Effects: in-place operations in a traced graph, and what they mean for whoever reads afterwards.

- An operation that writes to a tensor writes to all views of it. A node that reads one of them later depends on the
  write though no edge says so; here is where these dependencies are found.
- A write to an intermediate value is repeated wherever its effect is read, on a copy; a write to a buffer (running
  statistics, counters) happens once, in one group.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_STATISTICS = {  # operations that update running statistics when a flag is set, which their schema does not say
    aten.batch_norm.default: ((3, 4), 5),
    aten.instance_norm.default: ((3, 4), 5),
}


@dataclass(frozen=True)
class Effects:
    """`base` maps each node to the node whose memory it shares; `writes` maps each writing node to the bases that it
    writes; `before` maps nodes to the writes whose effect they see: those made since what they read was.
    """

    base: Mapping[fx.Node, fx.Node]
    writes: Mapping[fx.Node, frozenset[fx.Node]]
    before: Mapping[fx.Node, tuple[fx.Node, ...]]

    def inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        """All that a node depends on: what it reads, and the writes to that which came before."""
        yield from node.all_input_nodes
        yield from self.before.get(node, ())

    def is_written(self, node: fx.Node) -> bool:
        """Whether anything ever writes to the memory of a node."""
        base = self.base.get(node, node)
        return any(base in bases for bases in self.writes.values())


def find_effects(graph: fx.Graph) -> Effects:
    """Follow aliases and writes through a graph, in its order."""
    base: dict[fx.Node, fx.Node] = {}
    writes: dict[fx.Node, frozenset[fx.Node]] = {}
    before: dict[fx.Node, tuple[fx.Node, ...]] = {}
    written: dict[fx.Node, list[fx.Node]] = {}  # writes so far, by base
    order: dict[fx.Node, int] = {}
    for node in graph.nodes:
        order[node] = len(order)
        seen = dict.fromkeys(
            write
            for source in node.all_input_nodes
            for write in written.get(base[source], ())
            if order[write] > order[source]
        )
        if seen:
            before[node] = tuple(seen)
        source = _shares_memory_with(node)
        base[node] = base[source] if source is not None else node
        bases = frozenset(base[target] for target in _written_by(node))
        if bases:
            writes[node] = bases
            for target in bases:
                written.setdefault(target, []).append(node)
    return Effects(base, writes, before)


def _shares_memory_with(node: fx.Node) -> fx.Node | None:
    """The argument that a node's result is a view of, if any."""
    if node.op != "call_function":
        return None
    if node.target is getitem:
        source = node.args[0]
        shares = isinstance(source, fx.Node) and _shares_memory_with(source) is not None
        return source if shares and isinstance(source, fx.Node) else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    results = (value.alias_info for value in node.target._schema.returns)
    returned = {alias for info in results if info is not None for alias in info.after_set}
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        aliases = argument.alias_info.before_set if argument.alias_info else set()
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor) and aliases & returned:
            return value
    return None


def _written_by(node: fx.Node) -> Iterator[fx.Node]:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    if node.target in _STATISTICS:
        places, flag = _STATISTICS[node.target]
        if len(node.args) > flag and node.args[flag]:
            yield from (value for place in places if isinstance(value := node.args[place], fx.Node))
        return
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            values = value if isinstance(value, list | tuple) else (value,)
            yield from (written for written in values if isinstance(written, fx.Node))
