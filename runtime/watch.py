"""Watch: what ranks tell of their steps in, StepMetrics for callbacks out."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spindle.metrics import Callback, EvaluationMetrics, StepMetrics
from spindle.runtime.steps.busy import Meeting
from spindle.runtime.steps.record import StepRecord
from spindle.values.graph import base_task, num_micro_batches
from spindle.values.trace import SpanKind

if TYPE_CHECKING:
    from spindle.runtime.controller import Prepared
    from spindle.runtime.worker import Report

_SHARE_BY_KIND = {
    SpanKind.FORWARD: "utilization",
    SpanKind.BACKWARD: "utilization",
    SpanKind.STEP: "utilization",
    SpanKind.TRANSFER: "communication",
    SpanKind.REDUCE: "communication",
    SpanKind.LOAD: "loading",
}


@dataclass(slots=True)
class RankStep:
    """What a rank reports of one step: its seconds, those of each share, and tokens of the tasks that it loaded."""

    step_s: float
    shares_s: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)  # that it computed, by slice run
    together_s: dict[Meeting, tuple[float, float]] = field(default_factory=dict)  # see `Together.taken`


def rank_step(step_s: float, record: StepRecord, tokens: Mapping[str, int]) -> RankStep:
    """Add up the spans of what a step left behind."""
    shares_s = dict.fromkeys(_SHARE_BY_KIND.values(), 0.0)
    for span in record.spans:
        shares_s[_SHARE_BY_KIND[span.kind]] += span.end_s - span.start_s
    return RankStep(step_s, shares_s, dict(tokens), dict(record.busy_s), dict(record.together_s))


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch: what its attention mask lets through, else the size of its ids; 0 when it has neither."""
    if "attention_mask" in batch:
        return int((batch["attention_mask"] != 0).sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


class Watch:
    """Tells callbacks of a run's steps."""

    def __init__(self, prepared: "Prepared", callbacks: Sequence[Callback], *, leads: bool = True) -> None:
        """`leads`: whether this process is the one to call; under torchrun only rank 0 is, and the others call what is
        to be called everywhere.
        """
        self._callbacks = tuple(callback for callback in callbacks if leads or callback.everywhere)
        workload, plan = prepared.workload, prepared.plan
        self._plan = plan
        rounds = workload.accumulate // num_micro_batches(prepared.captured.tasks)
        self._samples = {name: task.batch_size * workload.accumulate for name, task in workload.tasks.items()}
        self._flops = dict.fromkeys(workload.tasks, 0.0)
        for operator in prepared.captured.graph:
            work = operator.forward_flops + operator.backward_flops
            self._flops[base_task(operator.task)] += work * rounds
        device = plan.cluster.device if plan.cluster else None
        known = device is not None and device.name != "cpu"
        self._peak_flops = plan.num_devices * device.peak_flops if device and known else None

    @contextlib.contextmanager
    def running(self, first_step: int) -> Iterator["Watch"]:
        """Begin, and end whatever happens."""
        try:
            for callback in self._callbacks:
                callback.on_train_begin(self._plan, first_step)
            yield self
        finally:
            for callback in self._callbacks:
                callback.on_train_end()

    def tell(self, first_step: int, losses: Sequence[Mapping[str, float]], reports: "Sequence[Report]") -> None:
        """Some steps are done, the first of which is `first_step`."""
        for index, values in enumerate(losses if self._callbacks else ()):
            metrics = self._metrics(first_step + index, index, values, reports)
            for callback in self._callbacks:
                callback.on_step_end(metrics)

    def evaluated(self, metrics: EvaluationMetrics) -> None:
        """An evaluation is done."""
        for callback in self._callbacks:
            callback.on_evaluate(metrics)

    def saved(self, step: int, checkpoint: Path) -> None:
        """The checkpoint after `step` steps is whole."""
        for callback in self._callbacks:
            callback.on_save(step, checkpoint)

    def _metrics(self, step: int, index: int, losses: Mapping[str, float], reports: "Sequence[Report]") -> StepMetrics:
        steps = [report.steps[index] for report in reports]
        step_s = max(max(t.step_s for t in steps), 1e-9)
        shares = {
            name: sum(t.shares_s.get(name, 0.0) for t in steps) / (step_s * len(steps))
            for name in ("utilization", "communication", "loading")
        }
        tokens: dict[str, int] = {}
        for task, count in ((task, count) for t in steps for task, count in t.tokens.items()):
            tokens[task] = max(count, tokens.get(task, 0))  # ranks that load one task read the same batches
        flops = sum(self._flops[task] for task in losses)
        rates = {name: rate for report in reports for name, rate in report.learning_rates.items()}
        return StepMetrics(
            step=step,
            step_s=step_s,
            losses=dict(losses),
            samples_per_s={task: self._samples[task] / step_s for task in losses},
            tokens_per_s={task: count / step_s for task, count in tokens.items() if count},
            **shares,
            idle=max(0.0, 1 - shares["utilization"]),
            mfu=flops / (step_s * self._peak_flops) if self._peak_flops else None,
            grad_norm=next((r.grad_norms[index] for r in reports if r.grad_norms[index] is not None), None),
            memory_bytes=tuple(report.memory_bytes for report in reports),
            learning_rates=rates,
        )
