"""Metrics: what a training run tells of each step, and where it goes: JSON lines, TensorBoard, or a callback of yours.

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
    from spindle.plan import Plan

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
