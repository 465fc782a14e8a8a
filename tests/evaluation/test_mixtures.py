"""Mixtures, stages and limits: which tasks a step has, and when it ends, alike for every plan and after a resume."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spindle
from spindle.errors import PlanError, WorkloadError
from spindle.mixtures import Mixture
from spindle.values.plan import Plan
from spindle.values.presence import Presence, task_sets
from spindle.verbs.stages import Stage, train_stages
from tests.drawn import SEEDS, drawn
from tests.plain_loops import WIDTH, tower
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import floats

Batch = dict[str, Tensor]
NAMES = ("web", "books", "code")


def batches(seed: int, *sizes: int) -> list[Batch]:
    return [
        {"x": floats(size, WIDTH, seed=seed + i, dtype=torch.float64), "y": torch.arange(size) % 3}
        for i, size in enumerate(sizes)
    ]


def trunks(**options: Any) -> spindle.Workload:
    """Three tasks over a trunk and a head of their own each; batches differ in size."""
    torch.manual_seed(0)
    made = spindle.Workload("mixed", **options)
    trunk = made.component("trunk", tower().double())
    for number, name in enumerate(NAMES):
        head = made.component(f"head-{name}", nn.Linear(WIDTH, 3).double())

        def task(b: Batch, head: nn.Module = head) -> Tensor:
            return F.cross_entropy(head(trunk(b["x"])), b["y"])

        made.task(name, batch_size=4, data=batches(10 * number, 4, 4, 3), weight=1.0 + number)(task)
    return made


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


OPTIONS: dict[str, Any] = {"optimizer": sgd, "launcher": "threads", "timeout_s": 30.0}


def values(made: spindle.Workload) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.named_parameters()}


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.allclose(ours[name], theirs[name], 0, 1e-12)] == []


# -- draws ------------------------------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=5),
    temperature=st.floats(0.3, 5),
    data=st.data(),
)
@settings(max_examples=30)
def test_shares_of_a_mixture(weights: list[float], temperature: float, data: st.DataObject) -> None:
    """They sum to one, each set has the number of tasks that is drawn, and what is drawn comes as often as they say."""
    count = data.draw(st.integers(1, len(weights) - 1))
    mixture = Mixture.tempered({f"t{i}": weight for i, weight in enumerate(weights)}, temperature, count)
    sets = mixture.sets()
    assert sets is not None
    assert sum(sets.values()) == pytest.approx(1)
    assert all(len(tasks) == count for tasks in sets)
    if count == 1:
        powers = [weight ** (1 / temperature) for weight in weights]
        shares = [sets[frozenset({f"t{i}"})] for i in range(len(weights))]
        assert shares == pytest.approx([power / sum(powers) for power in powers])
    steps = 2000
    seen = Counter(mixture.drawn(step, 7) for step in range(steps))
    for tasks, share in sets.items():
        assert seen[tasks] / steps == pytest.approx(share, abs=5 * (share * (1 - share) / steps) ** 0.5 + 1e-9)


def test_a_plan_knows_how_often_each_set_of_tasks_comes() -> None:
    """Beside a task of its own probability and one of every second step; of large mixtures steps are drawn."""
    mixture = Mixture(("a", "b"), (3.0, 1.0))
    presences = [
        Presence(task="a", mixture=mixture),
        Presence(task="b", mixture=mixture),
        Presence(task="c", probability=0.5),
        Presence(task="d", every=2),
    ]
    shares = {each.tasks: each.share for each in task_sets(presences)}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["a", "c", "d"] == pytest.approx(0.75 * 0.5 * 0.5)
    assert shares["b",] == pytest.approx(0.25 * 0.5 * 0.5)
    many = Mixture(tuple(f"t{i}" for i in range(12)), (1.0,) * 12, 4)
    found = task_sets([Presence(task=name, mixture=many) for name in many.tasks])
    assert all(len(each.tasks) == 4 for each in found)
    assert sum(each.share for each in found) == pytest.approx(1)


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_a_mixture_trains_as_one_process(num_ranks: int, seed: int) -> None:
    made = trunks()
    made.mixture({"web": 5.0, "books": 1.0, "code": 1.0}, temperature=2.0, tasks_per_step=2)
    plan = random_plan(spindle.make_metagraph(made), num_ranks, seed)
    report = spindle.verify(made, plan, steps=4, optimizer=sgd, launcher="threads", timeout_s=30.0)
    assert report.ok, str(report)
    assert all(len(losses) == 2 for losses in report.losses)


def test_a_resumed_mixture_draws_on(tmp_path: Path) -> None:
    """The same tasks in the same steps, with their data where they stood."""
    found = []
    for resumes in (False, True):
        made = trunks()
        made.mixture({"web": 1.0, "books": 1.0, "code": 2.0})
        plan = widest_plan(spindle.make_metagraph(made), 2)
        options = OPTIONS | {"seed": 5, "checkpoints": tmp_path / str(resumes)}
        losses: tuple[dict[str, float], ...] = ()
        for steps in (3, 7) if resumes else (7,):
            result = spindle.train(made, plan, steps=steps, resume=bool(losses), **options)
            losses += result.losses
        found.append((losses, values(made)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ({"web": 1.0, "film": 1.0}, {}, "names task 'film', which workload 'mixed' does not have"),
        ({"web": 1.0, "books": 0.0}, {}, "gives task 'books' the weight 0.0"),
        ({"web": 1.0, "books": float("nan")}, {}, "gives task 'books' the weight nan"),
        ({"web": 1.0, "books": 1.0}, {"temperature": 0.0}, "has temperature 0.0"),
        ({"web": 1.0, "books": 1.0}, {"tasks_per_step": 2}, "a mixture of 2 tasks draws 2"),
        ({"web": 1.0}, {}, "a mixture of 1 tasks draws 1"),
    ],
)
def test_what_is_no_mixture_is_refused(weights: dict[str, float], options: dict[str, Any], words: str) -> None:
    made = trunks()
    with pytest.raises(WorkloadError, match=words):
        made.mixture(weights, **options)
    assert all(task.mixture is None for task in made.tasks.values())


def test_a_task_takes_part_by_one_rule() -> None:
    made = trunks()
    made.task("rare", batch_size=4, data=batches(3, 4), every=3)(made.tasks["web"].function)
    with pytest.raises(WorkloadError, match="'rare', which takes part by every= or probability= already"):
        made.mixture({"web": 1.0, "rare": 1.0})
    made.mixture({"web": 1.0, "books": 1.0})
    with pytest.raises(WorkloadError, match="'books', which stands in a mixture already"):
        made.mixture({"books": 1.0, "code": 1.0})


def test_of_some_tasks_of_a_mixture_the_others_are_drawn() -> None:
    """A part of a workload (`--tasks`, a stage) draws among what is left of a mixture."""
    made = trunks()
    made.mixture({"web": 5.0, "books": 1.0, "code": 1.0})
    left = made.only(["books", "code"])
    assert {left.tasks_of(step, 0) for step in range(40)} == {("books",), ("code",)}
    assert made.only(["web"]).tasks_of(3, 0) == ("web",)


# -- stages -----------------------------------------------------------------------------------------------------------


STAGES = (
    Stage(until=3, weights={"web": 1.0, "books": 0.5}),
    Stage(until=5, weights={"code": 2.0}),
    Stage(until=8, weights={"web": 0.1, "books": 1.0, "code": 1.0}),
)


def by_hand(made: spindle.Workload, steps: int) -> dict[str, Tensor]:
    """A plain loop that knows which tasks each step has, and with which weights."""

    def forever(task: spindle.workload.Task) -> Iterator[Batch]:
        while True:
            yield from task.batches()

    data = {name: forever(task) for name, task in made.tasks.items()}
    optimizer = sgd([parameter for _, parameter in made.named_parameters()])
    for step in range(steps):
        stage = next(stage for stage in STAGES if step < stage.until)
        optimizer.zero_grad()
        for name in (name for name in made.tasks if name in (stage.weights or {})):
            loss = made.tasks[name].function(dict(next(data[name]))) * (stage.weights or {})[name]
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return values(made)


@drawn(2, num_ranks=range(1, 4), seed=SEEDS, stops=[None, 2, 3, 4, 6])
def test_stages_are_one_training(
    tmp_path_factory: pytest.TempPathFactory, num_ranks: int, seed: int, stops: int | None
) -> None:
    """Each under a plan of its own, from the checkpoint of the one before. A task that rests in one goes on with its
    data where it stood, and momentum of what nobody trains meanwhile is kept. So it is where the run is resumed.
    """
    made = trunks()
    planned: list[set[str]] = []

    def plan(stage: spindle.Workload) -> Plan:
        planned.append(set(stage.tasks))
        return random_plan(spindle.make_metagraph(stage), num_ranks, seed + len(planned))

    options = OPTIONS | {"checkpoints": tmp_path_factory.mktemp("run"), "plan": plan}
    losses: list[dict[str, float]] = []
    if stops is not None:
        losses += train_stages(made, STAGES, steps=stops, **options).losses
        made = trunks()
    result = train_stages(made, STAGES, resume=stops is not None, **options)
    losses += result.losses
    assert [set(step) for step in losses] == [{"web", "books"}] * 3 + [{"code"}] * 2 + [set(NAMES)] * 3
    assert_close(values(made), by_hand(trunks(), 8))
    assert planned[-1] == set(NAMES)


def test_a_stage_draws_from_a_mixture_of_its_own(tmp_path: Path) -> None:
    made = trunks()
    stages = [Stage(until=6, weights={"web": 1.0, "books": 1.0}, mixture={"web": 1.0, "books": 3.0}), Stage(until=8)]
    result = train_stages(made, stages, cluster="1x2:cpu", checkpoints=tmp_path, **OPTIONS)
    assert all(len(losses) == 1 for losses in result.losses[:6])
    assert all(len(losses) == 3 for losses in result.losses[6:])
    with pytest.raises(PlanError, match="8 steps are done already"):
        train_stages(made, stages, cluster="1x2:cpu", checkpoints=tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "there are no stages"),
        ([Stage(until=3), Stage(until=3)], "a stage ends at step 3, and the one before it at 3"),
        ([Stage(until=3, weights={"film": 1.0})], "has no task 'film'"),
        ([Stage(until=3, weights={"web": 0.0})], "gives task 'web' the weight 0.0, and it is registered with 1.0"),
        ([Stage(until=3, weights={"web": 1.0}, mixture={"web": 1.0, "books": 1.0})], "names task 'books'"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: list[Stage], words: str, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=words):
        train_stages(trunks(), stages, checkpoints=tmp_path, **OPTIONS)


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(("limits", "steps"), [({"max_samples": 20}, 2), ({"max_samples": 25}, 3), ({}, 6)])
def test_a_limit_on_samples(num_ranks: int, limits: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """The step that reaches it is the last: steps have 12, 12 and 9 samples. A resumed run counts on."""
    made = trunks()
    plan = widest_plan(spindle.make_metagraph(made), num_ranks)
    result = spindle.train(made, plan, steps=6, **OPTIONS, **limits)
    assert len(result.losses) == steps
    assert ("samples are trained (max_samples is" in result.stopped) == bool(limits)
    options = OPTIONS | {"checkpoints": tmp_path}
    spindle.train(made, plan, steps=1, **options)
    resumed = spindle.train(made, plan, steps=6, resume=True, **options, **limits)
    assert resumed.first_step + len(resumed.losses) == steps
    assert resumed.stopped == result.stopped


def test_a_limit_counts_what_is_trained_in_all_stages(tmp_path: Path) -> None:
    """Not what runs forward only; tasks that rest by then count with what they had."""
    made = trunks()
    made.task("watched", batch_size=4, data=batches(90, 4), weight=0.0)(made.tasks["web"].function)
    stages = [Stage(until=2, weights={"web": 1.0, "watched": 0.0}), Stage(until=9, weights={"code": 1.0})]
    options: dict[str, Any] = OPTIONS | {"checkpoints": tmp_path, "cluster": "1x2:cpu"}
    result = train_stages(made, stages, max_samples=16, **options)
    assert len(result.losses) == 4
    assert result.stopped.startswith("16 samples are trained")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_limit_on_tokens_that_no_batch_has_is_refused(num_ranks: int) -> None:
    made = trunks()
    plan = widest_plan(spindle.make_metagraph(made), num_ranks)
    with pytest.raises(WorkloadError, match=r"max_tokens is 5, but no batch of tasks .*web.* has tokens"):
        spindle.train(made, plan, steps=6, max_tokens=5, **OPTIONS)


def test_a_limit_on_tokens() -> None:
    """Tokens are those of metrics: the sum of attention_mask, or the size of input_ids."""
    torch.manual_seed(0)
    made = spindle.Workload("text")
    table, head = (
        made.component("table", nn.Embedding(9, WIDTH).double()),
        made.component("head", nn.Linear(WIDTH, 9).double()),
    )
    ids = torch.arange(12).reshape(2, 6) % 9

    @made.task("t", batch_size=2, data=[{"input_ids": ids}])
    def task(b: Batch) -> Tensor:
        return F.cross_entropy(head(table(b["input_ids"])).flatten(0, 1), b["input_ids"].flatten())

    plan = widest_plan(spindle.make_metagraph(made), 2)
    result = spindle.train(made, plan, steps=9, max_tokens=30, **OPTIONS)
    assert len(result.losses) == 3
    assert result.stopped == "36 tokens are trained (max_tokens is 30)"


def test_a_limit_is_at_least_one() -> None:
    with pytest.raises(PlanError, match="max_tokens is 0"):
        spindle.train(trunks(), steps=1, max_tokens=0, **OPTIONS)
