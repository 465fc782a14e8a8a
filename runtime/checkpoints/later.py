"""Later: a checkpoint that is written beside the steps that follow. A step waits for copies in main memory alone.

- Ranks copy what they hold and write it in a thread of their own. After each call for steps the driver asks whether all
  have written; then a thread of the driver's adds checksums and gives the checkpoint its name, and only then does it
  count as written.
- There is one such write at a time, of the folder and of each rank: the next save waits for it, and so do the end of
  the run and SIGTERM.
- What goes wrong in a thread is raised by the next question. A run that fails takes what is half written with it.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spindle.errors import CheckpointError
from spindle.runtime.checkpoints.checkpoint import (
    Checkpoints,
    begin,
    clear,
    finish,
    path_of,
    put_progress,
    unfinished_of,
)
from spindle.runtime.checkpoints.writing import Writing
from spindle.runtime.controller import Run
from spindle.runtime.training import Saves

if TYPE_CHECKING:
    from spindle.runtime.watch import Watch

LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class _Pending:
    """A checkpoint that is being written."""

    path: Path
    unfinished: Path
    step: int
    best: int | None
    deadline_s: float


@contextlib.contextmanager
def cleared(checkpoints: Checkpoints | None, *, leads: bool) -> Iterator[None]:
    """After a bad end, when nobody writes any more, remove what was half written."""
    try:
        yield
    except BaseException:
        if checkpoints is not None and checkpoints.later and leads:
            clear(checkpoints.directory)
        raise


class LaterSaves(Saves):
    """Checkpoints of one worker group that are written while it goes on."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        seed: int,
        written: list[Path],
        watch: "Watch | None",
        *,
        patience_s: float,
    ) -> None:
        """`patience_s`: how long one may take."""
        super().__init__(run, checkpoints, seed, written, watch)
        self._workers, self._patience_s = run.workers, patience_s
        self._pending: _Pending | None = None
        self._finishing: Writing | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """While open the run is at its steps; a good end waits for what is being written, a bad one removes it."""
        try:
            yield
            self.settle()
        except BaseException:
            self._abandon()
            raise

    def save(self, step: int, best: int | None = None, more: Mapping[str, Any] | None = None) -> None:
        """Have ranks copy what they hold after `step` steps, and begin to write it; waits for the save before."""
        self.settle()
        path = path_of(self.checkpoints.directory, step)
        unfinished = begin(path) if self._workers.leads else unfinished_of(path)
        self._pending = _Pending(path, unfinished, step, best, time.monotonic() + self._patience_s)
        self._workers.call("sync")
        progress = self.run.progress(self._workers.call("save", str(unfinished), later=True), more)
        if self._workers.leads:
            with self._explained(path):
                put_progress(unfinished, progress)

    def look(self) -> None:
        """Go on with what is being written, without waiting for it. Raises CheckpointError where it went wrong."""
        pending = self._pending
        if pending is None:
            return
        with self._explained(pending.path):
            finished = self._finishing is not None and self._finishing.check()
        answers = self._workers.call("writing", finished)
        if answers[0][1]:  # as the driver says that leads, where there are several
            self._pending = self._finishing = None
            self.is_whole(pending.step, pending.path)
        elif self._workers.leads and self._finishing is None and all(done for done, _ in answers):
            self._finishing = Writing()
            self._finishing.start(lambda: self._finish(pending))
        if self._pending is not None and time.monotonic() > pending.deadline_s:
            raise CheckpointError(
                f"{pending.path} was not written within {self._patience_s:g} s; see what keeps its file system, or "
                "raise timeout_s"
            )

    def settle(self) -> None:
        """Wait for what is being written."""
        self.look()
        while self._pending is not None:
            time.sleep(LOOK_S)
            self.look()

    def _finish(self, pending: _Pending) -> None:
        finish(pending.unfinished, replace(self.checkpoints, best=pending.best), step=pending.step, seed=self.seed)

    def _abandon(self) -> None:
        """Let what is nearly whole become so; `cleared` removes the rest."""
        pending, self._pending = self._pending, None
        if pending is not None and self._finishing is not None:
            self._finishing.wait()
            with contextlib.suppress(Exception):
                self._finishing.check()
                self.written.append(pending.path)

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """Errors of the file system as those of the checkpoint."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by the latter
            raise CheckpointError(f"{path} cannot be written ({error}); make room there") from error
