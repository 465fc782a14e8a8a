"""Worker: one rank. Program, codes, loaders and optimiser in; losses, spans and trained tensors out.

It knows nothing of Ray: the same class runs in threads, in spawned processes, under torchrun and inside a Ray actor.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spindle.capture.codes import Captured, OperatorCode
from spindle.graph import Parameter, base_task, num_micro_batches, parse_piece
from spindle.plan import SizeRange
from spindle.record.copies import copied
from spindle.record.recording import LeafWrite
from spindle.record.travel import let_travel
from spindle.record.writes import OwnWrite
from spindle.runtime.batches import Batches
from spindle.runtime.clock import Clock
from spindle.runtime.data import Feed, is_listed, keeps_state
from spindle.runtime.drift import Drift
from spindle.runtime.executor import Executor, Fetch, Observe
from spindle.runtime.optimizers import (
    Metric,
    Optimization,
    OptimizerFactory,
    SchedulerFactory,
    described,
    make_schedule,
    rank_optimizer,
    step_schedule,
)
from spindle.runtime.parallel.layers import Switch, cut_codes
from spindle.runtime.parallel.names import Held, held_by_rank, held_names
from spindle.runtime.programs.passes import restricted
from spindle.runtime.programs.program import Op, Program
from spindle.runtime.progress import (
    PREFIX,
    Progress,
    load_optimizer,
    optimizer_progress,
    optimizer_tensors,
)
from spindle.runtime.record import StepRecord
from spindle.runtime.recordings import Recipe, Recordings
from spindle.runtime.shared_batches import shared_reads
from spindle.runtime.state import momenta
from spindle.runtime.store import ParameterStore
from spindle.runtime.transport import Transport
from spindle.runtime.watch import StepTold, peak_memory, step_told
from spindle.trace import Span
from spindle.workload import Batch, Precision, Task, Workload


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one rank needs to start. Sent to it once."""

    program: Program
    rank: int
    codes: Mapping[str, OperatorCode]
    recipe: Recipe
    tasks: Mapping[str, Task]
    cuts: Mapping[str, Held] = field(default_factory=dict)  # by parameter
    clocks: Mapping[str, Tensor] = field(default_factory=dict)  # buffers that writes to parameters read
    partial: frozenset[str] = frozenset()
    owned: tuple[str, ...] = ()  # parameters and buffers that this rank answers for
    unused: Mapping[str, Tensor] = field(default_factory=dict)  # those that no task uses, for checkpoints; on rank 0
    rounds: int = 1
    precision: Precision = "fp32"
    parameters: tuple[Parameter, ...] = ()  # all of the workload, for the optimizer
    settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # of the optimizer, by component
    optimizer: OptimizerFactory | None = None
    scheduler: SchedulerFactory | None = None
    metric: Metric | None = None
    seed: int = 0
    timeout_s: float = 60.0
    sizes: tuple[SizeRange, ...] = ()  # of the batches that the plan was made for


@dataclass(slots=True)
class Report:
    """What a rank has to tell after some steps: losses by step, spans, and gradients by step when asked for. `ended`
    names the task whose data ended, when there are fewer steps than asked for.
    """

    rank: int
    losses: list[dict[str, float]] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    ended: str | None = None
    told: list[StepTold] = field(default_factory=list)  # of each step
    memory_bytes: int = 0  # the most that it has held
    drift: dict[str, str] = field(default_factory=dict)  # sentences on batches that the plan was not made for, by task
    learning_rates: dict[str, float] = field(default_factory=dict)  # after the last step, by parameter group


