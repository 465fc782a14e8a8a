"""Partition: the graph of a task in, groups of nodes that become operators out.

- Each block call is a group. Glue nodes belong together when they are connected, come from the same call of the same
  component, and wait for the same last blocks (their frontier).
- Nodes that depend on batch fields and constants alone, and draw no random numbers, are aux: every rank computes those
  it needs. What depends on the number of samples alone (sizes, `arange`), or on parameters alone (an exponential, a
  part of a fused weight), is repeated inside whatever glue reads it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import getitem

import networkx as nx
import torch
from torch import Tensor, fx

from spindle.capture.tracing import BLOCK, TracedTask

Frontier = frozenset[int]


@dataclass(eq=False)
class Group:
    """Nodes that become one operator, or two where part of them mixes samples. `call` is set for a block.

    `outputs` are read by other groups; `updates` are new values of buffers (running statistics).
    """

    nodes: list[fx.Node]
    frontier: Frontier
    component: str
    call: int | None = None
    outputs: list[fx.Node] = field(default_factory=list)
    updates: list[fx.Node] = field(default_factory=list)

    @property
    def is_block(self) -> bool:
        """Whether it is one block call."""
        return self.call is not None


@dataclass(frozen=True)
class Partition:
    """Groups in topological order, and the nodes that stand in none: aux, and those repeated where they are read."""

    groups: list[Group]
    aux: frozenset[fx.Node]
    repeated: frozenset[fx.Node]


def is_compute(node: fx.Node) -> bool:
    """Whether a node computes something (rather than being an input, the output, or a nested graph)."""
    return node.op == "call_function"


def partition(traced: TracedTask) -> Partition:
    """Divide a traced task into groups."""
    aux, repeated = _apart(traced)
    groups = _Grouper(traced, aux | repeated).run()
    group_of = {node: group for group in groups for node in group.nodes}
    updates = traced.updates()
    readers: dict[fx.Node, set[Group]] = {}
    for node, group in group_of.items():
        for source in traced.effects.inputs(node):
            readers.setdefault(source, set()).add(group)
    for node, group in group_of.items():
        if (readers.get(node, set()) - {group} or node is traced.loss) and node.target is not BLOCK:
            group.outputs.append(node)
        if node in updates:
            group.updates.append(node)
    return Partition(groups, aux, repeated)


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), Tensor | tuple | list)


def _apart(traced: TracedTask) -> tuple[frozenset[fx.Node], frozenset[fx.Node]]:
    """Aux nodes, and repeated nodes."""
    effects = traced.effects
    fields = {n for n in traced.graph.nodes if n.op == "placeholder" and n.name in traced.fields}
    of_batch, of_size, constant = set(fields), set(traced.rows), set[fx.Node]()
    of_parameters: set[fx.Node] = {n for n in traced.graph.nodes if n.name in traced.parameters}
    for node in traced.graph.nodes:
        if node in of_batch or node in of_size:
            continue
        if not is_compute(node):
            inert = node.op in ("placeholder", "get_attr") and node.name not in traced.parameters
            if inert and not (traced.is_buffer(node) and (effects.is_written(node) or _replaced(node, traced))):
                constant.add(node)
        elif node.target is not BLOCK and not _is_random(node):
            sources = set(effects.inputs(node))
            if sources <= constant:
                constant.add(node)
            elif sources <= constant | of_size or _is_size(node):
                of_size.add(node)
            elif sources <= constant | of_size | of_batch:
                of_batch.add(node)
            elif sources <= constant | of_size | of_parameters and not _read_by_block(node):
                of_parameters.add(node)
    repeated = of_size | {n for n in of_parameters if is_compute(n)}
    return frozenset(of_batch | {n for n in constant if is_compute(n)}), frozenset(repeated)


def _read_by_block(node: fx.Node) -> bool:
    """What blocks read is computed once, not once in each of them."""
    return any(user.target is BLOCK for user in node.users)


def _replaced(node: fx.Node, traced: TracedTask) -> bool:
    return traced.buffers[node.name] in traced.mutations.values()


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class _Grouper:
    """Works out frontiers, joins glue nodes, and orders the groups."""

    def __init__(self, traced: TracedTask, apart: frozenset[fx.Node]) -> None:
        self.traced = traced
        live = traced.live()
        self.nodes = [n for n in traced.graph.nodes if is_compute(n) and n in live and n not in apart]
        self.members = set(self.nodes)
        self.ancestors: dict[fx.Node, Frontier] = {}  # of a block node: the blocks it waits for
        self.frontiers: dict[fx.Node, Frontier] = {}
        self.call_of = {n: call for n in self.nodes if n.target is BLOCK and isinstance(call := n.args[1], int)}

    def run(self) -> list[Group]:
        self._find_frontiers()
        groups = self._join()
        groups = self._merge_cycles(groups)
        groups = self._merge_task_glue(groups)
        return self._ordered(groups)

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        return (source for source in self.traced.effects.inputs(node) if source in self.members)

    def _find_frontiers(self) -> None:
        node_of_call = {call: node for node, call in self.call_of.items()}
        for node in self.nodes:
            waits: set[int] = set()
            for source in self._sources(node):
                waits |= {self.call_of[source]} if source in self.call_of else self.frontiers[source]
            hidden = {b for call in waits for b in self.ancestors[node_of_call[call]]}
            self.frontiers[node] = frozenset(waits - hidden)
            if node in self.call_of:
                self.ancestors[node] = frozenset(waits | hidden)

    def _component(self, node: fx.Node) -> str:
        """The call of a component in which the node arose: `vision`, or `vision@1` for its second call."""
        for key, (path, _) in list(node.meta.get("nn_module_stack", {}).items())[1:2]:
            _, at, count = key.partition("@")
            return f"{path.split('.')[0]}{at}{count}"
        return ""

    def _join(self) -> list[Group]:
        joined: nx.Graph[fx.Node] = nx.Graph()
        joined.add_nodes_from(self.nodes)
        for node in self.nodes:
            for source in self._sources(node):
                if self._of_block(node) or self._of_block(source):
                    same = source in self.call_of and self._of_block(node) and node not in self.call_of
                else:
                    same = self._key(source) == self._key(node)
                if same:
                    joined.add_edge(source, node)
        joined.add_edges_from(self._together())
        order = {node: index for index, node in enumerate(self.nodes)}
        return [self._group(sorted(part, key=order.__getitem__)) for part in nx.connected_components(joined)]

    def _together(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Pairs that must not part: whatever touches a buffer that changes, and all that changes in one module."""
        first: dict[str, fx.Node] = {}
        for node in self.nodes:
            for buffer in self._changing_buffers(node):
                owner = buffer.rpartition(".")[0]
                yield first.setdefault(owner, node), node

    def _changing_buffers(self, node: fx.Node) -> Iterator[str]:
        if node in self.traced.mutations:
            yield self.traced.mutations[node]
        effects = self.traced.effects
        for source in (*node.all_input_nodes, node):
            base = effects.base[source]
            if self.traced.is_buffer(base) and (effects.is_written(base) or _replaced(base, self.traced)):
                yield self.traced.buffers[base.name]

    def _of_block(self, node: fx.Node) -> bool:
        """Whether a node is a block call or one of its results."""
        return node in self.call_of or (node.target is getitem and node.args[0] in self.call_of)

    def _key(self, node: fx.Node) -> tuple[Frontier, str]:
        return self.frontiers[node], self._component(node)

    def _group(self, nodes: list[fx.Node]) -> Group:
        calls = [self.call_of[node] for node in nodes if node in self.call_of]
        names = [self._component(node) for node in nodes]
        component = max(set(names), key=lambda name: (name != "", names.count(name), name))
        return Group(nodes, self.frontiers[nodes[0]], component, calls[0] if calls else None)

    def _edges(self, groups: list[Group]) -> "nx.DiGraph[Group]":
        group_of = {node: group for group in groups for node in group.nodes}
        graph: nx.DiGraph[Group] = nx.DiGraph()
        graph.add_nodes_from(groups)
        for node, group in group_of.items():
            graph.add_edges_from((group_of[s], group) for s in self._sources(node) if group_of[s] is not group)
        return graph

    def _merged(self, groups: list[Group]) -> Group:
        order = {node: index for index, node in enumerate(self.nodes)}
        return self._group(sorted((node for group in groups for node in group.nodes), key=order.__getitem__))

    def _merge_cycles(self, groups: list[Group]) -> list[Group]:
        """Groups that wait for each other (glue of two components interleaved) become one."""
        parts = list(nx.strongly_connected_components(self._edges(groups)))
        return [next(iter(part)) if len(part) == 1 else self._merged(list(part)) for part in parts]

    def _merge_task_glue(self, groups: list[Group]) -> list[Group]:
        """Glue without parameters joins the one glue group it reads; glue that reads nothing, the one that reads it."""
        while True:
            graph = self._edges(groups)
            for group in groups:
                partner = self._partner(group, graph)
                if partner is not None:
                    groups = [g for g in groups if g not in (group, partner)] + [self._merged([group, partner])]
                    break
            else:
                return groups

    def _partner(self, group: Group, graph: "nx.DiGraph[Group]") -> Group | None:
        if group.is_block:
            return None
        before, after = list(graph.predecessors(group)), list(graph.successors(group))
        if len(before) == 1 and not before[0].is_block and not self._parameters(group):
            return before[0]
        if not before and len(after) == 1 and not after[0].is_block and not self._reads_batch(group):
            return after[0]
        return None

    def _parameters(self, group: Group) -> set[str]:
        return {s.name for node in group.nodes for s in node.all_input_nodes if s.name in self.traced.parameters}

    def _reads_batch(self, group: Group) -> bool:
        inert = self.traced.parameters.keys() | self.traced.buffers.keys() | self.traced.constants.keys()
        members = set(group.nodes)
        return any(
            source not in members and source.name not in inert
            for node in group.nodes
            for source in self.traced.effects.inputs(node)
        )

    def _ordered(self, groups: list[Group]) -> list[Group]:
        order = {node: index for index, node in enumerate(self.nodes)}
        graph = self._edges(groups)
        return list(nx.lexicographical_topological_sort(graph, key=lambda group: order[group.nodes[0]]))
