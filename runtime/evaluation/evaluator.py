"""Evaluator: forward-only tasks on the ranks that hold the weights; what each rank runs, and what comes of it.

- The tasks have a program of their own, whose layers are those of the training program. It is run by the same executor
  on the same parameters, under no gradients, with the modules that it runs in eval mode.
- Training does not see it: batches come from feeds of its own, random numbers are functions of their place, recordings
  are made in modules of their own, and buffers that it has touched are put back.
- The outputs of a batch come together on the rank that computes the task's loss. Metrics are computed there, in the
  order of the batches, so that nothing depends on the plan but rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from torch import Tensor

from spindle.capture.codes import OperatorCode
from spindle.errors import RunError, WorkloadError
from spindle.evaluation import Measures, Metric, Outputs, modes_kept, unpacked
from spindle.record.substitutes.draws import Stream
from spindle.record.travel import dumped
from spindle.runtime.comms.transport import sum_over_all
from spindle.runtime.loading.data import Feed, FeedState
from spindle.runtime.loading.recordings import LoadedBatch, Recipe, Recordings
from spindle.runtime.programs.messages import Layouts
from spindle.runtime.programs.passes import restricted
from spindle.runtime.programs.program import Program
from spindle.runtime.steps.executor import Executor
from spindle.runtime.steps.record import Timed
from spindle.runtime.updates.averages import standing_in
from spindle.workload import Task

if TYPE_CHECKING:
    from spindle.runtime.worker import Worker

Scored = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Scoring:
    """Metrics of each task. They travel without the weights of modules that they may hold."""

    measures: Mapping[str, Measures]

    def __reduce__(self) -> tuple[Any, ...]:
        functions = [f for found in self.measures.values() for f in (*found.metrics.values(), *found.over_all.values())]
        return _received, (dumped(dict(self.measures), functions),)


def _received(payload: bytes) -> Scoring:
    return Scoring(cloudpickle.loads(payload))


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """What one rank needs to evaluate: its part of the program, and the codes that it runs, whose modules are those of
    the codes that it trains.
    """

    program: Program
    codes: Mapping[str, OperatorCode]
    recipe: Recipe
    tasks: Mapping[str, Task]
    scoring: Scoring
    precision: Any = "fp32"
    gathered_bytes: int = 0
    ema: bool = False  # on the running averages of the weights


@dataclass
class _Pass:
    """What a task's pass over its data came to so far, on the rank that has its outputs."""

    task: str
    measures: Measures
    most_bytes: int
    samples: int = 0
    loss: float = 0.0
    has_loss: bool = False
    sums: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    kept: list[Outputs] = field(default_factory=list)
    kept_bytes: int = 0

    def take(self, outputs: Outputs, samples: int) -> None:
        """Take the outputs of one batch in."""
        self.samples += samples
        if "loss" in outputs:
            self.has_loss = True
            self.loss += float(outputs["loss"]) * samples
        for name, metric in self.measures.metrics.items():
            total, count = self._called(name, metric, outputs)
            if name in self.sums and (self.sums[name][1] is None) != (count is None):
                raise self._wrong(name, "gives a pair for some batches, and a number for others")
            before, counted = self.sums.get(name, (0.0, None))
            self.sums[name] = before + total, count if counted is None else counted + (count or 0.0)
        if self.measures.over_all:
            rows = {name: value.cpu() for name, value in outputs.items() if value.ndim}
            self.kept_bytes += sum(value.nbytes for value in rows.values())
            if self.kept_bytes > self.most_bytes:
                raise WorkloadError(
                    f"evaluation task {self.task!r}: its outputs take more than {self.most_bytes / 2**20:.0f} MiB, "
                    f"which {', '.join(map(repr, self.measures.over_all))} would see all at once; return less, give "
                    "sums and counts (metrics=), or raise gathered_bytes= of the Evaluation"
                )
            self._check_joins(rows)
            self.kept.append(rows)

    def scores(self) -> dict[str, float]:
        """The loss, averaged over samples, and all metrics."""
        found = {"loss": self.loss / self.samples} if self.has_loss else {}
        for name, (total, count) in self.sums.items():
            if count == 0:
                raise self._wrong(name, "counts nothing in the whole pass")
            found[name] = total if count is None else total / count
        if self.measures.over_all:
            joined = {name: torch.cat([rows[name] for rows in self.kept]) for name in self.kept[0]}
            for name, metric in self.measures.over_all.items():
                total, count = self._called(name, metric, joined)
                found[name] = total if count is None else total / count
        return found

    def _check_joins(self, rows: Outputs) -> None:
        """Outputs of all batches are joined along their first dimension alone."""
        first = self.kept[0] if self.kept else rows
        for name in dict.fromkeys((*first, *rows)):
            shapes = [tuple(each[name].shape[1:]) if name in each else None for each in (first, rows)]
            if shapes[0] != shapes[1]:
                found = ["missing" if s is None else f"of shape {('N', *s)}".replace("'", "") for s in shapes]
                raise WorkloadError(
                    f"evaluation task {self.task!r}: output {name!r} is {found[0]} for the first batch and {found[1]} "
                    f"for a later one, so that {', '.join(map(repr, self.measures.over_all))} cannot see both as one; "
                    "pad or pool it to one size, or give sums and counts (metrics=)"
                )

    def _called(self, name: str, metric: Metric, outputs: Outputs) -> tuple[float, float | None]:
        try:
            with torch.no_grad():
                value = metric(dict(outputs))
        except Exception as error:
            raise RunError.of(error, f"evaluation task {self.task!r}, metric {name!r}") from error
        pair = tuple(value) if isinstance(value, tuple | list) else (value,)
        try:
            numbers = [float(each) for each in pair]
        except (TypeError, ValueError, RuntimeError):
            numbers = []
        if len(numbers) not in (1, 2):
            raise self._wrong(name, f"gave a {type(value).__name__}")
        return numbers[0], numbers[1] if len(numbers) == 2 else None

    def _wrong(self, name: str, what: str) -> WorkloadError:
        return WorkloadError(
            f"evaluation task {self.task!r}: metric {name!r} {what}; give a number, or a pair of a sum and a count"
        )


