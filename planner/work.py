"""Work: a time limit in, counted work out: the same input gives the same plan on any machine and under any load.

- The search spends units; one unit is a microsecond of the core the constants below were measured on (one core of a
  shared x86 server, Python 3.11). A time limit of S seconds buys S * UNITS_PER_S units, whatever the clock says.
- The clock is a brake: on a machine too busy or slow for the work of a limit, the search stops where it is and `braked`
  becomes true. A plan made so says so: it may come out differently elsewhere. A limit that somebody gave is kept; who
  gives none is given time, and the brake is then far away.
"""

from collections.abc import Callable

UNITS_PER_S = 1e6
LEAST_UNITS, UNITS_PER_LAYER_SQUARED = 5e4, 250.0  # small problems have few schedules: more work than this is wasted
BRAKE, GRACE_S = 1.1, 1.0  # of a limit that was given, and the least
PATIENCE, PATIENCE_S = 4.0, 10.0  # where none was


class Work:
    """A budget of work. `spend` as you go; `left` says how much there is."""

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

    def left(self, share: float = 1.0) -> float:
        """Units left of the first `share` of the budget; 0 when the brake is pulled."""
        if not self.braked and self._clock() > self._brake_s:
            self.braked = True
        return 0.0 if self.braked else max(0.0, share * self.total - self.spent)
