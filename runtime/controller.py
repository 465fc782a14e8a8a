"""Controller: a workload and a plan in, a crew running its program out. What `train` and `verify` share.

Before anything starts the program is checked against the laws, and the ranks' first batches are compared.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from spindle.capture import Captured, capture
from spindle.contract import contract
from spindle.errors import RunError, SpindleWarning, WorkloadError
from spindle.graph import base_task
from spindle.metagraph import MetaGraph
from spindle.plan import Plan
from spindle.runtime.launch.crew import Crew, ThreadCrew
from spindle.runtime.launch.torchrun import TorchrunCrew, place_among_all, under_torchrun
from spindle.runtime.laws import check_program
from spindle.runtime.optimizers import (
    Metric,
    OptimizerFactory,
    SchedulerFactory,
    check_optimizer,
    described,
    make_optimizer,
    make_schedule,
    stand_in,
)
from spindle.runtime.parallel.names import joined_pieces
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.program import Program
from spindle.runtime.progress import merged
from spindle.runtime.trial_steps import check_trial_steps
from spindle.runtime.worker import Report, make_jobs, merge_losses
from spindle.trace import Trace
from spindle.workload import Workload

if TYPE_CHECKING:
    from spindle.runtime.checkpoint import Checkpoint, Checkpoints

Launcher = Literal["auto", "ray", "processes", "threads", "torchrun"]


@dataclass(frozen=True)
class Prepared:
    """A workload lowered for a plan."""

    workload: Workload
    captured: Captured
    metagraph: MetaGraph
    plan: Plan
    program: Program


def prepare(workload: Workload, plan: Plan) -> Prepared:
    """Capture, lower and check. Raises PlanError for a plan of another workload, ProgramError on a broken law."""
    captured = capture(workload)
    metagraph = contract(captured.graph)
    program = lower(
        plan,
        metagraph,
        captured.graph,
        losses=captured.losses,
        weights={task: weight / workload.accumulate for task, weight in captured.weights.items()},
        max_grad_norm=workload.max_grad_norm,
        recompute={metaop.component for metaop in metagraph} if plan.recompute else workload.recompute,
        shard_optimizer=plan.shard_optimizer or workload.shard_optimizer,
        rounds=workload.accumulate // workload.in_flight,
        varying={name for name in captured.tasks if workload.tasks[base_task(name)].rows is not None},
    )
    check_program(program)
    return Prepared(workload, captured, metagraph, plan, program)


class Run:
    """A crew at work on a prepared workload."""

    def __init__(self, prepared: Prepared, crew: Crew, timeout_s: float = 60.0) -> None:
        """Compares the first batches that the ranks read; raises WorkloadError when loaders disagree.

        A step may take as long as one rank may wait for another, `timeout_s`, and the first ones somewhat longer.
        """
        self.prepared, self.crew, self.timeout_s = prepared, crew, timeout_s
        self.drifted: set[str] = set()
        self._check_batches(crew.call("digests"))

    @staticmethod
    def _check_batches(digests: Sequence[Mapping[str, str]]) -> None:
        seen: dict[str, tuple[int, str]] = {}
        for rank, by_task in enumerate(digests):
            for task, digest in by_task.items():
                first, expected = seen.setdefault(task, (rank, digest))
                if digest != expected:
                    raise WorkloadError(
                        f"task {task!r}: ranks {first} and {rank} read different batches; every pass over its data "
                        "must give the same batches in every process (seed your own random generators)"
                    )

    def steps(self, count: int, **options: Any) -> tuple[list[dict[str, float]], list[Report]]:
        """Run `count` steps on all ranks; losses by step, and the reports."""
        reports = self.crew.call("run", count, patience_s=(count + 2) * self.timeout_s, **options)
        self._warn_of_drift(reports)
        return merge_losses(reports), reports

    def _warn_of_drift(self, reports: Sequence[Report]) -> None:
        """Once a task."""
        for task, sentence in ((t, s) for report in reports for t, s in report.drift.items()):
            if task not in self.drifted and self.crew.leads:
                self.drifted.add(task)
                warnings.warn(sentence, SpindleWarning, stacklevel=4)

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the whole run, each from the rank that answers for it."""
        return joined_pieces({name: tensor for held in self.crew.call("state") for name, tensor in held.items()})

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """States of the whole run's optimizer as `optimizer:NAME:KEY`."""
        held = self.crew.call("optimizer_state")
        return joined_pieces({name: tensor for states in held for name, tensor in states.items()})

    def save(self, checkpoints: "Checkpoints", step: int, seed: int) -> Path:
        """Write a checkpoint after `step` steps; its path."""
        from spindle.runtime.checkpoint import begin, finish, path_of, unfinished_of

        path = path_of(checkpoints.directory, step)
        unfinished = begin(path) if self.crew.leads else unfinished_of(path)
        self.crew.call("sync")
        progress = merged(self.crew.call("save", str(unfinished)))
        if self.crew.leads:
            finish(unfinished, path, step=step, seed=seed, progress=progress, keep=checkpoints.keep)
        return path

    def resume(self, checkpoint: "Checkpoint") -> None:
        """Go on where a checkpoint ended; its weights are in the user's modules already."""
        self.crew.call("load", str(checkpoint.path), checkpoint.step, checkpoint.progress)


