"""The group of commands, and the arguments that several of them take."""

import re
from typing import TYPE_CHECKING

import click

from spindle.cli.kinds import CLUSTER_TEXT, JSON_FILE, SOURCE_FILE
from spindle.cli.terminal import WIDTH
from spindle.errors import FormatError

if TYPE_CHECKING:
    from spindle.values.plan import Plan


HELP = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}


def _clause(text: str, most: int = 80) -> str:
    """As much of a text's first sentence as fits into the list of commands, up to a mark between its clauses."""
    for marks in ("[:;.]", ","):
        ends = [mark.start() for mark in re.finditer(rf"{marks}(?=\s|$)", text) if mark.start() <= most]
        if ends:
            return " ".join(text[: ends[-1]].split()) + "."
    return text


class _Commands(click.Group):
    """Lists commands in the order in which one uses them."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Also parsed without this group a command has both help options: click keeps the first that it makes."""
        cmd.context_settings = {**HELP, **cmd.context_settings}
        cmd.short_help = cmd.short_help or _clause(cmd.help or "")
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings=HELP)
@click.version_option(package_name="spindle")
def cli() -> None:
    """Plan and run multi-task, multi-modal PyTorch training in waves.

    \b
    spindle plan workload.yaml --cluster 4x8 -o plan.json     no GPU needed
    spindle verify model.py:workload                          same gradients as one process?
    spindle train model.py:workload --steps 100               on Ray
    """


SOURCE = click.argument("source", type=SOURCE_FILE)
PLAN = click.argument("plan_file", metavar="PLAN", type=JSON_FILE)
CLUSTER = click.option(
    "--cluster", "-c", type=CLUSTER_TEXT, help="4x8, 4x8:a100-80g, or a YAML file. Python sources: this machine."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
CALIBRATION = click.option(
    "--calibration", type=JSON_FILE, help="Factors fitted on measured steps (spindle calibrate)."
)
TASKS = click.option("--tasks", metavar="K|NAME,..", help="The first K tasks, or these, instead of all.")
PROFILE = click.option("--profile", "-p", type=JSON_FILE, help="Measured times (spindle profile).")
LAUNCHER = click.option(
    "--launcher",
    type=click.Choice(["auto", "ray", "processes", "threads", "torchrun"]),
    default="auto",
    show_default=True,
    help="What starts the workers.",
)


def cluster_for(source: str, cluster: str | None) -> str:
    """The cluster that was typed, or this machine for a Python source. Raises FormatError for files without one."""
    if cluster is None and source.endswith((".json", ".yaml", ".yml")):
        raise FormatError(f"no cluster is given for {source}; add --cluster, for instance --cluster 4x8:a100-80g")
    if cluster is not None:
        return cluster
    from spindle.verbs.at_hand import devices_at_hand

    return devices_at_hand()


def read_plan(path: str, *, as_it_is: bool = False) -> "Plan":
    """The plan in a file; PlanError where it breaks a rule of the checker, unless it is read `as_it_is`."""
    from spindle.errors import PlanError
    from spindle.files.formats import read
    from spindle.planner.check import check_plan
    from spindle.values.plan import Plan

    plan = read(path, Plan)
    findings = () if as_it_is else check_plan(plan)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise PlanError(f"{path}: {findings[0]}{more}; `spindle check {path}` lists all that is wrong")
    return plan
