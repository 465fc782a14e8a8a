"""Segments: measured (size, seconds) points in, the fewest alpha-beta segments that keep within a tolerance out.

Libraries switch algorithms with the size of a message, so one line alpha + size / bandwidth does not fit (errors of
20 to 30 % on published sweeps). Breaks stand half way (geometrically) between the points that they separate.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, sqrt

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Segment:
    """alpha_s + size / rate from `start` on; size in bytes and rate in bytes per second for transfers."""

    start: float
    alpha_s: float
    seconds_per_unit: float

    def time_s(self, size: float) -> float:
        """Seconds for `size`."""
        return self.alpha_s + self.seconds_per_unit * size


@dataclass(frozen=True)
class Segments:
    """Segments in order of size; the first begins at 0."""

    segments: tuple[Segment, ...]

    def time_s(self, size: float) -> float:
        """Seconds for `size`; the last segment goes on for ever."""
        at = bisect_right([segment.start for segment in self.segments], size) - 1
        return self.segments[max(at, 0)].time_s(size)


def fit_segments(points: Sequence[Point], *, tolerance: float = 0.08) -> Segments:
    """The fewest segments with a relative error of at most `tolerance` at every point; ties by the sum of squares.

    `points` need rising sizes and positive times. A segment of one point is a constant rate through it. O(points^3).

    >>> fit_segments([(1.0, 11.0), (2.0, 12.0), (4.0, 14.0)]).segments
    (Segment(start=0.0, alpha_s=10.0, seconds_per_unit=1.0),)
    """
    if not points or any(t <= 0 for _, t in points) or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError(
            f"segments need rising sizes and positive times, not {list(points)[:4]}; sort and measure again"
        )
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)]  # segments used, squares, where the last segment begins
    lines: dict[tuple[int, int], Segment] = {}
    for end in range(1, len(points) + 1):
        options = []
        for begin in range(end):
            segment, squares, worst = _line(points[begin:end])
            if worst <= tolerance:
                lines[begin, end] = segment
                options.append((best[begin][0] + 1, best[begin][1] + squares, begin))
        best.append(min(options))
    cuts, at = [], len(points)
    while at:
        cuts.append((best[at][2], at))
        at = best[at][2]
    chosen = []
    for begin, end in reversed(cuts):
        start = sqrt(points[begin - 1][0] * points[begin][0]) if begin else 0.0
        line = lines[begin, end]
        chosen.append(Segment(start, line.alpha_s, line.seconds_per_unit))
    return Segments(tuple(chosen))


def _line(points: Sequence[Point]) -> tuple[Segment, float, float]:
    """Least squares of relative errors, with alpha and slope kept non-negative: (segment, squares, worst error)."""
    weights = [1 / t for _, t in points]
    sxx = sum((w * x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    sx = sum(w * w * x for w, (x, _) in zip(weights, points, strict=True))
    s1 = sum(w * w for w in weights)
    bx = sum(w * x for w, (x, _) in zip(weights, points, strict=True))
    b1 = sum(weights)
    determinant = sxx * s1 - sx * sx
    candidates = [(0.0, bx / sxx), (b1 / s1, 0.0)]
    if len(points) > 1 and determinant > 0:
        candidates.append(((sxx * b1 - sx * bx) / determinant, (s1 * bx - sx * b1) / determinant))
    best: tuple[Segment, float, float] | None = None
    for alpha, slope in candidates:
        if alpha < 0 or slope < 0:
            continue
        errors = [(alpha + slope * x) / t - 1 for x, t in points]
        squares = sum(e * e for e in errors)
        if best is None or squares < best[1]:
            best = Segment(0.0, alpha, slope), squares, max(abs(e) for e in errors)
    assert best is not None, "a line through the origin is always a candidate"
    return best


def held_out_error(points: Sequence[Point], *, tolerance: float = 0.08) -> tuple[float, float]:
    """Mean and largest relative error at every second inner point when the segments are fitted on the others.

    What `--validate` prints: an honest error of interpolation. (inf, inf) when there are fewer than three points.
    """
    held = [point for index, point in enumerate(points) if index % 2 == 1 and index < len(points) - 1]
    if not held:
        return inf, inf
    fitted = fit_segments([point for point in points if point not in held], tolerance=tolerance)
    errors = [abs(fitted.time_s(size) / time - 1) for size, time in held]
    return sum(errors) / len(errors), max(errors)
