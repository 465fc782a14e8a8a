"""Failures: how often a run is started again by itself, on which devices, and how long it may take to end when it is
asked to.
"""

from collections.abc import Callable
from dataclasses import dataclass

from spindle.errors import InputError
from spindle.words.whole_numbers import check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """What a run does about failures of its ranks, and about SIGTERM.

    `max_failures`: how many failures are followed by another start, from the newest whole checkpoint of the run, or
    from its beginning when there is none; the next one ends it. `backoff_s`: seconds before the first of these starts;
    each later one waits twice as long, at most `max_backoff_s`. `grace_s`: seconds from SIGTERM until the run ends at
    once, whether or not its checkpoint is written.

    `elastic`: where there are fewer or more devices than the plan has, at the start or after a failure, the run plans
    anew for what is there, and goes on (docs/elastic.md). `min_devices`: with fewer than these it ends.
    `devices`: what says which devices are there, as "3" or "2x4" (nodes x devices of each); None: the launcher knows.

    >>> [Failures(max_failures=3, backoff_s=1.0).pause_s(failure) for failure in (1, 2, 3)]
    [1.0, 2.0, 4.0]
    """

    max_failures: int = 0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    grace_s: float = 120.0
    elastic: bool = False
    min_devices: int = 1
    devices: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_failures, bool) or not isinstance(self.max_failures, int) or self.max_failures < 0:
            raise InputError(f"max_failures is {self.max_failures!r}; give a number of failures, from 0 up")
        for name in ("backoff_s", "max_backoff_s", "grace_s"):
            seconds = getattr(self, name)
            if not 0 <= seconds < float("inf"):
                raise InputError(f"{name} is {seconds!r}; give seconds, from 0 up")
        check_whole({"min_devices": self.min_devices}, error=InputError)
        if not self.elastic and (self.min_devices > 1 or self.devices is not None):
            given = "devices" if self.devices is not None else f"min_devices={self.min_devices}"
            raise InputError(f"{given} is for a run that may change its devices; add elastic=True, or leave it out")

    def pause_s(self, failure: int) -> float:
        """Seconds before the start that follows failure number `failure`, counted from 1."""
        return float(min(self.backoff_s * 2.0 ** min(failure - 1, 60), self.max_backoff_s))
