"""Elastic runs: devices are lost or come, the run plans anew for what is there, and its losses are those of a
run that had them from the checkpoint on.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spindle
from spindle.errors import InfeasibleError, InputError, LostRankError, NoRoomError, PlanError, RunError, SpindleWarning
from spindle.failures import Failures
from spindle.runtime.checkpoints.checkpoint import read
from spindle.runtime.faults.elastic import Elastic, shape_of
from spindle.runtime.faults.preemption import Notice
from spindle.runtime.faults.recovery import Attempts
from spindle.runtime.training import Steps
from spindle.values.outlook import Outlook
from spindle.values.plan import Plan
from tests.faults import injected
from tests.faults.injected import Fault, workload_of


def planned(count: int, fault: Fault) -> Plan:
    """All devices at each layer: a search would leave so small a model to one of them."""
    return spindle.make_plan(workload_of(fault), f"1x{count}:cpu", method="sequential")


def trained(
    fault: Fault, folder: Path, plan: "Plan | Callable[[str], Plan]", steps: int = 8, **more: Any
) -> tuple["spindle.TrainResult", dict[str, Tensor]]:
    """A run with a checkpoint every second step, and its weights."""
    given: dict[str, Any] = {"launcher": "threads", "timeout_s": 30.0} | more
    return injected.trained(fault, plan=plan, steps=steps, checkpoints=folder, **given)


def arming(fault: Fault, times: int) -> Callable[[int, dict[str, float]], None]:
    """The fault happens so often, from the fourth step on."""

    def on_step(step: int, losses: dict[str, float]) -> None:
        if step == 3 and not fault.folder.exists():
            fault.armed(times)

    return on_step


def check_goes_on_as_if_resumed(
    result: "spindle.TrainResult", weights: dict[str, Tensor], plans: tuple[Plan, Plan], fault: Fault, folder: Path
) -> None:
    """Losses and weights are those of a run under the first plan up to the checkpoint, and under the second from it on,
    bit for bit.
    """
    found = re.search(r"went on from step (\d+)", result.recovered[0])
    assert found, result.recovered
    calm, at = replace(fault, folder=fault.folder / "none"), int(found[1])
    first, _ = trained(calm, folder, plans[0], at)
    second, expected = trained(calm, folder, plans[1], resume=True)
    assert result.losses == first.losses + second.losses
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.gloo
def test_a_rank_that_is_lost_for_good(tmp_path: Path) -> None:
    """Killed twice in a row without a checkpoint in between, its device counts as lost: the plan is one for one device
    fewer.
    """
    fault = Fault("killed", "forward", tmp_path / "faults", call=1)
    plan = planned(2, fault)
    failures = Failures(max_failures=4, backoff_s=0.01, elastic=True)
    with pytest.warns(SpindleWarning, match="planned anew"):
        result, weights = trained(
            fault, tmp_path / "c", plan, launcher="processes", on_step=arming(fault, 2), failures=failures
        )
    killed, again, anew = result.recovered
    assert killed.startswith("rank 1 died (exit code -9)")
    assert again.startswith("rank 1 died (exit code -9)")
    words = r"planned anew for 1 device \(1x1\), not 2: a step is predicted to take \S+ s, not \S+ s; planning took \S+"
    assert re.match(words, anew)
    assert result.plan.num_devices == 1
    check_goes_on_as_if_resumed(result, weights, (plan, result.plan), fault, tmp_path / "calm")


def test_what_is_left_may_be_said(tmp_path: Path) -> None:
    """By a function, which is asked after each failure. The first plan comes back with its devices."""
    fault = Fault("raises", "forward", tmp_path / "faults", rank=0, call=1)
    answers = iter(["1x3", "2", "1x3"])
    failures = Failures(max_failures=4, backoff_s=0.0, elastic=True, devices=lambda: next(answers))
    plan = planned(3, fault)
    result, weights = trained(fault, tmp_path / "c", plan, on_step=arming(fault, 2), failures=failures)
    assert [told.partition(":")[0].partition(", for")[0] for told in result.recovered] == [
        "rank 0, wave 0, FORWARD s0 (t.first.0) raised ValueError",
        "planned anew for 2 devices (1x2), not 3",
        "rank 0, wave 0, FORWARD s0 (t.first.0) raised ValueError",
        "back to the first plan",
    ]
    assert result.plan is plan
    check_goes_on_as_if_resumed(result, weights, (plan, plan), fault, tmp_path / "calm")


def test_a_function_plans_anew(tmp_path: Path) -> None:
    """With options of the user's own, which a plan does not tell."""
    fault = Fault("raises", "forward", tmp_path / "faults")
    asked: list[str] = []

    def plan(shape: str) -> Plan:
        asked.append(shape)
        return planned(int(shape.rpartition("x")[2]), fault)

    result, _ = trained(fault, tmp_path / "c", plan, 2, failures=Failures(elastic=True, devices=lambda: "3"))
    assert asked[-1] == "1x3"
    assert result.plan.num_devices == 3
    with pytest.raises(PlanError, match=r"plan= was asked for a plan for 1x\d+ devices and gave one for 99"):
        trained(fault, tmp_path / "c", lambda shape: replace(plan(shape), num_devices=99), 4, resume=True)


