"""Work: a time limit in, counted work out: the same input gives the same plan on any machine and under any load.

- The search spends units; one unit is a microsecond of the core the constants below were measured on (one core of a
  shared x86 server, Python 3.11). A time limit of S seconds buys S * UNITS_PER_S units, whatever the clock says.
- The clock is an emergency brake only: when the search has taken BRAKE times its limit (and a grace, for small limits),
  it stops where it is and `braked` becomes true. A plan made so says so: it may come out differently elsewhere.
"""

from collections.abc import Callable

UNITS_PER_S = 1e6
LEAST_UNITS, UNITS_PER_LAYER_SQUARED = 5e4, 250.0  # small problems have few schedules: more work than this is wasted
BRAKE = 4.0
GRACE_S = 10.0


class Work:
    """A budget of work. `spend` as you go; `left` says how much there is."""

    def __init__(self, limit_s: float, clock: Callable[[], float], *, num_layers: int | None = None) -> None:
        self.total = limit_s * UNITS_PER_S
        if num_layers is not None:
            self.total = min(self.total, LEAST_UNITS + UNITS_PER_LAYER_SQUARED * num_layers**2)
        self.spent = 0.0
        self.braked = False
        self._clock = clock
        self._brake_s = clock() + BRAKE * limit_s + GRACE_S

    def spend(self, units: float) -> None:
        """Count work done."""
        self.spent += units

    def left(self, share: float = 1.0) -> float:
        """Units left of the first `share` of the budget; 0 when the brake is pulled."""
        if not self.braked and self._clock() > self._brake_s:
            self.braked = True
        return 0.0 if self.braked else max(0.0, share * self.total - self.spent)
