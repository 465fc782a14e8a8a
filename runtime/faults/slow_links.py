"""Slow links: how long ranks sum and gather together, step by step; sentences that name ranks between which it is slow.

- A rank that waits for a collective may wait for the link or for a rank that comes late. The rank that comes last waits
  for the link alone, so the shortest wait of all ranks is no longer than the collective takes: its low bound. The
  shortest time from a rank's start to its end is its high bound. No clock is compared with another rank's.
- A group of ranks is named where the low bound is longer than the high bound of what it is compared with: itself in its
  best earlier window; groups of as many ranks that lie on nodes in the same way; the prediction, where a profile has
  measured the messages. As the best window it was as fast as ranks computed in it.
- Windows, patience and the least part of a step are those of stragglers.
- Messages from one rank to another are not watched: only the sender's clock knows when they left.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spindle.cost.links import collective_s
from spindle.runtime.faults.slowness import (
    BY_ITSELF,
    BY_PEERS,
    BY_PREDICTION,
    FEWEST,
    PATIENCE,
    WINDOW,
    Patience,
    Slow,
    lower_quartile,
)
from spindle.runtime.steps.busy import Meeting
from spindle.values.plan import Plan

if TYPE_CHECKING:
    from spindle.runtime.watch import RankStep
    from spindle.runtime.worker import Report

Group = tuple[int, ...]
SELDOM = 10  # one of this many steps may be faster; a busy machine slows messages in most steps, hardly in all
MOST_OPEN = 4096  # collectives of which some ranks have not reported yet


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a window: seconds that a collective takes at least in nearly all steps, and at most in a quarter of them."""

    low_s: float
    high_s: float


