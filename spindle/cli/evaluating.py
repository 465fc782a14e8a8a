"""Evaluating: the options of commands that evaluate, and how they say what came of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spindle.cli.terminal import folded, is_silent

if TYPE_CHECKING:
    from types import ModuleType

    from spindle.evaluation import Evaluation
    from spindle.metrics import Callback, EvaluationMetrics, Scores
    from spindle.verbs.training import TrainResult
    from spindle.workload import Workload

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

NAME = click.option(
    "--evaluation", "name", default="evaluation", show_default=True, help="Name of the Evaluation in the file."
)


def with_evaluation(command: CommandT) -> CommandT:
    """The options of a run that evaluates, and that ends before its last step."""
    for option in (
        click.option("--stages", is_flag=True, help="Train in the stages that the file lists as `stages`."),
        click.option(
            "--max-tokens",
            type=click.IntRange(1),
            help="Stop once all tasks together have trained with this number of tokens.",
        ),
        click.option(
            "--max-samples",
            type=click.IntRange(1),
            help="Stop once all tasks together have trained with this number of samples.",
        ),
        click.option("--patience", type=click.IntRange(1), default=3, show_default=True, help="Of --early-stop."),
        click.option(
            "--early-stop",
            metavar="TASK:METRIC[:min|max]",
            help="Stop when this has not improved in --patience evaluations in a row.",
        ),
        click.option(
            "--keep-best",
            metavar="TASK:METRIC[:min|max]",
            help="Keep the checkpoint with the best value of this too, whatever --keep says.",
        ),
        NAME,
        click.option("--evaluate-every", type=click.IntRange(1), help="Steps between evaluations. Default: none."),
    ):
        command = option(command)
    return command


def asked(
    source: str,
    workload: "Workload",
    module: "ModuleType",
    *,
    evaluate_every: int | None,
    name: str,
    keep_best: str | None,
    early_stop: str | None,
    patience: int,
    **limits: int | None,
) -> dict[str, Any]:
    """What `train` is given for the options of `with_evaluation`."""
    if evaluate_every is None:
        for option, value in (("--keep-best", keep_best), ("--early-stop", early_stop)):
            if value is not None:
                raise click.UsageError(f"{option} {value}: nothing is evaluated; add --evaluate-every STEPS.")
        return {**limits}
    from spindle.evaluation import EarlyStop

    return {
        **limits,
        "evaluation": evaluation_in(source, workload, module, name),
        "evaluate_every": evaluate_every,
        "keep_best": keep_best,
        "early_stop": EarlyStop(metric=early_stop, patience=patience) if early_stop else None,
    }


def evaluation_in(source: str, workload: "Workload", module: "ModuleType", name: str) -> "Evaluation":
    """The Evaluation of this name in a source's file; or what a function of this name makes of the workload.

    Raises WorkloadError where there is none.
    """
    from spindle.errors import WorkloadError
    from spindle.evaluation import Evaluation

    value = getattr(module, name, None)
    if callable(value) and not isinstance(value, Evaluation):
        value = value(workload)
    if not isinstance(value, Evaluation):
        known = [key for key, member in vars(module).items() if isinstance(member, Evaluation)]
        raise WorkloadError(
            f"{source} has no Evaluation {name!r}; it has {', '.join(known) or 'none'}: evaluation = "
            "spindle.Evaluation(workload), see docs/evaluation.md"
        )
    return value


def staged(
    source: str, workload: "Workload", module: "ModuleType", *, plan_file: str | None, checkpoints: str | None
) -> Callable[..., "TrainResult"]:
    """What trains in the stages that a source's file lists."""
    import functools

    from spindle.errors import WorkloadError
    from spindle.verbs.stages import Stage, train_stages

    if plan_file is not None:
        raise click.UsageError("--stages: each stage is planned anew; leave out --plan.")
    if checkpoints is None:
        raise click.UsageError("--stages: each stage goes on from a checkpoint; give --checkpoints DIR.")
    found = getattr(module, "stages", None)
    if not isinstance(found, list | tuple) or not all(isinstance(stage, Stage) for stage in found):
        raise WorkloadError(f"{source} has no list `stages`; give stages = [spindle.Stage(until=1000, ...), ...]")
    return functools.partial(train_stages, workload, found)


def telling() -> "Callback":
    """A callback that prints a line on stderr for each evaluation."""
    from spindle.metrics import Callback

    class Telling(Callback):
        def on_evaluate(self, metrics: "EvaluationMetrics") -> None:
            if is_silent():
                return
            best = "  (best so far)" if metrics.is_best else ""
            click.echo(folded(f"evaluated after step {metrics.step}: {scores_text(metrics.scores)}{best}"), err=True)

    return Telling()


def scores_text(scores: "Scores") -> str:
    """Scores on one line."""
    return "; ".join(
        f"{task} {', '.join(f'{name} {value:.4f}' for name, value in own.items())}" for task, own in scores.items()
    )


def last_text(result: "TrainResult") -> str:
    """What the evaluations of a run came to, in lines; "" without any."""
    lines = [f"stopped: {result.stopped}"] if result.stopped else []
    if result.scores:
        last = max(result.scores)
        lines.append(f"evaluated after step {last}: {scores_text(result.scores[last])}")
    if result.best is not None:
        lines.append(f"best  {result.best}")
    return "\n".join(lines)
