"""TaskGraph and what it is made of: each rule, and what follows from the tensors that operators read and write."""

from collections.abc import Callable

import pytest

from spindle.errors import GraphError
from spindle.values.graph import Operator, Parameter, TaskGraph, TensorSpec
from tests.refusals import Refusal, check_refusal, each


def tensor(
    name: str = "x", shape: tuple[int, ...] = (4, 3), *, dtype: str = "float32", rows: int = 1, row_dim: int = 0
) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype, rows=rows, row_dim=row_dim)


def operator(name: str, reads: str = "", writes: str = "", **fields: object) -> Operator:
    """Reads and writes tensors of these one-letter names."""
    given: dict[str, object] = {"name": name, "task": "t", "component": "c", "kind": "k", "batch_size": 4, **fields}
    outputs = tuple(tensor(letter) for letter in writes)
    return Operator(inputs=tuple(reads), outputs=outputs, **given)  # type: ignore[arg-type]


def graph(*operators: Operator) -> Callable[[], TaskGraph]:
    return lambda: TaskGraph(operators)


RULES: dict[str, Refusal] = {
    "a type that runs nowhere": (
        lambda: tensor(dtype="float8"),
        "tensor 'x'",
        "'float8' is not known",
        "cast to one of",
    ),
    "a size below zero": (lambda: tensor(shape=(4, -1)), "tensor 'x'", "(4, -1) has a negative size", "0 or more"),
    "rows below zero": (lambda: tensor(rows=-2), "tensor 'x'", "-2 rows", "give 0"),
    "rows in a dimension that is not there": (lambda: tensor(row_dim=2), "(4, 3)", "no dimension 2", "rows=0"),
    "rows in a negative dimension": (lambda: tensor(row_dim=-1), "(4, 3)", "no dimension -1", "rows=0"),
    "rows of a scalar": (lambda: tensor(shape=()), "tensor 'x'", "no dimension 0", "rows=0"),
    "no samples": (lambda: operator("a", batch_size=0), "operator 'a'", "batch size is 0", "at least one"),
    "FLOPs below zero": (lambda: operator("a", forward_flops=-1), "'a'", "forward_flops is -1", "0 or more"),
    "FLOPs that are no number": (
        lambda: operator("a", backward_flops=float("nan")),
        "'a'",
        "backward_flops is nan",
        "must be",
    ),
    "endless bytes": (lambda: operator("a", input_bytes=float("inf")), "'a'", "input_bytes is inf", "0 or more"),
    "bytes below zero": (lambda: operator("a", activation_bytes=-8), "'a'", "activation_bytes is -8", "0 or more"),
    "no operators": (graph(), "the task graph", "no operators", "add a task"),
    "one name twice": (graph(operator("a"), operator("a")), "'a'", "names are unique", "rename one"),
    "one tensor written twice": (
        graph(operator("a", "", "x"), operator("b", "", "x")),
        "'x' is written by 'a' and by 'b'",
        "one operator writes a tensor",
        "rename",
    ),
    "one tensor written twice by one operator": (
        graph(operator("a", "", "xx")),
        "'x' is written by 'a' and by 'a'",
        "one operator writes a tensor",
        "rename",
    ),
    "a tensor from nowhere": (graph(operator("a", "z")), "'a' reads tensor 'z'", "no operator writes", "add the one"),
    "itself before itself": (graph(operator("a", "x", "x")), "operators a", "in a circle", "leave out"),
    "a circle of three": (
        graph(operator("a", "z", "x"), operator("b", "x", "y"), operator("c", "y", "z")),
        "->",
        "in a circle",
        "leave out",
    ),
}


@each(RULES)
def test_rules_of_task_graphs(refusal: Refusal) -> None:
    check_refusal(refusal, GraphError)


def test_flows_follow_from_tensors() -> None:
    """An operator that reads two tensors of another has one flow from it, which carries both."""
    made = TaskGraph((operator("a", "", "xy"), operator("b", "xy", "z"), operator("c", "xz")))
    assert made.flows == {("a", "b"): ("x", "y"), ("a", "c"): ("x",), ("b", "c"): ("z",)}
    assert made.producers == {"x": "a", "y": "a", "z": "b"}
    assert sorted(made.digraph.edges) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [op.name for op in made] == ["a", "b", "c"]
    assert len(made) == 3


@pytest.mark.parametrize(
    ("given", "samples", "expected"),
    [
        (tensor(shape=(4, 3)), 2, (2, 3)),  # one row a sample
        (tensor(shape=(8, 3), rows=2), 3, (6, 3)),  # samples flattened into rows
        (tensor(shape=(7, 4, 3), row_dim=1), 1, (7, 1, 3)),  # batch in the second dimension
        (tensor(shape=(5, 5), rows=0), 2, (5, 5)),  # only goes whole
        (tensor(shape=(), rows=0), 2, ()),  # a scalar
    ],
)
def test_shape_of_some_samples(given: TensorSpec, samples: int, expected: tuple[int, ...]) -> None:
    assert given.shape_of(samples) == expected


@pytest.mark.parametrize(("dtype", "size"), [("float64", 8), ("bfloat16", 2), ("bool", 1), ("int64", 8)])
def test_bytes_by_hand(dtype: str, size: int) -> None:
    """Twelve numbers of a type; a parameter counts like a tensor."""
    assert tensor(dtype=dtype).num_bytes == 12 * size
    assert Parameter(name="w", shape=(3, 4), dtype=dtype).num_bytes == 12 * size
    assert Parameter(name="b", shape=(), dtype=dtype).num_bytes == size


def test_bytes_of_an_operator_are_those_of_all_it_holds() -> None:
    made = Operator(
        name="a",
        task="t",
        component="c",
        kind="k",
        batch_size=4,
        outputs=(tensor("x", (4, 3)), tensor("y", (4,), dtype="int64")),
        parameters=(Parameter(name="w", shape=(3, 3), dtype="float32", trainable=False),),
    )
    assert made.output_bytes == 48 + 32
    assert made.parameter_bytes == 36  # frozen ones count
