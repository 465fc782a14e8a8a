"""Training: a run in, its losses out. Steps go to the ranks in chunks, so that a call is rare but progress is seen."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spindle.runtime.controller import Run
from spindle.runtime.worker import Report

if TYPE_CHECKING:
    from spindle.runtime.checkpoint import Checkpoints
    from spindle.runtime.watch import Watch

StepCallback = Callable[[int, dict[str, float]], None]


@dataclass(slots=True)
class Steps:
    """What some steps left behind. `ended` names the task whose data ended, where that stopped the training; `train_s`
    leaves out what writing checkpoints took.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)  # of the last steps, with their spans
    train_s: float = 0.0
    seconds: list[float] = field(default_factory=list)  # by step; steps of one call took alike
    ended: str | None = None


def run_steps(
    run: Run,
    *,
    first: int,
    last: int,
    seed: int,
    on_step: StepCallback | None = None,
    trace_steps: int = 5,
    checkpoints: "Checkpoints | None" = None,
    watch: "Watch | None" = None,
) -> Steps:
    """Run steps `first` + 1 to `last`. A checkpoint is written every `checkpoints.every` steps and after the last."""
    found = Steps()
    done, chunk, saved, began = first, 1, first, time.perf_counter()
    while done < last and found.ended is None:
        keep = done >= last - trace_steps
        ends = [last if keep else last - trace_steps, done + chunk]
        if checkpoints is not None:
            ends.append(done + checkpoints.every - done % checkpoints.every)
        count = max(1, min(ends) - done)
        started = time.perf_counter()
        losses, reports = run.steps(count, keep_spans=keep)
        took_s = time.perf_counter() - started
        found.seconds += [took_s / count] * len(losses)
        if watch is not None:
            watch.tell(done + 1, losses, reports)
        for values in losses:
            done += 1
            found.losses.append(values)
            if on_step is not None:
                on_step(done, values)
        found.reports += reports if keep else []
        found.ended = reports[0].ended
        chunk = _next_chunk(count, took_s)
        if checkpoints is not None and done > saved and (done % checkpoints.every == 0 or found.ended or done == last):
            started = time.perf_counter()
            run.save(checkpoints, done, seed)
            saved, began = done, began + time.perf_counter() - started
    found.train_s = time.perf_counter() - began
    return found


def _next_chunk(count: int, took_s: float, target_s: float = 1.0) -> int:
    """A call of Ray's actors takes some milliseconds."""
    return max(1, min(2 * count, int(count * target_s / max(took_s, 1e-6))))
