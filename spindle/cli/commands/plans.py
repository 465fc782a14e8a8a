"""Commands on plans: make one, check it, explain it, compare it, show it."""

import json
from typing import TYPE_CHECKING

import click

from spindle.cli.bars import busy, progress
from spindle.cli.group import CALIBRATION, CLUSTER, JSON, PLAN, PROFILE, SOURCE, TASKS, cli, cluster_for, read_plan
from spindle.cli.kinds import FILE, JSON_FILE, METHOD
from spindle.cli.options import at_least_one, check_directory, device_counts, picture_file, pins, positive
from spindle.cli.terminal import cost_notes, folded, json_text
from spindle.errors import PlanError

if TYPE_CHECKING:
    from spindle.values.cluster import Cluster
    from spindle.values.plan import Plan


@cli.command()
@SOURCE
@CLUSTER
@PROFILE
@click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="The cluster with another number of nodes.")
@CALIBRATION
@click.option(
    "--per-device-batch",
    type=int,
    metavar="B",
    callback=at_least_one,
    help="Scale a spec's batches to B samples a device in all.",
)
@TASKS
@click.option("--output", "-o", type=FILE, help="Write the plan.")
@click.option(
    "--method", type=METHOD, default="auto", show_default=True, help="auto, lp, paper, sequential, task_split, ..."
)
@click.option("--time-limit", "time_limit_s", type=float, metavar="S", callback=positive, help="Seconds to search.")
@click.option("--aligned", is_flag=True, help="Strict waves: each starts when the one before has ended.")
@click.option(
    "--start", "start_file", metavar="PLAN", type=JSON_FILE, help="Begin from this plan, of other tasks for instance."
)
@click.option("--pin", "pins", multiple=True, metavar="NAME=0-3", callback=pins, help="Keep a component on devices.")
@click.option("--table", "with_table", is_flag=True, help="Print every slice.")
@JSON
def plan(
    source: str,
    cluster: str | None,
    profile: str | None,
    calibration: str | None,
    per_device_batch: int | None,
    nodes: int | None,
    tasks: str | None,
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
    spindle plan multitask_clip.yaml --cluster 4x8:a100-80g --tasks 4
    spindle plan model.py:workload --cluster 1x2:cpu --profile profile.json -o plan.json
    spindle plan model.py:workload --start plan.json --pin vision=0-3
    """
    from dataclasses import replace

    from spindle.files.clusterfile import parse_cluster
    from spindle.files.formats import dumps, read, write
    from spindle.planner.report.figures import titled
    from spindle.planner.report.render import render, table
    from spindle.planner.solve import METHODS, default_limit_s
    from spindle.values.calibration import Calibration
    from spindle.values.profile import Profile
    from spindle.verbs.planning import plan_source, with_outlook
    from spindle.verbs.source import load_source
    from spindle.words.nearest import did_you_mean

    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise click.UsageError(f"Invalid value for '--method': {method!r} is not one of {', '.join(METHODS)}{hint}.")
    check_directory(output)
    where = parse_cluster(named := cluster_for(source, cluster))
    where = replace(where, nodes=nodes or where.nodes)
    measured = read(profile, Profile) if profile else None
    fitted = read(calibration, Calibration) if calibration else None
    with busy(f"reading {source}") as doing:
        per_device = (per_device_batch, where.num_devices) if per_device_batch else None
        loaded = load_source(source, doing, tasks=tasks, per_device=per_device)
        doing("planning", default_limit_s(where) if time_limit_s is None else time_limit_s)
        found, cost_options = plan_source(
            loaded,
            where,
            measured,
            calibration=fitted,
            method=method,
            time_limit_s=time_limit_s,
            aligned=aligned,
            start=read_plan(start_file) if start_file else None,
            pins=pins or None,
        )
        found = with_outlook(found, loaded, cost_options, profile=measured, calibration=fitted)
    if output:
        write(found, output)
    if as_json:
        click.echo(dumps(found))
        return
    click.echo(render(found, names=(source, named)))
    click.echo(cost_notes(loaded, found, measured, cost_options, is_calibrated=fitted is not None))
    if where.device.name != "cpu":
        counts = f"{where.num_devices},{2 * where.num_devices}"
        lines = titled("sizes", f"spindle whatif {source} --cluster {named} --devices {counts}")
        click.echo(" \\\n".join(lines))
    if with_table:
        click.echo(f"\n{table(found)}")
    if output:
        click.echo(f"\nwritten to {output}")


@cli.command()
@PLAN
@click.option("--metagraph", "-g", type=JSON_FILE, help="Check against this MetaGraph instead of the plan's own.")
@JSON
def check(plan_file: str, metagraph: str | None, as_json: bool) -> None:
    """Recompute every rule of PLAN; exit 1 when one is broken.

    \b
    spindle check plan.json
    """
    from spindle.files.formats import read
    from spindle.planner.check import check_plan, picture
    from spindle.values.metagraph import MetaGraph

    loaded = read_plan(plan_file, as_it_is=True)
    findings = check_plan(loaded, read(metagraph, MetaGraph) if metagraph else None)
    if as_json:
        click.echo(json_text({"ok": not findings, "findings": [str(finding) for finding in findings]}, indent=1))
    elif not findings:
        what = (
            "rules and costs" if metagraph or loaded.metagraph else "rules (it carries no MetaGraph to check costs by)"
        )
        click.echo(f"{plan_file}: keeps all {what}; makespan {loaded.makespan_s:.6f} s, {len(loaded.slices)} slices")
    else:
        click.echo(folded("\n".join(f"{plan_file}: {finding}" for finding in findings[:10])))
        click.echo(picture(loaded, findings))
    if findings:
        click.get_current_context().exit(PlanError.exit_code)


@cli.command()
@PLAN
@JSON
def explain(plan_file: str, as_json: bool) -> None:
    """Say why PLAN looks as it does: what bounds it, where its gap and its idle time come from.

    \b
    spindle explain plan.json
    """
    from dataclasses import asdict

    from spindle.planner.report.explain import explain
    from spindle.planner.report.explained import render_explanation

    found = explain(read_plan(plan_file))
    click.echo(json_text(asdict(found)) if as_json else render_explanation(found))


@cli.command()
@click.argument("before", metavar="A", type=JSON_FILE)
@click.argument("after", metavar="B", type=JSON_FILE)
@JSON
def diff(before: str, after: str, as_json: bool) -> None:
    """Compare two plans: their figures, and the MetaOps that run otherwise.

    \b
    spindle diff old.json new.json
    """
    from dataclasses import asdict

    from spindle.planner.report.compare import compare, render_difference

    found = compare(read_plan(before), read_plan(after))
    click.echo(json_text(asdict(found)) if as_json else render_difference(found))


@cli.command()
@SOURCE
@click.option("--devices", "-n", required=True, metavar="N,N,...", help="Device counts to plan for.")
@CLUSTER
@PROFILE
@CALIBRATION
@TASKS
@click.option(
    "--time-limit",
    "time_limit_s",
    type=float,
    metavar="S",
    callback=positive,
    help="Seconds to search each.",
)
@click.option("--output", "-o", type=FILE, callback=picture_file, help="Draw step and efficiency: FILE.svg or .png.")
@JSON
def whatif(
    source: str,
    devices: str,
    cluster: str | None,
    profile: str | None,
    calibration: str | None,
    tasks: str | None,
    time_limit_s: float | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Plan SOURCE on clusters of several sizes: time, speed, memory, and where more devices stop helping.

    --cluster gives the type of devices and how many a node has.

    \b
    spindle whatif multitask_clip.yaml --devices 8,16,32,64 --cluster 1x8:a100-80g
    spindle whatif multitask_clip.yaml --devices 8,16,32,64 -o sizes.svg
    """
    from dataclasses import asdict

    from spindle.files.clusterfile import parse_cluster
    from spindle.files.formats import read
    from spindle.pictures import sizes_svg, write_picture
    from spindle.planner.report.sizes import enough, plan_sizes, render_sizes
    from spindle.values.calibration import Calibration
    from spindle.values.profile import Profile
    from spindle.verbs.planning import plan_source
    from spindle.verbs.source import load_source

    check_directory(output)
    counts = device_counts(devices)
    where = parse_cluster(cluster or "1x8")
    measured = read(profile, Profile) if profile else None
    fitted = read(calibration, Calibration) if calibration else None
    loaded = load_source(source, tasks=tasks)
    wanted = sorted(set(counts))
    with progress("planning") as update:

        def solve(some: "Cluster") -> "Plan":
            update(wanted.index(some.num_devices), len(wanted), f"{some.num_devices} devices")
            return plan_source(loaded, some, measured, calibration=fitted, time_limit_s=time_limit_s)[0]

        rows = plan_sizes(solve, where, counts)
    if as_json:
        click.echo(json_text({"sizes": [asdict(row) for row in rows], "enough": enough(rows)}))
    else:
        click.echo(render_sizes(rows))
    if output:  # last, so that a file that cannot be written does not cost what was searched
        write_picture(sizes_svg(rows, title=source, notes=[_sizes_note(where)]), output)
        click.echo(f"written to {output}", err=as_json)


def _sizes_note(where: "Cluster") -> str:
    device = f" of {where.device.name}" if where.device.name else ""
    return f"Nodes of {where.devices_per_node} devices{device}. Efficiency is against the smallest size with a plan."


@cli.command()
@PLAN
@click.option("--trace", "trace_file", type=JSON_FILE, help="A run to show beside the plan (spindle train --trace).")
@click.option("--html", type=FILE, help="Write one page that needs no network.")
@click.option("--svg", type=FILE, help="Write a picture for papers.")
@click.option("--png", type=FILE, help="The same as points (pip install 'spindle[png]').")
@click.option("--chrome", type=FILE, help="Write the trace for Perfetto or chrome://tracing.")
@JSON
def show(
    plan_file: str,
    trace_file: str | None,
    html: str | None,
    svg: str | None,
    png: str | None,
    chrome: str | None,
    as_json: bool,
) -> None:
    """Show PLAN, and a run beside it, on one time axis; without a file to write, as text.

    \b
    spindle show plan.json --trace trace.json --html timeline.html
    spindle show plan.json --trace trace.json --json
    """
    from spindle.files.formats import read, write_bytes, write_text
    from spindle.planner.report.render import render
    from spindle.planner.simulate import simulate
    from spindle.timeline import chrome_trace, render_page, render_png, render_svg, timeline_figures
    from spindle.values.trace import Trace

    for file in (html, svg, png, chrome):
        check_directory(file)
    with busy("drawing"):
        loaded = read_plan(plan_file)
        predicted = simulate(loaded)
        measured = read(trace_file, Trace) if trace_file else None
        title = loaded.workload or plan_file
        if html:
            write_text(render_page(loaded, predicted=predicted, measured=measured, title=title), html)
        if svg:
            write_text(render_svg(loaded, predicted=predicted, measured=measured, title=title), svg)
        if png:
            write_bytes(render_png(loaded, predicted=predicted, measured=measured, title=title), png)
        if chrome:
            write_text(json.dumps(chrome_trace(measured or predicted, plan=loaded)), chrome)
    written = [name for name in (html, svg, png, chrome) if name]
    if as_json:
        click.echo(json_text(timeline_figures(loaded, predicted=predicted, measured=measured) | {"written": written}))
    else:
        click.echo(f"written to {', '.join(written)}" if written else render(loaded))
