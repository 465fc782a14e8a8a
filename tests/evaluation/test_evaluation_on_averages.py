"""Evaluation on running averages of the weights."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.errors import WorkloadError
from spindle.runtime.comms.transport import Wait
from spindle.runtime.updates import averages
from tests.evaluation.test_evaluation import assert_scores, by_hand, evaluation_of, towers, trained
from tests.late_transport import late
from tests.plain_loops import WIDTH, Block
from tests.random_plans import random_plan

DECAY = 0.5


class Normed(Block):
    """A layer with running statistics, which are averaged too."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.statistics(x))


@pytest.mark.parametrize(
    ("kind", "num_ranks", "options", "sharded"),
    [
        (Block, 1, {}, ()),
        (Block, 3, {}, ()),
        (Block, 3, {"shard_optimizer": True, "accumulate": 2}, ()),
        (Block, 2, {}, ("one", "two")),
        (Normed, 3, {}, ()),
    ],
    ids=str,
)
def test_scores_are_those_of_the_averages_in_the_checkpoint(
    kind: type[nn.Module], num_ranks: int, options: dict[str, Any], sharded: tuple[str, ...], tmp_path: Path
) -> None:
    """After each evaluation too, and then the weights go on as without: bit-equal."""
    found = []
    for evaluates in (True, False):
        made = towers(kind, ema=spindle.EMA(DECAY, buffers="average"), **options)
        plan = random_plan(spindle.make_metagraph(made), num_ranks, 3, on_all=sharded)
        own: dict[str, Any] = {}
        if evaluates:
            own = {"evaluation": evaluation_of(made, ema=True), "evaluate_every": 2}
        folder = tmp_path / str(evaluates)
        result = trained(made, plan, checkpoints=folder, checkpoint_every=2, **own)
        found.append(
            (result, {name: value.clone() for name, value in (*made.named_parameters(), *made.named_buffers())})
        )
    (result, state), (other, other_state) = found
    assert result.losses == other.losses
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())
    for step in (2, 4):
        spindle.load_checkpoint(made, tmp_path / "True" / f"step-{step:08}", ema=True)
        assert_scores(result.scores[step], by_hand(made))
    assert any(not torch.equal(value, state[name]) for name, value in made.named_parameters())


def test_as_late_as_messages_may_be(tmp_path: Path) -> None:
    """Averages that come from other ranks are waited for."""
    made = towers(ema=DECAY)
    plan = random_plan(spindle.make_metagraph(made), 3, 5)
    with late():
        result = trained(made, plan, checkpoints=tmp_path, evaluation=evaluation_of(made, ema=True), evaluate_every=4)
    spindle.load_checkpoint(made, tmp_path / "step-00000004", ema=True)
    assert_scores(result.scores[4], by_hand(made))


def test_averages_that_are_not_waited_for_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: what comes from other ranks is used at once."""
    whole = averages.brought

    def impatient(*args: Any) -> dict[str, Tensor]:
        transport, waits = args[3], list[Wait]()

        def started(*posts: Any) -> tuple[Wait, Wait]:
            waits.extend(type(transport).start(transport, *posts))
            return (lambda: None), (lambda: None)

        with mock.patch.object(transport, "start", started):
            found = {name: value.clone() for name, value in whole(*args).items()}
        for wait in waits:
            wait()
        return found

    monkeypatch.setattr("spindle.runtime.worker.brought", impatient)
    made = towers(ema=DECAY)
    plan = random_plan(spindle.make_metagraph(made), 3, 5)
    with late():
        result = trained(made, plan, evaluation=evaluation_of(made, ema=True), evaluate_every=4)
    assert any(math.isnan(each["loss"]) for each in result.scores[4].values())


def test_before_the_first_step_that_counts_the_average_is_the_weights() -> None:
    made = towers(ema=spindle.EMA(DECAY, start=100))
    plan = random_plan(spindle.make_metagraph(made), 2, 1)
    result = trained(made, plan, evaluation=evaluation_of(made, ema=True), evaluate_every=4)
    assert_scores(result.scores[4], by_hand(made))


def test_averages_that_stay_where_they_are_kept_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A planted fault: ranks evaluate with the averages that they keep themselves, and else with weights."""
    monkeypatch.setattr("spindle.runtime.worker.brought", lambda averages, *args: dict(averages.values))
    made = towers(ema=DECAY)
    plan = random_plan(spindle.make_metagraph(made), 3, 5)
    result = trained(made, plan, checkpoints=tmp_path, evaluation=evaluation_of(made, ema=True), evaluate_every=4)
    spindle.load_checkpoint(made, tmp_path / "step-00000004", ema=True)
    with pytest.raises(AssertionError):
        assert_scores(result.scores[4], by_hand(made))


def test_an_evaluation_by_itself(tmp_path: Path) -> None:
    """On the average that a checkpoint holds, under a plan of its own or that of the training."""
    made = towers(ema=DECAY)
    plan = random_plan(spindle.make_metagraph(made), 2, 1)
    trained(made, plan, checkpoints=tmp_path)
    found, last = evaluation_of(made, ema=True), tmp_path / "step-00000004"
    scores = spindle.evaluate(found, checkpoint=last, launcher="threads", timeout_s=30.0)
    assert_scores(scores, by_hand(made))
    assert_scores(spindle.evaluate(found, plan, checkpoint=last, launcher="threads", timeout_s=30.0), by_hand(made))
    spindle.load_checkpoint(made, last)
    with pytest.raises(AssertionError):
        assert_scores(scores, by_hand(made))


def test_what_cannot_be() -> None:
    made = towers()
    plan = random_plan(spindle.make_metagraph(made), 1, 1)
    found = evaluation_of(made, ema=True)
    with pytest.raises(WorkloadError, match=r"the workload keeps none; make it with Workload\(ema=0.999\)"):
        trained(made, plan, evaluation=found, evaluate_every=2)
    with pytest.raises(WorkloadError, match="which a checkpoint holds; give one by checkpoint="):
        spindle.evaluate(found, launcher="threads")


def test_weights_come_back_after_a_failure() -> None:
    held = {"x": torch.ones(3)}

    def fail() -> None:
        with averages.standing_in({"x": torch.full((3,), 2.0)}, held):
            assert held["x"].tolist() == [2.0] * 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert held["x"].tolist() == [1.0] * 3
