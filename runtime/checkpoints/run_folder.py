"""A run's folder: one run at a time works in it, and none loses what another has written.

- A run at work holds `.lock`, which the operating system frees when it dies; `.owner.json` tells which run that is.
- A run that begins afresh needs a folder without checkpoints.
- What a resumed run does not go on from, damaged checkpoints and later ones, moves to `aside/`: the newest checkpoint
  that is left is always the one to go on from.
"""

import contextlib
import json
import os
import socket
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from torch import Tensor

from spindle.errors import CheckpointError, SpindleWarning
from spindle.runtime.checkpoints.checkpoint import (
    Checkpoint,
    Checkpoints,
    Damaged,
    Share,
    checkpoints_in,
    clear,
    latest,
    path_of,
    progress_in,
    put_weights,
    read,
    step_of,
)
from spindle.workload import Workload

Resume = bool | int | Path | str
"""Go on from nothing (False), the newest checkpoint (True), the one after a number of steps, or one by its path."""

_LOCK, OWNER, ASIDE = ".lock", ".owner.json", "aside"


@dataclass(frozen=True)
class Start:
    """Where a run begins: the checkpoint to go on from, if any, and where it keeps its own."""

    before: Checkpoint | None
    checkpoints: Checkpoints | None


@contextlib.contextmanager
def opened(
    workload: Workload,
    checkpoints: Checkpoints | None,
    resume: Resume,
    share: Share = (0, 1),
    initial: dict[str, Tensor] | None = None,
) -> Iterator[Start]:
    """Hold the folder of a run while it is at work. The weights of the checkpoint to go on from are in the user's
    modules then. `share`: which of how many processes that drive the run this is; the first holds the folder.
    `initial`: see `put_weights`.

    Raises CheckpointError for a folder that cannot be written, that another run works in, or, without `resume`, that
    holds checkpoints; and for a checkpoint that is damaged, missing or of another model.
    """
    leads = share[0] == 0
    with _held(checkpoints.directory) if checkpoints and leads else contextlib.nullcontext():
        before = _to_resume(checkpoints, resume, share)
        if before is not None:
            put_weights(workload, before, initial=initial)
        if checkpoints is not None:
            goes_on = before is not None and before.path.parent.resolve() == checkpoints.directory.resolve()
            if before is not None and leads:
                _leave_later(checkpoints.directory, before.step if goes_on else -1)
            checkpoints = replace(checkpoints, run=before.run if before and goes_on else uuid.uuid4().hex)
        yield Start(before, checkpoints)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    owner = directory / OWNER
    try:
        with _locked(directory):
            started = datetime.now().astimezone().isoformat(" ", "seconds")
            owner.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": started}))
            clear(directory)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    owner.unlink()
    except Timeout:
        raise CheckpointError(
            f"{directory} is in use by another run ({_user(owner)}); give this one another directory, or end that one"
        ) from None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises Timeout where another process holds the lock."""
    lock: BaseFileLock = FileLock(directory / _LOCK, timeout=0, thread_local=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except NotImplementedError:  # a file system without flock
            lock = SoftFileLock(directory / f"{_LOCK}-soft", timeout=0, thread_local=False)
            lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be written ({error.strerror or error}); choose a directory that you may write"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _user(owner: Path) -> str:
    try:
        values = json.loads(owner.read_text()[:1000])
        return f"process {int(values['process'])} on {values['host']!s:.80}, since {values['since']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it does not say which"


def _to_resume(checkpoints: Checkpoints | None, resume: Resume, share: Share = (0, 1)) -> Checkpoint | None:
    """The checkpoint to go on from; None to begin afresh."""
    if isinstance(resume, Path | str):
        return read(Path(resume), share)
    if checkpoints is None:
        if resume is False:
            return None
        raise CheckpointError(
            f"resume is {resume} but no directory of checkpoints is given; give one, or a checkpoint's path"
        )
    found = checkpoints_in(checkpoints.directory)
    if resume is False:
        if found:
            raise CheckpointError(
                f"{checkpoints.directory} holds checkpoints already (the newest after {step_of(found[-1])} steps), and "
                "this run would begin afresh; resume it, or give another directory"
            )
        return None
    if resume is True:
        return _newest(found, share)
    path = path_of(checkpoints.directory, resume)
    if path not in found:
        steps = ", ".join(str(step_of(each)) for each in found[-5:]) or "none"
        raise CheckpointError(f"{checkpoints.directory} has no checkpoint after {resume} steps; it has {steps}")
    return read(path, share)


def rate_before(directory: Path, resume: bool | int) -> float | None:
    """The learning rate with which the run was begun that `resume` goes on with; None where there is none, or several.

    For a caller whose user did not name one.
    """
    if resume is False:
        return None
    path = latest(directory) if resume is True else path_of(directory, resume)
    try:
        made = progress_in(path)["made"]["optimizer"] if path else None
        rates = {float(group["lr"]) for group in made["groups"]} if made else set()
    except (CheckpointError, KeyError, TypeError, ValueError):  # which the run tells of
        return None
    return rates.pop() if len(rates) == 1 else None


def _newest(found: list[Path], share: Share) -> Checkpoint | None:
    """The newest one that is whole; damaged ones after it go aside, unless there is no other."""
    for index, path in reversed(list(enumerate(found))):
        try:
            return read(path, share)
        except Damaged as error:
            if index == 0:
                raise
            said = str(error).removesuffix("; take an older checkpoint")
            place = _put_aside(path)
            if share[1] > 1:  # of several processes the others may have found it whole
                raise Damaged(
                    f"{said}; it is now {place}, and the next start goes on from {found[index - 1].name}"
                ) from None
            warnings.warn(
                SpindleWarning(f"{said}; it is now {place}, and {found[index - 1].name} is tried"), stacklevel=2
            )
    return None


def _leave_later(directory: Path, step: int) -> None:
    """Put checkpoints of more steps aside: a run that goes on from `step` writes its own."""
    later = [path for path in checkpoints_in(directory) if step_of(path) > step]
    if later and step < 0:
        raise CheckpointError(
            f"{directory} holds checkpoints of another run than the one to go on from; give another directory"
        )
    places = [str(_put_aside(path)) for path in later]
    if places:
        warnings.warn(
            SpindleWarning(f"the run goes on from step {step}; later checkpoints are now {', '.join(places)}"),
            stacklevel=2,
        )


def _put_aside(path: Path) -> Path:
    number, place = 1, path.parent / ASIDE / path.name
    place.parent.mkdir(exist_ok=True)
    while place.exists():
        number += 1
        place = place.with_name(f"{path.name}-{number}")
    path.rename(place)
    return place
