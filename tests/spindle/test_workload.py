"""Workload: every rule of names, modules, data and batches, and what parameters are called."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.errors import WorkloadError
from spindle.workload import Task, Workload
from tests.refusals import Refusal, check_refusal, each

GOOD = {"x": torch.ones(4, 2)}


def task(data: Iterable[Any] | Callable[[], Iterable[Any]] = (), batch_size: int = 4) -> Task:
    return Task(name="t", function=lambda batch: batch["x"].sum(), batch_size=batch_size, data=data)


def packed(rows: Callable[[Any], Any]) -> Task:
    return Task(name="t", function=lambda batch: batch["x"].sum(), batch_size=4, data=(), rows=rows)


def register(name: str = "t", batch_size: int = 4, weight: float = 1.0) -> None:
    Workload("w").task(name, batch_size=batch_size, data=[GOOD], weight=weight)(lambda batch: batch["x"].sum())


def component(name: str, module: object = None) -> nn.Module:
    return Workload("w").component(name, cast(nn.Module, module or nn.Linear(2, 2)))


def twice(what: str, same_module: bool = False) -> None:
    workload, module = Workload("w"), nn.Linear(2, 2)
    if what == "task":
        for _ in range(2):
            workload.task("t", batch_size=4, data=[GOOD])(lambda batch: batch["x"].sum())
    workload.component("a", module)
    workload.component("b" if same_module else "a", module if same_module else nn.Linear(2, 2))


RULES: dict[str, Refusal] = {
    "a component without name": (
        lambda: component(""),
        "component ''",
        "a name starts with a letter",
        "letters, digits",
    ),
    "a dotted component": (lambda: component("a.b"), "component 'a.b'", "starts with a letter", "follow"),
    "a component that begins with a digit": (lambda: component("1st"), "'1st'", "starts with a letter", "follow"),
    "a component with a space": (lambda: component("a b"), "'a b'", "starts with a letter", "letters, digits"),
    "a component of two lines": (lambda: component("a\n"), "'a\\n'", "starts with a letter", "letters, digits"),
    "a component that is no module": (lambda: component("a", "x"), "component 'a' is a str", "give a", "nn.Module"),
    "a class for a module": (lambda: component("a", nn.Linear), "component 'a' is a type", "give a", "nn.Module"),
    "a component twice": (lambda: twice("component"), "component 'a'", "registered already", "choose another name"),
    "a module twice": (lambda: twice("module", same_module=True), "component 'b'", "of component 'a'", "use it twice"),
    "a task twice": (lambda: twice("task"), "task 't'", "registered already", "choose another name"),
    "a task with a slash": (lambda: register("a/b"), "task 'a/b'", "starts with a letter", "letters, digits"),
    "no samples": (lambda: register(batch_size=0), "task 't'", "batch_size is 0", "at least 1"),
    "samples below zero": (lambda: register(batch_size=-4), "task 't'", "batch_size is -4", "at least 1"),
    "half a sample": (lambda: register(batch_size=4.5), "task 't'", "batch_size is 4.5", "a whole number"),  # type: ignore[arg-type]
    "a weight below zero": (lambda: register(weight=-0.5), "task 't'", "weight is -0.5", "zero or a positive number"),
    "weight below zero": (lambda: register(weight=-1.0), "task 't'", "weight is -1.0", "a positive number"),
    "weight that is no number": (lambda: register(weight=float("nan")), "'t'", "weight is nan", "a positive number"),
    "weight without end": (lambda: register(weight=float("inf")), "'t'", "weight is inf", "a positive number"),
    "no tasks": (lambda: Workload("w").require_tasks(), "workload 'w'", "no tasks", "add one with @workload.task"),
    "data that is no data": (lambda: task(3).batches(), "data is a int", "an iterable of batches", "or a function"),  # type: ignore[arg-type]
    "data that runs once": (lambda: task(iter([GOOD])).batches(), "'t'", "one-time iterator", "a list, a loader"),
    "a generator": (lambda: task(x for x in [GOOD]).batches(), "(generator)", "one-time iterator", "a fresh iterator"),
    "a function that returns no data": (lambda: task(lambda: 3).batches(), "a int", "an iterable of batches", "or a"),  # type: ignore[arg-type, return-value]
    "no data": (lambda: task([]).first_batch(), "task 't'", "holds no batch", "give at least one"),
    "a batch that is a tensor": (
        lambda: task().sampled(torch.ones(4)),
        "'t'",
        "a batch is a Tensor",
        "dicts of fields",
    ),
    "a batch that is a tuple": (lambda: task().sampled((GOOD["x"],)), "'t'", "a batch is a tuple", "dicts of fields"),
    "an empty batch": (lambda: task().sampled({}), "'t'", "a batch is a dict", "dicts of fields"),
    "a batch without a field of samples": (
        lambda: task().sampled({"x": torch.tensor(1.0), "name": "a"}),
        "task 't'",
        "do not share a number of samples (rows of each: none)",
        "must be the batch size 4, or rows= must count it",
    ),
    "fields of different samples": (
        lambda: task().sampled({"x": torch.ones(3, 2), "y": torch.ones(5)}),
        "task 't'",
        "rows of each: x 3, y 5",
        "must be the batch size 4, or rows= must count it",
    ),
    "a packed field that is not declared": (
        lambda: task().sampled({**GOOD, "pixels": torch.ones(7, 2)}),
        "task 't': batch['pixels'] has 7 rows for 4 samples",
        "it is packed",
        "give rows=",
    ),
    "no sample": (lambda: task().sampled({"x": torch.ones(0, 2)}), "'t'", "has no samples", "leave empty batches out"),
    "rows that raise": (
        lambda: packed(lambda batch: {"x": batch["n"]}).sampled(GOOD),
        "task 't'",
        "rows= raised KeyError: 'n'",
        "correct rows=",
    ),
    "rows that are none": (
        lambda: packed(lambda batch: None).sampled(GOOD),
        "task 't'",
        "rows= raised TypeError",
        "correct rows=",
    ),
    "rows that do not add up": (
        lambda: packed(lambda batch: {"x": [1, 1, 1, 2]}).sampled(GOOD),
        "task 't'",
        "rows= counts 5 rows of 'x', which has 4",
        "correct rows=",
    ),
}


@each(RULES)
def test_rules_of_workloads(refusal: Refusal) -> None:
    check_refusal(refusal, WorkloadError)


def test_modules_and_functions_come_back_unchanged() -> None:
    """A component is the user's own module, a task the user's own function."""
    workload, module = spindle.Workload("w"), nn.Linear(2, 2)
    assert workload.component("a", module) is module

    def function(batch: dict[str, Tensor]) -> Tensor:
        return batch["x"].sum()

    assert workload.task("t", batch_size=4, data=[GOOD], weight=0.5)(function) is function
    assert (workload.tasks["t"].weight, workload.tasks["t"].batch_size) == (0.5, 4)


@pytest.mark.parametrize(("given", "kept"), [(None, None), ("a.b", ("a.b",)), (["a", "b"], ("a", "b")), ([], ())])
def test_layers_are_kept_as_paths(given: str | list[str] | None, kept: tuple[str, ...] | None) -> None:
    workload = Workload("w")
    workload.component("a", nn.Linear(2, 2), layers=given)
    assert workload.components["a"].layers == kept


def test_every_pass_is_fresh() -> None:
    """Lists and functions give the same batches again; the first batch is checked."""
    for data in ([GOOD, GOOD], lambda: iter([GOOD, GOOD])):
        made = task(data)
        assert len(list(made.batches())) == len(list(made.batches())) == 2
        assert made.first_batch()["x"] is GOOD["x"]


def test_a_mapping_of_its_own_is_a_batch() -> None:
    """What tokenizers return is a mapping, not a dict."""

    class Encoding(dict[str, Tensor]):
        pass

    found = task().sampled(Encoding(GOOD))
    assert type(found.fields) is dict
    assert found.fields["x"] is GOOD["x"]


def test_fields_of_any_kind_and_any_number_of_samples() -> None:
    """Lists with an entry for each sample are cut with it; single numbers, texts and settings go to all."""
    batch = task().sampled(
        {"x": torch.ones(3, 2), "names": ["a", "b", "c"], "scale": torch.tensor(2.0), "mode": "fast"}
    )
    assert batch.units.num_samples == 3
    part = batch.part(1, 3)
    assert (part["x"].shape, part["names"], part["scale"], part["mode"]) == ((2, 2), ["b", "c"], 2.0, "fast")


def test_rows_of_packed_fields_are_asked_for_each_batch() -> None:
    """What `rows=` gives for a batch says where its samples end."""
    batch = packed(lambda batch: {"x": batch["count"]}).sampled({"x": torch.ones(6, 2), "count": torch.tensor([1, 5])})
    assert batch.units.counts["x"] == (1, 5)
    assert batch.part(1, 2)["x"].shape == (5, 2)


def test_parameters_are_named_once() -> None:
    """Tied tensors, in one component or across two, bear the first of their names."""
    workload = Workload("w")
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    workload.component("a", first)
    workload.component("b", nn.ModuleDict({"x": second, "y": nn.BatchNorm1d(2)}))
    assert [name for name, _ in workload.named_parameters()] == [
        "a.weight",
        "a.bias",
        "b.x.bias",
        "b.y.weight",
        "b.y.bias",
    ]
    assert [name for name, _ in workload.named_buffers()] == [
        "b.y.running_mean",
        "b.y.running_var",
        "b.y.num_batches_tracked",
    ]
