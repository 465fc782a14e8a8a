"""Families: measured times of a layer on batches of some sizes in; its time on a batch of any other size out.

On one count of devices T = a + b * size goes through two measured sizes, as a + b / n does through two counts (paper,
section 3.2). Beyond the largest the line goes on; below the least it does too, but falls no faster than the work.
Where samples are alike, a device knows no batch but its own share: n devices tell the time of an n-th of it, so that
one batch on several counts is several sizes (`shared_curve`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

from spindle.values.profile import ProfileEntry


@dataclass(frozen=True)
class Curve:
    """Entries of a family on one count of devices in order of size, each size once."""

    entries: tuple[ProfileEntry, ...]

    def at(self, size: float) -> ProfileEntry:
        """What would be measured on a batch of another size."""
        return replace(
            self.entries[0],
            size=size,
            forward_s=self._value(size, "forward_s"),
            backward_s=self._value(size, "backward_s"),
            bare_forward_s=self._value(size, "bare_forward_s"),
        )

    def _value(self, size: float, name: str) -> float:
        points = [(entry.size, float(getattr(entry, name))) for entry in self.entries]
        if len(points) == 1:
            return points[0][1] * size / points[0][0]
        low, high = next((pair for pair in pairwise(points) if size <= pair[1][0]), (points[-2], points[-1]))
        line = low[1] + (size - low[0]) * (high[1] - low[1]) / (high[0] - low[0])
        if size < points[0][0]:
            return min(max(line, points[0][1] * size / points[0][0]), points[0][1])
        return max(line, points[-1][1]) if size > points[-1][0] else line


def curves_of(entries: Sequence[ProfileEntry]) -> dict[int, Curve]:
    """The curve of each count of devices, from measured entries of one family that tell their size."""
    found: dict[int, dict[float, list[ProfileEntry]]] = {}
    for entry in entries:
        if entry.size > 0:
            found.setdefault(entry.num_devices, {}).setdefault(entry.size, []).append(entry)
    return {
        count: Curve(tuple(_mean(by_size[size]) for size in sorted(by_size)))
        for count, by_size in sorted(found.items())
    }


def shared_curve(entries: Sequence[ProfileEntry]) -> Curve:
    """The curve of one device by the size of its own share of the batch; at least one entry tells its size."""
    shares = [replace(each, num_devices=1, size=each.size / each.num_devices) for each in entries if each.size > 0]
    by_size: dict[float, list[ProfileEntry]] = {}
    for share in shares:
        by_size.setdefault(share.size, []).append(share)
    return Curve(tuple(_mean(by_size[size]) for size in sorted(by_size)))


def _mean(entries: Sequence[ProfileEntry]) -> ProfileEntry:
    return replace(
        entries[0],
        forward_s=fmean(entry.forward_s for entry in entries),
        backward_s=fmean(entry.backward_s for entry in entries),
    )
