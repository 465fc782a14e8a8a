"""Errors that are the user's to mend; a broken invariant of ours is an AssertionError instead.

    SpindleError
    +-- InputError (ValueError)     a value or file that breaks a rule
    |   +-- FormatError             a file that cannot be read, or is of an unknown version or field
    |   +-- GraphError              a task graph or MetaGraph
    |   +-- ClusterError            a cluster description
    |   +-- ProfileError            measured times
    |   +-- WorkloadError           a model, task function, loader or batch
    |   +-- PlanError               a plan that breaks a rule
    |   +-- CheckpointError           a checkpoint that is not whole, or of another model
    |   `-- ProgramError            a lowered program that breaks a law of the runtime
    +-- InfeasibleError             no plan exists for this input
    +-- MismatchError               checked and found different: parity, prediction
    +-- PreemptedError              the run was asked to end (SIGTERM)
    `-- RunError                    a worker raised, died or stalled
        +-- NotFiniteError          a loss or a gradient is no finite number
        +-- ReplicaError            what several ranks should hold alike differs
        +-- LostRankError           a rank died or hangs, or found no place: another try may go better
        `-- LostPeerError           a rank waited for another, whose failure is the cause

    SpindleWarning (UserWarning)    what runs, but not as well as it could

Each message names the value, the rule and the remedy, in that order. `exit_code` is what the command line returns.
"""

import os
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RESUMABLE = 75
"""Exit code of a run that was asked to end and can be resumed: EX_TEMPFAIL of sysexits.h, "try again later"."""
TERMINATED = 143
"""Exit code of a run that was asked to end and saved nothing: 128 + SIGTERM, as shells tell it."""


class SpindleError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 2
    flight: "Path | None" = None
    """The folder of the run, where there is a record of what its ranks did last (`spindle flight`)."""


class SpindleWarning(UserWarning):
    """What runs, but not as well as it could; the message names the value, the rule and the remedy as errors do."""


class InputError(SpindleError, ValueError):
    """A value or file that breaks a rule."""


class FormatError(InputError):
    """A file that cannot be read: not of its format, of an unknown version, or with unknown fields."""


class GraphError(InputError):
    """A task graph or MetaGraph that breaks a rule: a cycle, a missing end of a flow, layers below one."""


class ClusterError(InputError):
    """A cluster description that breaks a rule."""


class ProfileError(InputError):
    """Measured times that break a rule, or do not cover what is asked of them."""


class WorkloadError(InputError):
    """A model, task function, loader or batch that Spindle cannot take."""


class PlanError(InputError):
    """A plan that breaks a rule of plans."""

    exit_code = 1


class ProgramError(InputError):
    """A lowered program that breaks a law of the runtime; it is refused before it starts."""

    exit_code = 1


class CheckpointError(InputError):
    """A checkpoint that is missing, cut short, changed, or of another model."""


class InfeasibleError(SpindleError):
    """No plan exists for this input; the message says what would make one possible."""

    exit_code = 3


class MismatchError(SpindleError):
    """Two results that must agree do not."""

    exit_code = 1


class RunError(SpindleError):
    """A worker raised, died or stalled; the message carries rank, wave and instruction."""

    exit_code = 1

    @classmethod
    def of(cls, error: BaseException, where: str = "") -> "RunError":
        """An error as two lines: what was raised where, and the line of the user's own code that was running.

        The whole traceback goes along as a note: Python prints it below the message, the command line when asked to.
        """
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        raised = f"{where} raised " if where else ""
        made = cls("\n".join(filter(None, (f"{raised}{type(error).__name__}: {text}", _own_line(error)))))
        made.add_note("".join(traceback.format_exception(error)).rstrip())
        return made


class NotFiniteError(RunError):
    """A loss or a gradient is not finite; the optimizer has not stepped with it."""


class ReplicaError(RunError):
    """What several ranks should hold alike differs; the optimizer has not stepped with it since it was found."""


class LostRankError(RunError):
    """A rank died or hangs, or there was no place for it: nothing that the user's code raised. `rank`: which, where it
    is known.
    """

    rank: int | None = None

    @classmethod
    def at(cls, rank: int, text: str) -> "LostRankError":
        """The error of this rank."""
        made = cls(text)
        made.rank = rank
        return made


class NoRoomError(LostRankError):
    """A cluster had no room for the devices of a plan. `free`: devices that each of its nodes has free."""

    free: tuple[int, ...] = ()


class LostPeerError(RunError):
    """A rank waited for another in vain; what happened to the other is the cause."""


class PreemptedError(SpindleError):
    """The run was asked to end by SIGTERM. `exit_code` 75: started again with resume it goes on from its newest
    checkpoint; 143: it ended at once, and nothing was saved.
    """

    def __init__(self, text: str, *, saved: bool) -> None:
        super().__init__(text)
        self.saved = saved
        self.exit_code = RESUMABLE if saved else TERMINATED


def _own_line(error: BaseException) -> str:
    """The innermost line that is neither ours, torch's nor Python's; of another library where there is none else."""
    frames = traceback.extract_tb(error.__traceback__)
    shown = [[frame for frame in frames if _place_of(frame.filename) == place] for place in ("user", "library")]
    if not any(shown):
        return ""
    frame = (shown[0] or shown[1])[-1]
    code = f": {frame.line}" if frame.line else ""
    return f"{frame.filename}:{frame.lineno} in {frame.name}{code}"


def _place_of(file: str) -> str:
    if file.startswith(("<", *_OURS)):
        return "ours"
    _, found, inner = file.replace(os.sep, "/").rpartition("/site-packages/")
    if found:
        return "torch" if inner.startswith("torch/") else "library"
    return "python" if file.startswith(_PYTHON) else "user"


_HERE, _PYTHON = os.path.dirname(__file__) + os.sep, os.path.dirname(os.__file__) + os.sep
_OURS = (_HERE, *(os.path.realpath(f"{_HERE}{room}") + os.sep for room in ("", "planner", "runtime")))
