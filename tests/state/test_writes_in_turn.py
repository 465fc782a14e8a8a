"""Writes to parameters whose order shows: once a batch, in the order of one process; and torch's AveragedModel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import spindle
from tests.drawn import SEEDS, drawn
from tests.state.stateful import WIDTH, batches, follows, sgd, stack
from tests.state.test_writes import (
    Clock,
    Layer,
    _advanced,
    after,
    before,
    by_clock,
    data_after,
    data_in_place_after,
    follows_the_frozen,
    moves,
    nothing,
    quiet,
    teacher,
    two,
)

IN_TURN: dict[str, tuple[Callable[..., None], Callable[..., None], tuple[int, int]]] = {
    "used earlier": (nothing, before, (1, 1)),
    "used later": (after, nothing, (1, 1)),
    "by two tasks": (before, before, (1, 1)),
    "by two tasks, on both sides": (after, before, (3, 1)),
    "what another reads for its own": (before, follows_the_frozen, (2, 1)),
    "at once": (before, nothing, (2, 2)),
    "for each batch": (before, nothing, (2, 1)),
    "after each batch of some": (nothing, after, (4, 2)),
    "unnoticed": (data_after, nothing, (2, 2)),
    "unnoticed, by two tasks": (data_after, data_after, (2, 1)),
    "unnoticed, in place": (data_in_place_after, before, (1, 1)),
}
"""What two tasks write, `accumulate` and `in_flight`, where it shows when each batch writes."""


@quiet
@pytest.mark.parametrize("case", IN_TURN)
@drawn(1, num_ranks=range(1, 5), seed=SEEDS, every=((1, 1), (2, 1), (1, 2)))
def test_writes_in_turn(case: str, num_ranks: int, seed: int, every: tuple[int, int]) -> None:
    """Batches of the tasks concerned follow each other where their order shows."""
    first, second, (accumulate, in_flight) = IN_TURN[case]
    follows(lambda: two(first, second, every, accumulate=accumulate, in_flight=in_flight), num_ranks, seed)


@quiet
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, when=(before, after), in_flight=(1, 2), both=(False, True))
def test_writes_beside_states_in_turn(
    num_ranks: int, seed: int, when: Callable[..., None], in_flight: int, both: bool
) -> None:
    """A write that nobody else sees goes on once a batch where other tasks need an order of batches; and a state keeps
    its order where a task that touches it writes in turn (`both`).
    """

    def make() -> spindle.Workload:
        workload = two(when, nothing, accumulate=2, in_flight=in_flight)
        clock = workload.component("clock", Clock())
        for name in ("third", "fourth"):

            @workload.task(name, batch_size=6, data=batches(3), every=2)
            def task(batch: dict[str, Tensor], name: str = name) -> Tensor:
                _advanced(clock, "before")
                tower, frozen = (workload.components[part].module for part in ("tower", "frozen"))
                if both and name == "third":
                    with torch.no_grad():
                        moves(0, tower, frozen, batch["x"], 0)
                found: Tensor = tower(batch["x"]).square().mean() / (1 + clock.step)
                return found

        return workload

    follows(make, num_ranks, seed, steps=4)


@quiet
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, after=(False, True), every=(1, 2))
def test_a_teacher_of_several_batches_at_once(num_ranks: int, seed: int, after: bool, every: int) -> None:
    """Its own task follows batch after batch; the other one runs several at once."""
    follows(teacher("lerp", after=after, accumulate=4, in_flight=2, every=every), num_ranks, seed, steps=4)


@quiet
def test_a_run_in_turn_says_so_and_resumes() -> None:
    """What waits for each other is named; and verify agrees after a resume under another plan."""
    words = r"tasks change what others, or other batches, read \('follow'\): their 4 batches of a step run one after"
    with pytest.warns(spindle.errors.SpindleWarning, match=words):
        report = spindle.verify(
            by_clock("before", accumulate=4, in_flight=2)(),
            num_workers=2,
            steps=4,
            optimizer=sgd,
            resume_under=3,
            launcher="threads",
        )
    assert report.ok, str(report)


@quiet
def test_what_backward_computes_again_cannot_be_written_unnoticed() -> None:
    with pytest.raises(spindle.SpindleError, match=r"'tower.0.*through .data.*'tower'.*leave its component out of rec"):
        spindle.train(two(data_after, nothing, recompute=["tower"]), optimizer=sgd, steps=1, launcher="threads")


swa: Any = swa_utils
AVERAGES: dict[str, dict[str, object]] = {
    "equal": {},
    "equal, several at once": {"multi_avg_fn": swa.get_swa_multi_avg_fn()},
    "exponential": {"avg_fn": swa.get_ema_avg_fn(0.7)},
    "exponential, several at once": {"multi_avg_fn": swa.get_ema_multi_avg_fn(0.7)},
    "of the user's own": {"avg_fn": lambda mine, theirs, count: mine * (count / (count + 1)) + theirs / (count + 1)},
    "with buffers": {"use_buffers": True},
}


@quiet
@pytest.mark.parametrize("kind", AVERAGES)
@drawn(1, num_ranks=range(1, 5), seed=SEEDS, after=(False, True), rounds=((1, 1), (2, 2)))
def test_an_averaged_model(kind: str, num_ranks: int, seed: int, after: bool, rounds: tuple[int, int]) -> None:
    """Torch's AveragedModel copies the first time, by a count in a buffer, and averages from then on."""

    def make() -> spindle.Workload:
        workload = spindle.Workload("average", accumulate=rounds[0], in_flight=rounds[1])
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)).double()
        student = workload.component("student", made, layers=["0", "2"])
        averaged = swa.AveragedModel(student, **AVERAGES[kind]).requires_grad_(False)
        with torch.no_grad():
            averaged.module[0].weight.mul_(3)  # what the first call overwrites
        workload.component("averaged", averaged)

        @workload.task("follow", batch_size=6, data=batches(1))
        def follow(batch: dict[str, Tensor]) -> Tensor:
            if not after:
                averaged.update_parameters(student)
            with torch.no_grad():
                target = averaged(batch["x"])
            loss: Tensor = (1.1 * student(batch["x"]) - target).square().mean()
            if after:
                averaged.update_parameters(student)
            return loss

        return workload

    follows(make, num_ranks, seed, steps=4)


