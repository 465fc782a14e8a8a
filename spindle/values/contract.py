"""Contraction: a TaskGraph in, a MetaGraph of chains of identical operators out, and back (paper, section 2.1).

- Two operators merge iff each is the other's only neighbor on that side and they agree in kind, task, component and
  input size.
- Neighbors are those of the transitive reduction. A tensor that every layer reads (encoder states in a decoder, a
  position bias) gives each layer a second edge, which adds no dependency: the chain already orders it. The full flows
  are kept for the MetaGraph, so nothing is lost; see docs/decisions/0002-contract-the-reduction.md.
"""

import hashlib
from itertools import chain, takewhile

import networkx as nx

from spindle.values.graph import Operator, TaskGraph
from spindle.values.metagraph import Flow, MetaGraph, MetaOp


def contract(graph: TaskGraph) -> MetaGraph:
    """Merge chains of identical operators into MetaOps; the result has no costs yet. O(operators + flows) but for the
    transitive reduction, which is O(operators * flows) in the worst case and runs task by task.
    """
    chains = _chains(graph)
    return _assembled(graph, _unique_names(chains), chains)


def contract_like(metagraph: MetaGraph, graph: TaskGraph) -> MetaGraph:
    """The MetaGraph of a TaskGraph with the same operators, which do more or less work, in the same chains."""
    chains = [[graph.by_name[operator.name] for operator in metaop.operators] for metaop in metagraph]
    return _assembled(graph, [metaop.name for metaop in metagraph], chains)


def _assembled(graph: TaskGraph, names: list[str], chains: list[list[Operator]]) -> MetaGraph:
    owner = {op.name: name for name, ops in zip(names, chains, strict=True) for op in ops}
    bytes_by_pair: dict[tuple[str, str], dict[str, int]] = {}
    for (source, target), tensors in graph.flows.items():
        if owner[source] != owner[target]:
            carried = bytes_by_pair.setdefault((owner[source], owner[target]), {})
            carried.update({name: graph.tensors[name].num_bytes for name in tensors})
    flows = tuple(Flow(*pair, float(sum(carried.values()))) for pair, carried in bytes_by_pair.items())
    return MetaGraph(tuple(_metaop(name, ops) for name, ops in zip(names, chains, strict=True)), flows)


def expand(metagraph: MetaGraph) -> TaskGraph:
    """The TaskGraph whose contraction this MetaGraph is; operators in the order of their MetaOps."""
    return TaskGraph(tuple(chain.from_iterable(metaop.operators for metaop in metagraph.metaops)))


def meta_levels(metagraph: MetaGraph) -> tuple[tuple[str, ...], ...]:
    """MetaOps by level, level 1 first: a level is one more than the highest among those it waits for.

    Longest path, not breadth-first depth: only so has no level an edge inside it (paper, section 2.1, our note).
    """
    level: dict[str, int] = {}
    for name in metagraph.topological_order:
        level[name] = 1 + max((level[p] for p in metagraph.predecessors[name]), default=-1)
    levels: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for name in metagraph.topological_order:
        levels[level[name]].append(name)
    return tuple(map(tuple, levels))


def _chains(graph: TaskGraph) -> list[list[Operator]]:
    reduced: nx.DiGraph[str] = nx.DiGraph()
    reduced.add_nodes_from(graph.by_name)
    for part in nx.weakly_connected_components(graph.digraph):
        reduced.add_edges_from(nx.transitive_reduction(graph.digraph.subgraph(part)).edges)
    order = {operator.name: index for index, operator in enumerate(graph)}
    chain_of: dict[str, list[Operator]] = {}
    chains: list[list[Operator]] = []
    for name in nx.lexicographical_topological_sort(graph.digraph, key=order.__getitem__):
        operator = graph.by_name[name]
        before = list(reduced.predecessors(name))
        if len(before) == 1 and reduced.out_degree(before[0]) == 1 and _alike(graph.by_name[before[0]], operator):
            chain_of[name] = chain_of[before[0]]
        else:
            chain_of[name] = []
            chains.append(chain_of[name])
        chain_of[name].append(operator)
    return chains


def _alike(a: Operator, b: Operator) -> bool:
    return (a.task, a.component, a.kind, a.input_bytes) == (b.task, b.component, b.kind, b.input_bytes)


def _unique_names(chains: list[list[Operator]]) -> list[str]:
    """What the operators' dotted names have in common; numbered from the second chain of the same name on."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for ops in chains:
        base = _common_name([op.name for op in ops])
        seen[base] = seen.get(base, 0) + 1
        names.append(base if seen[base] == 1 else f"{base}.{seen[base]}")
    if len(set(names)) != len(names):  # "a.2" may be an operator's own name
        return [f"{name}#{index}" for index, name in enumerate(names)]
    return names


def _common_name(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=False)
    common = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    return ".".join(common) or names[0]


def _metaop(name: str, ops: list[Operator]) -> MetaOp:
    first = ops[0]
    flops = first.forward_flops + first.backward_flops
    return MetaOp(
        name=name,
        task=first.task,
        component=first.component,
        layers=len(ops),
        layer_param_bytes=float(max(op.parameter_bytes for op in ops)),
        output_bytes=float(max(op.output_bytes for op in ops)),
        parameters=_parameter_key(ops),
        forward_fraction=first.forward_flops / flops if flops else 1 / 3,
        operators=tuple(ops),
    )


def _parameter_key(ops: list[Operator]) -> str:
    """Equal for MetaOps that hold the same parameters: their common name and a digest of all names."""
    names = sorted({parameter.name for op in ops for parameter in op.parameters})
    if not names:
        return ""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return f"{_common_name(names)}#{digest}"
