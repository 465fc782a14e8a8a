"""Controller: a workload and a plan in, a worker group running its program out. What `train` and `verify` share.

Before anything starts the program is checked against the laws, and the ranks' first batches are compared.
"""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from spindle.capture import Captured, capture
from spindle.errors import CheckpointError, RunError, SpindleWarning, WorkloadError
from spindle.ray_nodes import RayNodes
from spindle.runtime.checkpoints.changes import KEY, facts_of
from spindle.runtime.checkpoints.tensor_files import Source
from spindle.runtime.evaluation.evaluator import merged_scores
from spindle.runtime.faults.slow_links import SlowLinks
from spindle.runtime.faults.stragglers import Stragglers
from spindle.runtime.launch.ray_train import workers_of_ray_train
from spindle.runtime.launch.torchrun import TorchrunWorkers, place_among_all, under_torchrun
from spindle.runtime.launch.worker_group import ThreadWorkers, WorkerGroup
from spindle.runtime.laws import check_program
from spindle.runtime.loading.counts import Limits
from spindle.runtime.parallel.names import joined_pieces, whole_name
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.program import Program
from spindle.runtime.programs.sequences import in_words, sequences, turns_of, whole_step
from spindle.runtime.rank_spec import RankSpec, make_rank_specs
from spindle.runtime.startup import Links, Phases
from spindle.runtime.steps.finite import NotFinite
from spindle.runtime.updates.masters import Numbers
from spindle.runtime.updates.optimizers import OptimizerFactory, check_optimizer, described, make_optimizer, stand_in
from spindle.runtime.updates.progress import Progress, merged
from spindle.runtime.updates.schedules import Metric, SchedulerFactory, make_schedule
from spindle.runtime.updates.trial_steps import check_steps_apart, check_trial_steps
from spindle.runtime.worker import Report, merge_losses
from spindle.values.contract import contract
from spindle.values.graph import base_task
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan
from spindle.values.trace import Trace
from spindle.words.nearest import did_you_mean
from spindle.workload import Workload

if TYPE_CHECKING:
    from spindle.metrics import Scores
    from spindle.runtime.checkpoints.checkpoint import Checkpoint, Checkpoints
    from spindle.runtime.evaluation.prepare import PreparedEvaluation
    from spindle.runtime.faults.preemption import Notice

logger = logging.getLogger(__name__)
STREAMED_BYTES = 8 * 2**20  # of weights that ranks hand over at a time

Launcher = Literal["auto", "ray", "processes", "threads", "torchrun"]


@dataclass(frozen=True)
class Prepared:
    """A workload lowered for a plan."""

    workload: Workload
    captured: Captured
    metagraph: MetaGraph
    plan: Plan
    program: Program
    phases: Phases = field(default_factory=Phases, compare=False)

    @property
    def summary(self) -> str:
        """How long the start-up took by phase so far, and how many groups and peers ranks have."""
        return f"{self.phases}; {Links.of(self.program)}"


def prepare(workload: Workload, plan: Plan, phases: Phases | None = None) -> Prepared:
    """Capture, lower and check; `phases`: of the start-up so far. Raises PlanError for a plan of another workload,
    ProgramError on a broken law.
    """
    phases = phases or Phases()
    with phases("capture"):
        captured = capture(workload)
    rounds = workload.accumulate // workload.in_flight
    with phases("lower"):
        laid_out, turns = plan, None
        if follow := sequences(captured.graph, rounds):
            captured, laid_out = whole_step(captured, plan, workload.accumulate)
            rounds, sizes = 1, (workload.accumulate, workload.in_flight)
            turns = turns_of(follow, plan, captured.tasks, *sizes)
            warnings.warn(in_words(follow, workload.accumulate), SpindleWarning, stacklevel=3)
        metagraph = contract(captured.graph)
        program = lower(
            laid_out,
            metagraph,
            captured.graph,
            losses=captured.losses,
            weights={task: weight / workload.accumulate for task, weight in captured.weights.items()},
            max_grad_norm=workload.max_grad_norm,
            recompute={metaop.component for metaop in metagraph} if plan.recompute else workload.recompute,
            shard_optimizer=plan.shard_optimizer or workload.shard_optimizer,
            shard_parameters={*plan.shard_parameters, *workload.shard_parameters},
            rounds=rounds,
            turns=turns,
            varying={name for name in captured.tasks if workload.tasks[base_task(name)].rows is not None},
        )
    with phases("laws"):
        check_program(program)
    return Prepared(workload, captured, metagraph, plan, program, phases)