def make_jobs(
    program: Program,
    captured: Captured,
    workload: Workload,
    *,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    timeout_s: float = 60.0,
    sizes: tuple[SizeRange, ...] = (),
) -> list[Job]:
    """For each rank the part of a captured workload that it runs. Takes time by the ranks that the slices have."""
    pieces = held_by_rank(program, captured)
    codes = [{name: captured.codes[name] for name in names} for names in program.operators_by_rank]
    owned = owners(program, [held_names(own.values(), held) for own, held in zip(codes, pieces, strict=True)])
    used = {parse_piece(name).whole for names in owned for name in names}
    every = (*workload.named_parameters(), *workload.named_buffers())
    unused = {name: tensor.detach() for name, tensor in every if name not in used}
    recipe, jobs, parameters = Recipe.of(workload, captured), [], described(workload.named_parameters())
    clocks = {name for code in captured.tasks.values() for write in code.writes for name in write.clocks}
    let_travel(component.module for component in workload.components.values())
    for rank, own in enumerate(codes):
        loads = {base_task(i.target) for i in program.instructions[rank] if i.op is Op.LOAD}
        jobs.append(
            Job(
                program=program,
                rank=rank,
                codes=own,
                recipe=recipe,
                tasks={name: _as_needed(task, loads=name in loads) for name, task in workload.tasks.items()},
                cuts=pieces[rank],
                clocks={name: value.detach() for name, value in workload.named_buffers() if name in clocks},
                partial=captured.graph.partial,
                owned=tuple(owned[rank]),
                unused={} if rank else unused,
                rounds=workload.accumulate // workload.in_flight,
                precision=captured.precision,
                parameters=parameters,
                settings=workload.optimizer_settings,
                optimizer=optimizer,
                scheduler=scheduler,
                metric=metric,
                seed=seed,
                timeout_s=timeout_s,
                sizes=sizes,
            )
        )
    return jobs


def _as_needed(task: Task, *, loads: bool) -> Task:
    """A task as a worker needs it: when it takes part, and its data if the rank loads it. Its function travels in the
    recipe, without the weights of the modules that it would bring along.
    """
    return replace(task, function=_stayed_behind, data=task.data if loads else ())


def _stayed_behind(batch: Batch) -> Tensor:
    raise AssertionError("a worker records the functions of its recipe, never this one")


def separate(job: Job) -> Job:
    """A job with codes of its own, and loaders where they have a state: ranks of one process must not share them."""
    codes = copied(job.codes, [code.module for code in job.codes.values()])
    tasks = {
        name: replace(task, data=copy.deepcopy(task.data)) if keeps_state(task) else task
        for name, task in job.tasks.items()
    }
    return replace(job, codes=codes, tasks=tasks)


def _feeds(tasks: Mapping[str, Task], job: Job, transport: Transport) -> dict[str, Feed]:
    """Feeds of the tasks that a rank loads. All ranks come here together, since ranks of a machine share batches."""
    read = [name for name, task in tasks.items() if not is_listed(task)]
    in_flight = num_micro_batches(task for task, _ in job.program.losses)
    shared = shared_reads(transport, read, in_flight=in_flight, timeout_s=job.timeout_s)
    return {
        name: Feed(task, job.seed, timeout_s=job.timeout_s, shared=shared.get(name), cores=transport.cores)
        for name, task in tasks.items()
    }


