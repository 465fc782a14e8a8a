"""The command line. Each command parses, calls the room that does the work, and prints; it decides nothing itself.

Exit codes: 0 fine, 1 checked and found wrong, 2 bad input or usage, 3 infeasible, 70 a bug of Spindle.
"""

import json
import os
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import NoArgsIsHelpError

from spindle.errors import FormatError, PlanError, SpindleError
from spindle.options import check_directory as _check_directory
from spindle.options import counts as _counts
from spindle.options import not_negative as _not_negative
from spindle.options import pins as _pins
from spindle.options import positive as _positive
from spindle.terminal import advise_after as _advise_after
from spindle.terminal import cost_notes as _cost_notes
from spindle.terminal import json_text as _json
from spindle.terminal import losses_text as _losses
from spindle.terminal import progress as _progress
from spindle.terminal import show_warning as _show_warning

if TYPE_CHECKING:
    from spindle.plan import Plan

BUG = 70


class _Commands(click.Group):
    """Lists commands in the order in which one uses them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spindle")
def cli() -> None:
    """Plan and run multi-task, multi-modal PyTorch training in waves.

    \b
    spindle plan workload.yaml --cluster 4x8 -o plan.json     no GPU needed
    spindle verify model.py:workload                          same gradients as one process?
    spindle train model.py:workload --steps 100               on Ray
    """


_SOURCE = click.argument("source")
_CLUSTER = click.option("--cluster", "-c", help="4x8, 4x8:a100-80g, or a YAML file. Python sources: this machine.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
_PROFILE = click.option("--profile", "-p", metavar="FILE", help="Measured times (spindle profile).")
_LAUNCHER = click.option(
    "--launcher",
    type=click.Choice(["auto", "ray", "processes", "threads", "torchrun"]),
    default="auto",
    show_default=True,
    help="What starts the workers.",
)


@cli.command()
@_SOURCE
@_CLUSTER
@_PROFILE
@click.option("--output", "-o", metavar="FILE", help="Write the plan.")
@click.option("--method", default="auto", show_default=True, help="auto, lp, paper, sequential, task_split, ...")
@click.option("--time-limit", "time_limit_s", type=float, metavar="S", callback=_positive, help="Seconds to search.")
@click.option("--aligned", is_flag=True, help="Strict waves: each starts when the one before has ended.")
@click.option("--start", "start_file", metavar="PLAN", help="Begin from this plan, of other tasks for instance.")
@click.option("--pin", "pins", multiple=True, metavar="NAME=0-3", callback=_pins, help="Keep a component on devices.")
@click.option("--table", "with_table", is_flag=True, help="Print every slice.")
@_JSON
def plan(
    source: str,
    cluster: str | None,
    profile: str | None,
    output: str | None,
    method: str,
    time_limit_s: float | None,
    aligned: bool,
    start_file: str | None,
    pins: dict[str, tuple[int, ...]],
    with_table: bool,
    as_json: bool,
) -> None:
    """Plan SOURCE: a spec (.yaml), a MetaGraph (.json) or file.py:workload. Needs no GPU.

    \b
    spindle plan multitask_clip.yaml --cluster 4x8:a100-80g
    spindle plan model.py:workload --cluster 1x2:cpu --profile profile.json -o plan.json
    spindle plan model.py:workload --start plan.json --pin vision=0-3
    """
    from spindle.api import plan_source
    from spindle.clusterfile import parse_cluster
    from spindle.formats import dumps, read, write
    from spindle.planner.render import render, table
    from spindle.planner.solve import METHODS
    from spindle.profile import Profile
    from spindle.source import is_python, load_source

    if method not in METHODS:
        raise click.UsageError(f"Invalid value for '--method': {method!r} is not one of {', '.join(METHODS)}.")
    if cluster is None and not is_python(source):
        raise FormatError(f"no cluster is given for {source}; add --cluster, for instance --cluster 4x8:a100-80g")
    where = parse_cluster(cluster or _this_machine())
    measured = read(profile, Profile) if profile else None
    loaded = load_source(source)
    found, pricing = plan_source(
        loaded,
        where,
        measured,
        method=method,
        time_limit_s=time_limit_s,
        aligned=aligned,
        start=_read_plan(start_file) if start_file else None,
        pins=pins or None,
    )
    if output:
        write(found, output)
    if as_json:
        click.echo(dumps(found))
        return
    click.echo(render(found))
    click.echo(_cost_notes(loaded, found, measured, pricing))
    if with_table:
        click.echo(f"\n{table(found)}")
    if output:
        click.echo(f"\nwritten to {output}")


def _this_machine() -> str:
    from spindle.api import devices_at_hand

    return devices_at_hand()


@cli.command()
@click.argument("plan_file", metavar="PLAN")
@click.option("--metagraph", "-g", metavar="FILE", help="Check against this MetaGraph instead of the plan's own.")
@_JSON
def check(plan_file: str, metagraph: str | None, as_json: bool) -> None:
    """Recompute every rule of PLAN; exit 1 when one is broken.

    \b
    spindle check plan.json
    """
    from spindle.formats import read
    from spindle.metagraph import MetaGraph
    from spindle.planner.check import check_plan, picture

    loaded = _read_plan(plan_file)
    findings = check_plan(loaded, read(metagraph, MetaGraph) if metagraph else None)
    if as_json:
        click.echo(_json({"ok": not findings, "findings": [str(finding) for finding in findings]}, indent=1))
    elif not findings:
        what = (
            "rules and costs" if metagraph or loaded.metagraph else "rules (it carries no MetaGraph to check costs by)"
        )
        click.echo(f"{plan_file}: keeps all {what}; makespan {loaded.makespan_s:.6f} s, {len(loaded.slices)} slices")
    else:
        click.echo("\n".join(f"{plan_file}: {finding}" for finding in findings[:10]))
        click.echo(picture(loaded, findings))
    if findings:
        click.get_current_context().exit(PlanError.exit_code)


def _read_plan(path: str) -> "Plan":
    from spindle.formats import read
    from spindle.plan import Plan

    return read(path, Plan)


@cli.command()
@click.argument("plan_file", metavar="PLAN")
@_JSON
def explain(plan_file: str, as_json: bool) -> None:
    """Say why PLAN looks as it does: what bounds it, where its gap and its idle time come from.

    \b
    spindle explain plan.json
    """
    from dataclasses import asdict

    from spindle.planner.explain import explain, render_explanation

    found = explain(_read_plan(plan_file))
    click.echo(_json(asdict(found)) if as_json else render_explanation(found))


@cli.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@_JSON
def diff(before: str, after: str, as_json: bool) -> None:
    """Compare two plans: their figures, and the MetaOps that run otherwise.

    \b
    spindle diff old.json new.json
    """
    from dataclasses import asdict

    from spindle.planner.compare import compare, render_difference

    found = compare(_read_plan(before), _read_plan(after))
    click.echo(_json(asdict(found)) if as_json else render_difference(found))


@cli.command()
@_SOURCE
@click.option("--devices", "-n", required=True, metavar="N,N,...", help="Device counts to plan for.")
@_CLUSTER
@_PROFILE
@click.option("--time-limit", "time_limit_s", type=float, metavar="S", help="Seconds to search, for each count.")
@_JSON
def whatif(
    source: str,
    devices: str,
    cluster: str | None,
    profile: str | None,
    time_limit_s: float | None,
    as_json: bool,
) -> None:
    """Plan SOURCE on clusters of several sizes: time, gap, efficiency, and where more devices stop helping.

    --cluster tells the type of devices and how many a node has.

    \b
    spindle whatif multitask_clip.yaml --devices 8,16,32,64 --cluster 1x8:a100-80g
    """
    from dataclasses import asdict

    from spindle.api import plan_source
    from spindle.clusterfile import parse_cluster
    from spindle.formats import read
    from spindle.planner.compare import enough, plan_sizes, render_sizes
    from spindle.profile import Profile
    from spindle.source import load_source

    counts = _counts(devices)
    where = parse_cluster(cluster or "1x8")
    measured = read(profile, Profile) if profile else None
    loaded = load_source(source)
    rows = plan_sizes(lambda c: plan_source(loaded, c, measured, time_limit_s=time_limit_s)[0], where, counts)
    if as_json:
        click.echo(_json({"sizes": [asdict(row) for row in rows], "enough": enough(rows)}))
    else:
        click.echo(render_sizes(rows))


@cli.command()
@click.argument("plan_file", metavar="PLAN")
@click.option("--trace", "trace_file", metavar="FILE", help="A run to show beside the plan (spindle train --trace).")
@click.option("--html", metavar="FILE", help="Write one page that needs no network.")
@click.option("--svg", metavar="FILE", help="Write a picture for papers.")
@click.option("--chrome", metavar="FILE", help="Write the trace for Perfetto or chrome://tracing.")
def show(plan_file: str, trace_file: str | None, html: str | None, svg: str | None, chrome: str | None) -> None:
    """Show PLAN, and a run beside it, on one time axis; without a file to write, as text.

    \b
    spindle show plan.json --trace trace.json --html timeline.html
    """
    from spindle.formats import read, write_text
    from spindle.planner.render import render
    from spindle.planner.simulate import simulate
    from spindle.timeline import chrome_trace, render_page, render_svg
    from spindle.trace import Trace

    loaded = _read_plan(plan_file)
    predicted = simulate(loaded)
    measured = read(trace_file, Trace) if trace_file else None
    if html:
        write_text(render_page(loaded, predicted=predicted, measured=measured, title=plan_file), html)
    if svg:
        write_text(render_svg(loaded, predicted=predicted, measured=measured, title=plan_file), svg)
    if chrome:
        write_text(json.dumps(chrome_trace(measured or predicted, plan=loaded)), chrome)
    written = [name for name in (html, svg, chrome) if name]
    click.echo(f"written to {', '.join(written)}" if written else render(loaded))


@cli.command()
@_SOURCE
@_CLUSTER
@click.option("--devices", "-n", "num_devices", type=click.IntRange(1), help="Largest device count. Default: all.")
@click.option("--profile", "-p", "old", metavar="FILE", help="A profile whose times are taken over.")
@click.option("--output", "-o", metavar="FILE", required=True, help="The profile; what it holds is not measured again.")
@click.option("--validate", is_flag=True, help="Measure more counts, and print how well curves tell them.")
@_JSON
def profile(
    source: str,
    cluster: str | None,
    num_devices: int | None,
    old: str | None,
    output: str,
    validate: bool,
    as_json: bool,
) -> None:
    """Time the layers of SOURCE (file.py:workload) on this machine.

    Also the optimiser's step and messages between ranks. Interrupted, the same command goes on.

    \b
    spindle profile model.py:workload -o profile.json
    spindle plan model.py:workload --profile profile.json
    """
    import functools
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from spindle import api
    from spindle.cost.heldout import held_out, render_held_out
    from spindle.formats import read, write
    from spindle.profile import Profile
    from spindle.source import load_workload

    workload, module = load_workload(source)
    found = [read(path, Profile) for path in (old, output if Path(output).exists() else None) if path]
    known = functools.reduce(Profile.merge, found) if found else None
    with _progress("profiling") as update:
        measured = api.make_profile(
            workload,
            num_devices=num_devices,
            cluster=cluster,
            known=known,
            optimizer=getattr(module, "optimizer", None) or torch.optim.AdamW,
            validate=validate,
            progress=update,
            keep=lambda so_far: write(so_far, output),
        )
    write(measured, output)
    rows = held_out(measured) if validate else ()
    if as_json:
        counts = {"kinds": len(measured.by_kind), "entries": len(measured.entries), "messages": len(measured.links)}
        new = measured.size - (known.size if known else 0)
        told = {"output": output, "device": measured.device, **counts, "new": new}
        click.echo(json.dumps(told | ({"held_out": [asdict(row) for row in rows]} if validate else {})))
        return
    click.echo(f"{measured.describe(known)}; written to {output}")
    if validate:
        click.echo(render_held_out(rows))


@cli.command()
@_SOURCE
@click.option("--plan", "plan_file", metavar="FILE", help="Verify this plan. Default: plan for --workers devices.")
@click.option("--workers", "-n", type=click.IntRange(1), default=2, show_default=True, help="Devices to plan for.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rtol", type=float, callback=_not_negative, help="Default: 1e-4, or 1e-10 for float64 models.")
@click.option("--atol", type=float, callback=_not_negative, help="Default: 1e-5, or 1e-10 for float64 models.")
@_LAUNCHER
@_JSON
def verify(
    source: str,
    plan_file: str | None,
    workers: int,
    steps: int,
    rtol: float | None,
    atol: float | None,
    launcher: Any,
    as_json: bool,
) -> None:
    """Compare a planned run of SOURCE with one process: losses, gradients, updates. Exit 1 when they differ.

    \b
    spindle verify model.py:workload --workers 4
    """
    from dataclasses import asdict

    from spindle import api
    from spindle.source import load_workload

    workload, _ = load_workload(source)
    report = api.verify(
        workload,
        _read_plan(plan_file) if plan_file else None,
        num_workers=workers,
        steps=steps,
        rtol=rtol,
        atol=atol,
        launcher=launcher,
    )
    if as_json:
        values = {"ok": report.ok, "max_abs_error": report.max_abs_error, "max_rel_error": report.max_rel_error}
        losses = {"losses": report.losses, "reference_losses": report.reference_losses}
        click.echo(_json(values | losses | {"rows": [asdict(row) for row in report.rows]}))
    else:
        click.echo(str(report))
    if not report.ok:
        click.get_current_context().exit(1)


@cli.command()
@_SOURCE
@click.option("--plan", "plan_file", metavar="FILE", help="Default: plan for the devices of this machine.")
@click.option("--steps", type=click.IntRange(1), required=True)
@click.option(
    "--lr",
    type=float,
    default=1e-3,
    show_default=True,
    callback=_not_negative,
    help="Of AdamW, unless the file has `optimizer`.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--trace", "trace_file", metavar="FILE", help="Write what the last steps did, when and where.")
@click.option("--metrics", metavar="FILE", help="Write a line of JSON a step: losses, speed, shares of time, memory.")
@click.option("--tensorboard", metavar="DIR", help="The same for TensorBoard (pip install tensorboard).")
@click.option("--checkpoints", metavar="DIR", help="Write checkpoints here, the last one at the end.")
@click.option("--every", type=click.IntRange(1), default=1000, show_default=True, help="Steps between checkpoints.")
@click.option("--keep", type=click.IntRange(1), help="Checkpoints to keep, the newest. Default: all.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, if there is one.")
@_LAUNCHER
@_JSON
def train(
    source: str,
    plan_file: str | None,
    steps: int,
    lr: float,
    seed: int,
    trace_file: str | None,
    metrics: str | None,
    tensorboard: str | None,
    checkpoints: str | None,
    every: int,
    keep: int | None,
    resume: bool,
    launcher: Any,
    as_json: bool,
) -> None:
    """Train SOURCE (file.py:workload) as planned, up to --steps steps in all.

    A function `optimizer(parameters)` in the file makes the optimiser; without one it is AdamW. `scheduler(optimizer)`,
    if there is one, makes its schedule.

    \b
    spindle train model.py:workload --plan plan.json --steps 100 --metrics run.jsonl
    spindle train model.py:workload --steps 5000 --checkpoints runs/a --every 500 --resume
    torchrun --nproc-per-node 2 -m spindle train model.py:workload --steps 100
    """
    import functools

    import torch

    from spindle import api
    from spindle.formats import write
    from spindle.metrics import Callback, JsonLines, TensorBoard
    from spindle.source import load_workload

    _check_directory(trace_file)
    _check_directory(metrics)
    callbacks: list[Callback] = [JsonLines(metrics)] if metrics else []
    callbacks += [TensorBoard(tensorboard)] if tensorboard else []
    workload, module = load_workload(source)
    optimizer = getattr(module, "optimizer", None) or functools.partial(torch.optim.AdamW, lr=lr)
    with _progress("training") as update:
        result = api.train(
            workload,
            _read_plan(plan_file) if plan_file else None,
            optimizer=optimizer,
            scheduler=getattr(module, "scheduler", None),
            steps=steps,
            launcher=launcher,
            seed=seed,
            checkpoints=checkpoints,
            checkpoint_every=every,
            keep_checkpoints=keep,
            resume=resume,
            on_step=lambda step, losses: update(step, steps, _losses(losses)),
            callbacks=callbacks,
        )
    if trace_file:
        write(result.trace, trace_file)
    if as_json:
        done = result.first_step + len(result.losses)
        told = {"steps": done, "first_step": result.first_step, "ended": result.ended, "step_s": result.step_s}
        click.echo(_json(told | {"losses": result.losses}))
        return
    if result.first_step:
        click.echo(f"resumed after {result.first_step} steps")
    click.echo(f"{len(result.losses)} steps in {result.train_s:.1f} s ({result.step_s * 1e3:.1f} ms each)")
    if result.losses:
        click.echo(f"first {_losses(result.losses[0])}\nlast  {_losses(result.losses[-1])}")
    if result.ended:
        click.echo(f"stopped: the data of task {result.ended!r} ended")
    _advise_after(workload, result)


@cli.command()
@_SOURCE
@click.option("--checkpoint", metavar="DIR", help="Weights to write. Default: as the file makes them.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Each component goes to DIR/NAME.")
def export(source: str, checkpoint: str | None, output: str) -> None:
    """Write the components of SOURCE as their library loads them: `save_pretrained`, or else safetensors.

    \b
    spindle export model.py:workload --checkpoint runs/a/step-00005000 -o trained
    """
    from spindle import api
    from spindle.source import load_workload

    workload, _ = load_workload(source)
    if checkpoint:
        api.load_checkpoint(workload, checkpoint)
    for name, directory in api.export(workload, output).items():
        click.echo(f"{name:20} {directory}")


@cli.command()
@_JSON
def doctor(as_json: bool) -> None:
    """Say what would keep a run from working on this machine, and what to do about it. Exit 1 when something would.

    \b
    spindle doctor --json
    """
    from spindle.doctor import examine, render, verdict

    colours = {"warn": "yellow", "fail": "red"}
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            click.secho("\n".join(render(finding)), fg=colours.get(finding.status))
    found = verdict(findings)
    if as_json:
        click.echo(_json(found, indent=1))
    if not found["ok"]:
        click.get_current_context().exit(1)


def main() -> None:
    """Run the command line; errors become one to three lines on stderr and an exit code, warnings one line."""
    warnings.showwarning = _show_warning
    try:
        status = cli.main(standalone_mode=False)
    except NoArgsIsHelpError as error:  # `spindle` alone shows what there is
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"\nTry '{context.command_path} --help'." if context else ""
        click.echo(f"spindle: {error.format_message()}{hint}", err=True)
        sys.exit(2)
    except SpindleError as error:
        click.echo(f"spindle: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as error:  # commands end by click's exit; this one would pass for ours
        if "click" in traceback.extract_tb(error.__traceback__)[-1].filename:  # who read our output has gone
            raise
        click.echo(f"spindle: the workload's own code ended the process (SystemExit {error.code}); mend it", err=True)
        sys.exit(SpindleError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("spindle: interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("SPINDLE_DEBUG"):
            raise
        click.echo(
            f"spindle: a bug of Spindle: {type(error).__name__}: {error}\n"
            "Set SPINDLE_DEBUG=1 to see where, and please report it.",
            err=True,
        )
        sys.exit(BUG)
    sys.exit(status if isinstance(status, int) else 0)
