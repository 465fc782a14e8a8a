"""The command that evaluates, and trains nothing."""

from typing import Any

import click

from spindle.cli.bars import busy
from spindle.cli.evaluating import NAME, evaluation_in
from spindle.cli.group import JSON, LAUNCHER, SOURCE, cli, read_plan
from spindle.cli.kinds import FOLDER, JSON_FILE
from spindle.cli.terminal import json_text


@cli.command()
@SOURCE
@NAME
@click.option("--plan", "plan_file", type=JSON_FILE, help="That of the training. Default: plan the evaluation here.")
@click.option("--checkpoint", type=FOLDER, help="Weights to evaluate. Default: as the file makes them.")
@click.option("--ema", is_flag=True, help="The running average of the weights in the checkpoint.")
@LAUNCHER
@JSON
def evaluate(
    source: str, name: str, plan_file: str | None, checkpoint: str | None, ema: bool, launcher: Any, as_json: bool
) -> None:
    """Run the evaluation of SOURCE (file.py:workload) forward only, and print its losses and metrics.

    The file has an `evaluation = spindle.Evaluation(workload)`, with tasks of its own.

    \b
    spindle evaluate model.py:workload --checkpoint runs/a/step-00005000
    """
    from spindle.verbs.scoring import evaluate as run
    from spindle.verbs.source import load_workload

    with busy("evaluating"):
        workload, module = load_workload(source)
        found = evaluation_in(source, workload, module, name)
        found.ema = found.ema or ema
        plan = read_plan(plan_file) if plan_file else None
        scores = run(found, plan, checkpoint=checkpoint, launcher=launcher)
    if as_json:
        click.echo(json_text({"scores": scores}))
        return
    for task, own in scores.items():
        for metric, value in own.items():
            click.echo(f"{task:20} {metric:20} {value:.6g}")
