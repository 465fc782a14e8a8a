"""Ray Train: a run inside of a `train_loop_per_worker`, whose workers are its ranks, as those of torchrun are.

- A TorchTrainer has set RANK, WORLD_SIZE and the rest, and made a process group, which a run borrows (`meeting.Lent`).
- `ray.train.report` waits for all workers, so all report each checkpoint; the first one has Ray copy it.
- When a worker fails Ray Train ends all of them and starts them again, as torchrun does.
"""

import sys
from pathlib import Path
from types import ModuleType

from spindle.errors import CheckpointError
from spindle.metrics import Callback, EvaluationMetrics, StepMetrics, scalars, scalars_of_scores
from spindle.runtime.checkpoints.checkpoint import checkpoints_in, path_of, step_of
from spindle.runtime.checkpoints.uploads import copied, step_there


def ray_train() -> ModuleType | None:
    """The module `ray.train` inside of a worker of Ray Train, None elsewhere.

    That of Ray before 2.51, which reports otherwise, counts as none.
    """
    train = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        from ray.train import collective  # noqa: F401 - only the present Ray Train has it

        train.get_context().get_world_size()
    except (ImportError, RuntimeError, DeprecationWarning):  # the last one inside of Ray Tune
        return None
    return train


def workers_of_ray_train() -> int:
    """How many workers Ray Train has started, of which this process is one; 0 where it is none."""
    train = ray_train()
    return int(train.get_context().get_world_size()) if train else 0


def reports() -> "list[Callback]":
    """What a run calls beside the user's callbacks: a report of each checkpoint inside of Ray Train."""
    train = ray_train()
    return [Reports(train)] if train else []


class Reports(Callback):
    """Reports each checkpoint to Ray Train, with the numbers of its step: `loss/TASK`, `evaluation/TASK/METRIC`, ..."""

    everywhere = True

    def __init__(self, train: ModuleType) -> None:
        """`train`: what `ray_train` gives."""
        self._train = train
        self._numbers: dict[int, dict[str, float]] = {}  # by step, since the last report

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Keep the numbers."""
        self._numbers[metrics.step] = {"step": metrics.step, **scalars(metrics)}

    def on_evaluate(self, metrics: EvaluationMetrics) -> None:
        """Keep the scores."""
        self._numbers.setdefault(metrics.step, {"step": metrics.step}).update(scalars_of_scores(metrics))

    def on_save(self, step: int, checkpoint: Path) -> None:
        """Report, and wait until Ray has its copy: the next step would wait for the first worker."""
        numbers = self._numbers.get(step, {"step": step})
        self._numbers = {number: kept for number, kept in self._numbers.items() if number > step}
        leads = self._train.get_context().get_world_rank() == 0
        self._train.report(numbers, checkpoint=self._train.Checkpoint.from_directory(checkpoint) if leads else None)
        self._train.collective.barrier()


def fetch_reported(train: ModuleType, directory: Path) -> Path | None:
    """The checkpoint that was reported last, copied into a directory that has none of as many steps; None where there
    is nothing newer. Raises CheckpointError where it is not one of Spindle's, or not as it was written.
    """
    reported = train.get_checkpoint()
    if reported is None:
        return None
    from fsspec.implementations.arrow import ArrowFSWrapper

    files = ArrowFSWrapper(reported.filesystem)
    try:
        step = step_there(files, reported.path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{reported.path}, the checkpoint that was reported to Ray Train last, is none of Spindle's ({error}); "
            "leave ray.train.report to it, or begin afresh with resume=False"
        ) from None
    if step <= max((step_of(path) for path in checkpoints_in(directory)), default=-1):
        return None
    path = path_of(directory, step)
    copied(files, reported.path, path, reported.path)
    return path
