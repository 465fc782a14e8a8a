"""Writing: work in a thread, whose error is raised where its result is asked for."""

import threading
from collections.abc import Callable

from spindle.runtime.comms.background import start_thread


class Writing:
    """Work in a thread, one at a time; its error is raised where its result is asked for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin, once what was begun before is done."""
        self.wait()
        self.check()
        self._thread = start_thread(lambda: self._run(work), "checkpoint", end=lambda: None)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error

    def check(self) -> bool:
        """Whether the work is done. Raises its error, once."""
        done = self._thread is None or not self._thread.is_alive()
        if done and self._error is not None:
            error, self._error = self._error, None
            raise error
        return done

    def wait(self) -> None:
        """Wait until it is done, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
