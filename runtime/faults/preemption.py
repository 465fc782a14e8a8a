"""Pre-emption: SIGTERM to the process that drives a run in, an orderly end out.

- The first one: the steps under way are finished and a checkpoint is written, where the run writes any; then the run
  ends with PreemptedError. Where nothing can be saved it ends at once.
- A second one, or `grace_s` after the first, ends it at once. Ranks end with it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from spindle.errors import PreemptedError

if TYPE_CHECKING:
    from spindle.runtime.launch.worker_group import WorkerGroup


class Notice:
    """Whether the run was asked to end. `finishing`: steps are under way, after which a checkpoint will be written."""

    def __init__(self, *, grace_s: float, saves: bool) -> None:
        """`saves`: the run writes checkpoints."""
        self.came = threading.Event()
        self.finishing = False
        self.alone = True  # one process drives the run
        self.saves = saves
        self._grace_s = grace_s
        self._tell: Callable[[], None] | None = None
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def heeded(self) -> Iterator["Notice"]:
        """While open SIGTERM is heeded, unless the user's own code does so, or this is not the main thread."""
        before = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or not _is_usual(before):
            yield self
            return
        signal.signal(signal.SIGTERM, self._heed)
        try:
            yield self
        finally:
            if self._timer is not None:
                self._timer.cancel()
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def driving(self, workers: "WorkerGroup") -> Iterator[None]:
        """While open a worker group is at work. Where it has several drivers, each tells the others through
        its rank.
        """
        self.alone, self._tell = workers.alone, getattr(workers, "stop", None)
        try:
            yield
        finally:
            self._tell = None

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """While open the run is at its steps, which are finished before it ends."""
        self.finishing = self.saves
        try:
            yield
        finally:
            self.finishing = False

    def wait(self, seconds: float) -> None:
        """Wait, unless the run is asked to end meanwhile."""
        self.came.wait(seconds)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if self.came.is_set():
            if self._timer is not None:
                self._timer.cancel()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a third one ends this process whatever it does
            raise PreemptedError(
                "SIGTERM came twice, or its time was over, before the checkpoint was written; the run ended at once",
                saved=False,
            )
        self.came.set()
        if self._tell is not None:
            self._tell()
        if not self.finishing:
            raise PreemptedError(*_words(self.saves), saved=self.saves)
        self._timer = threading.Timer(self._grace_s, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True
        self._timer.start()


def _words(saves: bool) -> tuple[str]:
    if saves:
        return ("SIGTERM came while no step was under way; start again with resume=True (--resume)",)
    return ("SIGTERM came and the run writes no checkpoints, so nothing is saved; give checkpoints= (--checkpoints)",)


def _is_usual(handler: object) -> bool:
    """Whether nobody but Python, or Ray, which a driver joined, handles a signal."""
    return handler == signal.SIG_DFL or getattr(handler, "__module__", "").startswith("ray.")
