"""What a plan says it needs to fit is what a run of it does."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import spindle
from spindle.errors import InfeasibleError
from spindle.files.clusterfile import parse_cluster
from spindle.runtime.controller import prepare
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.execution import Execution
from spindle.values.plan import Plan
from spindle.values.profile import ProfileEntry
from spindle.verbs.source import cost_options_of
from spindle.workload import Workload
from tests.tiny_workloads import HandWritten, floats


def cluster(memory_bytes: float) -> Cluster:
    where = parse_cluster("1x2:cpu")
    return replace(where, device=replace(where.device, memory_bytes=memory_bytes))


def planned(workload: Workload, memory_bytes: float) -> Plan:
    """All devices run everything, since two are measured to be twice as fast as one."""
    entries = {
        (op.kind, n): ProfileEntry(kind=op.kind, num_devices=n, forward_s=1 / n, backward_s=2 / n)
        for metaop in spindle.make_metagraph(workload)
        for op in metaop.operators
        for n in ((1, 2) if op.splittable else (1,))
    }
    profile = spindle.Profile("cpu", entries=tuple(entries.values()))
    return spindle.make_plan(workload, cluster(memory_bytes), profile=profile, method="sequential")


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Six equal layers whose activations weigh as much as their optimizer states."""
    torch.manual_seed(0)
    made = spindle.Workload("deep")
    tower = made.component("tower", HandWritten(5, depth=6).double())
    rows = [{"a": floats(16, 5, seed=s, dtype=torch.float64)} for s in (1, 2, 3)]

    @made.task("fit", batch_size=16, data=rows)
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return tower(batch["a"]).square().mean()  # type: ignore[no-any-return]

    return made


def test_with_room_nothing_is_given_up(workload: Workload) -> None:
    plan = planned(workload, 1e9)
    program = prepare(workload, plan).program
    assert (plan.recompute, plan.shard_optimizer) == (False, False)
    assert not any(run.recompute for run in program.slices)
    assert all(bucket.owner is None for bucket in program.buckets)


def test_what_does_not_fit_is_chosen_run_and_exact(workload: Workload) -> None:
    """Less and less memory: first the states are sharded, then activations recomputed; gradients stay the same."""
    memory_bytes = max(planned(workload, 1e9).memory.peak_bytes_per_device)
    chosen: dict[tuple[bool, bool], Plan] = {}
    while True:
        try:
            plan = planned(workload, memory_bytes)
        except InfeasibleError:
            break
        chosen.setdefault((plan.recompute, plan.shard_optimizer), plan)
        memory_bytes *= 0.99
    assert list(chosen) == [(False, False), (False, True), (True, True)]
    sharded, both = chosen[False, True], chosen[True, True]
    assert all(plan.memory.fits for plan in chosen.values())
    program = prepare(workload, both).program
    assert all(run.recompute and len(run.operators) == 1 for run in program.slices if run.backward)
    shared = [bucket for bucket in prepare(workload, sharded).program.buckets if len(bucket.ranks) > 1]
    assert shared
    assert all(bucket.owner is not None for bucket in shared)
    assert spindle.verify(workload, both, launcher="threads", steps=1).ok


def test_an_optimizer_is_costed_as_its_function_makes_it_regression() -> None:
    """The function gets parameters like those of the workload, with names where it asks for them: planning from a file
    gave it a single one without a name.
    """
    module = spindle.Workload("w")
    module.component("a", torch.nn.Linear(2, 3, device="meta"))

    def by_name(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        known = dict(named_parameters)
        return torch.optim.SGD([{"params": [known["a.weight"]]}, {"params": [known["a.bias"]]}], momentum=0.9)

    assert cost_options_of(module, by_name).optimizer == "sgd_momentum"
    assert cost_options_of(module, lambda parameters: torch.optim.SGD(parameters[1:])).optimizer == "sgd"


def test_a_workload_says_how_it_is_costed() -> None:
    """Its own choices, the optimizer of its file, and that PyTorch runs its modules eagerly."""
    module = spindle.Workload("w", recompute=["a"], shard_optimizer=True)
    eager = Execution(layers="eager", optimizer="plain", tf32=False, gradients="float32")
    told = CostOptions(optimizer="sgd", shard_optimizer=True, recomputed=("a",), execution=eager, wide_gradients=True)
    assert cost_options_of(module, torch.optim.SGD) == told
    bare = cost_options_of(spindle.Workload("w", master_weights="none"))
    assert (bare.master_weights, bare.execution.gradients) == (False, "parameters")
    fused = cost_options_of(module, lambda ps: torch.optim.AdamW(ps, fused=True))
    assert fused.execution.optimizer == "fused"
    momentum = cost_options_of(module, lambda ps: torch.optim.SGD(ps, momentum=0.9))
    assert momentum.optimizer == "sgd_momentum"
    assert cost_options_of(module).optimizer == "adamw"
    assert cost_options_of(module).of("a").recompute
    assert not cost_options_of(module).of("b").recompute
