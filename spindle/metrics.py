"""Metrics: what a training run tells of each step, and where it goes: JSON lines, TensorBoard, Ray's endpoint for
Prometheus, or a callback of yours.

- Shares are of the ranks' time: `utilization` goes into forward, backward and the optimizer, `communication` into
  transfers and reductions with the waits for them, `loading` into batches; `idle` is all but utilization.
- `mfu` is the FLOPs that the model needs (what recompute adds does not count) over time and the devices' peak. It is
  None where the plan does not name its devices, or names CPUs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from spindle.errors import InputError

if TYPE_CHECKING:
    from spindle.values.plan import Plan

Scores = Mapping[str, Mapping[str, float]]
"""What an evaluation gives: by task, "loss" and the task's metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One step of a run, counted from 1. Mappings are keyed by task, by rank, and by parameter group.

    step_s                    the slowest rank's seconds from the step's start to its end
    samples_per_s, tokens_per_s   of tasks that took part; tokens of those whose batches have `attention_mask` (its sum)
                              or `input_ids` (its size)
    learning_rates            by group: "" or a component with settings of its own, after "group 0", "group 1", or the
                              name of the group, where the optimizer has several
    memory_bytes              peak of each rank so far: of its GPU, or of its process on a CPU
    """

    step: int
    step_s: float
    losses: Mapping[str, float]
    samples_per_s: Mapping[str, float] = field(default_factory=dict)
    tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    utilization: float = 0.0
    communication: float = 0.0
    loading: float = 0.0
    idle: float = 0.0
    mfu: float | None = None
    grad_norm: float | None = None
    memory_bytes: tuple[int, ...] = ()
    learning_rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMetrics:
    """One evaluation, after `step` steps: the scores by task, and how long it took. `is_best`: the checkpoint of this
    step is now the one that `keep_best=` keeps.
    """

    step: int
    scores: Scores
    evaluation_s: float = 0.0
    is_best: bool = False


class Callback:
    """What a run calls in the process that drives it (under torchrun: on rank 0). Override what you need.

    Steps are reported a few at a time and late, since ranks run several before they report. The methods are named as
    those of a `TrainerCallback` of transformers that are called at the same moments.
    """

    everywhere = False
    """Whether each process that drives a run calls it, where there are several."""

    def on_train_begin(self, plan: "Plan", first_step: int) -> None:
        """The run starts; `first_step` steps were done before, by the run that is resumed."""

    def on_step_end(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def on_evaluate(self, metrics: EvaluationMetrics) -> None:
        """An evaluation is done; steps up to its own have been reported."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """The checkpoint after `step` steps is written and whole."""

    def on_train_end(self) -> None:
        """The run ended, by an error too."""


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Raise InputError where a run would not call what one of them defines."""
    called = [name for name in vars(Callback) if name.startswith("on_")]
    for index, callback in enumerate(callbacks):
        kind = type(callback).__name__
        if not isinstance(callback, Callback):
            raise InputError(
                f"callbacks[{index}] is a {kind}, which a run cannot call; derive it from spindle.metrics.Callback "
                "(one of transformers keeps the names of its methods and gets other arguments: docs/from_trainer.md)"
            )
        never = sorted(name for name in dir(callback) if name.startswith("on_") and name not in called)
        if never:
            raise InputError(
                f"callbacks[{index}]: {kind}.{never[0]} would never be called; a run calls {', '.join(called)}"
            )


