"""Commands that draw what is planned: the graph of a workload, and how its parts scale."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from spindle.cli.bars import busy
from spindle.cli.group import CALIBRATION, CLUSTER, JSON, PROFILE, SOURCE, TASKS, cli, cluster_for
from spindle.cli.kinds import FILE
from spindle.cli.options import check_directory, graph_file, picture_file
from spindle.cli.terminal import json_text

if TYPE_CHECKING:
    from spindle.cost.sources import CostSource
    from spindle.values.cluster import Cluster
    from spindle.values.metagraph import MetaGraph


@cli.command()
@SOURCE
@CLUSTER
@PROFILE
@CALIBRATION
@TASKS
@click.option("--output", "-o", type=FILE, callback=graph_file, help="FILE.svg (default: graph.svg), .png or .mmd.")
@click.option("--mermaid", is_flag=True, help="Print a Mermaid flowchart, for Markdown pages.")
@JSON
def graph(
    source: str,
    cluster: str | None,
    profile: str | None,
    calibration: str | None,
    tasks: str | None,
    output: str | None,
    mermaid: bool,
    as_json: bool,
) -> None:
    """Draw the graph of SOURCE: its MetaOps by level, their times, shared parameters, and tensors between them.

    \b
    spindle graph multitask_clip.yaml --cluster 4x8:a100-80g --tasks 4 -o graph.svg
    spindle graph model.py:workload --mermaid
    """
    from dataclasses import asdict

    from spindle.files.formats import write_text
    from spindle.pictures import graph_mermaid, graph_of, graph_svg, write_picture

    if mermaid and as_json:
        raise click.UsageError("--mermaid and --json both print on stdout; give one of them.")
    file = output or (None if mermaid or as_json else "graph.svg")
    check_directory(file)
    with busy(f"reading {source}") as doing:
        metagraph, sources, named, _ = _costed(source, cluster, profile, calibration, tasks, doing)
        found = graph_of(metagraph)
        if file and file.endswith(".mmd"):
            write_text(graph_mermaid(found), file)
        elif file:
            write_picture(graph_svg(found, title=source, notes=[_notes(named, sources)]), file)
    if mermaid:
        click.echo(graph_mermaid(found), nl=False)
    elif as_json:
        click.echo(json_text(asdict(found) | {"written": [output] if output else []}))
    if file and not mermaid and not as_json:
        click.echo(f"written to {file}")


@cli.command()
@SOURCE
@CLUSTER
@PROFILE
@CALIBRATION
@TASKS
@click.option("--output", "-o", type=FILE, callback=picture_file, help="FILE.svg (default: curves.svg) or .png.")
@JSON
def curves(
    source: str,
    cluster: str | None,
    profile: str | None,
    calibration: str | None,
    tasks: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Draw how SOURCE scales: the time of a layer of each MetaOp on 1, 2, ... devices, and where more stop helping.

    \b
    spindle curves multitask_clip.yaml --cluster 4x8:a100-80g -o curves.svg
    spindle curves model.py:workload --cluster 1x4:cpu --profile profile.json -o curves.png
    """
    from dataclasses import asdict

    from spindle.pictures import curves_svg, panels_of, write_picture

    file = output or (None if as_json else "curves.svg")
    check_directory(file)
    with busy(f"reading {source}") as doing:
        metagraph, sources, named, where = _costed(source, cluster, profile, calibration, tasks, doing)
        panels = panels_of(metagraph, sources, num_devices=where.num_devices)
        if file:
            notes = [f"Seconds of one layer, forward and backward. {_notes(named, sources)}"]
            write_picture(curves_svg(panels, num_devices=where.num_devices, title=source, notes=notes), file)
    if as_json:
        shown = {"panels": [asdict(panel) for panel in panels], "written": [output] if output else []}
        click.echo(json_text(shown))
    else:
        click.echo(f"written to {file}")


def _costed(
    source: str,
    cluster: str | None,
    profile: str | None,
    calibration: str | None,
    tasks: str | None,
    doing: Callable[..., None],
) -> "tuple[MetaGraph, Sequence[CostSource], str, Cluster]":
    """The MetaGraph with the times that a plan would start from, where they come from, and the cluster."""
    from spindle.cost.sources import cost_sources
    from spindle.files.clusterfile import parse_cluster
    from spindle.files.formats import read
    from spindle.values.calibration import Calibration
    from spindle.values.profile import Profile
    from spindle.verbs.source import costed_source, load_source

    where = parse_cluster(named := cluster_for(source, cluster))
    measured = read(profile, Profile) if profile else None
    fitted = read(calibration, Calibration) if calibration else None
    costed = costed_source(load_source(source, doing, tasks=tasks), where, measured, fitted)
    return costed, cost_sources(costed, measured, is_calibrated=fitted is not None), named, where


def _notes(named: str, sources: "Sequence[CostSource]") -> str:
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(str(s.source) for s in sources).most_common())
    return f"On {named}; costs: {counts}."
