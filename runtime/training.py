"""Training: a run in, its losses out. Steps go to the ranks in chunks, so that a call is rare but progress is seen."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spindle.errors import PreemptedError, SpindleWarning
from spindle.metrics import EvaluationMetrics, Scores
from spindle.runtime.comms.pulse import LONG
from spindle.runtime.controller import Run
from spindle.runtime.parallel.names import put_piece, whole_name
from spindle.runtime.worker import Report
from spindle.workload import Workload

if TYPE_CHECKING:
    from spindle.runtime.checkpoints.checkpoint import Checkpoints
    from spindle.runtime.evaluation.scores import Evaluations
    from spindle.runtime.faults.preemption import Notice
    from spindle.runtime.watch import Watch

StepCallback = Callable[[int, dict[str, float]], None]


@dataclass(slots=True)
class Steps:
    """What some steps left behind, of all attempts of a run. `first` steps were done before; `ended` names the task
    whose data ended, where that stopped the training; `train_s` leaves out what writing checkpoints took.
    """

    first: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)  # of the last steps, with their spans
    train_s: float = 0.0
    seconds: list[float] = field(default_factory=list)  # by step; steps of one call took alike
    ended: str | None = None
    written: list[Path] = field(default_factory=list)  # checkpoints, the last one last
    skipped: dict[int, str] = field(default_factory=dict)  # steps in which no optimizer stepped, and why
    scores: dict[int, Scores] = field(default_factory=dict)  # of evaluations, by steps done
    stopped: str = ""  # why training stopped before its last step, where nothing ended

    @property
    def done(self) -> int:
        """Steps that are done, counted from the start of the first run."""
        return self.first + len(self.losses)

    @property
    def checkpoint(self) -> Path | None:
        """The last one written."""
        return self.written[-1] if self.written else None

    def rewind(self, step: int) -> None:
        """Forget what was done after `step` steps: it will be done again."""
        del self.losses[step - self.first :], self.seconds[step - self.first :]
        self.reports.clear()
        self.skipped = {number: why for number, why in self.skipped.items() if number <= step}
        self.scores = {number: scores for number, scores in self.scores.items() if number <= step}
        self.ended, self.stopped = None, ""

    @property
    def over(self) -> bool:
        """Whether there are no more steps, however many were asked for."""
        return self.ended is not None or bool(self.stopped)


def run_steps(
    run: Run,
    found: Steps,
    *,
    last: int,
    seed: int,
    on_step: StepCallback | None = None,
    trace_steps: int = 5,
    checkpoints: "Checkpoints | None" = None,
    watch: "Watch | None" = None,
    notice: "Notice | None" = None,
    timeout_s: float = 60.0,
    evaluations: "Evaluations | None" = None,
) -> None:
    """Run the steps after the `found` ones up to `last`, and add them. A checkpoint is written every
    `checkpoints.every` steps and after the last, and after an evaluation that was the best so far; all are whole in the
    end.

    Raises PreemptedError, after another checkpoint, when the run was asked to end.
    """
    saving = Saves(run, checkpoints, seed, found.written, watch) if checkpoints is not None else None
    if checkpoints is not None and checkpoints.later:
        from spindle.runtime.checkpoints.later import LaterSaves

        saving = LaterSaves(run, checkpoints, seed, found.written, watch, patience_s=LONG * timeout_s)
    with saving.open() if saving is not None else contextlib.nullcontext():
        _run_steps(run, found, last, on_step, trace_steps, saving, watch, notice, evaluations)


class Saves:
    """Checkpoints of a run, each written before the next step; whole ones are added to `written`, and
    reported to callbacks by `watch`.
    """

    def __init__(
        self, run: Run, checkpoints: "Checkpoints", seed: int, written: list[Path], watch: "Watch | None"
    ) -> None:
        self.run, self.checkpoints, self.seed, self.written, self.watch = run, checkpoints, seed, written, watch

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """While open the run is at its steps; a good end waits for what is being written."""
        yield

    def save(self, step: int, best: int | None = None, more: Mapping[str, Any] | None = None) -> None:
        """Write what ranks hold after `step` steps, or begin to, with `more` that the driver keeps. `best`: the
        checkpoint after that number of steps stays.
        """
        self.is_whole(step, self.run.save(replace(self.checkpoints, best=best), step, self.seed, more))

    def is_whole(self, step: int, path: Path) -> None:
        """Take in that the checkpoint after `step` steps is written."""
        self.written.append(path)
        if self.watch is not None:
            self.watch.saved(step, path)

    def look(self) -> None:
        """Go on with what is being written, without waiting for it."""

    def settle(self) -> None:
        """Wait for what is being written."""


def _run_steps(
    run: Run,
    found: Steps,
    last: int,
    on_step: StepCallback | None,
    trace_steps: int,
    saving: Saves | None,
    watch: "Watch | None",
    notice: "Notice | None",
    evaluations: "Evaluations | None",
) -> None:
    every = saving.checkpoints.every if saving is not None else last + 1
    chunk, saved, began = 1, found.done, time.perf_counter()
    if evaluations is not None:
        began += _evaluated(run, found, evaluations, watch)  # a run that was asked to end has left that to this one
        found.stopped = evaluations.stopped(found.scores)
    while found.done < last and not found.over:
        done = found.done
        keep = done >= last - trace_steps
        ends = [last if keep else last - trace_steps, done + chunk, done + every - done % every]
        if evaluations is not None:
            ends.append(done + evaluations.every - done % evaluations.every)
        count = max(1, min(ends) - done)
        started = time.perf_counter()
        losses, reports = run.steps(count, keep_spans=keep)
        took_s = time.perf_counter() - started
        found.seconds += [took_s / count] * len(losses)
        if watch is not None:
            watch.tell(done + 1, losses, reports)
        run.warn_of_stragglers(done + 1, reports)
        _tell_skipped(found, reports)
        for values in losses:
            found.losses.append(values)
            if on_step is not None:
                on_step(found.done, values)
        found.reports += reports if keep else []
        found.ended, found.stopped = reports[0].ended, reports[0].full
        chunk = _next_chunk(count, took_s)
        stops, done = run.stops(reports, notice), found.done
        if saving is not None:
            saving.look()
        if evaluations is not None and not stops:
            began += _evaluated(run, found, evaluations, watch)
            found.stopped = found.stopped or evaluations.stopped(found.scores)
        best = evaluations.best_of(found.scores) if evaluations is not None else None
        due = done % every == 0 or done in (best, last) or found.over or stops
        if saving is not None and done > saved and due:
            started = time.perf_counter()
            saving.save(done, best, {"scores": found.scores})
            saved, began = done, began + time.perf_counter() - started
        if stops and done < last and not found.over:
            if saving is not None:
                saving.settle()
            raise _preempted(done, found.checkpoint)
    found.train_s += time.perf_counter() - began


def _evaluated(run: Run, found: Steps, evaluations: "Evaluations", watch: "Watch | None") -> float:
    """Evaluate, where that is due; the seconds that it took."""
    step = found.done
    if not evaluations.is_due(step, found.scores):
        return 0.0
    started = time.perf_counter()
    found.scores[step] = run.evaluate()
    took_s = time.perf_counter() - started
    is_best = evaluations.best_of(found.scores) == step
    if watch is not None:
        watch.evaluated(EvaluationMetrics(step=step, scores=found.scores[step], evaluation_s=took_s, is_best=is_best))
    return took_s


def load_trained(workload: Workload, run: Run) -> None:
    """Copy the weights of a run into the user's modules, one at a time; not those on the meta device."""
    every = (*workload.named_parameters(), *workload.named_buffers())
    places = {name: tensor for name, tensor in every if not tensor.is_meta}
    with torch.no_grad():
        for name, tensor in run.streamed_state(places):
            put_piece(places[whole_name(name)], name, tensor)


def _tell_skipped(found: Steps, reports: Sequence[Report]) -> None:
    """Take in, and warn of, steps in which the optimizer rested."""
    for number in sorted({number for report in reports for number in report.skipped}):
        reasons = [report.skipped[number].split(", ") for report in reports if report.skipped.get(number)]
        whys = dict.fromkeys(why for each in reasons for why in each)  # devices may find the same
        found.skipped[number] = ", ".join(whys)
        warnings.warn(
            SpindleWarning(f"step {number}: {found.skipped[number]}; the optimizer did not step"), stacklevel=3
        )


def _preempted(done: int, checkpoint: Path | None) -> PreemptedError:
    if checkpoint is None:
        return PreemptedError(
            f"SIGTERM ended the run after step {done}; it writes no checkpoints (--checkpoints), so nothing is saved",
            saved=False,
        )
    return PreemptedError(
        f"SIGTERM ended the run after step {done}; start it again with resume=True (--resume), to go on from "
        f"{checkpoint}",
        saved=True,
    )


def _next_chunk(count: int, took_s: float, target_s: float = 1.0) -> int:
    """A call of Ray's actors takes some milliseconds."""
    return max(1, min(2 * count, int(count * target_s / max(took_s, 1e-6))))
