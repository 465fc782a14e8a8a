"""Evaluation: forward-only tasks between steps, as one process gives them, which training does not see."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.errors import PlanError
from spindle.metrics import Callback, EvaluationMetrics, Scores, StepMetrics
from spindle.runtime.controller import Launcher, prepare
from spindle.runtime.evaluation.prepare import prepare_beside
from tests.drawn import SEEDS, drawn
from tests.parity.test_tensor_parallel import workload as spread
from tests.plain_loops import WIDTH, Block, tower
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import floats

Batch = dict[str, Tensor]


class Stateful(Block):
    """A layer that draws, and keeps running statistics and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y: Tensor = self.dropout(super().forward(self.statistics(x))) * (1 + 0.01 * self.calls)
        return y


class Mixing(nn.Module):
    """A layer beside one that mixes samples while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.above, self.below = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.statistics, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.statistics(torch.relu(self.above(x)))) + self.below(x)
        return y


def batches(*sizes: int, seed: int = 1) -> list[Batch]:
    """Batches of these numbers of samples."""
    return [
        {
            "x": floats(size, WIDTH, seed=seed + i, dtype=torch.float64),
            "y": torch.arange(size).roll(i) % 3,
        }
        for i, size in enumerate(sizes)
    ]


def right(outputs: Batch) -> tuple[Tensor, int]:
    """How many of how many samples are classified right."""
    return (outputs["logits"].argmax(-1) == outputs["y"]).sum(), len(outputs["y"])


def mean(y: Tensor) -> Tensor:
    """A loss of any values."""
    return y.square().mean()


def largest(outputs: Batch) -> Tensor:
    """The largest similarity of two samples of the whole pass: no sum over batches gives it."""
    y = F.normalize(outputs["logits"], dim=-1)
    found: Tensor = (y @ y.T - 2 * torch.eye(len(y), dtype=y.dtype)).max()
    return found


def towers(kind: type[nn.Module] = Block, **options: Any) -> spindle.Workload:
    """Two tasks over two towers and a head."""
    torch.manual_seed(0)
    made = spindle.Workload("towers", **options)
    one, two = made.component("one", tower(kind).double()), made.component("two", tower(kind).double())
    head = made.component("head", nn.Linear(WIDTH, 3).double())

    @made.task("first", batch_size=4, data=batches(4, 4, 3))
    def first(b: Batch) -> Tensor:
        return F.cross_entropy(head(one(b["x"])), b["y"])

    @made.task("second", batch_size=4, data=batches(4, 4, seed=30))
    def second(b: Batch) -> Tensor:
        return F.cross_entropy(head(two(b["x"])), b["y"]) + mean(one(b["x"]))

    return made


def evaluation_of(made: spindle.Workload, **options: Any) -> spindle.Evaluation:
    """Two tasks with short last batches: a loss alone, and outputs with metrics."""
    found = spindle.Evaluation(made, **options)
    one, two, head = (made.components[name].module for name in ("one", "two", "head"))

    @found.task("plain", batch_size=4, data=batches(4, 4, 1, seed=50))
    def plain(b: Batch) -> Tensor:
        return F.cross_entropy(head(two(b["x"])), b["y"])

    @found.task(
        "measured",
        batch_size=6,
        data=lambda: iter(batches(6, 5, seed=70)),
        metrics={"accuracy": right, "samples": lambda outputs: len(outputs["y"])},
        over_all={"largest": largest},
    )
    def measured(b: Batch) -> Batch:
        logits = head(two(one(b["x"])))
        return {"loss": F.cross_entropy(logits, b["y"]), "logits": logits, "y": b["y"]}

    return found


def drawing(made: spindle.Workload) -> spindle.Evaluation:
    """A task that draws from the process's generators and from a place in the code, and changes a count of calls."""
    found = spindle.Evaluation(made)
    one, two = made.components["one"].module, made.components["two"].module

    def data() -> Iterator[Batch]:
        for b in batches(4, 4, 1, seed=50):
            yield {**b, "noise": torch.rand(len(b["y"]), 1, dtype=torch.float64)}

    @found.task("drawing", batch_size=4, data=data)
    def task(b: Batch) -> Tensor:
        x = b["x"] + b["noise"] + torch.rand_like(b["x"])
        return mean(two(one(x)))

    return found