class SlowLinks:
    """Watches the collectives of a run under one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._open: dict[Meeting, dict[int, tuple[float, float]]] = {}
        self._window: dict[Meeting, list[tuple[float, float]]] = defaultdict(list)  # of no step
        self._steps_s: list[float] = []
        self._paces_s: list[float] = []
        self._best: dict[Meeting, tuple[float, float]] = {}  # seconds, and how long ranks computed in that window
        self._patience = Patience()

    def take(self, first_step: int, reports: "Sequence[Report]") -> list[str]:
        """Take in some steps, of which the first is `first_step`; what is to be said of links."""
        said: list[str] = []
        for index in range(min(len(report.steps) for report in reports)):
            steps = [report.steps[index] for report in reports]
            self._steps_s.append(max(each.step_s for each in steps))
            self._paces_s.append(statistics.median(sum(each.busy_s.values()) for each in steps))
            for report, each in zip(reports, steps, strict=True):
                self._add(report.rank, each)
            if len(self._steps_s) == WINDOW:
                said += self._judged(first_step + index)
        return said

    def _add(self, rank: int, metrics: "RankStep") -> None:
        """Adds a rank's times of collectives; a collective that all ranks have reported enters the window."""
        for meeting, seconds in metrics.together_s.items():
            found = self._open.setdefault(meeting, {})
            found[rank] = seconds
            if len(found) == len(meeting.ranks):
                waited_s, took_s = zip(*self._open.pop(meeting).values(), strict=True)
                self._window[meeting._replace(step=0)].append((min(waited_s), min(took_s)))
        while len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open)))

    def _judged(self, last_step: int) -> list[str]:
        """A window is full."""
        found: dict[Group, dict[Meeting, Bounds]] = defaultdict(dict)
        for meeting, held in self._window.items():
            if len(held) >= FEWEST and len(meeting.ranks) > 1:
                lows_s, highs_s = zip(*held, strict=True)
                low_s = sorted(lows_s)[len(lows_s) // SELDOM]
                found[meeting.ranks][meeting] = Bounds(low_s, lower_quartile(highs_s))
        step_s, pace_s = statistics.median(self._steps_s), lower_quartile(self._paces_s)
        self._window.clear()
        self._steps_s.clear()
        self._paces_s.clear()
        said = []
        for group, own in found.items():
            slow = self._slowness(group, own, found, pace_s)
            if self._patience.is_over(group, slow, step_s) and slow is not None:
                said.append(self._sentence(group, slow, sum(each.low_s for each in own.values()), step_s, last_step))
        for meeting, bounds in ((m, b) for own in found.values() for m, b in own.items()):
            self._best[meeting] = min((bounds.high_s, pace_s), self._best.get(meeting, (bounds.high_s, pace_s)))
        return said

    def _slowness(
        self, group: Group, own: dict[Meeting, Bounds], found: dict[Group, dict[Meeting, Bounds]], pace_s: float
    ) -> Slow | None:
        """The comparison in which a group is too slow, if there is one."""
        expectations = (
            (BY_PEERS, "between other ranks", lambda meeting: self._by_peers(meeting, found)),
            (BY_ITSELF, "in earlier steps", lambda meeting: self._by_itself(meeting, pace_s)),
            (BY_PREDICTION, "predicted", self._predicted_s),
        )
        for limit, than, expected_of in expectations:
            known = [(bounds.low_s, s) for meeting, bounds in own.items() if (s := expected_of(meeting)) is not None]
            own_s, expected_s = (sum(each[place] for each in known) for place in (0, 1))
            if own_s > limit * expected_s > 0:
                return Slow(own_s, expected_s, than)
        return None

    def _by_peers(self, meeting: Meeting, found: dict[Group, dict[Meeting, Bounds]]) -> float | None:
        """What it takes ranks of other groups, by the collective of theirs that says least."""
        others = []
        for group, own in found.items():
            if group != meeting.ranks and self._spread(group) == self._spread(meeting.ranks):
                alike = [(m, bounds) for m, bounds in own.items() if m.operation == meeting.operation]
                others += [min(b.high_s * max(1.0, meeting.num_bytes / m.num_bytes) for m, b in alike)] if alike else []
        return statistics.median(others) if others else None

    def _by_itself(self, meeting: Meeting, pace_s: float) -> float | None:
        if meeting not in self._best:
            return None
        best_s, at_pace_s = self._best[meeting]
        return best_s * max(1.0, pace_s / at_pace_s) if at_pace_s else best_s

    def _predicted_s(self, meeting: Meeting) -> float | None:
        plan = self._plan
        if plan.cluster is None or plan.outlook is None or "profiled" not in plan.outlook.source:
            return None
        return collective_s(meeting.operation, meeting.num_bytes, plan.cluster, self._spread(meeting.ranks))

    def _spread(self, group: Group) -> tuple[int, ...]:
        """How many ranks of a group lie on each of its nodes."""
        return tuple(sorted(Counter(rank // self._plan.devices_per_node for rank in group).values()))

    def _sentence(self, group: Group, slow: Slow, all_s: float, step_s: float, last_step: int) -> str:
        link = f"the link between ranks {group[0]} and {group[1]} is"
        if len(group) > 2:
            link = f"a link among ranks {', '.join(_shown(group))} is"
        first = last_step - PATIENCE * WINDOW + 1
        usual_s = step_s - slow.own_s + slow.expected_s
        others = "the other" if len(group) == 2 else "another"
        return (
            f"{link} slow in steps {first} to {last_step}: what they sum and gather takes {slow.factor:.1f} times as "
            f"long as {slow.than}, though no rank waits for {others} then ({slow.own_s:.3g} s a step, not "
            f"{slow.expected_s:.3g} s). A step takes {step_s:.3g} s, and {usual_s:.3g} s if it were as fast; planned "
            f"anew at best {step_s - all_s:.3g} s, with nothing sent over it. See what slows it (a port, a cable, "
            "other traffic), or resume with a plan for other devices"
        )


def _shown(group: Group) -> Iterator[str]:
    yield from map(str, group[:4])
    if len(group) > 4:
        yield ".."
