"""Controller: what is checked before anything starts, and how the ranks' results become one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import nn

import spindle
from spindle.errors import PlanError, ProgramError, RunError, WorkloadError
from spindle.runtime import controller
from spindle.runtime.controller import Run, launched, merge_traces, prepare
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.program import Op, Program
from spindle.runtime.worker import Report, merge_losses
from spindle.values.trace import Span, SpanKind
from tests.faults.breaking import marked, workload_of
from tests.random_plans import random_plan, widest_plan


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def test_a_broken_program_is_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lowering made, the laws are asked before any worker is."""
    workload = workload_of(marked)
    plan = widest_plan(spindle.make_metagraph(workload), 2)

    def without_reductions(*args: Any, **kwargs: Any) -> Program:
        program = lower(*args, **kwargs)
        lists = tuple(tuple(i for i in rank if i.op is not Op.REDUCE) for rank in program.instructions)
        return replace(program, instructions=lists)

    monkeypatch.setattr(controller, "lower", without_reductions)
    monkeypatch.setattr(controller, "_start_workers", lambda *_: pytest.fail("a worker was started"))
    with pytest.raises(ProgramError, match=r"so it was not started(.|\n)*rank 0 does REDUCE b\d 0 times, not 1"):
        spindle.train(workload, plan, optimizer=sgd, steps=1, launcher="threads")


def test_a_plan_of_another_workload_is_refused() -> None:
    workload = workload_of(marked)
    other = spindle.Workload("other")
    net = other.component("tower", nn.Linear(4, 4))
    other.task("t", batch_size=4, data=marked)(lambda batch: net(batch["x"]).mean())
    with pytest.raises(PlanError, match=r"runs MetaOp 't\.tower"):
        prepare(workload, widest_plan(spindle.make_metagraph(other), 2))


def test_an_unknown_launcher() -> None:
    prepared = prepare(workload := workload_of(marked), widest_plan(spindle.make_metagraph(workload), 1))
    wrong = cast("controller.Launcher", "slurm")
    with (
        pytest.raises(RunError, match="launcher 'slurm' is not known; choose one of auto, ray"),
        launched(prepared, optimizer=sgd, launcher=wrong),
    ):
        pytest.fail("it was launched")


def test_the_launcher_is_chosen_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's variables first, then Ray where it is installed, else processes."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert controller.chosen("auto") == "ray"
    monkeypatch.setattr(controller, "find_spec", lambda name: None)
    assert controller.chosen("auto") == "processes"
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert controller.chosen("auto") == "torchrun"
    assert controller.chosen("threads") == "threads"


class FakeWorkers:
    """Answers for two ranks, and remembers what it was asked."""

    leads = alone = True

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        self.asked.append(method)
        return self.answers[method]

    def close(self) -> None:
        """Nothing to end."""


def run_on(workers: FakeWorkers) -> Run:
    workload = workload_of(marked)
    return Run(prepare(workload, widest_plan(spindle.make_metagraph(workload), 2)), workers)


@pytest.mark.parametrize(
    ("digests", "ranks"),
    [
        ([{"t": "aa"}, {"t": "bb"}], "0 and 1"),
        ([{"u": "cc"}, {"t": "aa"}, {}, {"t": "bb"}], "1 and 3"),
    ],
)
def test_ranks_that_read_different_batches(digests: list[Mapping[str, str]], ranks: str) -> None:
    """Found before the first step; the task and the two ranks are named."""
    with pytest.raises(WorkloadError, match=f"task 't': ranks {ranks} read different batches"):
        run_on(FakeWorkers(digests=digests))


def test_ranks_that_agree_start() -> None:
    workers = FakeWorkers(digests=[{"t": "aa", "u": "x"}, {"t": "aa"}])
    run_on(workers)
    assert workers.asked == ["digests"]


def test_a_chunk_of_steps_is_one_call() -> None:
    """The driver is not in the data path: so many steps, one call."""
    reports = [Report(0, losses=[{"t": 1.0}, {"t": 2.0}]), Report(1, losses=[{}, {}])]
    workers = FakeWorkers(digests=[{}, {}], run=reports)
    losses, _ = run_on(workers).steps(2)
    assert losses == [{"t": 1.0}, {"t": 2.0}]
    assert workers.asked == ["digests", "run"]


def test_losses_of_all_ranks_by_step() -> None:
    """A loss comes from the rank that ends its task."""
    reports = [Report(0, losses=[{"a": 1.0}, {"a": 3.0}]), Report(1, losses=[{"b": 2.0}, {}])]
    assert merge_losses(reports) == [{"a": 1.0, "b": 2.0}, {"a": 3.0}]
    assert merge_losses([]) == []
    assert [*merge_losses(reports, ["b", "c", "a"])[0]] == ["b", "a"]


def test_spans_of_all_ranks_in_one_trace() -> None:
    """In order of start, counted from the first moment of any rank."""

    def span(rank: int, start_s: float) -> Span:
        return Span(rank=rank, kind=SpanKind.STEP, name="STEP", start_s=start_s, end_s=start_s + 1.0)

    trace = merge_traces([Report(0, spans=[span(0, 7.0)]), Report(1, spans=[span(1, 5.0), span(1, 9.0)])], 2)
    assert [(s.rank, s.start_s) for s in trace] == [(1, 0.0), (0, 2.0), (1, 4.0)]
    assert (trace.num_ranks, trace.source) == (2, "measured")


def test_peaks_of_memory_stand_in_a_trace_where_all_ranks_are_on_gpus() -> None:
    """The highest of each rank's reports."""
    early, late = Report(1, memory_bytes=5, on_gpu=True), Report(1, memory_bytes=7, on_gpu=True)
    first = Report(0, memory_bytes=3, on_gpu=True)
    assert merge_traces([first, early, late], 2).peak_bytes == (3, 7)
    assert merge_traces([Report(0, memory_bytes=3), late], 2).peak_bytes == ()
    assert merge_traces([], 2).peak_bytes == ()


def test_what_ran_is_the_program() -> None:
    """Law 7: the spans of a step bear the names of the rank's instructions, in their order, frees left out."""
    workload = workload_of(marked)
    prepared = prepare(workload, random_plan(spindle.make_metagraph(workload), 3, 4))
    with launched(prepared, optimizer=sgd, launcher="threads") as run:
        _, reports = run.steps(2)
    for rank, report in enumerate(reports):
        planned = [str(i) for i in prepared.program.instructions[rank] if i.op is not Op.FREE]
        for step in (1, 2):
            assert [span.name for span in report.spans if span.step == step] == planned