def by_hand(made: spindle.Workload) -> dict[str, dict[str, float]]:
    """What a plain loop over the same modules gives, which are as they were afterwards."""
    one, two, head = (made.components[name].module for name in ("one", "two", "head"))
    modules = [part for module in (one, two, head) for part in module.modules()]
    modes = [(part, part.training) for part in modules]
    buffers = [(buffer, buffer.clone()) for _, buffer in made.named_buffers()]
    for module in (one, two, head):
        module.eval()
    plain = {"loss": 0.0}
    with torch.no_grad():
        for b in batches(4, 4, 1, seed=50):
            plain["loss"] += float(F.cross_entropy(head(two(b["x"])), b["y"])) * len(b["y"]) / 9
        for buffer, value in buffers:
            buffer.copy_(value)
        total, correct, seen = 0.0, 0, []
        for b in batches(6, 5, seed=70):
            logits = head(two(one(b["x"])))
            total += float(F.cross_entropy(logits, b["y"])) * len(b["y"])
            correct += int((logits.argmax(-1) == b["y"]).sum())
            seen.append(logits)
        for buffer, value in buffers:
            buffer.copy_(value)
    for part, mode in modes:
        part.training = mode
    scores = {"accuracy": correct / 11, "samples": 11.0, "largest": float(largest({"logits": torch.cat(seen)}))}
    return {"plain": plain, "measured": {"loss": total / 11, **scores}}


def assert_scores(ours: Scores, theirs: Mapping[str, Mapping[str, float]]) -> None:
    assert ours.keys() == theirs.keys()
    for task, scores in theirs.items():
        assert ours[task] == pytest.approx(scores, abs=1e-12), task


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trained(
    made: spindle.Workload, plan: spindle.Plan, *, steps: int = 4, launcher: Launcher = "threads", **options: Any
) -> spindle.TrainResult:
    return spindle.train(made, plan, optimizer=sgd, steps=steps, launcher=launcher, timeout_s=30.0, **options)


class Told(Callback):
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.found: list[EvaluationMetrics | int] = []

    def on_step_end(self, metrics: StepMetrics) -> None:
        self.found.append(metrics.step)

    def on_evaluate(self, metrics: EvaluationMetrics) -> None:
        self.found.append(metrics)


# -- scores -----------------------------------------------------------------------------------------------------------


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_scores_beside_training_are_those_of_one_process(num_ranks: int, seed: int) -> None:
    """With the weights of the step, whatever plan trains them; the modules' own modes come back."""
    made = towers()
    list(made.components["two"].module.children())[1].eval()
    modes = [m.training for c in made.components.values() for m in c.module.modules()]
    plan = random_plan(spindle.make_metagraph(made), num_ranks, seed)
    result = trained(made, plan, evaluation=evaluation_of(made), evaluate_every=2)
    assert list(result.scores) == [2, 4]
    assert_scores(result.scores[4], by_hand(made))
    assert modes == [m.training for c in made.components.values() for m in c.module.modules()]


