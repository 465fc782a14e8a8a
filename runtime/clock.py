"""Clock: moments that ranks of several machines can compare, though each machine counts seconds from its own start."""

import time
from collections.abc import Callable, Sequence

import torch

from spindle.runtime.transport import Transport

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

    def agree(self, transport: Transport, ranks: Sequence[int]) -> None:
        """Take over the clock of the first of `ranks`, as all of these do now, itself among them.

        Each asks it the time, and takes the answer that came quickest to be from halfway between question and answer:
        wrong by half of that time at most (Cristian, "Probabilistic clock synchronization", 1989). A rank whose clock
        may be the same, as on one machine, keeps its own.
        """
        first, *others = ranks
        self.offset_s = 0.0
        if transport.rank == first:
            for peer in others:
                for _ in range(PINGS):
                    _receive(transport, peer)
                    _send(transport, peer, self._seconds())
        else:
            asked = [self._ask(transport, first) for _ in range(PINGS)]
            error_s, offset_s = min(asked)
            self.offset_s = offset_s if abs(offset_s) > error_s else 0.0

    def _ask(self, transport: Transport, peer: int) -> tuple[float, float]:
        """How far the peer's clock is ahead of this one: the largest error, and the seconds."""
        asked_s = self._seconds()
        _send(transport, peer, asked_s)
        told_s = _receive(transport, peer)
        answered_s = self._seconds()
        return (answered_s - asked_s) / 2, told_s - (asked_s + answered_s) / 2


def _send(transport: Transport, peer: int, value: float) -> None:
    departed, _ = transport.start([(peer, torch.tensor([value], dtype=torch.float64, device=transport.device))], [])
    departed()


def _receive(transport: Transport, peer: int) -> float:
    value = torch.zeros(1, dtype=torch.float64, device=transport.device)
    _, arrived = transport.start([], [(peer, value)])
    arrived()
    return float(value)