class _Forward(Executor):
    """Runs a program without backward."""

    def outputs(self, fetch: Callable[[str], LoadedBatch], *, step: int, seed: int) -> dict[str, Tensor]:
        """What the tasks of the program return of one batch of each, where this rank computes it."""
        self.observe, self.grad_norm, self.skipped = None, None, None
        self.stream = Stream(seed=seed, step=step, device=self.transport.device)
        self.state.begin(1)
        self.first_batch, self.fetch = 0, fetch
        self.begin()
        self.reductions.begin(early=False)
        spans: list[Timed] = []
        for instruction in self.instructions:
            self.carry_out(instruction, spans, step + 1)
        self._end()
        self.busy.taken()  # which nobody asks for
        self.together.taken()
        return self.losses


class Evaluator:
    """Evaluates on one rank, whose worker trains, or does nothing else."""

    def __init__(self, spec: EvaluationSpec, worker: "Worker", feeds: Mapping[str, Feed]) -> None:
        """`feeds`: of the tasks that the rank loads."""
        self.spec, self.worker, self.feeds = spec, worker, feeds
        self.transport = worker.transport
        self.codes = {name: worker.codes[key_of(name)] for name in spec.codes}  # cut as those of training
        self.recordings = Recordings(spec.recipe, self.transport.streams)
        self.layouts = Layouts(spec.program)
        self.start: dict[str, FeedState] = {name: feed.state() for name, feed in feeds.items()}
        self.begun = False
        self.executors: dict[frozenset[str], _Forward] = {}
        assert spec.program.loaded_by(self.transport.rank) == set(feeds), "a rank loads the tasks of its program"

    def run(self) -> Scored:
        """One pass over the data of each task; the scores of those whose outputs come together here."""
        if self.begun:
            for name, feed in self.feeds.items():
                feed.resume(self.start[name])
        self.begun = True
        found: dict[str, _Pass] = {}
        with self._undisturbed():
            for number in range(2**62):
                tasks = self._holding()
                if not tasks:
                    break
                self._batch(tasks, number, found)
        for feed in self.feeds.values():
            feed.settle()
        return {name: each.scores() for name, each in found.items()}

    def _batch(self, tasks: frozenset[str], number: int, found: dict[str, _Pass]) -> None:
        """The next batch of some tasks."""
        samples: dict[str, int] = {}
        seed = self.worker.spec.seed

        def fetch(task: str) -> LoadedBatch:
            batch = self.feeds[task].next()
            samples[task] = batch.units.num_samples
            stream = Stream(seed=seed, step=number, task=task)
            return self.recordings.loaded(task, batch, self.layouts.of(task, batch.units), stream)

        for task, values in self._executor(tasks).outputs(fetch, step=number, seed=seed).items():
            measures = self.spec.scoring.measures[task]
            own = found.setdefault(task, _Pass(task, measures, self.spec.gathered_bytes))
            own.take(unpacked(values), samples[task])

    def _holding(self) -> frozenset[str]:
        """Tasks that have another batch: the same on all ranks. Raises WorkloadError where loaders disagree."""
        names = list(self.spec.tasks)
        for feed in self.feeds.values():
            feed.ask(1)
        holds = [name in self.feeds and self.feeds[name].holds(1) for name in names]
        flags = torch.tensor(
            [[float(name in self.feeds), float(held)] for name, held in zip(names, holds, strict=True)]
        )
        sum_over_all(flags, self.transport)
        for name, (loading, holding) in zip(names, flags.tolist(), strict=True):
            if holding not in (0, loading):
                raise WorkloadError(
                    f"evaluation task {name!r}: its data ended on {int(loading - holding)} of {int(loading)} devices "
                    "that read it, and not on the others; every pass over it must give the same batches everywhere"
                )
        return frozenset(name for name, (_, holding) in zip(names, flags.tolist(), strict=True) if holding)

    def _executor(self, tasks: frozenset[str]) -> _Forward:
        """The program of the tasks that have a batch; all ranks restrict it alike."""
        if tasks not in self.executors:
            whole = self.spec.program
            program = whole if len(tasks) == len(whole.losses) else restricted(whole, tasks)
            worker = self.worker
            self.executors[tasks] = _Forward(
                program, self.transport, self.codes, worker.store, None, self.spec.precision, worker.switch
            )
        return self.executors[tasks]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """While open modules are in eval mode; then they, and all buffers, are as they were."""
        modules = {id(m): m for code in self.codes.values() for m in code.module.modules()}.values()
        with ExitStack() as stack:
            stack.enter_context(modes_kept(modules))
            stack.enter_context(self._buffers_kept())
            if self.spec.ema:
                values = self.worker.averages_here()
                stack.enter_context(standing_in(values, self.worker.store.held(values)))
            stack.enter_context(torch.no_grad())
            yield

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Buffers stand as training has left them, in the codes of the evaluation too, and again afterwards."""
        current = self.worker.store.buffers
        places = [
            (code.module.get_submodule(inner.rpartition(".")[0])._buffers, inner.rpartition(".")[2], current[name])
            for code in self.codes.values()
            for inner, name in code.buffers
        ]
        values = [(tensor, tensor.clone(), tensor._version) for tensor in {id(t): t for _, _, t in places}.values()]
        for held, key, tensor in places:
            held[key] = tensor
        try:
            yield
        finally:
            for held, key, tensor in places:
                held[key] = tensor
            for tensor, value, version in values:
                if tensor._version != version:
                    tensor.copy_(value)


def key_of(operator: str) -> str:
    """Under which key a worker's codes hold an operator of the evaluation, beside those of training."""
    return f"evaluation {operator}"


def beside(codes: Mapping[str, OperatorCode], spec: EvaluationSpec | None) -> dict[str, OperatorCode]:
    """The codes of a rank that trains and evaluates. Where both hold a buffer, training's stands last, which counts."""
    own = {key_of(name): code for name, code in spec.codes.items()} if spec else {}
    return {**own, **codes}


def merged_scores(found: Sequence[Scored]) -> Scored:
    """Scores of all tasks, each from the rank that has them, by name."""
    return dict(sorted((task, scores) for own in found for task, scores in own.items()))
