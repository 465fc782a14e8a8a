"""Contraction: the paper's example, decision 0002, and the laws that hold for every graph."""

import random
from itertools import pairwise
from math import prod

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.values.contract import contract, expand, meta_levels
from spindle.values.graph import Operator, Parameter, TaskGraph, TensorSpec
from spindle.values.metagraph import MetaGraph
from tests.task_graphs import random_task_graph


def operator(
    name: str, shape: tuple[int, ...], reads: tuple[str, ...], *, kind: str = "k", weight: str = ""
) -> Operator:
    """An operator `task.component.letter` that reads the tensors of others, named like them, and writes its own."""
    task, component, _ = name.split(".")
    output = TensorSpec(name=name, shape=shape, dtype="float32")
    return Operator(
        name=name,
        task=task,
        component=component,
        kind=kind,
        batch_size=shape[0],
        inputs=reads,
        outputs=(output,),
        parameters=(Parameter(name=weight, shape=(4,), dtype="float32"),) if weight else (),
        input_bytes=prod(shape) * 4,
    )


# Fig. 3 of the paper: operators, type, input [batch, sequence, hidden], task; chains feed the LM of their task
FIGURE_3 = {
    "al.audio": ("ABC", "Audio", (8, 229, 768), ()),
    "al.text": ("DE", "Text", (8, 77, 768), ()),
    "al.lm": ("FGH", "LM", (8, 512, 1024), ("al.audio.C", "al.text.E")),
    "vl.text": ("IJ", "Text", (4, 77, 768), ()),
    "vl.vision257": ("KL", "Vision", (4, 257, 768), ()),
    "vl.vision197": ("MN", "Vision", (4, 197, 768), ()),
    "vl.lm": ("OPQ", "LM", (4, 512, 1024), ("vl.text.J", "vl.vision257.L", "vl.vision197.N")),
}


def figure_3() -> TaskGraph:
    """Both tasks hold the same weights W6, W7, W8 in their LM, and the same text tower."""
    weights = {"lm": "W678", "text": "W45", "audio": "W123", "vision257": "W9A", "vision197": "W9A"}
    operators = []
    for chain, (letters, kind, shape, sources) in FIGURE_3.items():
        reads = sources
        for place, letter in enumerate(letters):
            name, weight = f"{chain}.{letter}", f"W{weights[chain.split('.')[1]][1 + place]}"
            operators.append(operator(name, shape, reads, kind=kind, weight=weight))
            reads = (name,)
    return TaskGraph(tuple(operators))


def test_figure_3_of_the_paper() -> None:
    """MetaOps 1 to 7 and both MetaLevels, exactly as in section 2.1."""
    metagraph = contract(figure_3())
    chains = {metaop.name: "".join(op.name[-1] for op in metaop.operators) for metaop in metagraph}
    assert chains == {name: letters for name, (letters, *_) in FIGURE_3.items()}
    assert {metaop.name: metaop.layers for metaop in metagraph} == {n: len(row[0]) for n, row in FIGURE_3.items()}
    number = {name: index + 1 for index, name in enumerate(FIGURE_3)}
    assert [sorted(number[name] for name in level) for level in meta_levels(metagraph)] == [[1, 2, 4, 5, 6], [3, 7]]
    flows = {(number[flow.source], number[flow.target]) for flow in metagraph.flows}
    assert flows == {(1, 3), (2, 3), (4, 7), (5, 7), (6, 7)}


def test_figure_3_shares_its_language_model() -> None:
    """The two LM MetaOps are nodes of their own, but name the same parameters; so do the text towers."""
    key = {metaop.name: metaop.parameters for metaop in contract(figure_3())}
    assert key["al.lm"] == key["vl.lm"] != ""
    assert key["al.text"] == key["vl.text"] != key["al.lm"]


def test_two_resolutions_of_one_component_are_two_metaops() -> None:
    """Equal kinds, one component, other input sizes; also when one chain follows the other."""
    ops = [operator("t.v.a", (4, 9), ()), operator("t.v.b", (4, 9), ("t.v.a",)), operator("t.v.c", (4, 5), ("t.v.b",))]
    assert [[op.name[-1] for op in metaop.operators] for metaop in contract(TaskGraph(tuple(ops)))] == [
        ["a", "b"],
        ["c"],
    ]


def decoder(num_layers: int, *, bias: bool) -> TaskGraph:
    """Layers that all read one memory; with `bias` also what the first of them made, as T5's do."""
    ops = [operator("t.enc.0", (4, 8), ())]
    for layer in range(num_layers):
        own = ("t.dec.0",) if bias and layer > 1 else ()
        before = (f"t.dec.{layer - 1}",) if layer else ()
        ops.append(operator(f"t.dec.{layer}", (4, 8), ("t.enc.0", *before, *own)))
    return TaskGraph(tuple(ops))


def test_edges_that_order_nothing_new_do_not_stop_a_chain() -> None:
    """Decision 0002: cross-attention and position biases; the flow keeps the memory's bytes, once."""
    for bias in (False, True):
        metagraph = contract(decoder(5, bias=bias))
        assert [(metaop.name, metaop.layers) for metaop in metagraph] == [("t.enc.0", 1), ("t.dec", 5)]
        (flow,) = metagraph.flows
        assert (flow.source, flow.target, flow.num_bytes) == ("t.enc.0", "t.dec", 4 * 8 * 4)


