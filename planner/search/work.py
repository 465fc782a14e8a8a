"""Work: a time limit in, counted work out: the same input gives the same plan on any machine and under any load.

- The search spends units; one unit is a microsecond of the core the constants below were measured on (one core of a
  shared x86 server, Python 3.11). A time limit of S seconds buys S * UNITS_PER_S units, whatever the clock says.
- A budget is spent in rounds that end at the same units whatever the budget is, and only what the end of a round finds
  counts. So a larger budget finds all that a smaller one does.
- The clock is a brake: on a machine too busy or slow for the work of a limit, the search stops where it is and `braked`
  becomes true. A plan made so says so: it may come out differently elsewhere. A limit that somebody gave is kept; who
  gives none is given time, and the brake is then far away.
"""

from collections.abc import Callable, Iterator
from itertools import count

UNITS_PER_S = 1e6
LEAST_UNITS, UNITS_PER_LAYER_SQUARED = 5e4, 250.0  # small problems have few schedules: more work than this is wasted
FIRST_ROUND = 4  # the first round ends at 10^4 units, and in each decade
ROUNDS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)  # end at these multiples
BRAKE, GRACE_S = 1.1, 1.0  # of a limit that was given, and the least
PATIENCE, PATIENCE_S = 4.0, 10.0  # where none was


class Work:
    """A budget of work. `spend` as you go; `rounds` says how it is divided, `is_stopped` whether the clock ended it."""

    def __init__(
        self, limit_s: float, clock: Callable[[], float], *, num_layers: int | None = None, is_given: bool = False
    ) -> None:
        self.total = limit_s * UNITS_PER_S
        if num_layers is not None:
            self.total = min(self.total, LEAST_UNITS + UNITS_PER_LAYER_SQUARED * num_layers**2)
        self.spent = 0.0
        self.braked = False
        self._clock = clock
        self._brake_s = clock() + (max(BRAKE * limit_s, GRACE_S) if is_given else PATIENCE * limit_s + PATIENCE_S)

    def spend(self, units: float) -> None:
        """Count work done."""
        self.spent += units

    @property
    def is_stopped(self) -> bool:
        """Whether the brake is pulled."""
        if not self.braked and self._clock() > self._brake_s:
            self.braked = True
        return self.braked

    def rounds(self) -> Iterator[float]:
        """Units by which each round ends: those of any larger budget as far as this one goes, and at least one."""
        ends = (step * 10.0**power for power in count(FIRST_ROUND) for step in ROUNDS)
        yield next(ends)
        for end in ends:
            if end > self.total * (1 + 1e-9):
                return
            yield end


class Part:
    """A part of a search that goes on where it stopped, and the work that it has done and may do."""

    def __init__(self, steps: Iterator[None], work: Work) -> None:
        self.steps, self.work = steps, work
        self.allowed = 0.0
        self.spent = 0.0

    def go_on(self, units: float) -> None:
        """Do so much more work; what a step did beyond its share is made up for the next time."""
        self.allowed += units
        while self.spent < self.allowed and not self.work.is_stopped and self.step():
            pass

    def step(self) -> bool:
        """One step; False when there is nothing to do now."""
        begun = self.work.spent
        next(self.steps)
        self.spent += self.work.spent - begun
        return self.work.spent > begun
