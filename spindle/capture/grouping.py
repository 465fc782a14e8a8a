"""Grouping: the nodes of a recording in, the operators that they belong to out.

- A block is an operator. Nodes of glue belong together when they wait for the same last blocks (their frontier), arise
  in the same call of a component, and both mix samples or neither does.
- What depends on parameters alone, or on constants, is computed again inside whatever glue reads it.
- A node is known by its key (place in the code, frontier, component call), which is the same in every recording of a
  task: so the operators found at capture hold for recordings of other batches and of parts of them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import networkx as nx

from spindle.record.recording import Node, Recording

Frontier = tuple[str, ...]
Key = tuple[int, Frontier, str]
"""Place in the code, names of the block calls waited for, and the component call."""


@dataclass
class Wired:
    """A recording with what its nodes read of each other.

    `live`: nodes that the loss or a changing buffer depends on, in order. `refs`: values that each node reads,
    `sources` the nodes that make them. `repeated`: nodes that are computed inside whatever reads them. `frontier` of
    every other live node, and its `key`, as above.
    """

    recording: Recording
    live: list[int]
    refs: list[list[int]]
    sources: dict[int, list[int]]
    repeated: set[int]
    frontier: dict[int, Frontier]
    maker: dict[int, int]

    def key(self, number: int) -> Key:
        """The key of a node of glue."""
        node = self.recording.nodes[number]
        return node.site, self.frontier[number], node.component

    def live_nodes(self) -> list[Node]:
        """The live nodes, in order."""
        return [self.recording.nodes[number] for number in self.live]

    def glue(self) -> Iterator[int]:
        """Live nodes that are neither blocks nor repeated."""
        return (n for n in self.live if not self.recording.nodes[n].block and n not in self.repeated)

    def blocks(self) -> Iterator[int]:
        """Live calls of blocks."""
        return (n for n in self.live if self.recording.nodes[n].block)


def wire(recording: Recording, stateful: Iterable[str]) -> Wired:
    """Work out who reads whom; `stateful` are buffers that change."""
    nodes, maker = recording.nodes, recording.makers()
    names = set(stateful)
    changing = {number for number, name in recording.leaves.items() if name in names}
    refs = [node.refs() for node in nodes]
    sources = {n: list(dict.fromkeys(maker[r] for r in refs[n] if r in maker)) for n in range(len(nodes))}
    live = _live(recording, maker, sources)
    read_by_block = {s for n in live if nodes[n].block for s in sources[n]}
    repeated: set[int] = set()
    for n in live:
        node = nodes[n]
        plain = not (node.block or node.draws or node.writes or node.aux() or changing & set(refs[n]))
        if plain and n not in read_by_block and all(s in repeated for s in sources[n]):
            repeated.add(n)
    repeated.discard(maker.get(recording.loss, -1))  # a loss of parameters alone is computed once
    return Wired(recording, live, refs, sources, repeated, _frontiers(nodes, live, sources, repeated), maker)


def _live(recording: Recording, maker: Mapping[int, int], sources: Mapping[int, list[int]]) -> list[int]:
    found: set[int] = set()
    stack = [n for n, node in enumerate(recording.nodes) if node.writes]
    if recording.loss in maker:
        stack.append(maker[recording.loss])
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            stack.extend(sources[n])
    return sorted(found)


def _frontiers(
    nodes: list[Node], live: list[int], sources: Mapping[int, list[int]], repeated: set[int]
) -> dict[int, Frontier]:
    before: dict[str, frozenset[str]] = {}  # blocks that each block waits for
    known: dict[frozenset[str], frozenset[str]] = {}
    frontier: dict[int, frozenset[str]] = {}
    empty = frozenset[str]()
    for n in live:
        if n in repeated:
            continue
        parts = {
            frozenset((nodes[s].block,)) if nodes[s].block else frontier[s] for s in sources[n] if s not in repeated
        }
        waits = next(iter(parts)) if len(parts) == 1 else empty.union(*parts)
        if waits not in known:
            hidden = empty.union(*(before[b] for b in waits))
            known[waits] = waits - hidden
        frontier[n] = known[waits]
        if nodes[n].block:
            before[nodes[n].block] = waits.union(*(before[b] for b in waits))
    ordered: dict[frozenset[str], Frontier] = {}
    return {n: ordered.setdefault(f, tuple(sorted(f))) for n, f in frontier.items()}


class Order:
    """Which block calls come before which: `waits` are the last ones before each, in the order of the calls."""

    def __init__(self, waits: Mapping[str, Frontier]) -> None:
        self.waits, self.before = waits, dict[str, frozenset[str]]()
        for block, last in waits.items():
            self.before[block] = frozenset(last).union(*(self.before[other] for other in last))

    def without(self, frontier: Frontier, called: set[str]) -> Frontier:
        """The blocks that are waited for when only some are called: instead of the others, those before them."""
        found: set[str] = set()
        stack, seen = list(frontier), set(frontier)
        while stack:
            block = stack.pop()
            if block in called:
                found.add(block)
            else:
                stack += set(self.waits.get(block, ())) - seen
                seen.update(stack)
        return tuple(sorted(found.difference(*(self.before.get(block, ()) for block in found))))


@dataclass
class Group:
    """Nodes of glue that become one operator. `mixes`: it mixes samples, and runs on whole batches."""

    keys: set[Key]
    mixes: bool
    nodes: list[int] = field(default_factory=list)

    @property
    def component(self) -> str:
        """The call of a component that most of it arose in."""
        names = [key[2] for key in self.keys]
        return max(set(names), key=lambda name: (name != "", names.count(name), name))

    @property
    def has_frontier(self) -> bool:
        """Whether it waits for blocks."""
        return any(key[1] for key in self.keys)


class Circle(Exception):
    """Groups of glue would wait for layers that wait for them."""


def group(wired: Wired, mixing: set[Key], joining: Collection[Key] = ()) -> list[Group]:
    """The groups of glue of a recording of a whole batch, in topological order; `mixing` are keys that mix samples,
    `joining` keys that stay with the glue that reads them. Raises Circle where they cannot.
    """
    return _Grouper(wired, mixing, joining).run()


class _Grouper:
    def __init__(self, wired: Wired, mixing: set[Key], joining: Collection[Key]) -> None:
        self.wired, self.mixing, self.joining, self.nodes = wired, mixing, joining, wired.recording.nodes
        self.glue = list(wired.glue())
        self.written = {name for node in self.nodes for name in node.writes}

    def run(self) -> list[Group]:
        groups = self._initial()
        groups = self._merge_cycles(groups)
        return self._ordered(self._merge_task_glue(groups))

    def _initial(self) -> list[Group]:
        """Connected nodes of one frontier, component call and mixing; all that touches the changing buffers of a module
        stays together.
        """
        joined: nx.Graph[Key | str] = nx.Graph()
        for n in self.glue:
            key = self.wired.key(n)
            joined.add_node(key)
            for s in self.wired.sources[n]:
                if s in self.wired.frontier and not self.nodes[s].block:
                    other = self.wired.key(s)
                    alike = other[1:] == key[1:] and (other in self.mixing) == (key in self.mixing)
                    if alike or other in self.joining:
                        joined.add_edge(key, other)
                elif s in self.wired.frontier:  # glue that reads the same block
                    joined.add_edge(key, f"{self.nodes[s].block} {key[1:]} {key in self.mixing}")
            for owner in self._changing_owners(n):
                joined.add_edge(key, f"buffers of {owner}")
        members = [{key for key in part if not isinstance(key, str)} for part in nx.connected_components(joined)]
        home = {key: index for index, keys in enumerate(members) for key in keys}
        groups = [Group(keys, bool(keys & self.mixing)) for keys in members]
        for n in self.glue:
            groups[home[self.wired.key(n)]].nodes.append(n)
        return groups

    def _changing_owners(self, n: int) -> Iterator[str]:
        leaves = self.wired.recording.leaves
        for name in (leaves[r] for r in self.wired.refs[n] if r in leaves):
            if name in self.written:
                yield name.rpartition(".")[0]

    def _graph(self, groups: list[Group]) -> "tuple[nx.DiGraph[int], dict[int, int]]":
        """Groups by number and blocks by -1 - node, and who waits for whom; the group of each node."""
        home = {n: index for index, found in enumerate(groups) for n in found.nodes}
        home |= {n: -1 - n for n in self.wired.blocks()}
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(home.values())
        for n, own in home.items():
            graph.add_edges_from((home[s], own) for s in self.wired.sources[n] if s in home and home[s] != own)
        return graph, home

    @staticmethod
    def _merged(groups: list[Group]) -> Group:
        return Group(
            set().union(*(g.keys for g in groups)),
            any(g.mixes for g in groups),
            sorted(n for g in groups for n in g.nodes),
        )

    def _merge_cycles(self, groups: list[Group]) -> list[Group]:
        """Groups that wait for each other (glue of two components interleaved) become one."""
        graph, _ = self._graph(groups)
        found: list[Group] = []
        for part in nx.strongly_connected_components(graph):
            glue = [groups[index] for index in part if index >= 0]
            if self.joining and glue and len(glue) < len(part):
                raise Circle
            if glue:
                found.append(self._merged(glue))
        return found

    def _merge_task_glue(self, groups: list[Group]) -> list[Group]:
        """Glue without parameters joins the one group of glue it reads; glue that reads nothing, the one that reads it.

        Glue that mixes samples joins only glue that does too.
        """
        while True:
            graph, _ = self._graph(groups)
            for index, one in enumerate(groups):
                partner = self._partner(index, one, graph, groups)
                if partner is not None:
                    rest = [g for i, g in enumerate(groups) if i not in (index, partner)]
                    groups = [*rest, self._merged([one, groups[partner]])]
                    break
            else:
                return groups

    def _partner(self, index: int, one: Group, graph: "nx.DiGraph[int]", groups: list[Group]) -> int | None:
        before, after = list(graph.predecessors(index)), list(graph.successors(index))
        if len(before) == 1 and before[0] >= 0 and not self._parameters(one) and one.mixes == groups[before[0]].mixes:
            return before[0]
        alone = len(after) == 1 and after[0] >= 0 and one.mixes == groups[after[0]].mixes
        return after[0] if not before and alone and not self._reads_batch(one) else None

    def _parameters(self, one: Group) -> bool:
        return any(r in self.wired.recording.leaves for n in one.nodes for r in self.wired.refs[n])

    def _reads_batch(self, one: Group) -> bool:
        return any(self.nodes[n].aux() for n in one.nodes)

    def _ordered(self, groups: list[Group]) -> list[Group]:
        graph, home = self._graph(groups)
        first: dict[int, int] = {}
        for n, own in home.items():
            first[own] = min(n, first.get(own, n))
        order = nx.lexicographical_topological_sort(graph, key=first.__getitem__)
        return [groups[index] for index in order if index >= 0]
