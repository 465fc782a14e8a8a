"""Fetching: the checkpoint to go on from, copied into the folder of a run before it begins; and uploads meanwhile.

It lies at the URL to which checkpoints are uploaded, or was reported to Ray Train. One process fetches; the others, and
all ranks, read it in the folder, which they share.
"""

import contextlib
import math
from pathlib import Path

from spindle.errors import InputError
from spindle.runtime.checkpoints.uploads import Warn, fetch, uploading
from spindle.runtime.launch.meeting import has_store, led
from spindle.runtime.launch.ray_train import fetch_reported, ray_train


def fetch_newest(
    url: str | None, directory: Path, warn: Warn, *, place: tuple[int, int] = (0, 1), timeout_s: float = 60.0
) -> None:
    """Have the newest whole checkpoint of a URL, and of Ray Train, in a directory, unless it has one of as many steps.
    `place`: which of how many processes that drive the run this is; all call this together.

    Raises InputError for a URL that will not do, CheckpointError where it, or what was reported, cannot be read.
    """
    train = ray_train()
    if url is None and train is None:
        return
    if place[1] > 1 and not has_store():
        if place[0] == 0:
            where = url or "what was reported to Ray Train"
            warn(
                f"{where} is not looked at for a checkpoint to go on from: the processes of this run have no store in "
                "which to wait for it; start them with torchrun, or copy the newest checkpoint yourself"
            )
        return

    def work() -> None:
        if url is not None:
            fetch(url, directory, warn)
        if train is not None:
            fetch_reported(train, directory)

    led(work, place, timeout_s)


def uploads_during(
    url: str | None, directory: Path | None, warn: Warn, *, wait_s: float, leads: bool
) -> contextlib.AbstractContextManager[None]:
    """What to train within, so that the checkpoints of a run's directory are copied to a URL, if one is given, by the
    process that leads. `wait_s`: see `uploading`.

    Raises InputError without a directory, and, as it is entered, for a URL that will not do.
    """
    if url is not None and directory is None:
        raise InputError(f"upload is {url!r} and the run writes no checkpoints; give checkpoints= a directory too")
    if not 0 <= wait_s < math.inf:
        raise InputError(f"upload_wait_s is {wait_s!r}; give seconds, from 0 up")
    if url is None or directory is None or not leads:
        return contextlib.nullcontext()
    return uploading(url, directory, warn, deadline_s=wait_s)
