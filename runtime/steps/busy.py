"""Busy: how long a rank computes in each slice run of a step, and Together: how long what it does together with other
ranks takes, by the clock of its device; nobody waits for it.

On a CPU the clock of the process tells. On a GPU work only starts while the process goes on, so events are put around
it, which the device passes later. Events passed by the end of a step are reported with it, others with a later one.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from spindle.runtime.comms.transport import Wait
from spindle.runtime.devices import Streams
from spindle.values.cluster import Collective

MOST_PENDING = 4096
"""Runs whose events have not passed; of more, a device far behind, the newest are not timed."""


class Busy:
    """Seconds of each slice run, forward and backward."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []

    def begin(self) -> Any:
        """Work begins; what `end` asks for."""
        return self._streams.mark()

    def end(self, run: str, begun: Any) -> None:
        """The work of a slice run that `begun` marks ends."""
        if len(self._pending) < MOST_PENDING:
            self._pending.append((run, begun, self._streams.mark()))
        if not self._streams.ahead:
            self._add_passed()

    def taken(self) -> dict[str, float]:
        """What is known since the last time."""
        self._add_passed()
        found, self._seconds = self._seconds, {}
        return found

    def _add_passed(self) -> None:
        while self._pending and self._streams.has_passed(self._pending[0][2]):
            run, begun, ended = self._pending.pop(0)
            self._seconds[run] = self._seconds.get(run, 0.0) + self._streams.between_s(begun, ended)


class Meeting(NamedTuple):
    """A collective of one step, alike on all of its ranks. `number`: how often its `name` came up in the step before.
    `num_bytes`: of the whole buffer.
    """

    step: int
    name: str
    number: int
    operation: Collective
    ranks: tuple[int, ...]
    num_bytes: int


class Together:
    """Seconds of each collective: that this rank waited for it, and from its start here to its end."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._pending: list[tuple[Meeting, Any, Any, Any]] = []
        self.begin(0)

    def begin(self, step: int) -> None:
        """A step begins; `step` is counted from 1."""
        self._step, self._counts = step, Counter[str]()

    def timed(
        self, name: str, operation: Collective, ranks: tuple[int, ...], num_bytes: int, begin: Callable[[], Wait]
    ) -> Wait:
        """Begin a collective; its wait, which is timed."""
        meeting = Meeting(self._step, name, self._counts[name], operation, ranks, num_bytes)
        self._counts[name] += 1
        begun, wait = self._streams.mark(), begin()

        def waited() -> None:
            waiting = self._streams.mark()
            wait()
            if len(self._pending) < MOST_PENDING:
                self._pending.append((meeting, begun, waiting, self._streams.mark()))

        return waited

    def taken(self) -> dict[Meeting, tuple[float, float]]:
        """What is known since the last time: seconds waited, and seconds since the start."""
        found = {}
        while self._pending and self._streams.has_passed(self._pending[0][3]):
            meeting, begun, waiting, ended = self._pending.pop(0)
            found[meeting] = self._streams.between_s(waiting, ended), self._streams.between_s(begun, ended)
        return found
