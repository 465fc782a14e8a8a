"""Slow links: which ranks are named for a slow link between them, when, and which are not; and what is measured."""

import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import spindle
from spindle.files.clusterfile import parse_cluster
from spindle.runtime.comms.transport import ThreadTransport, Wait
from spindle.runtime.faults.slow_links import SlowLinks
from spindle.runtime.faults.slowness import PATIENCE, WINDOW
from spindle.runtime.launch import worker_group
from spindle.runtime.steps.busy import Meeting, Together
from spindle.runtime.watch import RankStep
from spindle.runtime.worker import Report
from spindle.values.outlook import Outlook
from spindle.values.plan import Plan, Slice, make_waves
from tests.random_plans import widest_plan
from tests.runtime.comms.test_stragglers import Passing, towers

Group = tuple[int, ...]
Takes = Callable[[Group, int], float]
"""Seconds that the collective of a group takes in a step."""
Late = Callable[[int, int], float]
"""Seconds that a rank comes late in a step."""

PAIRS = ((0, 1), (2, 3), (4, 5))
FOUR = 4 * WINDOW
NUM_BYTES = 10**6


def plan_for(num_ranks: int, per_node: int | None = None) -> Plan:
    whole = Slice(metaop="t.net", first_layer=0, num_layers=1, devices=tuple(range(num_ranks)), start_s=0.0, end_s=1.0)
    per_node, waves = per_node or num_ranks, make_waves([whole])
    return Plan(num_devices=num_ranks, devices_per_node=per_node, method="test", waves=waves, makespan_s=1.0)


def said(
    groups: tuple[Group, ...], takes: Takes, *, windows: int = 12, late: Late = lambda *_: 0.0, plan: Plan | None = None
) -> list[str]:
    """What is said in some windows: each rank computes for 0.1 s, and comes late; then its group sums."""
    ranks = sorted({rank for group in groups for rank in group})
    watched, found = SlowLinks(plan or plan_for(len(ranks))), []
    for step in range(1, windows * WINDOW + 1):
        reports = [Report(rank) for rank in ranks]
        for report in reports:
            together = {}
            for group in groups:
                if report.rank in group:
                    seconds = takes(group, step)
                    waited = seconds + max(late(r, step) for r in group) - late(report.rank, step)
                    meeting = Meeting(step, "b0", 0, "all_reduce", group, NUM_BYTES)
                    together[meeting] = waited, waited + 0.001
            report.steps.append(RankStep(0.4, busy_s={"s0": 0.1}, together_s=together))
        found += watched.take(step, reports)
    return found


def slow(group: Group, seconds: float, since: int = 0) -> Takes:
    return lambda own, step: seconds if own == group and step > since else 0.05


@pytest.mark.parametrize("group", [(0, 1), (0, 1, 2)])
def test_a_link_that_becomes_slow_is_named_once(group: Group) -> None:
    """With what it takes, and what a plan that sends nothing over it could give."""
    (told,) = said((group,), slow(group, 0.15, FOUR))
    link = "the link between ranks 0 and 1 is" if len(group) == 2 else "a link among ranks 0, 1, 2 is"
    assert told.startswith(f"{link} slow in steps {FOUR + 1} to {FOUR + PATIENCE * WINDOW}: what they sum and gather ")
    assert "takes 2.9 times as long as in earlier steps" in told
    assert "(0.15 s a step, not 0.051 s). A step takes 0.4 s, and 0.301 s if it were as fast; planned anew" in told
    assert "at best 0.25 s, with nothing sent over it" in told


def test_a_link_that_is_slow_from_the_start_is_compared_with_others_alike() -> None:
    (told,) = said(PAIRS, slow((2, 3), 0.15))
    assert told.startswith("the link between ranks 2 and 3 is slow in steps 1 to 60: ")
    assert "as long as between other ranks" in told
    over_nodes = plan_for(6, per_node=3)  # ranks 2 and 3 are on two of them, which may well be slower
    assert said(PAIRS, slow((2, 3), 0.15), plan=over_nodes) == []