def test_a_run_that_is_resumed_takes_the_devices_that_came(tmp_path: Path) -> None:
    """Its losses are those of a run that is given such a plan."""
    fault = Fault("raises", "forward", tmp_path / "faults")
    plan = planned(1, fault)
    trained(fault, tmp_path / "c", plan, 4)
    failures = Failures(elastic=True, devices=lambda: "1x2")
    result, weights = trained(fault, tmp_path / "c", plan, resume=True, failures=failures)
    assert result.recovered[0].startswith("planned anew for 2 devices (1x2), not 1")
    trained(fault, tmp_path / "other", plan, 4)
    expected, other = trained(fault, tmp_path / "other", result.plan, resume=True)
    assert result.losses == expected.losses
    assert all(torch.equal(weights[name], other[name]) for name in other)


def test_each_stage_follows_the_devices(tmp_path: Path) -> None:
    """Its plan is made for the cluster that is named, and made anew for the devices that are there."""
    fault = Fault("raises", "forward", tmp_path / "faults")
    result = spindle.train_stages(
        workload_of(fault),
        [spindle.Stage(until=1), spindle.Stage(until=2)],
        cluster="1x1:cpu",
        checkpoints=tmp_path / "c",
        optimizer=injected.optimizer_of(fault),
        launcher="threads",
        failures=Failures(elastic=True, devices=lambda: "2"),
    )
    assert [told.partition(":")[0] for told in result.recovered] == ["planned anew for 2 devices (1x2), not 1"] * 2
    assert result.plan.num_devices == 2


def test_a_plan_keeps_the_memory_limit_of_the_first(tmp_path: Path) -> None:
    """And its links. What does not fit there is refused, with what was tried."""
    fault = Fault("raises", "forward", tmp_path / "faults")
    plan = planned(2, fault)
    assert plan.cluster is not None
    small = replace(plan.cluster, device=replace(plan.cluster.device, memory_bytes=3000.0))
    failures = Failures(elastic=True, devices=lambda: "1")
    with pytest.raises(InfeasibleError, match=r"planned anew for 1 device \(1x1\), not 2, and found no plan: .*GiB"):
        trained(fault, tmp_path / "c", replace(plan, cluster=small), failures=failures)
    roomy = replace(plan.cluster, device=replace(plan.cluster.device, memory_bytes=123456789.0))
    measured = replace(plan, cluster=roomy, outlook=Outlook(source="profiled", low_s=0.0, high_s=1.0))
    result, _ = trained(fault, tmp_path / "c", measured, 2, failures=failures)
    assert result.plan.cluster == replace(roomy, devices_per_node=1)
    assert "; with predicted times, not those of a profile" in result.recovered[0]


def test_too_few_devices_end_the_run(tmp_path: Path) -> None:
    """With the failure that took them, and what to do."""
    fault = Fault("raises", "forward", tmp_path / "faults", call=1)
    failures = Failures(max_failures=1, backoff_s=0.0, elastic=True, min_devices=2, devices=lambda: str(left()))

    def left() -> int:
        return 1 if (fault.folder / "at").exists() else 2

    with pytest.raises(RunError, match=r"ValueError: too hot; 1 devices are there, and min_devices is 2: .*--resume"):
        trained(fault, tmp_path / "c", planned(2, fault), on_step=arming(fault, 1), failures=failures)


