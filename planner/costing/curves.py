"""Curves: measured points of a MetaOp in, T(n) for any real n out.

- `counts` are numbers of devices that are strictly faster than every smaller one: measured times come unordered and
  need not fall, and a count that gains nothing only wastes devices (paper, section 3.2; our reading of a "valid
  allocation").
- `idle` keeps the others where traffic costs time: running on all devices of its input may be cheaper than moving it.
- Between points T(n) = a + b/n (paper, section 3.2); Fig. 5a of the paper uses this form, its appendix a straight line.
- Theorem 1 of the paper needs a concave rate 1/T(n), which measured points do not promise. `hull` keeps the counts on
  the concave envelope of {(0, 0)} and (n, 1/T(n)); mixing two neighboring hull counts is all that fractional
  schedules can reach, so bounds and allocations use the hull.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from spindle.errors import InfeasibleError
from spindle.values.metagraph import MetaOp


@dataclass(frozen=True)
class Curve:
    """Seconds of one layer by device count: counts rise, times fall. `idle`: counts that are no faster, by time."""

    counts: tuple[int, ...]
    times_s: tuple[float, ...]
    idle: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.counts))
        falling = all(a > b for a, b in pairwise(self.times_s))
        if not (self.counts and len(self.counts) == len(self.times_s) and rising and falling):
            raise AssertionError(f"a curve needs rising counts and falling times, not {self.counts}, {self.times_s}")

    @cached_property
    def time_by_count(self) -> dict[int, float]:
        """Seconds of one layer at each count."""
        return dict(zip(self.counts, self.times_s, strict=True)) | dict(self.idle)

    @cached_property
    def widest(self) -> int:
        """The largest count, whether it is faster or not."""
        return max(self.time_by_count)

    @cached_property
    def hull(self) -> "Curve":
        """The counts on the concave envelope of the rate; itself when all are."""
        kept: list[tuple[int, float]] = [(0, 0.0)]
        for n, t in zip(self.counts, self.times_s, strict=True):
            rate = 1 / t
            # counts of equal efficiency all stay: they are on the envelope, and small ones leave devices to others
            while len(kept) > 1 and _slope(kept[-2], kept[-1]) < _slope(kept[-1], (n, rate)) * (1 - 1e-12):
                kept.pop()
            kept.append((n, rate))
        counts = tuple(n for n, _ in kept[1:])
        return Curve(counts, tuple(self.time_by_count[n] for n in counts))

    def time(self, n: float) -> float:
        """T(n) for real n > 0; below the first count a device is shared in time, beyond the last nothing is gained."""
        if n <= self.counts[0]:
            return self.times_s[0] * self.counts[0] / n
        if n >= self.counts[-1]:
            return self.times_s[-1]
        i = bisect_right(self.counts, n)
        a, b = _alpha_beta(self.counts[i - 1 : i + 1], self.times_s[i - 1 : i + 1])
        return a + b / n

    def step(self, n: int) -> float:
        """Seconds on the largest count that is at most n."""
        return self.times_s[bisect_right(self.counts, n) - 1]

    def inverse(self, time_s: float) -> float:
        """The least real n with T(n) <= time_s; the last count when even that is slower (up to rounding)."""
        if time_s >= self.times_s[0]:
            return self.times_s[0] * self.counts[0] / time_s
        if time_s <= self.times_s[-1]:
            return float(self.counts[-1])
        low, high = self.neighbors(time_s)
        a, b = _alpha_beta((low, high), (self.time_by_count[low], self.time_by_count[high]))
        return b / (time_s - a)

    def rate_inverse(self, time_s: float) -> float:
        """Average devices of the mix of two neighboring counts that takes time_s a layer; `inverse` in rate space.

        On a hull this is the fewest device-seconds a layer that finishes in time: 1/time_s is linear in n.
        """
        if time_s >= self.times_s[0]:
            return self.times_s[0] * self.counts[0] / time_s
        if time_s <= self.times_s[-1]:
            return float(self.counts[-1])
        low, high = self.neighbors(time_s)
        rate_low, rate_high = 1 / self.time_by_count[low], 1 / self.time_by_count[high]
        return low + (high - low) * (1 / time_s - rate_low) / (rate_high - rate_low)

    def neighbors(self, time_s: float) -> tuple[int, int]:
        """The closest counts (low, high) with T(low) > time_s >= T(high); low is 0 when the first count is enough."""
        # bisect on falling times: the first index whose time is <= time_s
        high = bisect_left(self.times_s, -time_s, key=lambda t: -t)
        if high == 0:
            return 0, self.counts[0]
        if high == len(self.counts):  # only rounding asks for more than the fastest count
            return self.counts[-1], self.counts[-1]
        return self.counts[high - 1], self.counts[high]


def clean_curve(metaop: MetaOp, num_devices: int, *, with_idle: bool = False) -> Curve:
    """The usable points of a MetaOp on `num_devices` devices; raises InfeasibleError when no count is that small."""
    counts: list[int] = []
    times: list[float] = []
    idle: list[tuple[int, float]] = []
    for n, time_s in metaop.layer_time_s:
        if n <= num_devices and (not times or time_s < times[-1]):
            counts.append(n)
            times.append(time_s)
        elif n <= num_devices and with_idle:
            idle.append((n, time_s))
    if not counts:
        given = ", ".join(str(n) for n, _ in metaop.layer_time_s) or "none"
        raise InfeasibleError(
            f"MetaOp {metaop.name!r} runs on {given} devices but the cluster has {num_devices}; "
            "use a larger cluster, or give layer_time_s for a smaller count"
        )
    return Curve(tuple(counts), tuple(times), tuple(idle))


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _alpha_beta(counts: tuple[int, ...], times_s: tuple[float, ...]) -> tuple[float, float]:
    b = (times_s[0] - times_s[1]) / (1 / counts[0] - 1 / counts[1])
    return times_s[0] - b / counts[0], b
