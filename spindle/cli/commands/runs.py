"""Commands that run the model: measure it, verify, train, export; and `doctor`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spindle.cli.bars import busy, progress
from spindle.cli.evaluating import asked, last_text, staged, telling, with_evaluation
from spindle.cli.group import CLUSTER, JSON, LAUNCHER, SOURCE, cli, read_plan
from spindle.cli.kinds import FILE, FOLDER, JSON_FILE
from spindle.cli.options import check_directory, duration, not_negative
from spindle.cli.ray_nodes import ray_nodes_of, with_ray_nodes
from spindle.cli.terminal import advise_after, folded, json_text, losses_text, painted, warn_of_losses
from spindle.cli.uploads import uploads_of, with_upload

if TYPE_CHECKING:
    from spindle.values.plan import Plan


@cli.command()
@SOURCE
@CLUSTER
@click.option("--devices", "-n", "num_devices", type=click.IntRange(1), help="Largest device count. Default: all.")
@click.option("--profile", "-p", "old", type=JSON_FILE, help="A profile whose times are taken over.")
@click.option("--output", "-o", type=FILE, required=True, help="The profile; what it holds is not measured again.")
@click.option(
    "--launcher",
    type=click.Choice(["auto", "ray", "processes", "torchrun"]),
    default="auto",
    show_default=True,
    help="What starts the ranks. auto: torchrun where it did, ray where RAY_ADDRESS names a cluster.",
)
@click.option("--validate", is_flag=True, help="Measure more counts, and print how well curves tell them.")
@JSON
def profile(
    source: str,
    cluster: str | None,
    num_devices: int | None,
    old: str | None,
    output: str,
    launcher: Any,
    validate: bool,
    as_json: bool,
) -> None:
    """Time the layers of SOURCE (file.py:workload) here, on a Ray cluster's nodes, or under torchrun.

    Also the optimizer's step and messages between ranks, inside a node and across nodes. Interrupted, the same command
    goes on.

    \b
    spindle profile model.py:workload -o profile.json
    RAY_ADDRESS=head:6379 spindle profile model.py:workload -o profile.json
    torchrun --nproc-per-node 2 -m spindle profile model.py:workload -o profile.json
    spindle plan model.py:workload --profile profile.json
    """
    import functools
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from spindle.cost.measured.heldout import held_out, render_held_out
    from spindle.files.formats import read, write
    from spindle.runtime.controller import place_among_drivers
    from spindle.values.profile import Profile
    from spindle.verbs.measuring import make_profile
    from spindle.verbs.source import load_workload

    workload, module = load_workload(source)
    found = [read(path, Profile) for path in (old, output if Path(output).exists() else None) if path]
    known = functools.reduce(Profile.merge, found) if found else None
    with progress("profiling") as update:
        measured = make_profile(
            workload,
            num_devices=num_devices,
            cluster=cluster,
            known=known,
            optimizer=getattr(module, "optimizer", None) or torch.optim.AdamW,
            launcher=launcher,
            validate=validate,
            progress=update,
            keep=lambda so_far: write(so_far, output),
        )
    if place_among_drivers(launcher)[0]:
        return  # rank 0 of a torchrun job tells
    write(measured, output)
    rows = held_out(measured) if validate else ()
    if as_json:
        counts = {"kinds": len(measured.by_kind), "entries": len(measured.entries), "messages": len(measured.links)}
        new = measured.size - (known.size if known else 0)
        values = {"output": output, "device": measured.device, **counts, "new": new}
        click.echo(json.dumps(values | ({"held_out": [asdict(row) for row in rows]} if validate else {})))
        return
    click.echo(folded(f"{measured.describe(known)}; written to {output}"))
    if validate:
        click.echo(render_held_out(rows))


@cli.command()
@SOURCE
@click.option("--plan", "plan_file", type=JSON_FILE, help="Verify this plan. Default: plan for --workers devices.")
@click.option("--workers", "-n", type=click.IntRange(1), default=2, show_default=True, help="Devices to plan for.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--resume-under",
    metavar="PLAN|N",
    help="Save after half of the steps, and resume under this plan, or under one for N devices.",
)
@click.option("--rtol", type=float, callback=not_negative, help="Default: 1e-4, or 1e-10 for float64 models.")
@click.option("--atol", type=float, callback=not_negative, help="Default: 1e-5, or 1e-10 for float64 models.")
@LAUNCHER
@JSON
def verify(
    source: str,
    plan_file: str | None,
    workers: int,
    steps: int,
    resume_under: str | None,
    rtol: float | None,
    atol: float | None,
    launcher: Any,
    as_json: bool,
) -> None:
    """Compare a planned run of SOURCE with one process: all that a step changes. Exit 1 when they differ.

    Functions `optimizer(parameters)`, `scheduler(optimizer)` and `metric(losses)` in the file are used as `spindle
    train` uses them; without an optimizer it is plain gradient descent.

    \b
    spindle verify model.py:workload --workers 4
    spindle verify model.py:workload --steps 4 --resume-under 3
    """
    from dataclasses import asdict

    from spindle.runtime.controller import place_among_drivers
    from spindle.verbs import verifying
    from spindle.verbs.source import load_workload

    with busy("verifying"):
        workload, module = load_workload(source)
        report = verifying.verify(
            workload,
            read_plan(plan_file) if plan_file else None,
            num_workers=workers,
            steps=steps,
            optimizer=getattr(module, "optimizer", None),
            scheduler=getattr(module, "scheduler", None),
            metric=getattr(module, "metric", None),
            resume_under=_plan_or_count(resume_under) if resume_under else None,
            rtol=rtol,
            atol=atol,
            launcher=launcher,
        )
    if place_among_drivers(launcher)[0]:
        pass  # rank 0 of a torchrun job reports
    elif as_json:
        values = {"ok": report.ok, "max_abs_error": report.max_abs_error, "max_rel_error": report.max_rel_error}
        losses = {"losses": report.losses, "reference_losses": report.reference_losses}
        click.echo(json_text(values | losses | {"rows": [asdict(row) for row in report.rows]}))
    else:
        click.echo(folded(str(report)))
    if not report.ok:
        click.get_current_context().exit(1)


def _plan_or_count(text: str) -> "Plan | int":
    return int(text) if text.isdigit() else read_plan(text)


@cli.command()
@SOURCE
@click.option("--plan", "plan_file", type=JSON_FILE, help="Default: plan for the devices of this machine.")
@click.option("--steps", type=click.IntRange(1), required=True)
@click.option(
    "--lr",
    type=float,
    callback=not_negative,
    help="Of AdamW, unless the file has `optimizer`. Default: 0.001, or what a resumed run was begun with.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--trace", "trace_file", type=FILE, help="Write what the last steps did, when and where.")
@click.option("--metrics", type=FILE, help="Write a line of JSON a step: losses, speed, shares of time, memory.")
@click.option("--tensorboard", type=FOLDER, help="The same for TensorBoard (pip install tensorboard).")
@click.option("--checkpoints", type=FOLDER, help="Write checkpoints here, the last one at the end.")
@click.option("--every", type=click.IntRange(1), default=1000, show_default=True, help="Steps between checkpoints.")
@click.option("--keep", type=click.IntRange(1), help="Checkpoints to keep, the newest. Default: all.")
@click.option(
    "--keep-every",
    metavar="TIME",
    callback=duration,
    help="Of older ones than --keep, keep one each 30m, 6h or 1d. Default: none.",
)
@click.option("--save-async", is_flag=True, help="Write checkpoints beside the next steps, from a copy in main memory.")
@click.option(
    "--resume",
    metavar="[STEP]",
    is_flag=False,
    flag_value="newest",
    help="Go on from the newest checkpoint, if there is one, or from the one after this number of steps.",
)
@click.option(
    "--allow-changes",
    is_flag=True,
    help="Of --resume: components that the checkpoint does not have begin at their own values.",
)
@click.option(
    "--max-failures",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Failures of ranks after which the run goes on from its newest checkpoint.",
)
@click.option(
    "--elastic",
    is_flag=True,
    help="With fewer or more devices than the plan's, plan anew for the devices that are there, and go on.",
)
@click.option(
    "--min-devices", type=click.IntRange(1), default=1, show_default=True, help="With fewer an elastic run ends."
)
@click.option(
    "--not-finite",
    type=click.Choice(["stop", "skip", "ignore"]),
    default="stop",
    show_default=True,
    help="What a step does with a loss or a gradient that is no finite number.",
)
@click.option(
    "--check-replicas-every",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    metavar="STEPS",
    help="Compare what several ranks should hold alike; 0: never.",
)
@click.option(
    "--grace",
    type=float,
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    callback=not_negative,
    help="From SIGTERM until the run ends at once, its checkpoint written or not.",
)
@with_ray_nodes
@with_upload
@with_evaluation
@LAUNCHER
@JSON
def train(
    source: str,
    plan_file: str | None,
    steps: int,
    lr: float | None,
    seed: int,
    trace_file: str | None,
    metrics: str | None,
    tensorboard: str | None,
    checkpoints: str | None,
    every: int,
    keep: int | None,
    keep_every: float | None,
    save_async: bool,
    resume: str | None,
    allow_changes: bool,
    max_failures: int,
    elastic: bool,
    min_devices: int,
    not_finite: Any,
    check_replicas_every: int,
    grace: float,
    upload: str | None,
    upload_wait: float,
    wait_for_nodes: float | None,
    accelerator_type: str | None,
    node_labels: dict[str, str],
    ray_metrics: bool,
    launcher: Any,
    as_json: bool,
    **evaluating: Any,
) -> None:
    """Train SOURCE (file.py:workload) as planned, up to --steps steps in all.

    A function `optimizer(parameters)` in the file makes the optimizer; without one it is AdamW. `scheduler(optimizer)`,
    if there is one, makes its schedule. SIGTERM ends the run after a checkpoint with exit code 75: start it again with
    --resume.

    \b
    spindle train model.py:workload --plan plan.json --steps 100 --metrics run.jsonl
    spindle train model.py:workload --steps 5000 --checkpoints runs/a --resume --max-failures 3
    torchrun --nproc-per-node 2 -m spindle train model.py:workload --steps 100
    """
    import functools

    import torch

    from spindle.failures import Failures
    from spindle.files.formats import write
    from spindle.metrics import Callback, JsonLines, RayMetrics, TensorBoard
    from spindle.runtime.checkpoints.run_folder import rate_before
    from spindle.runtime.controller import place_among_drivers
    from spindle.verbs import training
    from spindle.verbs.source import load_workload

    if resume and not checkpoints:
        raise click.UsageError("--resume needs --checkpoints DIR, where the checkpoints of the run lie.")
    if keep_every and not keep:
        raise click.UsageError("--keep-every needs --keep N: how many of the newest stay besides.")
    if allow_changes and not resume:
        raise click.UsageError("--allow-changes is of a run that goes on from a checkpoint; add --resume.")
    if min_devices > 1 and not elastic:
        raise click.UsageError("--min-devices is for a run that may change its devices; add --elastic.")
    if resume not in (None, "newest") and not resume.isdigit():
        raise click.UsageError(f"--resume {resume}: give the number of steps after which a checkpoint was written.")
    check_directory(trace_file)
    check_directory(metrics)
    callbacks: list[Callback] = [JsonLines(metrics)] if metrics else []
    callbacks += [TensorBoard(tensorboard)] if tensorboard else []
    callbacks += [RayMetrics()] if ray_metrics else []
    workload, module = load_workload(source)
    in_stages = evaluating.pop("stages")
    evaluation = asked(source, workload, module, **evaluating)
    callbacks += [telling()] if "evaluation" in evaluation else []
    again = int(resume) if resume and resume.isdigit() else bool(resume)
    uploads = uploads_of(upload, upload_wait, checkpoints, resume=resume, launcher=launcher, in_stages=bool(in_stages))
    optimizer = getattr(module, "optimizer", None)
    if optimizer and lr is not None:
        raise click.UsageError(f"--lr {lr:g} is of AdamW, and {source} has an `optimizer`: give the rate there.")
    if lr is None:
        lr = (rate_before(Path(checkpoints), again) if checkpoints else None) or 1e-3
    optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=lr)
    run: Callable[..., training.TrainResult]
    if in_stages:
        run = staged(source, workload, module, plan_file=plan_file, checkpoints=checkpoints)
    else:
        run = functools.partial(training.train, workload, read_plan(plan_file) if plan_file else None)
    with progress("training") as update:
        result = run(
            optimizer=optimizer,
            scheduler=getattr(module, "scheduler", None),
            metric=getattr(module, "metric", None),
            steps=steps,
            launcher=launcher,
            seed=seed,
            checkpoints=checkpoints,
            checkpoint_every=every,
            keep_checkpoints=keep,
            keep_checkpoints_every_s=keep_every,
            save_async=save_async,
            resume=again,
            allow_changes=allow_changes,
            failures=Failures(max_failures=max_failures, grace_s=grace, elastic=elastic, min_devices=min_devices),
            not_finite=not_finite,
            check_replicas_every=check_replicas_every,
            on_step=lambda step, losses: update(step, steps, losses_text(losses)),
            callbacks=callbacks,
            **uploads,
            **ray_nodes_of(wait_for_nodes, accelerator_type, node_labels),
            **evaluation,
        )
    if place_among_drivers(launcher)[0]:
        return  # rank 0 of a torchrun job reports, for all have the same result
    warn_of_losses(result)
    if trace_file:
        write(result.trace, trace_file)
    if as_json:
        done = result.first_step + len(result.losses)
        values = {
            "steps": done,
            "first_step": result.first_step,
            "ended": result.ended,
            "step_s": result.step_s,
            "startup": result.startup,
            "recovered": result.recovered,
        }
        where = {"checkpoint": str(result.checkpoint)} if result.checkpoint else {}
        where |= {"best": str(result.best)} if result.best else {}
        scores = {"scores": result.scores, "stopped": result.stopped} if result.scores or result.stopped else {}
        click.echo(json_text(values | where | scores | {"losses": result.losses}))
        return
    click.echo(folded(result.startup, indent=2), err=True)
    if result.first_step:
        click.echo(f"resumed after {result.first_step} steps")
    click.echo(f"{len(result.losses)} steps in {result.train_s:.1f} s ({result.step_s * 1e3:.1f} ms in the median)")
    if result.losses:
        first, last = (losses_text(result.losses[i]) for i in (0, -1))
        click.echo(folded(f"first {first}\nlast  {last}", indent=6))
    if result.ended:
        click.echo(f"stopped: the data of task {result.ended!r} ended")
    if result.scores or result.stopped:
        click.echo(folded(last_text(result), indent=6))
    if result.checkpoint and any(parameter.is_meta for _, parameter in workload.named_parameters()):
        click.echo(
            folded(
                f"trained weights are in {result.checkpoint}; `spindle export {source} --checkpoint "
                f"{result.checkpoint} -o DIR` writes them as save_pretrained does",
                indent=6,
            )
        )
    advise_after(workload, result)


@cli.command()
@SOURCE
@click.option("--checkpoint", type=FOLDER, help="Weights to write. Default: as the file makes them.")
@click.option("--ema", is_flag=True, help="Of the checkpoint, the running average of the weights.")
@click.option("-o", "--output", required=True, type=FOLDER, help="Each component goes to DIR/NAME.")
@JSON
def export(source: str, checkpoint: str | None, ema: bool, output: str, as_json: bool) -> None:
    """Write the components of SOURCE as their library loads them: `save_pretrained`, or else safetensors.

    \b
    spindle export model.py:workload --checkpoint runs/a/step-00005000 -o trained
    """
    from spindle.verbs import checkpoints
    from spindle.verbs.source import load_workload

    with busy("exporting"):
        workload, _ = load_workload(source)
        if "transformers" in sys.modules:  # its bars would stand between our lines
            sys.modules["transformers"].logging.disable_progress_bar()
        found = checkpoints.export(workload, output, checkpoint=checkpoint, ema=ema)
        written = {name: str(directory) for name, directory in found.items()}
    if as_json:
        click.echo(json_text({"components": written}))
    else:
        click.echo("\n".join(f"{name:20} {directory}" for name, directory in written.items()))


@cli.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what would keep a run from working on this machine, and what to do about it. Exit 1 when something would.

    \b
    spindle doctor --json
    """
    from spindle.verbs.doctor import examine, render, verdict

    colors = {"warn": "yellow", "fail": "red"}
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            click.echo(painted(folded("\n".join(render(finding)), indent=23), colors.get(finding.status)))
    found = verdict(findings)
    if as_json:
        click.echo(json_text(found, indent=1))
    if not found["ok"]:
        click.get_current_context().exit(1)
