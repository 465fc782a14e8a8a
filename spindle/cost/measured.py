"""Measured links: a cluster and a profile's link entries in, the cluster with links as they were measured out.

A level's transfers give its rate and latency, its all-reduces one or two protocols (latency + hops + bytes / rate: two
where a switch of algorithms makes one line miss). Levels that were not measured stay as they are.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from spindle.cluster import Cluster, Link, Protocol
from spindle.errors import ProfileError, SpindleWarning
from spindle.metagraph import MetaGraph
from spindle.profile import LinkEntry, LinkLevel, Profile

SECOND_PROTOCOL_GAIN = 0.8  # two protocols are taken when their squared error is below this share of one's


@dataclass(frozen=True, slots=True)
class _Row:
    """One measurement as the model sees it: (1, hops, bytes that each member sends) and seconds."""

    hops: int
    sent: float
    seconds: float


def check_device(cluster: Cluster, profile: Profile) -> None:
    """Raises ProfileError for a profile of a CPU and a cluster of GPUs, or the other way round.

    Names of GPUs and of device types do not compare: drivers call an `a100-80g` by other names.
    """
    if profile.device.startswith("cpu") != cluster.device.name.startswith("cpu"):
        raise ProfileError(
            f"times of {profile.device!r} do not hold for a cluster of {cluster.device.name!r}; measure on its devices "
            "(spindle profile), or plan without a profile: times are then predicted"
        )


def warn_of_gaps(metagraph: MetaGraph, profile: Profile) -> None:
    """Warns when a profile has no time of any operator kind of the MetaGraph; kinds tell shapes, batch and dtype."""
    kinds = {op.kind for metaop in metagraph for op in metaop.operators}
    if kinds and not kinds & profile.by_kind.keys():
        dtype = dict(profile.versions).get("dtype", "unknown")
        warnings.warn(
            f"the profile (dtype {dtype}) has none of the {len(kinds)} operator kinds of this workload, whose shapes, "
            "batch sizes or dtype differ: all times are predicted; run spindle profile on it to add what is missing",
            SpindleWarning,
            stacklevel=3,
        )


def measured_links(cluster: Cluster, profile: Profile) -> Cluster:
    """The cluster with the links that `profile` measured."""
    return replace(
        cluster,
        intra_node=_link(cluster.intra_node, profile, "intra_node"),
        inter_node=_link(cluster.inter_node, profile, "inter_node"),
    )


def _link(link: Link, profile: Profile, level: LinkLevel) -> Link:
    entries = [entry for entry in profile.links if entry.level == level]
    transfers = [_Row(0, float(e.num_bytes), e.seconds) for e in entries if e.operation == "transfer"]
    if len(transfers) >= 2:
        latency, _, slope = _fit(transfers)
        if slope > 0:
            link = replace(link, latency_s=latency, bytes_per_s=1 / slope)
    reduces = [_reduce_row(entry) for entry in entries if entry.operation == "all_reduce"]
    return replace(link, protocols=_protocols(reduces)) if len(reduces) >= 3 else link


def _reduce_row(entry: LinkEntry) -> _Row:
    return _Row(entry.members - 1, 2 * (entry.members - 1) / entry.members * entry.num_bytes, entry.seconds)


def _protocols(rows: Sequence[_Row]) -> tuple[Protocol, ...]:
    """One protocol for all rows, or one for the small and one for the large, whichever switch fits best."""
    one: tuple[tuple[float, float, float], ...] = (_fit(rows),)
    best, squares = one, _squares(one, rows)
    limit = SECOND_PROTOCOL_GAIN * squares
    sizes = sorted({row.sent for row in rows})
    for size in sizes[1:-1]:
        parts = [row for row in rows if row.sent < size], [row for row in rows if row.sent >= size]
        if min(map(len, parts)) >= 3:
            two = tuple(_fit(part) for part in parts)
            if _squares(two, rows) < min(limit, squares):
                best, squares = two, _squares(two, rows)
    return tuple(
        Protocol(latency_s=latency, hop_s=hop, bytes_per_s=1 / slope) for latency, hop, slope in best if slope > 0
    )


def _fit(rows: Sequence[_Row]) -> tuple[float, float, float]:
    """Non-negative (latency, time of a hop, seconds per byte) with the least squares of relative errors."""
    matrix = np.array([[1.0, row.hops, row.sent] for row in rows]) / np.array([[row.seconds] for row in rows])
    best = (0.0, 0.0, 0.0)
    least = float("inf")
    for count in (1, 2, 3):
        for columns in combinations(range(3), count):
            found, *_ = np.linalg.lstsq(matrix[:, columns], np.ones(len(rows)), rcond=None)
            error = float(((matrix[:, columns] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                values = dict(zip(columns, found.tolist(), strict=True))
                best, least = (values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0)), error
    return best


def _squares(protocols: Sequence[tuple[float, float, float]], rows: Sequence[_Row]) -> float:
    total = 0.0
    for row in rows:
        predicted = min(latency + hop * row.hops + slope * row.sent for latency, hop, slope in protocols)
        total += (predicted / row.seconds - 1) ** 2
    return total
