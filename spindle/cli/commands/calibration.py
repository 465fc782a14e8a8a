"""The command that fits the cost model to a user's own steps."""

from typing import TYPE_CHECKING

import click

from spindle.cli.bars import busy
from spindle.cli.group import CLUSTER, JSON, PROFILE, SOURCE, cli
from spindle.cli.kinds import CSV_FILE, FILE, METHOD
from spindle.cli.options import check_directory
from spindle.cli.terminal import folded, warn
from spindle.errors import FormatError

if TYPE_CHECKING:
    from spindle.values.calibration import Calibration


@cli.command()
@SOURCE
@CLUSTER
@PROFILE
@click.option(
    "--steps", "steps_file", type=CSV_FILE, required=True, help="Columns gpus,per_gpu_batch,seconds_per_step."
)
@click.option("--table", metavar="NAME", help="The rows of one table, where the file has a column of them.")
@click.option("--output", "-o", type=FILE, help="Write the calibration, for plan --calibration.")
@click.option(
    "--method", type=METHOD, default="sequential", show_default=True, help="How the steps were run, as in plan."
)
@JSON
def calibrate(
    source: str,
    cluster: str | None,
    profile: str | None,
    steps_file: str,
    table: str | None,
    output: str | None,
    method: str,
    as_json: bool,
) -> None:
    """Fit a few constants to measured steps of SOURCE, and say what they cannot explain.

    Each row is planned on its own number of GPUs, with its batch on each. The constants are factors on the
    seconds of computation, of the host and of the network, and a fixed part of each step.

    \b
    spindle calibrate workload.yaml --cluster 4x8:a100-80g --steps measured.csv -o calibrated.json
    spindle plan workload.yaml --cluster 4x8:a100-80g --calibration calibrated.json
    """
    from spindle.files.calibrationfile import read_steps
    from spindle.files.formats import dumps, read, write
    from spindle.planner.solve import METHODS
    from spindle.values.profile import Profile
    from spindle.verbs.at_hand import devices_at_hand
    from spindle.verbs.calibrating import make_calibration
    from spindle.verbs.source import is_python
    from spindle.words.nearest import did_you_mean

    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise click.UsageError(f"Invalid value for '--method': {method!r} is not one of {', '.join(METHODS)}{hint}.")
    if cluster is None and not is_python(source):
        raise FormatError(f"no cluster is given for {source}; add --cluster, for instance --cluster 4x8:a100-80g")
    check_directory(output)
    found = read_steps(steps_file, table)
    if found.unread:
        warn(
            f"{steps_file}: columns {', '.join(found.unread)} are not read; "
            "put rows that differ in them into tables of their own (a column `table`)"
        )
    measured = read(profile, Profile) if profile else None
    with busy(f"calibrating on {len(found.rows)} rows"):
        fitted = make_calibration(source, cluster or devices_at_hand(), found.rows, profile=measured, method=method)
    if output:
        write(fitted, output)
    if as_json:
        click.echo(dumps(fitted))
        return
    click.echo(calibration_text(fitted))
    if output:
        click.echo(f"written to {output}")


def calibration_text(found: "Calibration") -> str:
    """The constants, what they make of each row, and what the rows leave open."""
    lines = [f"{'constant':10} {'value':>9}"]
    for name, text, what in (
        ("compute", f"x {found.compute:.3f}", "seconds of computation"),
        ("host", f"x {found.host:.3f}", "seconds in which the host starts kernels"),
        ("network", f"x {found.network:.3f}", "seconds of collectives and transfers"),
        ("step_s", f"{_seconds(found.step_s)} s", "fixed part of each step: data, logging, hooks"),
    ):
        doubt = ": these rows say nothing about it" if name in found.undetermined else ""
        lines.append(f"{name:10} {text:>9}  {what}{doubt}")
    lines += ["", f"{'GPUs':>5} {'batch each':>10} {'measured s':>11} {'fitted s':>9} {'error %':>8}"]
    lines += [
        f"{row.gpus:>5} {row.per_gpu_batch:>10} {_seconds(row.seconds):>11} {_seconds(row.predicted_s):>9} "
        f"{100 * row.error:>+8.1f}"
        for row in found.rows
    ]
    doubts = _doubts(found)
    return "\n".join([*lines, *([""] if doubts else []), *(folded(doubt) for doubt in doubts)])


def _seconds(value_s: float) -> str:
    """Four places, or five digits where these would leave nothing of a short step or overflow their column."""
    return f"{value_s:.4f}" if not value_s or 0.01 <= value_s < 1e4 else f"{value_s:.5g}"


def _doubts(found: "Calibration") -> list[str]:
    lines = []
    if len({row.gpus for row in found.rows}) == 1:
        lines.append(
            f"all rows are of {found.rows[0].gpus} GPUs, which says nothing about the network; add a row of another "
            "number of nodes"
        )
    if len({row.per_gpu_batch for row in found.rows}) == 1:
        lines.append(
            f"all rows have a batch of {found.rows[0].per_gpu_batch} on each GPU, which cannot tell computation from "
            "what each step takes anyway; add a row of another batch"
        )
    if found.inseparable:
        pairs = ", ".join(f"{one} and {other}" for one, other in found.inseparable)
        lines.append(
            f"{pairs} cannot be separated by these rows: with one larger and the other smaller they would be as near"
        )
    worst = max(found.rows, key=lambda row: abs(row.error))
    if abs(worst.error) > LARGE:
        lines.append(
            f"{worst}: {100 * worst.error:+.1f} % is more than these constants explain; see whether this row ran the "
            "same program (memory choices, precision, number of tasks)"
        )
    far = [name for name in ("compute", "host", "network") if not 1 / FAR < getattr(found, name) < FAR]
    if far:
        lines.append(
            f"{' and '.join(far)}: more than {FAR:g} times off; check that SOURCE and --cluster are what was measured"
        )
    shortest = min(found.rows, key=lambda row: row.predicted_s)
    if found.step_s > MOST_FIXED * shortest.predicted_s:
        lines.append(
            f"step_s is {100 * found.step_s / shortest.predicted_s:.0f} % of the step on {shortest}, so most of it is "
            "neither computation nor network; check that seconds_per_step is in seconds, of one step"
        )
    return lines


LARGE = 0.05  # relative error of a row that is worth a sentence
FAR = 3.0
MOST_FIXED = 0.7  # share of a step that loaders, logs and hooks may take before their unit is in doubt