def test_a_fork_ends_a_chain() -> None:
    """The letter of the rule: a -> b, a -> c; b and c do not order each other, so nothing merges."""
    ops = (operator("t.c.a", (4,), ()), operator("t.c.b", (4,), ("t.c.a",)), operator("t.c.d", (4,), ("t.c.a",)))
    assert [metaop.layers for metaop in contract(TaskGraph(ops))] == [1, 1, 1]


def test_names_are_unique_whatever_operators_are_called() -> None:
    """A second chain is numbered; where that name is taken too, all are."""
    chains = [operator(f"t.c.{x}", (size,), ()) for size, x in ((1, "a"), (2, "b"))]
    assert [metaop.name for metaop in contract(TaskGraph(tuple(chains)))] == ["t.c.a", "t.c.b"]
    pairs = []
    for letters, size in (("ab", 2), ("de", 3), ("fg", 4)):
        first, second = (f"t.c.{letter}" for letter in letters)
        pairs += [operator(first, (size,), ()), operator(second, (size,), (first,))]
    assert [metaop.name for metaop in contract(TaskGraph(tuple(pairs)))] == ["t.c", "t.c.2", "t.c.3"]
    clash = TaskGraph((*pairs, operator("t.c.2", (7,), ())))
    assert len({metaop.name for metaop in contract(clash)}) == 4


graphs = st.builds(
    lambda seed, tasks, size: random_task_graph(seed, num_tasks=tasks, operators_per_task=size).graph,
    st.integers(0, 10**9),
    st.integers(1, 3),
    st.integers(1, 10),
)


@settings(max_examples=200)
@given(graphs)
def test_expanding_gives_the_graph_back(graph: TaskGraph) -> None:
    """Same operators, same flows; contracting again gives the same MetaGraph."""
    metagraph = contract(graph)
    again = expand(metagraph)
    assert sorted(again, key=lambda op: op.name) == sorted(graph, key=lambda op: op.name)
    assert again.flows.keys() == graph.flows.keys()
    assert sorted(map(repr, contract(again))) == sorted(map(repr, metagraph))


@settings(max_examples=200)
@given(graphs)
def test_metaops_are_maximal_chains_of_equal_operators(graph: TaskGraph) -> None:
    """Inside: equal, consecutive, each other's only neighbor. Between two MetaOps: no pair that could still merge."""
    metagraph = contract(graph)
    reduced = nx.transitive_reduction(graph.digraph)
    owner = {op.name: metaop.name for metaop in metagraph for op in metaop.operators}
    for source, target in reduced.edges:
        a, b = graph.by_name[source], graph.by_name[target]
        alike = (a.task, a.component, a.kind, a.input_bytes) == (b.task, b.component, b.kind, b.input_bytes)
        mergeable = alike and reduced.out_degree(source) == 1 and reduced.in_degree(target) == 1
        assert mergeable == (owner[source] == owner[target]), (source, target)
    for metaop in metagraph:
        names = [op.name for op in metaop.operators]
        assert all(reduced.has_edge(*pair) for pair in pairwise(names))
        assert (metaop.layers, metaop.task) == (len(names), metaop.operators[0].task)


@settings(max_examples=200)
@given(graphs)
def test_flows_are_those_between_operators(graph: TaskGraph) -> None:
    """A flow for each pair of MetaOps that some tensor passes between; it carries each of these tensors once."""
    metagraph = contract(graph)
    owner = {op.name: metaop.name for metaop in metagraph for op in metaop.operators}
    passing: dict[tuple[str, str], set[str]] = {}
    for (source, target), tensors in graph.flows.items():
        if owner[source] != owner[target]:
            passing.setdefault((owner[source], owner[target]), set()).update(tensors)
    wanted = {pair: sum(graph.tensors[name].num_bytes for name in names) for pair, names in passing.items()}
    assert {(flow.source, flow.target): flow.num_bytes for flow in metagraph.flows} == wanted


@settings(max_examples=200)
@given(graphs)
def test_levels_have_no_edge_inside_and_are_as_low_as_can_be(graph: TaskGraph) -> None:
    """Every MetaOp stands in one level, right above the highest that it waits for."""
    metagraph = contract(graph)
    levels = meta_levels(metagraph)
    level = {name: index for index, names in enumerate(levels) for name in names}
    assert sorted(level) == sorted(metagraph.by_name)
    assert sum(map(len, levels)) == len(metagraph)
    for name in level:
        assert level[name] == 1 + max((level[p] for p in metagraph.predecessors[name]), default=-1)


@settings(max_examples=100)
@given(graphs, st.randoms(use_true_random=False))
def test_contraction_does_not_depend_on_the_order_of_unrelated_operators(graph: TaskGraph, rng: random.Random) -> None:
    """Operators listed in another order give the same chains."""
    mixed = list(graph)
    rng.shuffle(mixed)

    def chains(metagraph: MetaGraph) -> set[tuple[str, ...]]:
        return {tuple(op.name for op in metaop.operators) for metaop in metagraph}

    assert chains(contract(TaskGraph(tuple(mixed)))) == chains(contract(graph))
