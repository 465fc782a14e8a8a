"""`weigh=`: the losses of a step's batches count by samples or tokens, as one process has them on the joined batch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import spindle
from spindle.errors import NotFiniteError, WorkloadError
from spindle.inputs.weighing import shares
from spindle.values.plan import Plan
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import HandWritten, floats

Batch = dict[str, Any]
STEPS, ACCUMULATE = 3, 4
IGNORED = -100


def rows(seed: int, *, sizes: tuple[int, ...] = (6, 6, 3, 6, 5), valid: float = 0.5) -> list[Batch]:
    """Batches of several sizes, of which a share of the labels is valid, in some none."""
    draw = torch.Generator().manual_seed(seed)
    found: list[Batch] = []
    for number, size in enumerate(sizes):
        labels = torch.randint(0, 3, (size, 4), generator=draw)
        labels[torch.rand(labels.shape, generator=draw) > valid * (number % 3)] = IGNORED
        found.append(
            {
                "x": floats(size, 4, 5, seed=seed + number, dtype=torch.float64),
                "y": labels,
                "count": int((labels != IGNORED).sum()),
            }
        )
    return found


def tokens(batch: Batch) -> int:
    return int((batch["y"] != IGNORED).sum())


class Tasks:
    """Two tasks over one encoder; each averages over the valid labels of its batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoder, self.head = HandWritten(5, 8).double(), nn.Linear(8, 3).double()
        self.data = {"near": rows(1), "far": rows(9, sizes=(4, 6))}

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(batch["x"])).flatten(0, 1), batch["y"].flatten())

    def squares(self, batch: Batch) -> Tensor:
        loss: Tensor = self.head(self.encoder(batch["x"])).square().mean()
        return loss

    def joined(self, name: str, step: int, *, accumulate: int) -> Batch:
        """The batch that a step of one process would take at once."""
        data = self.data[name]
        own = [data[(step * accumulate + k) % len(data)] for k in range(accumulate)]
        return {key: torch.cat([each[key] for each in own]) for key in ("x", "y")}

    def workload(self, weigh: Any, *, squares: bool = False, **options: Any) -> spindle.Workload:
        made = spindle.Workload("weighed", **options)
        made.component("encoder", self.encoder)
        made.component("head", self.head)
        for name, weight in (("near", 1.0), ("far", 0.3)):
            task = made.task(name, batch_size=6, data=self.data[name], weigh=weigh, weight=weight)
            task(self.squares if squares else self.loss)
        return made


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def on_joined(tasks: Tasks, *, squares: bool = False, accumulate: int = ACCUMULATE) -> tuple[list[Batch], list[Tensor]]:
    """Losses and parameters of a plain loop on joined batches."""
    parameters = [*tasks.encoder.parameters(), *tasks.head.parameters()]
    optimizer, losses = sgd(parameters), list[Batch]()
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append({})
        for name, weight in (("near", 1.0), ("far", 0.3)):
            batch = tasks.joined(name, step, accumulate=accumulate)
            loss = tasks.squares(batch) if squares else tasks.loss(batch)
            (loss * weight).backward()  # type: ignore[no-untyped-call]
            losses[-1][name] = float(loss.detach())
        optimizer.step()
    return losses, [parameter.detach() for parameter in parameters]


def planned(
    tasks: Tasks, plan: Plan | None, made: spindle.Workload, **options: Any
) -> tuple[list[Batch], list[Tensor]]:
    plan = plan or widest_plan(spindle.make_metagraph(made), 2)
    found = spindle.train(made, plan, optimizer=sgd, steps=STEPS, launcher="threads", timeout_s=30.0, **options)
    return list(found.losses), [p.detach() for p in (*tasks.encoder.parameters(), *tasks.head.parameters())]


def assert_alike(ours: tuple[list[Batch], list[Tensor]], theirs: tuple[list[Batch], list[Tensor]]) -> None:
    for got, wanted in zip(ours[0], theirs[0], strict=True):
        assert got == pytest.approx(wanted, rel=1e-12)
    for value, expected in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weigh", [tokens, "count"], ids=["function", "field"])
@pytest.mark.parametrize("in_flight", [1, 2, 4])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_by_tokens_a_step_is_that_of_the_joined_batch(weigh: Any, in_flight: int, seed: int | None) -> None:
    """Short batches, batches without a valid label, whatever ranks they are on."""
    tasks = Tasks()
    made = tasks.workload(weigh, accumulate=ACCUMULATE, in_flight=in_flight)
    plan = None if seed is None else random_plan(spindle.make_metagraph(made), 3, seed)
    assert_alike(planned(tasks, plan, made), on_joined(Tasks()))


@pytest.mark.parametrize("seed", range(3))
def test_by_samples_too(seed: int) -> None:
    tasks = Tasks()
    made = tasks.workload("samples", squares=True, accumulate=ACCUMULATE, in_flight=2)
    plan = random_plan(spindle.make_metagraph(made), 3, seed)
    assert_alike(planned(tasks, plan, made), on_joined(Tasks(), squares=True))


