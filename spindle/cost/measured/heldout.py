"""Held out: a profile in; how wrong its curves are at points that they do not use, out.

Each measured point between two others is left out in turn and predicted from its neighbors: an operator's time by
a + b / n through both counts, or by a + b * size through both sizes; a message's by alpha-beta segments through every
second size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spindle.cost.measured.family import Curve, curves_of
from spindle.cost.measured.segments import fit_segments
from spindle.values.profile import LinkEntry, Profile, ProfileEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One point that a curve did not use; seconds. `at` is a number of devices, or of bytes for messages."""

    what: str
    at: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative, above zero where the curve is too slow."""
        return self.predicted_s / self.measured_s - 1


def between(n: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """Seconds on n devices by a + b / n through two (count, seconds) around it.

    >>> between(2, (1, 8.0), (4, 2.0))
    4.0
    """
    share = (1 / n - 1 / high[0]) / (1 / low[0] - 1 / high[0])
    return high[1] + share * (low[1] - high[1])


def left_out(kind: str, entries: Mapping[int, ProfileEntry]) -> list[HeldOut]:
    """Each inner measured count of a kind, from the counts beside it."""
    counts = sorted(entries)
    total_s = {n: entries[n].forward_s + entries[n].backward_s for n in counts}
    return [
        HeldOut(
            what=kind,
            at=n,
            measured_s=total_s[n],
            predicted_s=between(n, (low, total_s[low]), (high, total_s[high])),
        )
        for low, n, high in zip(counts, counts[1:], counts[2:], strict=False)
    ]


def left_out_sizes(family: str, entries: Sequence[ProfileEntry]) -> list[HeldOut]:
    """Each inner size of a family, from the others on the same count."""
    rows = []
    for count, curve in curves_of(entries).items():
        for index in range(1, len(curve.entries) - 1):
            left = curve.entries[index]
            predicted = Curve(curve.entries[:index] + curve.entries[index + 1 :]).at(left.size)
            measured_s, predicted_s = (entry.forward_s + entry.backward_s for entry in (left, predicted))
            rows.append(
                HeldOut(what=f"{family}, other sizes", at=count, measured_s=measured_s, predicted_s=predicted_s)
            )
    return rows


def held_out(profile: Profile) -> tuple[HeldOut, ...]:
    """All points of a profile that can be left out; none where no kind has three counts."""
    rows = [row for kind, entries in profile.by_kind.items() for row in left_out(kind, entries)]
    rows += [row for family, entries in profile.by_family.items() for row in left_out_sizes(family, entries)]
    groups: dict[str, list[LinkEntry]] = {}
    for entry in profile.links:
        groups.setdefault(f"{entry.operation} of {entry.members}, {entry.level}", []).append(entry)
    for what, entries_ in groups.items():
        ordered = sorted(entries_, key=lambda e: e.num_bytes)
        held = [e for i, e in enumerate(ordered) if i % 2 == 1 and i < len(ordered) - 1]
        if held:
            segments = fit_segments([(float(e.num_bytes), e.seconds) for e in ordered if e not in held])
            rows += [
                HeldOut(what=what, at=e.num_bytes, measured_s=e.seconds, predicted_s=segments.time_s(e.num_bytes))
                for e in held
            ]
    return tuple(rows)


def render_held_out(rows: tuple[HeldOut, ...]) -> str:
    """A table of what was left out, worst first, and the mean and largest error."""
    if not rows:
        return "nothing to hold out: no operator was measured on three counts, no message in three sizes"
    lines = [f"{'held out':44} {'at':>9} {'measured ms':>12} {'curve ms':>10} {'error':>7}"]
    for row in sorted(rows, key=lambda r: -abs(r.error)):
        lines.append(
            f"{row.what[:44]:44} {row.at:>9} {1e3 * row.measured_s:>12.3f} {1e3 * row.predicted_s:>10.3f} "
            f"{100 * row.error:>+6.1f}%"
        )
    errors = [abs(row.error) for row in rows]
    mean, most = 100 * sum(errors) / len(errors), 100 * max(errors)
    return "\n".join([*lines, f"{len(rows)} points not used: mean error {mean:.1f} %, largest {most:.1f} %"])
