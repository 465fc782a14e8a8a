"""Measured links: a cluster and a profile's link entries in, the cluster with links as they were measured out.

- A level's transfers give its rate and latency, each of its collectives one or two protocols (latency + hops + bytes /
  rate): two where one line misses, since a library switches algorithms or a cache is too small.
- Collectives that were not measured are as all-reduces. Levels that were not measured stay as they are.
- Lines have the least squares of logarithms: of a time that no line meets, twice too long is as wrong as half.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import exp, inf, log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spindle.cost.links import times_sent
from spindle.errors import ProfileError, SpindleWarning
from spindle.values.cluster import Cluster, Link, Protocol
from spindle.values.metagraph import MetaGraph
from spindle.values.profile import LinkEntry, LinkLevel, Profile

SECOND_PROTOCOL_GAIN = 0.8  # two protocols are taken when their squared error is below this share of one's
STEPS = 30  # of a fit, at most; most need three
FAR = 3.0  # times too long or too short: then no line tells how long messages take

LinkCollective = Literal["all_reduce", "reduce", "broadcast"]
COLLECTIVES: tuple[LinkCollective, ...] = ("all_reduce", "reduce", "broadcast")

Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class _Segment:
    """A line, from a number of bytes that each member sends on; the slope in seconds per byte."""

    latency_s: float
    hop_s: float
    slope: float
    from_bytes: float = 0.0


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
    families = {op.family for metaop in metagraph for op in metaop.operators}
    if kinds and not kinds & profile.by_kind.keys() and not families & profile.by_family.keys():
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
        segment = _fit(transfers)
        _warn_when_far("transfer", level, [segment], transfers)
        if segment.slope > 0:
            link = replace(link, latency_s=segment.latency_s, bytes_per_s=1 / segment.slope)
    found = [protocol for operation in COLLECTIVES for protocol in _protocols(operation, level, entries)]
    return replace(link, protocols=tuple(found)) if found else link


def _protocols(operation: LinkCollective, level: LinkLevel, entries: Sequence[LinkEntry]) -> Iterator[Protocol]:
    """Of one collective; the all-reduce's serve collectives that have none."""
    rows = [_row(operation, entry) for entry in entries if entry.operation == operation]
    if len(rows) >= 3:
        segments = _segments(rows)
        _warn_when_far(operation, level, segments, rows)
        for segment in segments:
            if segment.slope > 0:
                yield Protocol(
                    latency_s=segment.latency_s,
                    hop_s=segment.hop_s,
                    bytes_per_s=1 / segment.slope,
                    operation=None if operation == "all_reduce" else operation,
                    from_bytes=segment.from_bytes,
                )


def _warn_when_far(operation: str, level: LinkLevel, segments: Sequence[_Segment], rows: Sequence[_Row]) -> None:
    far = max(rows, key=lambda row: abs(_miss(segments, row)))
    if abs(_miss(segments, far)) > log(FAR):
        warnings.warn(
            f"measured times of {operation} over {level} links do not lie on a line: {far.sent:.0f} bytes took "
            f"{far.seconds:.2g} s, where it has {far.seconds * exp(_miss(segments, far)):.2g} s, so plans over these "
            "links are doubtful; see whether the network is shaped or busy, and measure again into a new file",
            SpindleWarning,
            stacklevel=6,
        )


def _row(operation: LinkCollective, entry: LinkEntry) -> _Row:
    return _Row(entry.members - 1, times_sent(operation, entry.members) * entry.num_bytes, entry.seconds)


def _segments(rows: Sequence[_Row]) -> list[_Segment]:
    """One line for all rows, or one for the small and one for the large; of two the quicker, or that for the size."""
    best = [_fit(rows)]
    squares = _squares(best, rows)
    limit = SECOND_PROTOCOL_GAIN * squares
    sizes = sorted({row.sent for row in rows})
    for below, size in pairwise(sizes[:-1]):
        parts = [row for row in rows if row.sent < size], [row for row in rows if row.sent >= size]
        if min(map(len, parts)) >= 3:
            small, large = map(_fit, parts)
            for two in ([small, large], [small, replace(large, from_bytes=sqrt(below * size))]):
                if _squares(two, rows) < min(limit, squares):
                    best, squares = two, _squares(two, rows)
    return best


def _fit(rows: Sequence[_Row]) -> _Segment:
    """The non-negative line with the least squares of logarithms."""
    terms, seconds = np.array([[1.0, row.hops, row.sent] for row in rows]), np.array([row.seconds for row in rows])
    best, least = _Segment(0.0, 0.0, 0.0), inf
    for count in (1, 2, 3):
        for columns in combinations(np.flatnonzero(terms.any(0)).tolist(), count):
            found = _least_squares(terms[:, columns], seconds)
            values = dict(zip(columns, found.tolist(), strict=True))
            segment = _Segment(values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0))
            if (found >= 0).all() and (squares := _squares([segment], rows)) < least * (1 - 1e-9):
                best, least = segment, squares
    return best


def _least_squares(terms: Array, seconds: Array) -> Array:
    """Of logarithms, by Gauss and Newton's steps from the least squares of relative errors, each halved until it helps.

    Coefficients may be below zero.
    """
    found: Array = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    for _ in range(STEPS):
        predicted = terms @ found
        if (predicted <= 0).any():
            break
        misses = np.log(predicted / seconds)
        step: Array = np.linalg.lstsq(terms / predicted[:, None], -misses, rcond=None)[0]
        for share in 0.5 ** np.arange(10):
            tried = terms @ (found + share * step)
            if (tried > 0).all() and (np.log(tried / seconds) ** 2).sum() < (misses**2).sum():
                found = found + share * step
                break
        else:
            break
    return found


def _squares(segments: Sequence[_Segment], rows: Sequence[_Row]) -> float:
    return sum(_miss(segments, row) ** 2 for row in rows)


def _miss(segments: Sequence[_Segment], row: _Row) -> float:
    """Logarithm of what they say over what was measured, as protocols are taken."""
    begin = max(segment.from_bytes for segment in segments if segment.from_bytes <= row.sent)
    predicted = min(p.latency_s + p.hop_s * row.hops + p.slope * row.sent for p in segments if p.from_bytes == begin)
    return log(predicted / row.seconds) if predicted > 0 else -inf
