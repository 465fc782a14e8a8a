"""Curves: a MetaGraph with costs and where its costs come from in; for each part of the model the curves T(n) out.

A panel is one component or one part of it (`vision`, `llm.head`), a curve the MetaOps of it that take the same times:
tasks differ by their batches. Where more devices stop helping is found by the rule of `spindle whatif`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spindle.cost.sources import CostSource
from spindle.planner.costing.curves import clean_curve
from spindle.planner.report.sizes import enough_of
from spindle.values.metagraph import MetaGraph, MetaOp, Points


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds of one layer, forward and backward, by number of devices, of the MetaOps that share it.

    measured       those numbers at which a profile timed it
    source         of the other times: predicted, interpolated and so on (`spindle.cost.sources`)
    low, high      nine of ten measured times lie between these multiples of the curve's
    enough         the number of devices beyond which more do not help
    most           the largest number that it can run on
    """

    metaops: tuple[str, ...]
    tasks: tuple[str, ...]
    points: Points
    measured: tuple[int, ...]
    source: str
    low: float
    high: float
    enough: int
    most: int


@dataclass(frozen=True, slots=True)
class Panel:
    """The curves of one part of the model."""

    name: str
    curves: tuple[Curve, ...]


def panels_of(metagraph: MetaGraph, sources: Sequence[CostSource], *, num_devices: int) -> tuple[Panel, ...]:
    """Panels in the order of the MetaOps. Raises InfeasibleError where a MetaOp needs more than `num_devices`."""
    source_by_metaop = {source.metaop: source for source in sources}
    found: dict[str, dict[Points, list[MetaOp]]] = {}
    for metaop in metagraph:
        part = metaop.name.removeprefix(f"{metaop.task}.") if metaop.operators else metaop.component or metaop.name
        found.setdefault(part, {}).setdefault(metaop.layer_time_s, []).append(metaop)
    return tuple(
        Panel(name, tuple(_curve(metaops, source_by_metaop, num_devices) for metaops in by_points.values()))
        for name, by_points in found.items()
    )


def _curve(metaops: Sequence[MetaOp], source_by_metaop: dict[str, CostSource], num_devices: int) -> Curve:
    first, source = metaops[0], source_by_metaop[metaops[0].name]
    clean = clean_curve(first, num_devices)
    points = tuple((n, time_s) for n, time_s in first.layer_time_s if n <= num_devices)
    return Curve(
        metaops=tuple(metaop.name for metaop in metaops),
        tasks=tuple(dict.fromkeys(metaop.task for metaop in metaops)),
        points=points,
        measured=tuple(n for n in source.timed if n <= num_devices),
        source=source.source,
        low=source.band.low,
        high=source.band.high,
        enough=enough_of(list(zip(clean.counts, clean.times_s, strict=True))) or clean.counts[-1],
        most=points[-1][0],
    )
