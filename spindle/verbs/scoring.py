"""Scoring: an evaluation by itself, under a plan of its own or that of the training."""

from pathlib import Path
from typing import TYPE_CHECKING

from spindle.errors import WorkloadError
from spindle.values.plan import Plan
from spindle.verbs.at_hand import devices_at_hand
from spindle.verbs.checkpoints import load_checkpoint
from spindle.verbs.planning import make_plan

if TYPE_CHECKING:
    from spindle.evaluation import Evaluation
    from spindle.metrics import Scores
    from spindle.runtime.controller import Launcher
    from spindle.workload import Workload


def evaluate(
    evaluation: "Evaluation",
    plan: Plan | None = None,
    *,
    checkpoint: Path | str | None = None,
    launcher: "Launcher" = "auto",
    seed: int = 0,
    timeout_s: float = 60.0,
) -> "Scores":
    """Run the tasks of an evaluation forward only, one pass over the data of each; by task its loss and its metrics.

    `plan`: the one the workload is trained under, whose devices then evaluate what they hold; None plans the
    forward-only tasks for the devices at hand. `checkpoint`: its weights (the running average of them, of an Evaluation
    with ema=True), which are put into the user's modules first, where these are in memory. Modules are in eval mode
    meanwhile, and buffers as before afterwards.

    Raises WorkloadError for tasks that cannot be run so, RunError as `train` does, and CheckpointError as
    `load_checkpoint` does.
    """
    from spindle.evaluation import check_evaluation, evaluation_mode
    from spindle.runtime.checkpoints.weights import sources_of
    from spindle.runtime.controller import launched, prepare
    from spindle.runtime.evaluation.prepare import prepare_alone, prepare_beside

    check_evaluation(evaluation)
    workload = evaluation.workload
    if evaluation.ema:
        _check_averages(workload, checkpoint)
    if checkpoint is not None:
        load_checkpoint(workload, checkpoint, ema=evaluation.ema)
    if plan is not None:
        prepared = prepare(workload, plan)
        evaluated = prepare_beside(evaluation, prepared)
    else:
        forward = evaluation.forward_workload()
        with evaluation_mode(forward):
            plan = make_plan(forward, devices_at_hand(launcher))
        prepared, evaluated = prepare_alone(evaluation, plan)
    sources = sources_of(workload, None if checkpoint is None else Path(checkpoint))
    made = launched(
        prepared,
        optimizer=None,
        launcher=launcher,
        seed=seed,
        timeout_s=timeout_s,
        weights=sources,
        evaluated=evaluated,
    )
    with made as run:
        return run.evaluate()


def _check_averages(workload: "Workload", checkpoint: Path | str | None) -> None:
    if checkpoint is None:
        raise WorkloadError(
            "the evaluation is on running averages of the weights (ema=True), which a checkpoint holds; give one by "
            "checkpoint="
        )
    empty = next((name for name, value in workload.named_parameters() if value.is_meta), None)
    if empty is not None:
        raise WorkloadError(
            f"component {empty.partition('.')[0]!r} is on the meta device, where averages cannot be evaluated from a "
            "checkpoint; write them by spindle export --ema, and evaluate these"
        )
