"""Recovery: attempts of one run, of which each goes on from the newest whole checkpoint that the run has written.

- The driver lives on: it knows which checkpoints are the run's own, and its modules hold the weights of the start.
- All launchers share this loop. Under torchrun ranks have no driver to outlive them: there torchrun starts them again,
  and they resume (`newest_of_this_job`).
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spindle.errors import (
    CheckpointError,
    LostPeerError,
    LostRankError,
    NoRoomError,
    PreemptedError,
    RunError,
    SpindleError,
    SpindleWarning,
    WorkloadError,
)
from spindle.failures import Failures
from spindle.runtime.checkpoints.checkpoint import checkpoints_in
from spindle.runtime.controller import chosen
from spindle.runtime.faults.elastic import Elastic
from spindle.runtime.launch.ray_train import ray_train
from spindle.runtime.startup import age_of_process

if TYPE_CHECKING:
    from spindle.runtime.checkpoints.checkpoint import Checkpoint
    from spindle.runtime.controller import Launcher
    from spindle.runtime.faults.preemption import Notice
    from spindle.runtime.training import Steps

_RECOVERABLE = (RunError, WorkloadError)  # of ranks; what is wrong before they start never gets here


@dataclass
class Attempts:
    """The attempts of a run so far. `read` makes of a checkpoint's path what a run resumes from, its weights in the
    user's modules. `elastic`: the plan of a run that may change it between two attempts. Of several drivers the one
    that `leads` warns.
    """

    failures: Failures
    read: Callable[[Path], "Checkpoint"]
    before: "Checkpoint | None" = None  # where the run begins
    elastic: Elastic | None = None
    leads: bool = True
    failed: list[SpindleError] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    _loaded: bool = False
    _saved: int = 0  # checkpoints that were written when it failed last
    _stuck: bool = False  # whether no checkpoint was written between the last two failures

    def run(self, attempt: "Callable[[Checkpoint | None], None]", steps: "Steps", notice: "Notice") -> None:
        """Attempt until one gets through. Raises the first failure after the last try; at once one of the user's own
        code that comes again with the same words before another checkpoint was written.
        """
        start = self.before
        while True:
            try:
                attempt(start)
                return
            except _RECOVERABLE as error:
                if notice.came.is_set() and notice.alone:  # else torchrun ends all ranks, since one has failed
                    raise _interrupted(error, steps) from error
                if isinstance(error, NoRoomError) and self._adapt(error):
                    continue  # no failure of a rank; the modules hold what they held
                self._note(error, steps)
            except PreemptedError as error:
                if notice.came.is_set() or len(self.failed) >= self.failures.max_failures:
                    raise
                self._note(error, steps)  # a rank alone was asked to end
            start = self._restart(steps)
            self._tell(start, notice)
            self._adapt(self.failed[-1])

    def begin(self) -> None:
        """Before the first attempt: have an elastic run plan for the devices that are there."""
        self._say(self.elastic.begin() if self.elastic else "")

    def _adapt(self, error: SpindleError) -> bool:
        """Have an elastic run plan for the devices that a failure has left; whether that changed its plan."""
        changed = self._say(self.elastic.after(error, stuck=self._stuck) if self.elastic else "")
        self._saved = -1 if changed else self._saved  # what fails under another plan fails for the first time
        return changed

    def _say(self, sentence: str) -> bool:
        if sentence:
            self.sentences.append(sentence)
            if self.leads:
                warnings.warn(sentence, SpindleWarning, stacklevel=3)
        return bool(sentence)

    def _note(self, error: SpindleError, steps: "Steps") -> None:
        """Take a failure in; raises the first one when there is no other try."""
        self.failed.append(error)
        self._stuck = len(self.failed) > 1 and len(steps.written) == self._saved
        self._saved = len(steps.written)
        repeats = self._stuck and _is_own(error) and str(error) == str(self.failed[-2])
        if repeats or len(self.failed) > self.failures.max_failures:
            raise self._first(repeats=repeats)
        error.__traceback__ = error.__cause__ = error.__context__ = None  # which hold the worker group that is gone

    def _first(self, *, repeats: bool) -> SpindleError:
        """The first failure, with what came of the others."""
        first, last = self.failed[0], self.failed[-1]
        if first is last:
            return first
        count = len(self.failed)
        why = "which came again" if repeats else f"the first of {count} failures"
        summed_up = type(first).__new__(type(first))
        summed_up.__dict__.update(first.__dict__)
        more = "" if str(last) == str(first) else f"; the last one: {str(last).splitlines()[0]}"
        if self.elastic is None and self._stuck and len({_lost(error) for error in self.failed[-2:]} - {None}) == 1:
            more += f"; rank {_lost(last)} was lost again: elastic=True (--elastic) would go on without its device"
        summed_up.args = (f"{first}\n({why}; the run was started again {count - 1} times{more})",)
        return summed_up

    def _restart(self, steps: "Steps") -> "Checkpoint | None":
        """Where the next attempt begins, its weights in the user's modules."""
        for path in reversed(steps.written):
            try:
                found = self.read(path)
            except CheckpointError as error:
                warnings.warn(f"{error}; going on from the one before", SpindleWarning, stacklevel=2)
                continue
            self._loaded = True
            steps.rewind(found.step)
            return found
        if self._loaded:
            if self.before is None:
                raise self.failed[0]  # the modules no longer hold the weights of the start
            self.read(self.before.path)
        steps.rewind(self.before.step if self.before else 0)
        return self.before

    def _tell(self, start: "Checkpoint | None", notice: "Notice") -> None:
        number = len(self.failed)
        pause_s = self.failures.pause_s(number)
        place = f"step {start.step}" if start else "the beginning"
        first = str(self.failed[-1]).splitlines()[0]
        self.sentences.append(f"{first}; went on from {place}")
        warnings.warn(
            f"{first}. Failure {number} of at most {self.failures.max_failures}: going on from {place} in "
            f"{pause_s:g} s",
            SpindleWarning,
            stacklevel=2,
        )
        notice.wait(pause_s)
        if notice.came.is_set():
            raise PreemptedError("SIGTERM came between two tries; start again with resume=True (--resume)", saved=True)