def test_without_elastic_a_rank_that_is_lost_again_ends_the_run() -> None:
    """As ever; the error says what would go on."""

    def attempt(start: object) -> None:
        raise LostRankError.at(1, "rank 1 died")

    attempts = Attempts(Failures(max_failures=1, backoff_s=0.0), read)
    with pytest.raises(RunError, match=r"rank 1 was lost again: elastic=True \(--elastic\) would go on without"):
        attempts.run(attempt, Steps(), Notice(grace_s=1.0, saves=False))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_devices": 0, "elastic": True}, "min_devices is 0; give a whole number, 1 or more"),
        ({"min_devices": 2}, "min_devices=2 is for a run that may change its devices; add elastic=True"),
        ({"devices": str}, "devices is for a run that may change its devices; add elastic=True"),
    ],
)
def test_what_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        Failures(**values)


@pytest.mark.parametrize(("answer", "words"), [("many", "is not NODESxDEVICES"), (None, "raised ZeroDivisionError")])
def test_an_answer_that_is_none(answer: str | None, words: str, tmp_path: Path) -> None:
    """Of the user's function: named before the first step."""
    fault = Fault("raises", "forward", tmp_path / "faults")
    failures = Failures(elastic=True, devices=lambda: answer or str(1 / 0))
    with pytest.raises(spindle.SpindleError, match=words):
        trained(fault, tmp_path / "c", planned(2, fault), failures=failures)


def resized(former: Plan, shape: tuple[int, int]) -> Plan:
    """Stands for a plan of another number of devices where no run follows."""
    return replace(former, num_devices=shape[0] * shape[1], devices_per_node=shape[1])


def test_nodes_of_another_size(tmp_path: Path) -> None:
    """As many devices as the plan has, and none of its nodes fits on one of Ray's: another plan for these."""
    plan = planned(4, Fault("raises", "forward", tmp_path / "faults"))
    elastic = Elastic(Failures(elastic=True), "ray", plan, resized)
    error = NoRoomError("no room for an island of 4 ranks")
    error.free = (2, 2)
    assert elastic.after(error, stuck=False).startswith("planned anew for 4 devices (2x2), not 4")
    assert elastic.plan.devices_per_node == 2
    assert elastic.after(error, stuck=False) == ""  # the same again: this is a failure


@pytest.mark.parametrize(("waits", "said"), [(False, "planned anew for 8 devices (2x4), not 4"), (True, "")])
def test_a_run_that_waits_for_nodes(waits: bool, said: str, tmp_path: Path) -> None:
    """It keeps its plan at the start: the nodes that are there, which may be others, are not those it waits for."""
    plan = planned(4, Fault("raises", "forward", tmp_path / "faults"))
    elastic = Elastic(Failures(elastic=True, devices=lambda: "2x4"), "ray", plan, resized, waits=waits)
    assert elastic.begin().partition(":")[0] == said


def test_gpus_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begins with those that are there, and leaves out those whose ranks were lost twice, whatever ranks the
    others have by then.
    """
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    plan = planned(4, Fault("raises", "forward", tmp_path / "faults"))
    elastic = Elastic(Failures(elastic=True), "processes", plan, resized)
    assert elastic.begin().startswith("planned anew for 3 devices (1x3), not 4")
    for lost, gone, left in ((1, {1}, 2), (1, {1, 2}, 1)):
        error = LostRankError.at(lost, f"rank {lost} died")
        assert elastic.after(error, stuck=False) == ""
        assert elastic.after(error, stuck=True).startswith(f"planned anew for {left} device")
        assert elastic.lost_gpus == gone
    error = LostRankError.at(0, "rank 0 died")
    elastic.after(error, stuck=False)
    with pytest.raises(RunError, match="rank 0 died; 0 devices are there, and min_devices is 1: the run ends"):
        elastic.after(error, stuck=True)


@given(st.lists(st.integers(0, 9), max_size=6))
def test_the_most_devices_of_equal_nodes(free: list[int]) -> None:
    """Of all shapes that the free devices of nodes have room for, one of the most devices."""
    rooms = [
        (nodes, count)
        for count in range(1, 10)
        for nodes in range(1, len(free) + 1)
        if nodes <= sum(each >= count for each in free)
    ]
    found = shape_of(free)
    if found is None:
        assert not rooms
    else:
        assert found in rooms
        assert found[0] * found[1] == max(nodes * count for nodes, count in rooms)