class Worker:
    """One rank, ready to run."""

    def __init__(self, job: Job, transport: Transport) -> None:
        """Takes over the codes of `job`, moves them to the transport's device, and makes the program's groups; on a CPU
        also the rank's share of the cores.
        """
        if transport.device.type == "cpu":
            torch.set_num_threads(transport.num_threads)
        self.job, self.transport, self.clock = job, transport, Clock()
        for code in job.codes.values():
            code.module.to(transport.device)
        self.switch = Switch()
        self.codes = cut_codes(job.codes, job.cuts, self.switch)
        self.store = ParameterStore(job.program, job.rank, self.codes.values())
        loads = {base_task(i.target) for i in job.program.instructions[job.rank] if i.op is Op.LOAD}
        self.feeds = _feeds({name: job.tasks[name] for name in sorted(loads)}, job, transport)
        self.optimization: Optimization | None = None
        if job.optimizer is not None:
            own = self._stepped(self.store.updated).items()
            self.optimization = rank_optimizer(job.optimizer, job.parameters, own, job.settings, transport.device)
        self.optimizer = self.optimization.optimizer if self.optimization else None
        self.scheduler = make_schedule(job.scheduler, self.optimizer, job.metric) if self.optimizer else None
        self.recordings = Recordings(job.recipe, transport.device)
        self.batches = Batches(
            job.program,
            job.rank,
            self.feeds,
            self.recordings,
            seed=job.seed,
            rounds=job.rounds,
            takes_part=self._taking_part,
            ahead=transport.device.type != "cpu",
            drift=Drift(job.sizes),
        )
        layers = [layer for tally in job.program.tallies for layer in tally.layers]
        self.momenta = momenta(job.recipe.skeleton.components, layers)
        self.writes = {
            (base_task(task), w.target): self._own_clocks(w)
            for task, code in job.recipe.codes.items()
            for w in code.writes
        }
        self.executors: dict[frozenset[str], Executor] = {}
        self.resting: dict[str, Tensor] = {}  # optimizer states of parameters that nobody steps in this run; on rank 0
        self.numbers: dict[str, str] = {}  # which optimizer states of the checkpoint are numbers
        self.steps_done = 0
        transport.make_groups(job.program.groups)

    def _own_clocks(self, write: LeafWrite) -> OwnWrite:
        return OwnWrite(write, {name: self.job.clocks[name].to(self.transport.device).clone() for name in write.clocks})

    def digests(self) -> dict[str, str]:
        """Fingerprint of the next batch of each task that this rank loads: equal on all ranks that load it."""
        return {name: feed.digest() for name, feed in self.feeds.items()}

    def run(self, steps: int, *, keep_spans: bool = True, keep_gradients: bool = False) -> Report:
        """Run some steps; the report holds spans and gradients of every step if they are to be kept.

        Spans tell moments on the first rank's clock, which all agree on first.
        """
        report = Report(self.job.rank)
        if keep_spans and self.transport.num_ranks > 1:
            self.clock.agree(self.transport, tuple(range(self.transport.num_ranks)))
        observe = report.gradients.append if keep_gradients else None
        self.recordings.checking = keep_gradients
        for _ in range(steps):
            report.ended = self._ended()
            if report.ended is not None:
                break
            self.batches.tokens.clear()
            began = time.perf_counter()
            record = self._step(observe)
            report.told.append(step_told(time.perf_counter() - began, record.spans, self.batches.tokens))
            report.losses.append(record.losses)
            report.grad_norms.append(record.grad_norm)
            if keep_spans:
                report.spans += [span.later(self.clock.offset_s) for span in record.spans]
        self.batches.settle()
        report.drift = dict(self.batches.drift.found)
        report.memory_bytes = peak_memory(self.transport.device)
        report.learning_rates = self.optimization.learning_rates() if self.optimization else {}
        return report

    def _ended(self) -> str | None:
        """A task that is to stop the training and lacks a batch for the next step. All ranks give the same answer."""
        stopping = [name for name in self._tasks() if self.job.tasks[name].on_end == "stop"]
        if not stopping:
            return None
        self.batches.wait()
        count = self.job.rounds * self.batches.in_flight
        lacking = [name in self.feeds and not self.feeds[name].holds(count) for name in stopping]
        flags = torch.tensor(lacking, dtype=torch.float32, device=self.transport.device)
        if self.transport.num_ranks > 1:
            self.transport.all_reduce(flags, tuple(range(self.transport.num_ranks)))()
        return next((name for name, flag in zip(stopping, flags.tolist(), strict=True) if flag), None)

    def _tasks(self) -> list[str]:
        """Tasks that take part in the next step."""
        return self._taking_part(self.steps_done)

    def _taking_part(self, step: int) -> list[str]:
        return [name for name, task in self.job.tasks.items() if task.takes_part(step, self.job.seed)]

    def _step(self, observe: Observe | None) -> StepRecord:
        job, tasks = self.job, frozenset(self._tasks())
        executor = self._executor(tasks)
        record = executor.step(self._rounds(), observe=observe, step=self.steps_done, rounds=job.rounds, seed=job.seed)
        if self.optimizer is not None and (self.store.updated or self.scheduler) and not executor.updated:
            with self.store.without_gradients(self.store.updated):
                self.optimizer.step()  # what it counts by group goes on, where nothing is held that this step updates
        if self.scheduler is not None:
            step_schedule(self.scheduler, job.metric, lambda: self._losses_of_all(record.losses))
        self.steps_done += 1
        return record

    def _losses_of_all(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Losses of this step's tasks, of whichever ranks computed them; of micro-batches in flight their mean."""
        tasks = self._tasks()
        own = [[loss for name, loss in losses.items() if base_task(name) == task] for task in tasks]
        sums = [[sum(values) for values in own], [len(values) for values in own]]
        found = torch.tensor(sums, dtype=torch.float64, device=self.transport.device)
        if self.transport.num_ranks > 1:
            self.transport.all_reduce(found, tuple(range(self.transport.num_ranks)))()
        return dict(zip(tasks, (found[0] / found[1]).tolist(), strict=True))

    def _rounds(self) -> Callable[[], Fetch]:
        """What begins each round of a step."""
        count = itertools.count()
        return lambda: self.batches.round(self.steps_done, next(count))

    def _executor(self, tasks: frozenset[str]) -> Executor:
        """The program of the tasks that take part in a step; all ranks restrict it alike."""
        if tasks not in self.executors:
            job = self.job
            parts = [task for task, _ in job.program.losses if base_task(task) in tasks]
            program = job.program if len(parts) == len(job.program.losses) else restricted(job.program, parts)
            self.executors[tasks] = Executor(
                program,
                self.transport,
                self.codes,
                self.store,
                self.optimizer,
                job.precision,
                self.switch,
                job.partial,
                self.momenta,
                self.writes,
            )
        return self.executors[tasks]

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters and buffers that this rank answers for."""
        return self.store.state(self.job.owned)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Copies of the optimizer's states of what this rank answers for; only tensors and numbers."""
        if self.optimizer is None:
            return {}
        return optimizer_tensors(self.optimizer, self._stepped(self.job.owned), strict=False)

    def save(self, path: str) -> Progress:
        """Write what this rank answers for into the checkpoint at `path`; what is not a tensor comes back."""
        tensors = {**self.state(), **self.job.unused}
        if self.optimizer is not None:
            tensors |= self.resting | optimizer_tensors(self.optimizer, self._stepped(self.job.owned))
        self.transport.save({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        stepped = {id(parameter): name for name, parameter in self._stepped(self.store.updated).items()}
        return {
            "feeds": {name: feed.state() for name, feed in self.feeds.items()},
            "optimizer": optimizer_progress(self.optimizer, stepped, self.numbers) if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
        }

    def load(self, path: str, step: int, progress: Progress) -> None:
        """Go on where the checkpoint at `path` ended, after `step` steps; weights are in place already."""
        self.steps_done = step
        self.batches.forget()
        for name, feed in self.feeds.items():
            if name in progress["feeds"]:
                feed.resume(progress["feeds"][name])
        if self.optimizer is not None and progress["optimizer"] is not None:
            self._load_optimizer(Path(path), progress["optimizer"])
        if self.scheduler is not None and progress["scheduler"] is not None:
            self.scheduler.load_state_dict(copy.deepcopy(progress["scheduler"]))  # of which some take keys out

    def _load_optimizer(self, path: Path, progress: Progress) -> None:
        """States and settings of a checkpoint. Those of parameters that are frozen now are kept for the next one."""
        assert self.optimizer is not None
        from spindle.runtime.checkpoint import tensors  # needs pydantic, which a worker else does without

        stepped = self._stepped(self.store.updated)
        own, self.numbers = {parse_piece(name).whole for name in stepped}, progress["numbers"]
        load_optimizer(self.optimizer, stepped, progress, tensors(path, lambda name: _of_parameter(name) in own))
        if self.job.rank == 0:
            buckets = self.job.program.buckets
            everyones = {None, *(parse_piece(name).whole for bucket in buckets for name in bucket.parameters)}
            self.resting = tensors(path, lambda name: _of_parameter(name) not in everyones)

    def sync(self) -> None:
        """Nothing; all ranks have come this far once it returns."""

    def _stepped(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Parameters among `names` that this rank's optimizer steps."""
        held = set(names)
        return {name: self.store.parameters[name] for name in self.store.updated if name in held}

    def close(self) -> None:
        """Stop reading, and leave the transport."""
        self.batches.close()
        self.transport.close()


def _of_parameter(name: str) -> str | None:
    """The parameter whose optimizer state has this name in a checkpoint; None for what is no such state."""
    kind, _, rest = name.partition(":")
    return rest.partition(":")[0] if kind == PREFIX and rest else None


def owners(program: Program, held: Sequence[Iterable[str]]) -> list[list[str]]:
    """For each rank the parameters and buffers, of those `held` by each, that it answers for: trained ones whose bucket
    it speaks for, and others that no lower rank holds.
    """
    home = {name: bucket.answering for bucket in program.buckets for name in bucket.parameters}
    for rank, names in enumerate(held):
        for name in names:
            home.setdefault(name, rank)
    found: list[list[str]] = [[] for _ in held]
    for name, rank in home.items():
        found[rank].append(name)
    return found


def merge_losses(reports: Sequence[Report]) -> list[dict[str, float]]:
    """Losses of all tasks by step; of a task with several micro-batches in flight, their mean."""
    steps = max((len(report.losses) for report in reports), default=0)
    merged = []
    for step in range(steps):
        parts: dict[str, list[float]] = {}
        for task, loss in ((t, x) for report in reports for t, x in report.losses[step].items()):
            parts.setdefault(base_task(task), []).append(loss)
        merged.append({task: sum(values) / len(values) for task, values in parts.items()})
    return merged