class Run:
    """A worker group at work on a prepared workload."""

    def __init__(self, prepared: Prepared, workers: WorkerGroup) -> None:
        """Compares the first batches that the ranks read; raises WorkloadError when loaders disagree."""
        self.prepared, self.workers = prepared, workers
        self.drifted: set[str] = set()
        self.stragglers = Stragglers(prepared.program, prepared.plan)
        self.slow_links = SlowLinks(prepared.plan)
        self._feeds: Mapping[str, Any] = {}  # where the data stand of tasks of earlier runs that this one may not have
        self._stepped = False
        with prepared.phases("first batches"):
            self._check_batches(workers.call("digests"))

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
        """Run `count` steps on all ranks; losses by step, and the reports. The first ones end the start-up."""
        with contextlib.nullcontext() if self._stepped else self.prepared.phases("first step"):
            reports = self.workers.call("run", count, **options)
        if not self._stepped and self.workers.leads:
            logger.info(self.prepared.summary)
        self._stepped = True
        self._warn_of_drift(reports)
        return merge_losses(reports, tuple(self.prepared.workload.tasks)), reports

    def warn_of_stragglers(self, first_step: int, reports: Sequence[Report]) -> None:
        """Of ranks, and links between them, that are slow for long, once some steps are done, of which the first is
        `first_step`.
        """
        for sentence in (*self.stragglers.take(first_step, reports), *self.slow_links.take(first_step, reports)):
            if self.workers.leads:
                warnings.warn(sentence, SpindleWarning, stacklevel=4)

    def evaluate(self) -> "Scores":
        """Scores of the tasks that are evaluated, with the weights as they are."""
        return merged_scores(self.workers.call("evaluate"))

    def _warn_of_drift(self, reports: Sequence[Report]) -> None:
        """Once a task."""
        for task, sentence in ((t, s) for report in reports for t, s in report.drift.items()):
            if task not in self.drifted and self.workers.leads:
                self.drifted.add(task)
                warnings.warn(sentence, SpindleWarning, stacklevel=4)

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the whole run, each from the rank that answers for it."""
        return joined_pieces({name: tensor for held in self.workers.call("state") for name, tensor in held.items()})

    def streamed_state(self, wanted: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers of some names, or the pieces that ranks hold of them, one after the other. Ranks hand
        over STREAMED_BYTES at a time, and no process holds more than these and one tensor.
        """
        sizes = {name: size for held in self.workers.call("sizes") for name, size in held.items()}
        found: dict[str, list[torch.Tensor]] = {}
        for ranges in _in_groups({name: size for name, size in sizes.items() if whole_name(name) in wanted}):
            for name, values in (pair for held in self.workers.call("ranges", ranges) for pair in held):
                found.setdefault(name, []).append(values)
                if sum(map(len, found[name])) == sizes[name][0].numel():
                    yield name, torch.cat(found.pop(name)).reshape(sizes[name][0])

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """States of the whole run's optimizer as `optimizer:NAME:KEY`."""
        held = self.workers.call("optimizer_state")
        return joined_pieces({name: tensor for states in held for name, tensor in states.items()})

    def ema_state(self) -> dict[str, torch.Tensor]:
        """Running averages of the whole run as `ema:NAME`; none before the first step that counts."""
        held = self.workers.call("ema_state")
        return joined_pieces({name: tensor for averages in held for name, tensor in averages.items()})

    def stops(self, reports: Sequence[Report], notice: "Notice | None" = None) -> bool:
        """Whether the run was asked to end, after some steps; where several processes drive it, all say the same."""
        asked = self.workers.alone and notice is not None and notice.came.is_set()
        return asked or any(report.stops for report in reports)

    def check_directory(self, checkpoints: "Checkpoints") -> None:
        """Raises CheckpointError, before the first step, where a rank cannot write checkpoints into the directory that
        the driver holds (`run_folder.opened`).
        """
        from spindle.runtime.checkpoints.run_folder import OWNER

        seen = self.workers.call("sees", str(checkpoints.directory / OWNER))
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise CheckpointError(
                f"{checkpoints.directory} is not there, or not to be written, for ranks {blind}; checkpoints= needs a "
                "directory that all machines share"
            )

    def progress(self, found: Sequence[Progress], more: Mapping[str, Any] | None = None) -> Progress:
        """What a checkpoint holds beside tensors: what each rank reported, and `more` that the driver keeps."""
        progress = merged(found) | dict(more or {}) | {KEY: facts_of(self.prepared.workload)}
        progress["feeds"] = {**self._feeds, **progress["feeds"]}
        return progress

    def save(self, checkpoints: "Checkpoints", step: int, seed: int, more: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint after `step` steps; its path. Where that fails nothing of it is left. `more`: what the
        driver adds to the progress of the ranks.
        """
        from spindle.runtime.checkpoints.checkpoint import begin, finish, path_of, put_progress, unfinished_of

        path = path_of(checkpoints.directory, step)
        unfinished = begin(path) if self.workers.leads else unfinished_of(path)
        try:
            self.workers.call("sync")
            progress = self.progress(self.workers.call("save", str(unfinished)), more)
            if self.workers.leads:
                put_progress(unfinished, progress)
                finish(unfinished, checkpoints, step=step, seed=seed)
        except BaseException as error:
            if self.workers.leads:
                shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError | RuntimeError):  # torch tells of a full disk by the latter
                raise CheckpointError(f"{path} cannot be written ({error}); make room there") from error
            raise
        return path

    def resume(self, checkpoint: "Checkpoint") -> None:
        """Go on where a checkpoint ended; its weights are in the user's modules already. Warns of settings that have
        changed since.
        """
        sentences, *_ = self.workers.call("load", str(checkpoint.path), checkpoint.step, checkpoint.progress)
        self._feeds = checkpoint.progress["feeds"]
        for sentence in sentences:
            warnings.warn(SpindleWarning(sentence), stacklevel=2)


def _in_groups(sizes: Mapping[str, tuple[torch.Size, int]]) -> Iterator[list[tuple[str, int, int]]]:
    """Names with ranges of their numbers, in groups of up to STREAMED_BYTES. `sizes`: shape, and bytes of a number."""
    group: list[tuple[str, int, int]] = []
    room = STREAMED_BYTES
    for name, (shape, width) in sizes.items():
        start, end, done = 0, shape.numel(), False
        while not done:
            stop = min(end, start + max(1, room // width))
            group.append((name, start, stop))
            start, room, done = stop, room - (stop - start) * width, stop == end
            if room < width:
                yield group
                group, room = [], STREAMED_BYTES
    if group:
        yield group


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
    weights: Mapping[str, Source] | None = None,
    checked: bool = False,
    on_broken: NotFinite = "ignore",
    flight: Path | None = None,
    check_replicas_every: int = 0,
    evaluated: "PreparedEvaluation | None" = None,
    limits: Limits | None = None,
    lost_gpus: frozenset[int] = frozenset(),
    ray_nodes: RayNodes | None = None,
) -> Iterator[Run]:
    """Start a worker group for a prepared workload, and end it whatever happens. `saves`: it will write or read
    checkpoints. `weights`: where the parameters lie that are on the meta device. `checked`: `check_steps` was called
    already. `on_broken`: what a step does with losses and gradients that are not finite. `flight`: of the ranks'
    records. `check_replicas_every`: steps between two comparisons of what ranks hold alike; 0 makes none. `evaluated`:
    what it evaluates; `limits`: on what it trains with. `lost_gpus`: numbers of this machine's GPUs that no rank takes.
    `ray_nodes`: what the launcher ray asks of nodes.

    Raises WorkloadError, before anything starts, for an optimizer or a schedule that cannot step as in one process, and
    CheckpointError for one of which a checkpoint would not hold all.
    """
    program = prepared.program
    if optimizer is not None and not checked:
        check_steps(prepared, optimizer, scheduler, metric, saves=saves)
    with prepared.phases("rank specs"):
        specs = make_rank_specs(
            program,
            prepared.captured,
            prepared.workload,
            optimizer=optimizer,
            scheduler=scheduler,
            metric=metric,
            seed=seed,
            timeout_s=timeout_s,
            sizes=prepared.plan.sizes,
            weights=weights,
            on_broken=on_broken,
            flight=flight,
            check_replicas_every=check_replicas_every,
        )
        if limits is not None:
            specs = [replace(spec, limits=limits) for spec in specs]
        if evaluated is not None:
            specs = evaluated.added(specs, weights)
    if narrow := Numbers.of(prepared.workload).narrow(prepared.workload):
        logger.info(
            "%d bfloat16 parameters (%s ...) have float32 masters, which the optimizer steps; master_weights='none' "
            "steps them as they are",
            len(narrow),
            narrow[0],
        )
    with prepared.phases("ranks"):
        workers = _start_workers(chosen(launcher), prepared, specs, timeout_s, lost_gpus, ray_nodes)
    try:
        prepared.phases.slowest(workers.call("started"))
        yield Run(prepared, workers)
    finally:
        workers.close()


def check_steps(
    prepared: Prepared,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    metric: Metric | None,
    *,
    saves: bool,
) -> None:
    """Make optimizer and schedule once, of stand-ins, and see whether they can be stepped as in one process.

    Raises WorkloadError where they cannot, and CheckpointError where `saves` and a checkpoint would not hold all.
    """
    workload, program = prepared.workload, prepared.program
    every = Numbers.of(workload).stepped(described(workload.named_parameters()))
    parameters = {p.name: stand_in(p, torch.device("cpu")) for p in every}
    optimization = make_optimizer(optimizer, parameters, workload.optimizer_settings)
    made = optimization.optimizer
    try:
        make_schedule(scheduler, optimization, metric)
    except RunError as error:
        if not workload.optimizer_settings:
            raise
        raise WorkloadError(
            "settings of components split the groups that optimizer= made into "
            f"{', '.join(label or 'the rest' for label in optimization.labels)}, and the schedule cannot take these: "
            "give its lists a value for each, in this order, or make the groups in optimizer= and leave the settings "
            f"out. {error}"
        ) from error
    check_trial_steps(every, workload.optimizer_settings, optimizer, scheduler, metric, saves=saves)
    specs = (p for operator in prepared.captured.graph for p in operator.parameters)
    sharded = [flat for flat in program.flats if flat.trained]
    same_everywhere = len({(bucket.ranks, bucket.owner) for bucket in program.buckets}) <= 1 and not sharded
    check_optimizer(
        made,
        cut={p.name.partition(".")[0] for p in specs if p.pieces > 1 and p.trainable},
        sharded={flat.parameters[0].partition(".")[0] for flat in sharded},
        same_everywhere=same_everywhere,
        steps_apart=program.num_ranks > 1,
    )
    check_steps_apart(
        every,
        workload.optimizer_settings,
        optimizer,
        scheduler,
        metric,
        several=program.num_ranks > 1,
        apart=program.num_ranks > 1 and not same_everywhere,
    )


def place_among_drivers(launcher: Launcher) -> tuple[int, int]:
    """Which of how many processes that drive one run this is: under torchrun every rank is one."""
    return place_among_all() if chosen(launcher) == "torchrun" else (0, 1)


def chosen(launcher: str) -> str:
    """The launcher that this name stands for here. Raises RunError for one that is not known."""
    if launcher not in get_args(Launcher):
        raise RunError(
            f"launcher {launcher!r} is not known{did_you_mean(launcher, get_args(Launcher))}; "
            f"choose one of {', '.join(get_args(Launcher))}"
        )
    if launcher in ("auto", "ray") and (workers := workers_of_ray_train()):
        if launcher == "auto" and under_torchrun():
            return "torchrun"
        raise RunError(
            f"launcher is {launcher!r} inside of a function of Ray Train, whose {workers} workers are the ranks of the "
            "run: leave launcher out, and start them with a TorchTrainer, whose TorchConfig has init_method='env'"
        )
    if launcher != "auto":
        return launcher
    if under_torchrun():
        return "torchrun"
    return "ray" if find_spec("ray") else "processes"


def _start_workers(
    launcher: str,
    prepared: Prepared,
    specs: Sequence[RankSpec],
    timeout_s: float,
    lost_gpus: frozenset[int],
    ray_nodes: RayNodes | None,
) -> WorkerGroup:
    plan = prepared.plan
    if launcher == "ray":
        from spindle.runtime.launch.ray_workers import RayWorkers

        device = plan.cluster.device.name if plan.cluster else None
        return RayWorkers(
            specs, devices_per_node=plan.devices_per_node, timeout_s=timeout_s, nodes=ray_nodes, device=device
        )
    if launcher == "processes":
        from spindle.runtime.launch.processes import ProcessWorkers

        return ProcessWorkers(specs, timeout_s=timeout_s, lost_gpus=lost_gpus)
    if launcher == "torchrun":
        return TorchrunWorkers(prepared.program, specs, timeout_s=timeout_s)
    return ThreadWorkers(specs, timeout_s=timeout_s)


def merge_traces(reports: Sequence[Report], num_ranks: int) -> Trace:
    """One trace of all ranks, its times counted from its first moment; with their peaks of memory if all are on GPUs.

    The memory of a process on a CPU holds what no plan counts, such as libraries and batches, so it is left out.
    """
    spans = sorted((span for report in reports for span in report.spans), key=lambda s: (s.start_s, s.rank))
    peaks: dict[int, int] = {}
    for report in reports:
        if report.on_gpu:
            peaks[report.rank] = max(peaks.get(report.rank, 0), report.memory_bytes)
    peak_bytes = tuple(peaks[rank] for rank in range(num_ranks)) if peaks.keys() == set(range(num_ranks)) else ()
    return Trace(num_ranks=num_ranks, source="measured", spans=tuple(spans), peak_bytes=peak_bytes).from_zero()
