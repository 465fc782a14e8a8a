"""Turns in real training: as exact as all tasks at once, with the activations of one turn only."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import spindle
from spindle.files.clusterfile import parse_cluster
from spindle.runtime import parity
from spindle.runtime.controller import launched, prepare
from spindle.runtime.programs.program import Instruction
from spindle.runtime.steps.executor import Activations, Executor
from spindle.runtime.steps.record import Timed
from spindle.values.plan import Plan
from tests.random_plans import by_task, widest_plan
from tests.tiny_workloads import five_families, two_towers


def in_turns(workload: spindle.Workload, num_ranks: int) -> Plan:
    metagraph = spindle.make_metagraph(workload)
    return by_task(widest_plan(metagraph, num_ranks), metagraph)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_turns_are_exact(num_ranks: int, sharded: bool, recompute: bool) -> None:
    workload = two_towers(torch.float64)
    plan = replace(in_turns(workload, num_ranks), shard_optimizer=sharded, recompute=recompute)
    report = spindle.verify(workload, plan, launcher="threads", optimizer=adam)
    assert report.ok, str(report)


def adam(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def wide_tasks() -> spindle.Workload:
    """Three tasks on one trunk, whose activations take far more than its parameters."""
    torch.manual_seed(0)
    workload = spindle.Workload("wide")
    layers = (torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()) for _ in range(4))
    trunk = workload.component("trunk", torch.nn.Sequential(*layers).double())
    for index in range(3):
        rows = torch.randn(2, 128, 16, dtype=torch.float64)

        @workload.task(f"t{index}", batch_size=128, data=[{"x": x} for x in rows])
        def task(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return trunk(batch["x"]).square().mean()  # type: ignore[no-any-return]

    return workload


def test_a_plan_made_for_little_memory_is_exact() -> None:
    """From planning to training: two thirds of what all tasks need at once leaves no room for them."""
    workload, where = wide_tasks(), parse_cluster("1x2:cpu")
    roomy = spindle.make_plan(workload, where, time_limit_s=0.1)
    assert roomy.turns == ()
    device = replace(where.device, memory_bytes=0.67 * max(roomy.memory.peak_bytes_per_device))
    plan = spindle.make_plan(workload, replace(where, device=device), time_limit_s=0.1)
    assert plan.turns
    assert not plan.recompute
    assert plan.memory.fits
    report = spindle.verify(workload, plan, launcher="threads")
    assert report.ok, str(report)


def most_held(workload: spindle.Workload, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes of activations that each rank holds at most, as its buffers are after each instruction."""
    most: dict[int, int] = defaultdict(int)
    carry_out = Executor.carry_out

    def watched(self: Executor, instruction: Instruction, spans: list[Timed], step: int) -> None:
        carry_out(self, instruction, spans, step)
        held = [value for value in self.buffers.values() if isinstance(value, Activations)]
        tensors = {id(t): t.nbytes for each in held for t in (*each.inputs.values(), *each.outputs.values())}
        most[self.rank] = max(most[self.rank], sum(tensors.values()))

    monkeypatch.setattr(Executor, "carry_out", watched)
    prepared = prepare(workload, plan)
    with launched(prepared, optimizer=parity.default_optimizer, launcher="threads", timeout_s=30.0) as run:
        run.steps(2)
    monkeypatch.undo()
    return dict(most)


def test_only_the_activations_of_a_turn_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tasks: each rank holds at most what its largest task keeps, and far less than all of them at once."""
    workload = five_families(torch.float32)
    turned = in_turns(workload, 2)
    at_once = most_held(workload, replace(turned, turns=()), monkeypatch)
    one_turn = most_held(workload, turned, monkeypatch)
    assert one_turn.keys() == at_once.keys() == {0, 1}
    for rank, num_bytes in one_turn.items():
        assert 0 < num_bytes < 0.7 * at_once[rank]