@quiet
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, every=(1, 2))
def test_a_count_of_two_tasks_that_write_by_it(num_ranks: int, seed: int, every: int) -> None:
    """Both move the same teacher, and count in one buffer."""

    def make() -> spindle.Workload:
        workload = spindle.Workload("clocks", accumulate=2, in_flight=2)
        student = workload.component("student", stack(Layer))
        averaged: Any = swa.AveragedModel(student)
        workload.component("averaged", averaged.requires_grad_(False))
        for number in range(2):

            @workload.task(f"t{number}", batch_size=6, data=batches(number), every=every if number else 1)
            def task(batch: dict[str, Tensor]) -> Tensor:
                averaged.update_parameters(student)
                found: Tensor = (1.1 * student(batch["x"]) - averaged(batch["x"])).square().mean()
                return found

        return workload

    follows(make, num_ranks, seed, steps=4)


class Queue(nn.Module):
    """MoCo as it was published: the place in its queue is a number of Python."""

    queue: Tensor
    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.key.requires_grad_(False)
        self.register_buffer("queue", torch.randn(12, 3))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def move(self) -> None:
        for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            k.data = k.data * 0.9 + q.data * 0.1

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.move()
            keys = self.key(x)
            place = int(self.place)
            self.queue[place : place + len(x)] = keys
            self.place.add_(len(x)).remainder_(len(self.queue))
        found: Tensor = self.query(x) @ self.queue.clone().T
        return found


@quiet
def test_the_line_of_a_write_is_that_of_the_write() -> None:
    """Not of what the class does with an attribute of the parameter's name."""
    torch.manual_seed(0)
    workload = spindle.Workload("queue")
    queue = workload.component("moco", Queue().double())
    workload.task("t", batch_size=6, data=batches(1))(lambda batch: queue(batch["x"]).square().mean())
    line = Queue.move.__code__.co_firstlineno + 2
    with pytest.raises(
        spindle.SpindleError, match=rf"writes to its parameter 'key\.\w+' .*\(line {line} of test_writes_in_turn"
    ):
        spindle.make_metagraph(workload)