@contextlib.contextmanager
def launched(
    prepared: Prepared,
    *,
    optimizer: OptimizerFactory | None,
    scheduler: SchedulerFactory | None = None,
    metric: Metric | None = None,
    launcher: Launcher = "auto",
    seed: int = 0,
    timeout_s: float = 60.0,
    saves: bool = False,
) -> Iterator[Run]:
    """Start a crew for a prepared workload, and end it whatever happens. `saves`: it will write or read checkpoints.

    Raises WorkloadError, before anything starts, for an optimizer or a schedule that cannot step as in one process, and
    CheckpointError for one of which a checkpoint would not hold all.
    """
    program = prepared.program
    if optimizer is not None:
        _check_steps(prepared, optimizer, scheduler, metric, saves=saves)
    jobs = make_jobs(
        program,
        prepared.captured,
        prepared.workload,
        optimizer=optimizer,
        scheduler=scheduler,
        metric=metric,
        seed=seed,
        timeout_s=timeout_s,
        sizes=prepared.plan.sizes,
    )
    crew = _make_crew(_chosen(launcher), jobs, prepared.plan.devices_per_node, timeout_s)
    try:
        yield Run(prepared, crew, timeout_s)
    finally:
        crew.close()


def _check_steps(
    prepared: Prepared,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    metric: Metric | None,
    *,
    saves: bool,
) -> None:
    """Make optimizer and schedule once, of stand-ins, and see whether they can be stepped as in one process."""
    workload, program = prepared.workload, prepared.program
    every = described(workload.named_parameters())
    parameters = {p.name: stand_in(p, torch.device("cpu")) for p in every}
    made = make_optimizer(optimizer, parameters, workload.optimizer_settings).optimizer
    make_schedule(scheduler, made, metric)
    check_trial_steps(every, workload.optimizer_settings, optimizer, scheduler, metric, saves=saves)
    specs = (p for operator in prepared.captured.graph for p in operator.parameters)
    check_optimizer(
        made,
        cut={p.name.partition(".")[0] for p in specs if p.pieces > 1 and p.trainable},
        same_everywhere=len({(bucket.ranks, bucket.owner) for bucket in program.buckets}) <= 1,
        steps_apart=program.num_ranks > 1,
    )


def place_among_drivers(launcher: Launcher) -> tuple[int, int]:
    """Which of how many processes that drive one run this is: under torchrun every rank is one."""
    return place_among_all() if _chosen(launcher) == "torchrun" else (0, 1)


def _chosen(launcher: str) -> str:
    if launcher not in get_args(Launcher):
        raise RunError(f"launcher {launcher!r} is not known; choose one of {', '.join(get_args(Launcher))}")
    if launcher != "auto":
        return launcher
    if under_torchrun():
        return "torchrun"
    return "ray" if find_spec("ray") else "processes"


def _make_crew(launcher: str, jobs: Sequence[Any], devices_per_node: int, timeout_s: float) -> Crew:
    if launcher == "ray":
        from spindle.runtime.launch.ray_crew import RayCrew

        return RayCrew(jobs, devices_per_node=devices_per_node, timeout_s=timeout_s)
    if launcher == "processes":
        from spindle.runtime.launch.processes import ProcessCrew

        return ProcessCrew(jobs, timeout_s=timeout_s)
    if launcher == "torchrun":
        return TorchrunCrew(jobs, timeout_s=timeout_s)
    return ThreadCrew(jobs, timeout_s=timeout_s)


def merge_traces(reports: Sequence[Report], num_ranks: int) -> Trace:
    """One trace of all ranks, its times counted from its first moment."""
    spans = sorted((span for report in reports for span in report.spans), key=lambda s: (s.start_s, s.rank))
    return Trace(num_ranks=num_ranks, source="measured", spans=tuple(spans)).from_zero()
