"""Slowness: when a run says that a rank or a link is slow: after how long, from how much on, and when again."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

WINDOW = 20  # steps that are looked at together
PATIENCE = 3  # windows in a row
FEWEST = WINDOW // 4  # steps of a window in which what is compared must take part
LEAST = 0.05  # of a step
BY_PEERS, BY_ITSELF, BY_PREDICTION = 1.5, 1.5, 3.0
"""Factors. A prediction without a profile may be wrong by two for some layers and right for others."""
WORSE = 1.5


@dataclass(frozen=True, slots=True)
class Slow:
    """What a rank or a group does takes `own_s` of a step, and `expected_s` beside `than`."""

    own_s: float
    expected_s: float
    than: str

    @property
    def factor(self) -> float:
        """How many times as long."""
        return self.own_s / self.expected_s

    @property
    def excess_s(self) -> float:
        """Seconds of a step."""
        return self.own_s - self.expected_s


class Patience:
    """Who has been slow for how long, and what has been said of it."""

    def __init__(self) -> None:
        self._in_a_row: dict[Hashable, int] = defaultdict(int)
        self._said: dict[Hashable, float] = {}

    def is_over(self, who: Hashable, slow: Slow | None, step_s: float) -> bool:
        """Whether it is to be said now that `who` is slow, at the end of a window whose steps took `step_s`."""
        if slow is None or slow.excess_s < LEAST * step_s:
            self._in_a_row[who] = 0
            return False
        self._in_a_row[who] += 1
        if self._in_a_row[who] < PATIENCE or slow.factor <= WORSE * self._said.get(who, 0.0):
            return False
        self._said[who] = slow.factor
        return True


def lower_quartile(values: Sequence[float]) -> float:
    """Three of four values are at least as large."""
    return sorted(values)[len(values) // 4]
