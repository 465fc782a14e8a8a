"""Terminal: how the command line says things: JSON, lines that fit, colors, notes on costs, warnings."""

import json
import math
import os
import sys
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import click

from spindle.errors import SpindleWarning

if TYPE_CHECKING:
    from spindle.values.cost_options import CostOptions
    from spindle.values.plan import Plan
    from spindle.values.profile import Profile
    from spindle.verbs.source import Source
    from spindle.verbs.training import TrainResult
    from spindle.workload import Workload

WIDTH = 100
COST_SOURCES = {
    "given": "given in the file",
    "predicted": "predicted from shapes",
    "calibrated": "predicted, and calibrated on measured steps",
    "measured": "measured in the profile",
    "interpolated": "interpolated between measured sizes",
    "scaled": "scaled from measured layers",
}
"""In words where the times of MetaOps come from."""


def json_text(value: Any, **options: Any) -> str:
    """JSON, which has no NaN and no infinity: null stands for them."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(member) for key, member in part.items()}
        if isinstance(part, list | tuple):
            return [finite(member) for member in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), allow_nan=False, **options)


def losses_text(losses: dict[str, float]) -> str:
    """Losses of one step on one line."""
    return "  ".join(f"{task} {value:.4f}" for task, value in losses.items())


def folded(text: str, *, indent: int = 2) -> str:
    """The text with its lines broken at spaces to fit the width; what goes on in a new line is indented."""

    def lines(line: str) -> list[str]:
        more = " " * indent
        return textwrap.wrap(line, WIDTH, subsequent_indent=more, break_long_words=False, break_on_hyphens=False)

    return "\n".join(part for line in text.splitlines() for part in (lines(line) if len(line) > WIDTH else [line]))


def painted(text: str, color: str | None) -> str:
    """The text in a color, unless NO_COLOR is set; click.echo leaves colors out where no terminal reads."""
    return text if color is None or os.environ.get("NO_COLOR") else click.style(text, fg=color)


def is_silent() -> bool:
    """Whether this is a rank of a torchrun job other than 0, which does the talking."""
    job = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in job) and os.environ["RANK"] != "0"


def say(text: str) -> None:
    """On stderr; folded on a terminal, while logs keep a line a message, which is what one searches them for."""
    tell(folded(text) if sys.stderr.isatty() else text)


def tell(text: str) -> None:
    """On stderr as it is, with colors on a terminal only."""
    print(text if sys.stderr.isatty() else click.unstyle(text), file=sys.stderr)  # click would write past a bar


def warn(text: str) -> None:
    """A line on stderr of what the user may want to change."""
    from spindle.words.harmless import harmless  # which help does not need

    if is_silent():
        return
    say(f"{painted('spindle: warning:', 'yellow')} {harmless(text)}")


def cost_notes(
    source: "Source",
    plan: "Plan",
    measured: "Profile | None",
    cost_options: "CostOptions",
    *,
    is_calibrated: bool = False,
) -> str:
    """Where the times come from; what else a run must do to fit; advice."""
    from collections import Counter

    from spindle.cost.sources import cost_sources, costed_like
    from spindle.planner.report.advice import advise
    from spindle.values.graph import base_task

    metagraph = source.metagraph
    sources = cost_sources(costed_like(metagraph, plan), measured, is_calibrated=is_calibrated)
    counts = Counter(str(each.source) for each in sources).most_common()
    lines = [f"costs      of {', '.join(f'{n} MetaOps {COST_SOURCES[kind]}' for kind, n in counts)}"]
    if (
        cost_options.min_tensor_parallel > 1
        and source.cost_options.min_tensor_parallel != cost_options.min_tensor_parallel
    ):
        lines.append(f"to fit     tensor parallelism of {cost_options.min_tensor_parallel} devices or more")
    if cost_options.offload_optimizer and not source.cost_options.offload_optimizer:
        lines.append("to fit     optimizer states in the memory of the host")
    batches = {base_task(operator.task): operator.batch_size for m in metagraph for operator in m.operators}
    if measured is not None and {str(s.source) for s in sources} <= {"predicted", "calibrated"}:
        lines.append("profile    holds no times of these operators; measure them (spindle profile)")
    for advice in advise(plan, batches=batches):
        lines += textwrap.wrap(advice.text, WIDTH, initial_indent="advice     ", subsequent_indent=" " * 11)
    return "\n".join(lines)


def advise_after(workload: "Workload", result: "TrainResult") -> None:
    """What to do about steps that took longer than planned, where there are some and the plan is for all of them."""
    from spindle.planner.report import advice as of_planner

    if len(result.losses) < 10 or any(t.every > 1 or t.probability < 1 or t.mixture for t in workload.tasks.values()):
        return
    advice = of_planner.advise_after(result.plan.step_s * workload.accumulate / workload.in_flight, result.step_s)
    if advice is not None:
        click.echo("\n".join(textwrap.wrap(advice.text, WIDTH, initial_indent="advice ", subsequent_indent=" " * 7)))


def warn_of_losses(result: "TrainResult") -> None:
    """A run whose losses are no longer numbers has ended as any other does."""
    for step, losses in enumerate(result.losses, result.first_step + 1):
        broken = [task for task, loss in losses.items() if not math.isfinite(loss)]
        if broken:
            start = (
                f"step {step}: the loss of {', '.join(broken)} is {losses[broken[0]]}; lower the learning rate (--lr), "
            )
            warn(f"{start}clip gradients (max_grad_norm=), or look at the batch")
            return


def show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Warnings of Spindle as one line on stderr; others as Python has them."""
    if issubclass(category, SpindleWarning):
        warn(str(message))
    else:
        click.echo(warnings.formatwarning(message, category, *place[:2]), err=True, nl=False)
