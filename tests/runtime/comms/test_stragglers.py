"""Stragglers: which ranks are named for being slow, when, and which are not; and what a rank's clock tells."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import spindle
from spindle.runtime.controller import Prepared, prepare
from spindle.runtime.devices import Streams
from spindle.runtime.faults.slowness import PATIENCE, WINDOW
from spindle.runtime.faults.stragglers import Stragglers
from spindle.runtime.steps.busy import Busy
from spindle.runtime.watch import RankStep
from spindle.runtime.worker import Report
from spindle.values.plan import Plan, SizeRange, make_waves
from spindle.workload import Workload
from tests.parity.test_tensor_parallel import spread
from tests.parity.test_tensor_parallel import workload as cut
from tests.random_plans import widest_plan
from tests.tiny_workloads import HandWritten, floats

Speed = Callable[[int, int], float]
"""How many times as long as usual a rank takes in a step."""


def steady(rank: int, step: int) -> float:
    return 1.0


def towers() -> Workload:
    """Two tasks, each with a model of its own."""
    torch.manual_seed(0)
    made = Workload("towers")
    for name, seed in (("a", 0), ("b", 9)):
        net = made.component(name, HandWritten(8, 8, depth=2).float())

        def loss(batch: dict[str, Tensor], net: Any = net) -> Tensor:
            return net(batch["x"]).square().mean()  # type: ignore[no-any-return]

        made.task(name, batch_size=12, data=[{"x": floats(12, 8, seed=seed, dtype=torch.float32)}])(loss)
    return made


def together(num_ranks: int) -> Prepared:
    """All layers on all ranks."""
    made = towers()
    return prepare(made, widest_plan(spindle.make_metagraph(made), num_ranks))


def apart(wrong: float = 1.0, **more: Any) -> Prepared:
    """Each task on a rank of its own; the prediction of the second rank is `wrong` by this factor."""
    made = towers()
    plan: Plan = widest_plan(spindle.make_metagraph(made), 2)
    slices = [
        replace(
            s,
            devices=(int(s.metaop.startswith("b")),),
            start_s=float(i),
            end_s=i + (wrong if s.metaop.startswith("b") else 1.0),
        )
        for i, s in enumerate(plan.slices)
    ]
    return prepare(made, replace(plan, waves=make_waves(slices), makespan_s=20.0, **more))


def said(found: Prepared, windows: int, speed: Speed = steady, *, jitter: Speed = steady, chunk: int = 7) -> list[str]:
    """What is said in some windows; a step takes each run 10 ms on each rank, times what these say."""
    watched, told, step = Stragglers(found.program, found.plan), [], 0
    all_runs = [run for run in found.program.slices if len(run.ranks) > 1] or found.program.slices
    while step < windows * WINDOW:
        reports = [Report(rank) for rank in range(found.program.num_ranks)]
        count = min(chunk, windows * WINDOW - step)
        for number in range(step, step + count):
            for report in reports:
                runs = [run for run in all_runs if report.rank in run.ranks]
                took = {
                    run.name: 0.01 * speed(report.rank, number) * jitter(report.rank, number) / len(run.ranks)
                    for run in runs
                }
                report.steps.append(RankStep(sum(took.values()), busy_s=took))
        told += watched.take(step + 1, reports)
        step += count
    return told


def slow(rank: int, factor: float, since: int = 0, until: int = 10**9) -> Speed:
    return lambda own, step: factor if own == rank and since <= step < until else 1.0


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("since", [0, 3 * WINDOW])
def test_a_slow_rank_is_named_once(num_ranks: int, since: int) -> None:
    """With the ranks that are faster, by how much, and what a plan without it, or with its speed, would give."""
    (told,) = said(together(num_ranks), 12, slow(1, 2.0, since))
    first, last = since + 1, since + PATIENCE * WINDOW
    assert told.startswith(f"rank 1 is a straggler in steps {first} to {last}: it computes 2.0 times as long as rank")
    step_s, fast_s, without_s, slower_s = map(
        float,
        re.findall(r"takes (\S+) s, and (\S+) s if .* at best (\S+) s without it, (\S+) s with its speed", told)[0],
    )
    assert step_s == pytest.approx(2 * fast_s, rel=0.01)
    assert without_s == pytest.approx(fast_s * num_ranks / (num_ranks - 1), rel=0.01)
    assert slower_s == pytest.approx(fast_s * num_ranks / (num_ranks - 0.5), rel=0.01)


def test_it_is_named_again_when_it_gets_worse() -> None:
    def speed(rank: int, step: int) -> float:
        return (2.0 if step < 8 * WINDOW else 2.2 if step < 16 * WINDOW else 4.0) if rank == 0 else 1.0

    factors = [re.findall(r"computes (\S+) times", told)[0] for told in said(together(3), 24, speed)]
    assert factors == ["2.0", "4.0"]


@pytest.mark.parametrize(
    ("speed", "windows"),
    [
        (slow(1, 9.0, 5 * WINDOW, 7 * WINDOW), 12),
        (slow(1, 1.4), 12),
        (lambda rank, step: 1.0 + step // 100, 20),
        (lambda rank, step: 5.0 if step % 4 == rank else 1.0, 20),
    ],
    ids=["for two windows", "a little", "all of them", "in turn"],
)
def test_others_are_not_named(speed: Speed, windows: int) -> None:
    assert said(together(3), windows, speed) == []
    assert said(apart(), windows, speed) == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", [lambda: together(2), lambda: together(4), apart], ids=["two", "four", "apart"])
def test_noise_is_not_slowness(make: Callable[[], Prepared], seed: int) -> None:
    """Each rank by itself takes up to half as long again in any step, and in one of five up to twenty times as long."""
    draw = random.Random(seed)

    def jitter(rank: int, step: int) -> float:
        return draw.uniform(1.0, 1.5) * (draw.uniform(2.0, 20.0) if draw.random() < 0.2 else 1.0)

    assert said(make(), 60, jitter=jitter) == []


def test_a_rank_that_runs_layers_alone_is_compared_with_itself_and_its_share() -> None:
    (told,) = said(apart(), 20, slow(1, 2.0, 4 * WINDOW))
    assert "it computes 2.0 times as long as it was itself in earlier steps" in told
    (told,) = said(apart(), 20, slow(1, 4.0))
    assert "it computes 4.0 times as long as its share of the prediction" in told
    assert said(apart(wrong=2.5), 20) == []
    assert said(apart(), 20, slow(1, 2.0)) == []  # such a prediction may be wrong by as much


def test_batches_of_many_sizes_are_no_slowness() -> None:
    """Those that the plan was made for differ, so that a task's load may rise on the rank that runs it."""
    sizes = (SizeRange(task="b", field="samples", least=2, most=9),)
    assert said(apart(sizes=sizes), 20, slow(1, 2.0, 4 * WINDOW)) == []


