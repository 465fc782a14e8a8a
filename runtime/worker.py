"""Worker: one rank. Program, codes, loaders and optimiser in; losses, spans and trained tensors out.

It knows nothing of Ray: the same class runs in threads, in spawned processes, under torchrun and inside a Ray actor.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spindle.capture.codes import AuxCode, Captured, OperatorCode
from spindle.capture.dropout import WithoutDropout
from spindle.runtime.data import Feed
from spindle.runtime.executor import Executor, StepRecord
from spindle.runtime.program import Op, Program
from spindle.runtime.store import ParameterStore
from spindle.runtime.transport import Transport
from spindle.trace import Span
from spindle.workload import Task

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one rank needs to start. Sent to it once."""

    program: Program
    rank: int
    codes: Mapping[str, OperatorCode]
    aux: Mapping[str, AuxCode]
    tasks: Mapping[str, Task]
    optimizer: OptimizerFactory | None = None
    seed: int = 0
    num_threads: int | None = None


@dataclass(slots=True)
class Report:
    """What a rank has to tell after some steps: losses by step, spans, and gradients by step when asked for."""

    rank: int
    losses: list[dict[str, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


def make_job(
    program: Program,
    rank: int,
    captured: Captured,
    tasks: Mapping[str, Task],
    *,
    optimizer: OptimizerFactory | None = None,
    seed: int = 0,
    num_threads: int | None = None,
) -> Job:
    """The part of a captured workload that `rank` runs."""
    codes = {name: captured.codes[name] for name in program.operators_of(rank)}
    read = {given.name for code in codes.values() for given in code.inputs if given.kind == "aux"}
    loads = {i.target for i in program.instructions[rank] if i.op is Op.LOAD}
    return Job(
        program=program,
        rank=rank,
        codes=codes,
        aux={name: captured.aux[name] for name in sorted(read)},
        tasks={name: tasks[name] for name in tasks if name in loads},
        optimizer=optimizer,
        seed=seed,
        num_threads=num_threads,
    )


def separate(job: Job) -> Job:
    """A job with codes of its own: ranks of one process must not share parameters."""
    codes, aux = copy.deepcopy((job.codes, job.aux))
    return replace(job, codes=codes, aux=aux)


class Worker:
    """One rank, ready to run."""

    def __init__(self, job: Job, transport: Transport) -> None:
        """Takes over the codes of `job`, moves them to the transport's device, and makes the program's groups."""
        if job.num_threads is not None:
            torch.set_num_threads(job.num_threads)
        self.job, self.transport = job, transport
        for module in (*(c.module for c in job.codes.values()), *(a.module for a in job.aux.values())):
            module.to(transport.device)
        self.store = ParameterStore(job.program, job.rank, job.codes.values())
        self.feeds = {name: Feed(task, job.seed) for name, task in job.tasks.items()}
        trained = [self.store.parameters[name] for name in self.store.trained]
        optimizer = job.optimizer(trained) if job.optimizer is not None and trained else None
        self.executor = Executor(job.program, transport, job.codes, job.aux, self.store, optimizer)
        self.steps_done = 0
        transport.make_groups(job.program.groups)

    def digests(self) -> dict[str, str]:
        """Fingerprint of the next batch of each task that this rank loads: equal on all ranks that load it."""
        return {name: feed.digest() for name, feed in self.feeds.items()}

    def run(self, steps: int, *, keep_spans: bool = True, keep_gradients: bool = False, dropout: bool = True) -> Report:
        """Run some steps; the report holds spans and gradients of every step if they are to be kept."""
        report = Report(self.job.rank)
        with contextlib.nullcontext() if dropout else WithoutDropout():
            for _ in range(steps):
                record = self._step(report if keep_gradients else None)
                report.losses.append(record.losses)
                if keep_spans:
                    report.spans += record.spans
                self.steps_done += 1
        return report

    def _step(self, keep: Report | None) -> StepRecord:
        observe = None if keep is None else lambda store: keep.gradients.append(store.gradients())
        return self.executor.step(lambda task: self.feeds[task].next(), observe=observe, step=self.steps_done)

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named parameters and buffers, as far as they are on this rank."""
        return self.store.state(names)

    def close(self) -> None:
        """Leave the transport."""
        self.transport.close()


def owners(program: Program, captured: Captured) -> dict[int, list[str]]:
    """For each rank the parameters and buffers that it answers for: those that no lower rank holds."""
    found: dict[int, list[str]] = {}
    seen: set[str] = set()
    for rank in range(program.num_ranks):
        codes = [captured.codes[name] for name in program.operators_of(rank)]
        names = dict.fromkeys(name for code in codes for _, name in (*code.parameters, *code.buffers))
        found[rank] = [name for name in names if name not in seen]
        seen.update(names)
    return found


def merge_losses(reports: Sequence[Report]) -> list[dict[str, float]]:
    """Losses of all tasks by step."""
    steps = max((len(report.losses) for report in reports), default=0)
    return [{task: loss for report in reports for task, loss in report.losses[step].items()} for step in range(steps)]