def test_a_profile_tells_what_messages_take() -> None:
    """Without one a prediction of links says nothing about this machine's."""
    cluster = parse_cluster("1x2:a100-80g")
    predicted = replace(plan_for(2), cluster=cluster, outlook=Outlook(source="predicted", low_s=0.1, high_s=0.2))
    assert said(((0, 1),), slow((0, 1), 0.05), plan=predicted) == []
    profiled = replace(predicted, outlook=Outlook(source="profiled", low_s=0.1, high_s=0.2))
    (told,) = said(((0, 1),), slow((0, 1), 0.05), plan=profiled)
    assert "times as long as predicted" in told


@pytest.mark.parametrize("seed", range(4))
def test_a_late_rank_is_no_slow_link(seed: int) -> None:
    """Whoever it is in whichever step, and however late: the last one to come waits for the link alone."""
    draw = random.Random(seed)
    delays = [[draw.uniform(0.0, 1.0) * (step > FOUR) for _ in range(3)] for step in range(20 * WINDOW + 1)]
    assert said(((0, 1, 2),), slow((), 0.0), late=lambda rank, step: delays[step][rank], windows=20) == []
    assert said(((0, 1),), slow((), 0.0), late=lambda rank, step: float(rank and step > FOUR)) == []


@pytest.mark.parametrize(
    "takes",
    [
        lambda group, step: 0.15 if FOUR < step <= FOUR + 2 * WINDOW else 0.05,
        lambda group, step: 0.15 if step % 3 == 0 else 0.05,
        lambda group, step: 0.065 if step > FOUR else 0.05,
    ],
    ids=["for two windows", "now and then", "a little"],
)
def test_others_are_not_named(takes: Takes) -> None:
    assert said(((0, 1),), takes) == []


def test_a_device_s_moments_are_told_when_it_has_passed_them() -> None:
    """Seconds waited, and since the start, by step and how often a name came up in it."""
    device = Passing()
    together = Together(device)

    def wait() -> None:
        device.clock_s += 2.0

    for step in (1, 2):
        together.begin(step)
        waited = together.timed("f0", "all_gather", (0, 1), 8, lambda: wait)
        device.clock_s += 3.0
        waited()
    assert together.taken() == {}
    device.passed_s = 5.0
    assert together.taken() == {Meeting(1, "f0", 0, "all_gather", (0, 1), 8): (2.0, 5.0)}
    device.passed_s = 10.0
    assert together.taken() == {Meeting(2, "f0", 0, "all_gather", (0, 1), 8): (2.0, 5.0)}


class Congested(ThreadTransport):
    """After 25 sums of gradients over a group each takes 40 ms more."""

    sums = 0

    def all_reduce(self, values: Tensor, ranks: tuple[int, ...]) -> Wait:
        arrive = super().all_reduce(values, ranks)
        is_gradient = values.numel() > 8  # not what ranks agree on
        self.sums += is_gradient
        is_late = is_gradient and self.sums > 25

        def late() -> None:
            arrive()
            until_s = time.perf_counter() + 0.04
            while is_late and time.perf_counter() < until_s:
                torch.ones(64, 64).tanh()

        return late


def test_a_link_that_becomes_slow_in_a_run_is_named(recwarn: pytest.WarningsRecorder) -> None:
    made = towers()
    options: dict[str, Any] = {"launcher": "threads", "steps": 100}
    with mock.patch.object(worker_group, "ThreadTransport", Congested):
        spindle.train(
            made,
            widest_plan(spindle.make_metagraph(made), 2),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            **options,
        )
    told = [str(each.message) for each in recwarn if "link" in str(each.message)]
    assert told
    assert all(re.match(r"the link between ranks 0 and 1 is slow in steps \d+ to \d+: ", each) for each in told)
