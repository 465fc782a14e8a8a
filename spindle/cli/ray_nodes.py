"""Options of runs on Ray: on which nodes of a cluster ranks may be, and its metrics."""

from collections.abc import Callable
from typing import Any

import click

from spindle.cli.options import duration


def _labels(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE as a label selector."""
    pairs = [label.partition("=")[::2] for label in given]
    for label, pair in zip(given, pairs, strict=True):
        if not all(pair):
            raise click.BadParameter(f"{label!r} is not KEY=VALUE, for instance market-type=!spot.")
    return dict(pairs)


def with_ray_nodes(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that `ray_nodes_of` reads, and `--ray-metrics`."""
    for option in (
        click.option(
            "--ray-metrics", is_flag=True, help="On Ray: the numbers of --metrics for Prometheus, from Ray's nodes."
        ),
        click.option(
            "--node-label",
            "node_labels",
            metavar="KEY=VALUE",
            multiple=True,
            callback=_labels,
            help="On Ray: run on nodes with this label alone; market-type=!spot: without it.",
        ),
        click.option(
            "--accelerator-type", metavar="TYPE", help="On Ray: run on GPUs of this type alone, such as H100."
        ),
        click.option(
            "--wait-for-nodes",
            metavar="TIME",
            callback=duration,
            help="On Ray: wait 30m or 2h for room, while an autoscaler starts nodes.",
        ),
    ):
        command = option(command)
    return command


def ray_nodes_of(wait_s: float | None, accelerator_type: str | None, labels: dict[str, str]) -> dict[str, Any]:
    """What `spindle.train` is asked; nothing where no option was given."""
    if wait_s is None and accelerator_type is None and not labels:
        return {}
    from spindle.ray_nodes import RayNodes

    return {"ray_nodes": RayNodes(wait_s=wait_s, accelerator_type=accelerator_type, label_selector=labels)}