def _is_own(error: SpindleError) -> bool:
    """Whether the user's code raised it, rather than the machine."""
    return not isinstance(error, LostRankError | LostPeerError | PreemptedError)


def _lost(error: SpindleError) -> int | None:
    """The rank that was lost, where it is known."""
    return error.rank if isinstance(error, LostRankError) else None


def _interrupted(error: SpindleError, steps: "Steps") -> PreemptedError:
    newest = f"the newest checkpoint is {steps.written[-1]}" if steps.written else "no checkpoint was written"
    return PreemptedError(
        f"SIGTERM came, and before its checkpoint was written the run failed; {newest}\n{str(error).splitlines()[0]}",
        saved=False,
    )


# -- under torchrun ------------------------------------------------------------------------------------------------


def left_to_torchrun(launcher: "Launcher", failures: Failures) -> Failures:
    """What the process itself does about failures: nothing under torchrun, or inside of Ray Train, which start all
    ranks again. Warns where torchrun will not, and of Ray Train.
    """
    if chosen(launcher) != "torchrun":
        return failures
    if ray_train() is not None:
        if failures.max_failures and os.environ.get("RANK") == "0":
            warnings.warn(
                f"max_failures is {failures.max_failures}, but Ray Train starts its workers again: give its RunConfig "
                f"failure_config=FailureConfig(max_failures={failures.max_failures})",
                SpindleWarning,
                stacklevel=3,
            )
        return replace(failures, max_failures=0)
    allowed = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    if allowed < failures.max_failures and os.environ.get("RANK") == "0":
        warnings.warn(
            f"max_failures is {failures.max_failures}, but torchrun starts ranks again {allowed} times; start it with "
            f"--max-restarts {failures.max_failures}",
            SpindleWarning,
            stacklevel=3,
        )
    return replace(failures, max_failures=0)


def newest_of_this_job(launcher: "Launcher", directory: Path) -> Path | None:
    """Where ranks that torchrun has started anew go on: the newest checkpoint written since torchrun itself began."""
    if chosen(launcher) != "torchrun" or not int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0):
        return None
    began_s = time.time() - age_of_process(os.getppid())
    own = [path for path in checkpoints_in(directory) if path.stat().st_mtime >= began_s]
    return own[-1] if own else None