@pytest.mark.parametrize("seed", range(4))
def test_verify_weighs_as_the_run_does(seed: int) -> None:
    """With rounds, sharded states, recompute, and a task that takes part in every other step."""
    tasks = Tasks()
    options: dict[str, Any] = {"shard_optimizer": True} if seed % 2 else {"recompute": ["encoder"]}
    made = tasks.workload(tokens, accumulate=4, in_flight=2, max_grad_norm=0.5, **options)
    made.task("rare", batch_size=6, data=tasks.data["near"], every=2, weigh="samples")(tasks.squares)
    plan = random_plan(spindle.make_metagraph(made), 3, seed)
    report = spindle.verify(made, plan, steps=3, optimizer=sgd, launcher="threads")
    assert report.ok, str(report)


def masked(tasks: Tasks) -> None:
    """A task of which no label is valid, beside one that has some."""
    tasks.data = {"near": rows(1, valid=0.0), "far": rows(9, sizes=(4, 6), valid=1.0)[1:]}


@pytest.mark.parametrize("on_all", [(), ("encoder",)], ids=["replicas", "sharded"])
@pytest.mark.parametrize("seed", range(3))
def test_a_task_whose_labels_are_all_masked_contributes_nothing(seed: int, on_all: tuple[str, ...]) -> None:
    """Its loss is NaN in a plain loop. Here it is 0, parameters that it alone has rest, the others take their step."""
    tasks, alone = Tasks(), Tasks()
    for each in (tasks, alone):
        masked(each)
        if on_all:
            each.data["far"] = rows(9, sizes=(6, 6), valid=1.0)[1:]
            each.data["near"] = rows(1, sizes=(6, 6), valid=0.0)
    own = nn.Linear(8, 3).double()
    before = own.weight.detach().clone()

    def near(batch: Batch) -> Tensor:
        return F.cross_entropy(own(tasks.encoder(batch["x"])).flatten(0, 1), batch["y"].flatten())

    made = spindle.Workload("masked", accumulate=2, max_grad_norm=5.0 if seed else None)
    made.component("encoder", tasks.encoder)
    made.component("head", tasks.head)
    made.component("own", own, optimizer={"weight_decay": 0.5})
    made.task("near", batch_size=6, data=tasks.data["near"], weigh=tokens)(near)
    made.task("far", batch_size=6, data=tasks.data["far"], weigh=tokens)(tasks.loss)
    only = alone.workload(tokens, accumulate=2, max_grad_norm=5.0 if seed else None)
    only.tasks.pop("near")
    only.tasks["far"] = made.tasks["far"].__class__(
        name="far", function=alone.loss, batch_size=6, data=alone.data["far"], weigh=tokens
    )
    expected = planned(alone, widest_plan(spindle.make_metagraph(only), 1), only)
    ours = planned(tasks, random_plan(spindle.make_metagraph(made), 2, seed, on_all=on_all), made)
    assert [losses.pop("near") for losses in ours[0]] == [0.0] * STEPS
    assert_alike(ours, expected)
    assert torch.equal(own.weight.detach(), before), "a parameter that nothing led to was decayed"


def test_without_weigh_a_mean_of_nothing_is_the_users_own_nan() -> None:
    """The run ends and names the task; with weigh= it goes on."""
    tasks = Tasks()
    masked(tasks)
    with pytest.raises(NotFiniteError, match="task 'near'"):
        planned(tasks, None, tasks.workload("micro-batches", accumulate=2))
    assert planned(tasks, None, tasks.workload(tokens, accumulate=2))[0][0]["near"] == 0.0


class Passes:
    """A loader that every rank reads for itself in a thread."""

    def __init__(self, data: list[Batch]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data)


@pytest.mark.gloo
def test_ranks_that_share_a_loader_look_at_a_whole_step() -> None:
    """Batches of later rounds are looked at before the first; no rank waits for another one's."""
    tasks = Tasks()
    tasks.data = {name: Passes(data) for name, data in tasks.data.items()}  # type: ignore[misc]
    made = tasks.workload(tokens, accumulate=ACCUMULATE)
    plan = widest_plan(spindle.make_metagraph(made), 2)
    result = spindle.train(made, plan, optimizer=sgd, steps=STEPS, launcher="processes", timeout_s=60.0)
    assert list(result.losses) == [pytest.approx(wanted, rel=1e-9) for wanted in on_joined(Tasks())[0]]


REFUSED: dict[str, tuple[Any, str]] = {
    "no such field": ("labels", r"weigh is 'labels', which is no field of its batch \(x, y, count\); give a field"),
    "a tensor": (lambda batch: batch["y"], r"weigh= gave a tensor of shape \(6, 4\) for a batch; it must give one num"),
    "negative": (lambda batch: -1, "weigh= gave -1 for a batch; it must give one number, zero or more"),
    "raises": (lambda batch: batch["no"], "weigh= raised KeyError: 'no'; correct weigh="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_count_is_refused(name: str) -> None:
    weigh, words = REFUSED[name]
    tasks = Tasks()
    with pytest.raises(WorkloadError, match="task 'near': " + words):
        planned(tasks, None, tasks.workload(weigh, accumulate=2))


def test_what_is_neither_name_nor_function_is_refused() -> None:
    with pytest.raises(WorkloadError, match="task 'near': weigh is 3; give 'micro-batches', 'samples', the name of"):
        Tasks().workload(3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8))
def test_shares_make_of_a_mean_the_weighted_one(counts: list[int]) -> None:
    found = shares(counts)
    assert sum(found) == pytest.approx(len(counts) if sum(counts) else 0)
    assert all((share == 0) == (count == 0) for share, count in zip(found, counts, strict=True)) or not sum(counts)
    if len(set(counts)) == 1 and counts[0]:
        assert found == [1.0] * len(counts)
