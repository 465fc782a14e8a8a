"""MetaGraph: every rule of its values, and what is read off its flows."""

from collections.abc import Callable

import pytest

from spindle.errors import GraphError
from spindle.values.graph import Operator
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points
from tests.refusals import Refusal, check_refusal, each

NAN, INF = float("nan"), float("inf")


def metaop(name: str = "t.a", **fields: object) -> MetaOp:
    given: dict[str, object] = {"name": name, "task": "t", "component": "a", "layers": 2, **fields}
    return MetaOp(**given)  # type: ignore[arg-type]


def graph(*names: str, flows: str = "", num_bytes: float | None = None) -> Callable[[], MetaGraph]:
    """`flows` as "a>b b>c"."""
    pairs = [flow.split(">") for flow in flows.split()]
    return lambda: MetaGraph(
        tuple(metaop(name) for name in names), tuple(Flow(source, target, num_bytes) for source, target in pairs)
    )


def layer(name: str) -> Operator:
    return Operator(name=name, task="t", component="a", kind="k", batch_size=1)


RULES: dict[str, Refusal] = {
    "no name": (lambda: metaop(""), "a MetaOp", "empty name", "name it"),
    "a name that clears the screen": (lambda: metaop("\x1b[2J"), "'\\x1b[2J'", "control characters", "leave them out"),
    "a task of two lines": (lambda: metaop(task="a\nb"), "'t.a'", "control characters", "leave them out"),
    "no layers": (lambda: metaop(layers=0), "'t.a'", "layers is 0", "at least one"),
    "layers below zero": (lambda: metaop(layers=-3), "'t.a'", "layers is -3", "at least one"),
    "operators that are not its layers": (lambda: metaop(operators=(layer("x"),)), "'t.a'", "1 operators", "one each"),
    "more forward than all": (lambda: metaop(forward_fraction=1.01), "'t.a'", "1.01", "between 0 and 1"),
    "forward below zero": (lambda: metaop(forward_fraction=-0.01), "'t.a'", "-0.01", "between 0 and 1"),
    "forward that is no number": (lambda: metaop(forward_fraction=NAN), "'t.a'", "nan", "between 0 and 1"),
    "parameters below zero": (lambda: metaop(layer_param_bytes=-1.0), "'t.a'", "layer_param_bytes", "0 or more"),
    "states without end": (lambda: metaop(layer_state_bytes=INF), "'t.a'", "layer_state_bytes is inf", "0 or more"),
    "output that is no number": (lambda: metaop(output_bytes=NAN), "'t.a'", "output_bytes is nan", "0 or more"),
    "a time of zero": (lambda: metaop(layer_time_s=((1, 0.0),)), "'t.a'", "on 1 devices is 0.0", "a positive number"),
    "a time below zero": (lambda: metaop(layer_time_s=((2, -1.0),)), "'t.a'", "on 2 devices is -1.0", "positive"),
    "a time that is no number": (lambda: metaop(layer_time_s=((1, NAN),)), "'t.a'", "is nan", "positive number"),
    "a time without end": (lambda: metaop(layer_time_s=((1, INF),)), "'t.a'", "is inf", "positive number"),
    "a time on no devices": (lambda: metaop(layer_time_s=((0, 1.0),)), "'t.a'", "0 devices", "start at 1"),
    "memory below zero": (lambda: metaop(memory_bytes=((1, -1.0),)), "'t.a'", "memory_bytes on 1", "zero or more"),
    "memory that is no number": (lambda: metaop(memory_bytes=((1, NAN),)), "'t.a'", "is nan", "zero or more"),
    "memory on no devices": (lambda: metaop(memory_bytes=((-1, 1.0),)), "'t.a'", "-1 devices", "start at 1"),
    "counts that fall": (
        lambda: metaop(layer_time_s=((2, 1.0), (1, 2.0))),
        "'t.a'",
        "in rising order",
        "metagraph.points()",
    ),
    "one count twice": (lambda: points([(2, 1.0), (2, 1.5)]), "count 2", "given twice", "one value"),
    "nothing to plan": (graph(), "the MetaGraph", "no MetaOps", "an empty workload cannot be planned"),
    "one name twice": (graph("a", "b", "a"), "'a'", "names are unique", "rename one"),
    "a flow from nowhere": (graph("a", flows="z>a"), "'z' -> 'a'", "does not exist", "the MetaOps are a"),
    "a flow to nowhere": (graph("a", flows="a>z"), "'a' -> 'z'", "does not exist", "the MetaOps are a"),
    "a flow to itself": (graph("a", flows="a>a"), "'a' -> 'a'", "back to its own MetaOp", "remove it"),
    "a flow twice": (graph("a", "b", flows="a>b a>b"), "'a' -> 'b'", "given twice", "give it once"),
    "a flow of fewer bytes than none": (graph("a", "b", flows="a>b", num_bytes=-1), "'a' -> 'b'", "-1", "0 or more"),
    "a flow of no number": (graph("a", "b", flows="a>b", num_bytes=NAN), "'a' -> 'b'", "nan bytes", "0 or more"),
    "a circle of two": (graph("a", "b", flows="a>b b>a"), "a -> b -> a", "in a circle", "remove one"),
    "a circle behind a chain": (graph(*"abcd", flows="a>b b>c c>d d>b"), "b -> c -> d -> b", "circle", "remove one"),
    "a MetaOp that it has not": (lambda: graph("a")()["z"], "'z'", "not in the MetaGraph", "it has a"),
}


@each(RULES)
def test_rules_of_metagraphs(refusal: Refusal) -> None:
    check_refusal(refusal, GraphError)


def test_a_long_list_of_names_is_cut() -> None:
    """Errors stay readable for hundreds of MetaOps."""
    names = [f"m{i:03}" for i in range(300)]
    with pytest.raises(GraphError, match=r"it has m000, .*, m007 and 292 more"):
        graph(*names)()["nobody"]


def test_points_sort_and_accept_mappings() -> None:
    assert points({4: 1.0, 1: 3.0}) == points([(4, 1.0), (1, 3.0)]) == ((1, 3.0), (4, 1.0))
    assert points({}) == ()


def test_neighbors_and_order() -> None:
    """A diamond: order follows the flows, ties follow the file."""
    made = graph(*"dbca", flows="a>b a>c b>d c>d")()
    assert made.topological_order == ("a", "b", "c", "d")
    assert made.predecessors == {"d": ("b", "c"), "b": ("a",), "c": ("a",), "a": ()}
    assert made.successors == {"d": (), "b": ("d",), "c": ("d",), "a": ("b", "c")}
    assert (len(made), made["b"].name, [m.name for m in made]) == (4, "b", list("dbca"))


def test_flow_bytes_fall_back_to_the_output() -> None:
    made = MetaGraph(
        (metaop("a", output_bytes=5.0), metaop("b"), metaop("c")), (Flow("a", "b"), Flow("a", "c", num_bytes=2.0))
    )
    assert [made.flow_bytes(flow) for flow in made.flows] == [5.0, 2.0]