@drawn(2, num_ranks=range(1, 5), seed=SEEDS)
def test_layers_with_states_are_evaluated_as_they_stand(num_ranks: int, seed: int) -> None:
    """Running statistics and counters of the step are used, dropout is off. The counter begins each pass where training
    has left it: in one process it goes on from batch to batch of one task, and so it does here.
    """
    made = towers(Stateful)
    plan = random_plan(spindle.make_metagraph(made), num_ranks, seed)
    found = spindle.Evaluation(made)
    one, two = made.components["one"].module, made.components["two"].module

    @found.task("t", batch_size=4, data=batches(4, 2))
    def task(b: Batch) -> Tensor:
        return mean(two(one(b["x"])))

    result = trained(made, plan, evaluation=found, evaluate_every=4)
    buffers = [(buffer, buffer.clone()) for _, buffer in made.named_buffers()]
    one.eval(), two.eval()
    with torch.no_grad():
        expected = sum(float(two(one(b["x"])).square().mean()) * len(b["y"]) for b in batches(4, 2)) / 6
    assert any(not torch.equal(buffer, value) for buffer, value in buffers)
    assert result.scores[4]["t"]["loss"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_what_training_cuts_where_it_mixes_samples_is_evaluated_whole(num_ranks: int) -> None:
    """In eval mode batch norm mixes no samples, so the operators around it are one, whose parameters one device has of
    several runs.
    """
    torch.manual_seed(0)
    made = spindle.Workload("statistics")
    one, two = made.component("one", tower().double()), made.component("two", tower().double())
    net = made.component("net", Mixing().double())
    made.task("t", batch_size=4, data=batches(4, 4))(lambda b: mean(two(net(one(b["x"])))))
    found = spindle.Evaluation(made)
    found.task("t", batch_size=4, data=batches(4, 3))(lambda b: mean(two(net(one(b["x"])))))
    plan = widest_plan(spindle.make_metagraph(made), num_ranks)
    assert len({run.metaop for run in prepare(made, plan).program.slices if "net" in run.metaop}) > 1
    result = trained(made, plan, evaluation=found, evaluate_every=4)
    net.eval()
    with torch.no_grad():
        expected = sum(float(mean(two(net(one(b["x"]))))) * len(b["y"]) for b in batches(4, 3)) / 7
    assert result.scores[4]["t"]["loss"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [Block, Stateful])
@drawn(2, num_ranks=range(1, 4), seed=SEEDS)
def test_training_does_not_see_an_evaluation(kind: type[nn.Module], num_ranks: int, seed: int) -> None:
    """Losses, weights, buffers, random numbers and the order of data are bit-equal with and without."""
    found = []
    for evaluates in (False, True):
        made = towers(kind)
        plan = random_plan(spindle.make_metagraph(made), num_ranks, seed)
        evaluation = evaluation_of(made) if kind is Block else drawing(made)
        options: dict[str, Any] = {"evaluation": evaluation, "evaluate_every": 1} if evaluates else {}
        result = trained(made, plan, seed=3, **options)
        state = {name: value.clone() for name, value in (*made.named_parameters(), *made.named_buffers())}
        found.append((result.losses, state))
    (losses, state), (others, other_state) = found
    assert losses == others
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_an_evaluation_by_itself(num_ranks: int) -> None:
    """Under a plan of its own, of forward alone, or under that of the training; modules are as before."""
    made = towers()
    found = evaluation_of(made)
    plan = widest_plan(spindle.make_metagraph(made), num_ranks)
    expected = by_hand(made)
    assert_scores(spindle.evaluate(found, launcher="threads", timeout_s=30.0), expected)
    assert_scores(spindle.evaluate(found, plan, launcher="threads", timeout_s=30.0), expected)
    assert all(m.training for c in made.components.values() for m in c.module.modules())


def test_sharded_parameters_are_gathered_for_an_evaluation() -> None:
    """No device holds them whole: rows of training are used, layer by layer."""
    made = towers()
    plan = random_plan(spindle.make_metagraph(made), 3, 5, on_all=("two",))
    result = trained(made, plan, evaluation=evaluation_of(made), evaluate_every=2)
    assert_scores(result.scores[4], by_hand(made))


@drawn(2, num_ranks=range(2, 5), seed=SEEDS)
def test_tensor_parallel_layers_are_evaluated_as_they_are_cut(num_ranks: int, seed: int) -> None:
    """In the layout that a run of the training has them in; a batch of one sample too."""
    made = spread()
    found = spindle.Evaluation(made)
    expected = {}
    for name, task in made.tasks.items():
        data = [dict(batch) for batch in task.batches()]
        short = {field: value[:1] for field, value in data[0].items()}
        found.task(name, batch_size=task.batch_size, data=[*data, short])(task.function)
        sizes = [task.batch_size] * len(data) + [1]
        expected[name] = (task, [*data, short], sizes)
    plan = random_plan(spindle.make_metagraph(made), num_ranks, seed)
    result = trained(made, plan, steps=2, evaluation=found, evaluate_every=2)
    for name, (task, data, sizes) in expected.items():
        with torch.no_grad():
            total = sum(float(task.function(batch)) * size for batch, size in zip(data, sizes, strict=True))
        assert result.scores[2][name]["loss"] == pytest.approx(total / sum(sizes), abs=1e-10)


def test_a_batch_too_small_for_sharded_parameters_is_refused() -> None:
    made = towers()
    found = spindle.Evaluation(made)
    two = made.components["two"].module

    @found.task("tiny", batch_size=2, data=batches(2))
    def tiny(b: Batch) -> Tensor:
        return mean(two(b["x"]))

    plan = random_plan(spindle.make_metagraph(made), 3, 5, on_all=("two",))
    with pytest.raises(PlanError, match=r"sharded over .* give it a batch_size of at least 3"):
        trained(made, plan, evaluation=found, evaluate_every=1)


def test_no_device_holds_more_than_it_trains_with() -> None:
    """Each run of the evaluation is on ranks of a run of training that holds the same parameters."""
    made = towers()
    for seed in range(5):
        prepared = prepare(made, random_plan(spindle.make_metagraph(made), 4, seed))
        evaluated = prepare_beside(evaluation_of(made), prepared)

        def held(captured: Any, program: Any) -> list[set[str]]:
            return [
                {name for op in names for _, name in captured.codes[op].parameters}
                for names in program.operators_by_rank
            ]

        training = held(prepared.captured, prepared.program)
        assert all(own <= more for own, more in zip(held(evaluated.captured, evaluated.program), training, strict=True))
        assert not any(run.backward for run in evaluated.program.slices)


def test_components_that_training_leaves_out_are_evaluated() -> None:
    """Their weights are those of the user's modules."""
    made = towers()
    extra = made.component("extra", nn.Linear(WIDTH, 2).double())
    found = spindle.Evaluation(made)
    one = made.components["one"].module

    @found.task("t", batch_size=4, data=batches(4, 4))
    def task(b: Batch) -> Tensor:
        return mean(extra(one(b["x"])))

    result = trained(made, random_plan(spindle.make_metagraph(made), 3, 1), evaluation=found, evaluate_every=4)
    with torch.no_grad():
        expected = sum(float(extra(one(b["x"])).square().mean()) for b in batches(4, 4)) / 2
    assert result.scores[4]["t"]["loss"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("launcher", ["processes"])
def test_an_evaluation_in_processes(launcher: Launcher) -> None:
    """Functions, metrics and loaders travel to them, and shared batches come from one of them."""
    made = towers(Stateful)
    found = spindle.Evaluation(made)
    one = made.components["one"].module
    data = torch.utils.data.DataLoader(Rows(), batch_size=4)

    @found.task("t", batch_size=4, data=data, metrics={"mean": lambda o: (o["y"].sum(), o["y"].numel())})
    def task(b: Batch) -> Batch:
        return {"y": one(b["x"])}

    plan = widest_plan(spindle.make_metagraph(made), 2)
    result = trained(made, plan, launcher=launcher, steps=2, evaluation=found, evaluate_every=1)
    assert list(result.scores) == [1, 2]
    one.eval()
    buffers = [(buffer, buffer.clone()) for buffer in one.buffers()]
    with torch.no_grad():
        every = torch.cat([one(torch.stack([Rows()[i]["x"] for i in part])) for part in ((0, 1, 2, 3), (4, 5))])
        for buffer, value in buffers:
            buffer.copy_(value)
    assert result.scores[2]["t"] == pytest.approx({"mean": float(every.mean())}, abs=1e-12)


class Rows(torch.utils.data.Dataset[Batch]):
    """Six samples."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Batch:
        return {"x": floats(WIDTH, seed=index, dtype=torch.float64)}


# -- what follows from scores -----------------------------------------------------------------------------------------


def test_callbacks_are_told_between_the_steps() -> None:
    made, told = towers(), Told()
    trained(
        made,
        widest_plan(spindle.make_metagraph(made), 2),
        steps=5,
        evaluation=evaluation_of(made),
        evaluate_every=2,
        callbacks=[told],
    )
    steps = [each if isinstance(each, int) else f"evaluated {each.step}" for each in told.found]
    assert steps == [1, 2, "evaluated 2", 3, 4, "evaluated 4", 5]


def scored(values: list[float]) -> Callable[[Batch], float]:
    """A metric that gives these numbers, one for each evaluation."""
    left = iter(values)
    return lambda outputs: next(left)


def with_metric(made: spindle.Workload, values: list[float]) -> spindle.Evaluation:
    found = spindle.Evaluation(made)
    one = made.components["one"].module
    found.task("t", batch_size=4, data=batches(4), metrics={"m": scored(values)})(lambda b: {"y": one(b["x"])})
    return found


def names_in(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


@pytest.mark.parametrize(("mode", "kept"), [("max", [2, 5, 6]), ("min", [4, 5, 6])])
def test_the_best_checkpoint_stays(tmp_path: Path, mode: str, kept: list[int]) -> None:
    """Beside the newest ones; of equal ones the first is the best, and what is no number never is."""
    made = towers()
    result = trained(
        made,
        widest_plan(spindle.make_metagraph(made), 1),
        steps=6,
        evaluation=with_metric(made, [2.0, 3.0, 1.0, 0.5, float("nan"), 3.0]),
        evaluate_every=1,
        keep_best=f"t:m:{mode}",
        checkpoints=tmp_path,
        checkpoint_every=1,
        keep_checkpoints=2,
    )
    assert result.best == tmp_path / f"step-{kept[0]:08}"
    assert names_in(tmp_path) == kept


def test_a_best_checkpoint_is_written_between_others(tmp_path: Path) -> None:
    made = towers()
    trained(
        made,
        widest_plan(spindle.make_metagraph(made), 1),
        steps=6,
        evaluation=with_metric(made, [2.0, 1.0, 3.0, 4.0, 5.0, 6.0]),
        evaluate_every=1,
        keep_best="t:m:min",
        checkpoints=tmp_path,
        checkpoint_every=5,
    )
    assert names_in(tmp_path) == [1, 2, 5, 6]


def test_training_stops_where_a_metric_does_not_improve(tmp_path: Path) -> None:
    """After so many evaluations in a row, with a checkpoint; a resumed run counts on, and stops there too."""
    made = towers()
    stop = spindle.EarlyStop(metric="t:m:max", patience=2, min_delta=0.1)
    values = [1.0, 2.0, 2.05, 2.05, 9.0]
    plan = widest_plan(spindle.make_metagraph(made), 1)
    options: dict[str, Any] = {"evaluate_every": 1, "early_stop": stop, "checkpoints": tmp_path}
    result = trained(made, plan, steps=9, evaluation=with_metric(made, values), **options)
    assert len(result.losses) == 4
    assert "t:m has not improved in 2 evaluations (after step 4 it is 2.05, the best is 2)" in result.stopped
    assert names_in(tmp_path) == [4]
    again = towers()
    early = trained(
        again, plan, steps=3, evaluation=with_metric(again, values), **options | {"checkpoints": tmp_path / "b"}
    )
    assert not early.stopped
    resumed = trained(
        again,
        plan,
        steps=9,
        evaluation=with_metric(again, values[3:]),
        resume=True,
        **options | {"checkpoints": tmp_path / "b"},
    )
    assert resumed.first_step + len(resumed.losses) == 4
    assert resumed.stopped == result.stopped
    assert resumed.scores == result.scores


def test_a_resumed_run_evaluates_at_the_same_steps(tmp_path: Path) -> None:
    """With the same scores, to the bit, and those before it too."""
    whole = towers(Stateful)
    plan = widest_plan(spindle.make_metagraph(whole), 2)
    expected = trained(whole, plan, steps=4, evaluation=drawing(whole), evaluate_every=2).scores
    made = towers(Stateful)
    options: dict[str, Any] = {"evaluate_every": 2, "checkpoints": tmp_path}
    trained(made, plan, steps=3, evaluation=drawing(made), **options)
    resumed = trained(made, plan, steps=4, evaluation=drawing(made), resume=True, **options)
    assert list(expected) == [2, 4]
    assert resumed.scores == expected