class JsonLines(Callback):
    """A line of JSON for each step and each evaluation; a resumed run goes on in the same file. Numbers that are not
    finite are null.
    """

    def __init__(self, path: Path | str) -> None:
        """`path`: the file, in a folder that exists."""
        self.path = Path(path)
        self._file: IO[str] | None = None

    def on_train_begin(self, plan: "Plan", first_step: int) -> None:
        """Open the file."""
        try:
            self._file = self.path.open("a" if first_step else "w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: metrics cannot be written ({error.strerror}); check the path") from None

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Write a line."""
        self._write(asdict(metrics))

    def on_evaluate(self, metrics: EvaluationMetrics) -> None:
        """Write a line, which has `scores`."""
        self._write(asdict(metrics))

    def _write(self, values: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(_finite(values), allow_nan=False) + "\n")
        self._file.flush()

    def on_train_end(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class TensorBoard(Callback):
    """Scalars for TensorBoard, under `loss/`, `samples_per_s/`, `learning_rate/` and so on."""

    def __init__(self, directory: Path | str) -> None:
        """Raises InputError when the package `tensorboard` is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "tensorboard is not installed; pip install tensorboard, or write JSON lines (--metrics FILE.jsonl)"
            ) from None
        self._make: Any = SummaryWriter
        self._directory = str(directory)
        self._writer: Any = None

    def on_train_begin(self, plan: "Plan", first_step: int) -> None:
        """Open the log; steps after `first_step` of an earlier run are purged from it."""
        self._writer = self._make(self._directory, purge_step=first_step + 1 if first_step else None)

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Write all numbers."""
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)

    def on_evaluate(self, metrics: EvaluationMetrics) -> None:
        """Write all scores, as `evaluation/TASK/METRIC`."""
        for name, value in scalars_of_scores(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)

    def on_train_end(self) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()


class RayMetrics(Callback):
    """Gives losses, times and memory to Ray, whose nodes serve them to Prometheus as `ray_spindle_loss` and so on."""

    def __init__(self, run: str = "") -> None:
        """`run`: a name that all numbers carry, to tell runs of one cluster apart."""
        self._run = run
        self._gauges: dict[str, Any] = {}

    def on_train_begin(self, plan: "Plan", first_step: int) -> None:
        """Raises InputError where this process is not part of a Ray cluster."""
        import ray
        from ray.util.metrics import Counter, Gauge, Histogram

        if not ray.is_initialized():
            raise InputError(
                "RayMetrics gives numbers to Ray, and this run is not on Ray; train with launcher='ray' or inside of a "
                "function of Ray Train, or write JSON lines (--metrics FILE.jsonl)"
            )
        self._gauges = {
            name: Gauge(f"spindle_{name}", words, ("run", *tags)) for name, (words, tags) in _RAY_GAUGES.items()
        }
        self._steps = Counter("spindle_steps", "Steps that are done.", ("run",))
        self._seconds = Histogram("spindle_step_seconds", "Seconds of a step.", _STEP_SECONDS, ("run",))

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Set all numbers."""
        self._steps.inc(1, {"run": self._run})
        self._seconds.observe(metrics.step_s, {"run": self._run})
        for name, by_task in (
            ("loss", metrics.losses),
            ("samples_per_second", metrics.samples_per_s),
            ("tokens_per_second", metrics.tokens_per_s),
        ):
            for task, value in by_task.items():
                self._set(name, value, task=task)
        for rank, held in enumerate(metrics.memory_bytes):
            self._set("memory_bytes", held, rank=str(rank))
        for name, share in (("utilization", metrics.utilization), ("mfu", metrics.mfu)):
            if share is not None:
                self._set(name, share)

    def on_evaluate(self, metrics: EvaluationMetrics) -> None:
        """Set the scores."""
        for task, scores in metrics.scores.items():
            for name, value in scores.items():
                self._set("score", value, task=task, metric=name)

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._gauges[name].set(value, {"run": self._run, **tags})


_RAY_GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "loss": ("Loss of a task.", ("task",)),
    "samples_per_second": ("Samples of a task each second.", ("task",)),
    "tokens_per_second": ("Tokens of a task each second.", ("task",)),
    "memory_bytes": ("Peak of a rank so far: of its GPU, or of its process on a CPU.", ("rank",)),
    "utilization": ("Share of the ranks' time in forward, backward and the optimizer.", ()),
    "mfu": ("FLOPs that the model needs, over time and the devices' peak.", ()),
    "score": ("What an evaluation gave.", ("task", "metric")),
}
_STEP_SECONDS = [0.01 * 2**power for power in range(16)]
"""Bounds of the histogram's buckets: 10 ms to 5.5 minutes."""


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """The numbers of a step by flat names: `loss/image-text`, `step_s`, `memory_bytes/rank0`."""
    found: dict[str, float] = {}
    for name, value in asdict(metrics).items():
        title = {"losses": "loss", "learning_rates": "learning_rate"}.get(name, name)
        if isinstance(value, Mapping):
            found |= {f"{title}/{key or 'all'}": number for key, number in value.items()}
        elif isinstance(value, tuple):
            found |= {f"{title}/rank{rank}": float(number) for rank, number in enumerate(value)}
        elif value is not None and name != "step":
            found[title] = value
    return found


def scalars_of_scores(metrics: EvaluationMetrics) -> dict[str, float]:
    """The scores of an evaluation by flat names: `evaluation/val/accuracy`."""
    return {
        f"evaluation/{task}/{name}": value for task, scores in metrics.scores.items() for name, value in scores.items()
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
