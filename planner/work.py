"""Work: a time limit in, counted work out: the same input gives the same plan on any machine and under any load.

- The search spends units; one unit is a microsecond of the core the constants below were measured on (one core of a
  shared x86 server, Python 3.11). A time limit of S seconds buys S * UNITS_PER_S units, whatever the clock says.
- Whatever the budget is, the search does the same work in the same order, in stages each longer than all before,
  and only looks at what it has found at fixed points. So a larger budget finds all that a smaller one does.
- The clock is a brake: on a machine too busy or slow for the work of a limit, the search stops where it is and `braked`
  becomes true. A plan made so says so: it may come out differently elsewhere. A limit that somebody gave is kept
  (`most_s`); who gives none is given time, and the brake is then far away.
"""

from collections.abc import Callable, Iterator
from itertools import count

UNITS_PER_S = 1e6
LEAST_UNITS, UNITS_PER_LAYER_SQUARED = 5e4, 250.0  # small problems have few schedules: more work than this is wasted
FIRST_STAGE, SHORT_STAGES = 15_625, 6  # units by which the first stage ends; the next double that, to half a second
MAIN_STAGE, STAGE_FACTOR = 2e6, 5.0  # then 2 s, 10 s and so on: a longer last stage is worth more, if it ends in time
LOOKS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)  # of each power of ten: where what is found counts
FIRST_POWER = 3
GRACE_S = 1.0  # of the clock, that a search may always take
PATIENCE, PATIENCE_S = 4.0, 10.0  # times the limit, and seconds, where no limit was given


class Work:
    """A budget of work. `spend` as you go; `looks` says how far it goes, `is_stopped` whether the clock ended it.

    `most_s`: seconds of the clock that it may take, or a little more where that is under GRACE_S; None: nobody waits.
    """

    def __init__(
        self,
        limit_s: float,
        clock: Callable[[], float],
        *,
        num_layers: int | None = None,
        most_s: float | None = None,
    ) -> None:
        self.total = limit_s * UNITS_PER_S
        if num_layers is not None:
            self.total = min(self.total, LEAST_UNITS + UNITS_PER_LAYER_SQUARED * num_layers**2)
        self.spent = 0.0
        self.braked = False
        self._clock = clock
        self._brake_s = clock() + (PATIENCE * limit_s + PATIENCE_S if most_s is None else max(most_s, GRACE_S))

    def spend(self, units: float) -> None:
        """Count work done."""
        self.spent += units

    @property
    def done_share(self) -> float:
        """Share of the budget that was spent before the brake was pulled; 1 where it was not."""
        return min(1.0, self.spent / self.total) if self.braked and self.total else 1.0

    @property
    def is_stopped(self) -> bool:
        """Whether the brake is pulled."""
        if not self.braked and self._clock() > self._brake_s:
            self.braked = True
        return self.braked

    def looks(self) -> Iterator[float]:
        """Units after which what is found counts: those of any larger budget as far as this one goes, at least one."""
        ends = (step * 10.0**power for power in count(FIRST_POWER) for step in LOOKS)
        yield next(ends)
        for end in ends:
            if end > self.total * (1 + 1e-9):
                return
            yield end


def stages(*, is_large: bool) -> Iterator[float]:
    """Units after which each stage ends, without end; large problems have none of the short ones."""
    if not is_large:
        yield from (FIRST_STAGE * 2.0**number for number in range(SHORT_STAGES))
        yield MAIN_STAGE
    yield from (MAIN_STAGE * STAGE_FACTOR**number for number in count(1))
