"""Clock: moments that ranks of several machines can compare, though each machine counts seconds from its own start."""

import time
from collections.abc import Callable

import torch

from spindle.runtime.comms.transport import Transport

PINGS = 20


class Clock:
    """Seconds on the clock of another rank, once they agree.

    Clocks of two machines run apart by up to some milliseconds a minute: agree again before what is to be exact.
    """

    def __init__(self, seconds: Callable[[], float] = time.perf_counter) -> None:
        """`seconds`: this machine's clock, which all its processes have."""
        self._seconds = seconds
        self.offset_s = 0.0

    def now(self) -> float:
        """This moment, on the clock agreed upon."""
        return self._seconds() + self.offset_s

    def agree(self, transport: Transport, ranks: tuple[int, ...]) -> None:
        """Take over the clock of the first of `ranks`, a group, as all of these do now, itself among them.

        Each asks it the time, and takes the answer that came quickest to be from halfway between question and answer:
        wrong by half of that time at most (Cristian, "Probabilistic clock synchronization", 1989). A rank whose clock
        may be the same, as on one machine, keeps its own.
        """
        error_s, offset_s = min(self._ask(transport, ranks) for _ in range(PINGS))
        self.offset_s = offset_s if abs(offset_s) > error_s else 0.0

    def _ask(self, transport: Transport, ranks: tuple[int, ...]) -> tuple[float, float]:
        """How far the first rank's clock is ahead of this one: the largest error, and the seconds.

        Question and answer are sums, of equal length and without connections of their own: the first rank knows by the
        one that all have asked, and the others by the other what the time was.
        """
        asked_s = self._seconds()
        _sum(transport, ranks, 0.0)
        theirs_s = _sum(transport, ranks, self._seconds() if transport.rank == ranks[0] else 0.0)
        answered_s = self._seconds()
        return (answered_s - asked_s) / 2, theirs_s - (asked_s + answered_s) / 2


def _sum(transport: Transport, ranks: tuple[int, ...], value: float) -> float:
    values = torch.tensor([value], dtype=torch.float64)
    transport.all_reduce(values, ranks)()
    return float(values)