def test_ranks_that_cut_layers_between_them_are_left_out() -> None:
    """They wait for each other in them; one rank has nobody beside it."""
    made = cut(degree=2)
    found = prepare(made, spread(made, 4, 2))
    watched = Stragglers(found.program, found.plan)
    between = {run.name for run in found.program.slices if run.tensor_parallel > 1}
    assert between
    for number in range(8 * WINDOW):
        took = {1: dict.fromkeys(between, 9.0)}
        reports = [Report(rank, steps=[RankStep(9.0, busy_s=took.get(rank, {}))]) for rank in range(4)]
        assert watched.take(number + 1, reports) == []
    assert said(together(1), 8, slow(0, 5.0)) == []


class Passing(Streams):
    """A device that comes to a moment when it is told to."""

    ahead = 1

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.clock_s, self.passed_s = 0.0, 0.0

    def mark(self) -> float:
        return self.clock_s

    def has_passed(self, moment: float) -> bool:
        return moment <= self.passed_s


def test_a_device_s_events_are_told_when_it_has_passed_them() -> None:
    """Nobody waits: what a step's end has not passed comes with a later one."""
    device = Passing()
    busy = Busy(device)
    for run, seconds in (("s0", 2.0), ("s1", 3.0), ("s0", 1.0)):
        begun = busy.begin()
        device.clock_s += seconds
        busy.end(run, begun)
    assert busy.taken() == {}
    device.passed_s = 5.0
    assert busy.taken() == {"s0": 2.0, "s1": 3.0}
    device.passed_s = 6.0
    assert busy.taken() == {"s0": 1.0}
    assert busy.taken() == {}


def test_a_cpu_s_clock_adds_up() -> None:
    busy = Busy(Streams(torch.device("cpu")))
    for run in ("s0", "s1", "s0"):
        busy.end(run, busy.begin())
    found = busy.taken()
    assert found.keys() == {"s0", "s1"}
    assert all(seconds >= 0 for seconds in found.values())
