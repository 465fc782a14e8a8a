"""Busy: how long a rank computes in each slice run of a step, by the clock of its device; nobody waits for it.

On a CPU the clock of the process tells. On a GPU work only starts while the process goes on, so events are put around
it, which the device passes later. Events passed by the end of a step are reported with it, others with a later one.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

MOST_PENDING = 4096
"""Runs whose events have not passed; of more, a device far behind, the newest are not timed."""


def device_event() -> Any:
    """An event that knows when a GPU passed it."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Busy:
    """Seconds of each slice run, forward and backward."""

    def __init__(self, device: torch.device, event: Callable[[], Any] = device_event) -> None:
        """`event` makes what marks a moment on a GPU."""
        self._event = event if device.type == "cuda" else None
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []

    def begin(self) -> Any:
        """Work begins; what `end` asks for."""
        if self._event is None:
            return time.perf_counter()
        mark = self._event()
        mark.record()
        return mark

    def end(self, run: str, begun: Any) -> None:
        """The work of a slice run that `begun` marks ends."""
        if self._event is None:
            self._add(run, time.perf_counter() - begun)
        elif len(self._pending) < MOST_PENDING:
            mark = self._event()
            mark.record()
            self._pending.append((run, begun, mark))

    def taken(self) -> dict[str, float]:
        """What is known since the last time."""
        while self._pending and self._pending[0][2].query():
            run, begun, ended = self._pending.pop(0)
            self._add(run, begun.elapsed_time(ended) / 1e3)
        found, self._seconds = self._seconds, {}
        return found

    def _add(self, run: str, seconds: float) -> None:
        self._seconds[run] = self._seconds.get(run, 0.0) + seconds
