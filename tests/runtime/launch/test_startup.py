"""Start-up: what a run says of the time before its first steps, and of the groups and peers of its ranks."""

import logging
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.runtime.controller import launched, prepare
from spindle.runtime.launch import processes
from spindle.runtime.rank_spec import make_rank_specs
from spindle.runtime.startup import MANY_GROUPS, Links, Phases
from tests.faults.breaking import Plain, rows
from tests.random_plans import widest_plan
from tests.runtime.programs.hand_program import lowered


def workload_of(layers: int = 2) -> spindle.Workload:
    workload = spindle.Workload("started")
    net = workload.component("net", nn.Sequential(*(Plain() for _ in range(layers))))

    @workload.task("t", batch_size=4, data=[rows(1.0)])
    def task(batch: dict[str, Tensor]) -> Tensor:
        return net(batch["x"]).square().mean()  # type: ignore[no-any-return]

    return workload


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_phases_in_a_sentence() -> None:
    """Phases in order; those of ranks are of the slowest, in brackets behind what the driver waited for them."""
    phases = Phases({"capture": 2.0, "ranks": 5.0, "first step": 0.25})
    phases.slowest([{"join": 0.1, "groups": 3.0}, {"join": 0.5, "groups": 1.0}])
    assert str(phases) == "start-up 7.2 s: capture 2.0, ranks 5.0 (slowest: join 0.5, groups 3.0), first step 0.2"


def test_a_phase_that_fails_is_timed_too() -> None:
    phases = Phases()
    with pytest.raises(KeyError), phases("capture"):
        raise KeyError
    assert list(phases.seconds) == ["capture"]


def test_groups_and_peers_of_the_program_in_the_head() -> None:
    """Ranks 0 and 1 hold the first layer together, and what it makes goes from rank 0 to rank 1."""
    assert str(Links.of(lowered())) == ("process groups: 1, at most 1 of a rank; peers of a rank: at most 1")


def test_many_groups_are_said_to_cost() -> None:
    assert "takes longer with each" not in str(Links(MANY_GROUPS, 3, 2))
    assert "takes longer with each" in str(Links(MANY_GROUPS + 1, 3, 2))


def test_a_run_logs_its_start_up_once(caplog: pytest.LogCaptureFixture) -> None:
    """After the first steps: every phase of the driver, and of ranks, with groups and peers."""
    workload = workload_of()
    prepared = prepare(workload, widest_plan(spindle.make_metagraph(workload), 2))
    with (
        caplog.at_level(logging.INFO, "spindle.runtime.controller"),
        launched(prepared, optimizer=sgd, launcher="threads") as run,
    ):
        run.steps(1)
        run.steps(1)
    (line,) = caplog.messages
    told = ("capture", "lower", "laws", "rank specs", "ranks", "first batches", "first step")
    assert tuple(prepared.phases.seconds) == told
    assert list(prepared.phases.of_ranks) == ["model", "groups"]
    assert line.startswith("start-up ")
    assert line.endswith(str(Links.of(prepared.program)))


def test_training_tells_its_start_up() -> None:
    workload = workload_of()
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    result = spindle.train(workload, plan, optimizer=sgd, steps=1, launcher="threads")
    assert result.startup.startswith("start-up ")


def test_what_ranks_need_is_imported_once_for_all() -> None:
    """Packages that define layers, and what the first optimizer imports; not torch's layers, nor the user's files."""
    workload = workload_of()
    prepared = prepare(workload, widest_plan(spindle.make_metagraph(workload), 1))
    specs = make_rank_specs(prepared.program, prepared.captured, workload, optimizer=sgd)
    assert processes._needed(specs) == ["torch._dynamo"]
    assert processes._needed([replace(specs[0], optimizer=None)]) == []
    assert processes._needed([]) == processes._needed(["something else"]) == []
    assert "torch" in sys.modules
