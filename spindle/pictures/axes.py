"""Axes: values in, pixels and ticks out, linear or logarithmic."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, log, log2, log10

from spindle.timeline.svg import text_at

FAINT = 'stroke="currentColor" stroke-opacity="0.14"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Values from `low` to `high` lie from pixel `start` to pixel `end`; those beyond are put at the nearer end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = True

    def at(self, value: float) -> float:
        """Pixel of a value."""
        value = min(max(value, self.low), self.high)
        share = log(value / self.low) / log(self.high / self.low) if self.is_log else self._linear(value)
        return self.start + share * (self.end - self.start)

    def _linear(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def device_axis(most: int, start: float, end: float) -> Axis:
    """From one device to `most`, with room for the marks at both ends."""
    return Axis(low=0.85, high=max(most, 2) * 1.18, start=start, end=end)


def device_ticks(most: int) -> list[int]:
    """Powers of two up to `most`, at most seven of them."""
    top = floor(log2(most))
    step = ceil((top + 1) / 7)
    return [2**power for power in range(0, top + 1, step)]


def log_ticks(axis: Axis) -> list[float]:
    """Round values of a logarithmic axis: at most five of 1, 2 and 5 a decade, else of 1 a decade or of fewer."""
    decades = range(floor(log10(axis.low)), ceil(log10(axis.high)) + 1)
    for digits in ((1, 2, 5), (1,)):
        found = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [value for value in found if axis.low <= value <= axis.high]
        if len(found) <= 5:
            return found
    return found[:: ceil(len(found) / 5)]


def frame(x: Axis, y: Axis, most: int, rows: list[tuple[float, str]]) -> Iterator[str]:
    """Grid and labels: devices below, `rows` of (value, label) on the left."""
    for count in device_ticks(most):
        at = x.at(count)
        yield f'<path d="M{at:.1f} {y.start:.1f}V{y.end:.1f}" {FAINT}/>'
        yield text_at(at, y.start + 13, str(count), anchor="middle", size=10, opacity=0.75)
    yield text_at((x.start + x.end) / 2, y.start + 27, "devices", anchor="middle", size=10, opacity=0.75)
    for value, label in rows:
        at = y.at(value)
        yield f'<path d="M{x.start:.1f} {at:.1f}H{x.end:.1f}" {FAINT}/>'
        yield text_at(x.start - 5, at + 3.5, label, anchor="end", size=10, opacity=0.75)
    yield f'<path d="M{x.start:.1f} {y.end:.1f}V{y.start:.1f}H{x.end:.1f}" fill="none" stroke="currentColor"/>'
