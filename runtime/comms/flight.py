"""Flight record: the last events of one rank in, a file of fixed size that outlives the rank out.

    RUN'S FOLDER/flight/
      now/rank-00000.ring ...     of the attempt at work; gone when it ends well
      3/rank-00000.ring ...       of an attempt that ended badly, with end.json: what the driver said of it

- A rank writes its events into a file that it has mapped into its memory. What it has written stays however it ends:
  the system keeps it when the rank is killed, stopped or hangs, and when the driver is gone too.
- An event has a fixed size, and the file room for EVENTS of them; the oldest give way. No call of the system, no lock.
- Where the file cannot be made or mapped the run goes on without a record.
"""

import contextlib
import json
import mmap
import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from spindle.errors import LostRankError, PreemptedError, SpindleError
from spindle.runtime.devices import Streams

FLIGHT, NOW, END = "flight", "now", "end.json"
MAGIC, VERSION = b"SPNFLGHT", 2  # 1 counted steps from 0
EVENTS = 512  # of a step with some dozens of instructions the last ten or so
KEPT = 4  # records of attempts that ended badly

HEAD = struct.Struct("=8sIIIId64s")  # MAGIC, VERSION, rank, number of ranks, EVENTS, begun at, host
STATE = struct.Struct("=QdBBB")  # number of events so far, last beat; whether it waits, beats, was asked to end
EVENT = struct.Struct("=dqdB103s")  # at, step from 1 on (-1: none), number, kind, text
STATE_AT, EVENTS_AT = 96, 128
_BEAT_AT, _WAITS_AT = STATE_AT + 8, STATE_AT + 16
_BEATS_AT, _STOPS_AT = _WAITS_AT + 1, _WAITS_AT + 2
_COUNT, _BEAT = struct.Struct("=Q"), struct.Struct("=d")
SIZE = EVENTS_AT + EVENTS * EVENT.size
"""Bytes of a file."""
MEMORY_S = 1.0  # between two looks at the memory of a rank


class EventKind(IntEnum):
    """What an event tells; in brackets, what its number is."""

    PLACE = 0  # the rank begins an instruction, or what it was called for (bytes that it waits for there)
    LOSS = 1  # of a task in a step that is done (the loss)
    NORM = 2  # of all gradients of that step (the norm)
    MEMORY = 3  # that the rank holds (bytes)
    ERROR = 4  # it ends by an error of its own
    LOST = 5  # it ends since it waited in vain for another rank


class Flight:
    """What one rank writes; about a microsecond an event."""

    def __init__(self, file: Path, rank: int, num_ranks: int) -> None:
        """Make the file anew."""
        self._memory: Any = _mapped(file)
        self._count, self._looked_s, self._failed = 0, 0.0, False
        host = socket.gethostname().encode(errors="replace")
        HEAD.pack_into(self._memory, 0, MAGIC, VERSION, rank, num_ranks, EVENTS, time.time(), host)

    def add(self, kind: EventKind, text: str | bytes, step: int = -1, number: float = 0.0) -> None:
        """An event; one that is half written when the rank ends is not counted."""
        data = text if isinstance(text, bytes) else text.encode(errors="replace")
        at = EVENTS_AT + self._count % EVENTS * EVENT.size
        EVENT.pack_into(self._memory, at, time.time(), step, number, kind, data)
        self._count += 1
        _COUNT.pack_into(self._memory, STATE_AT, self._count)

    def done(self, step: int, losses: Mapping[str, float], norm: float | None, streams: Streams) -> None:
        """A step is done; all numbers are on the host already."""
        for task, loss in losses.items():
            self.add(EventKind.LOSS, task, step, loss)
        if norm is not None:
            self.add(EventKind.NORM, "gradient norm", step, norm)
        now_s = time.monotonic()
        if now_s - self._looked_s > MEMORY_S:
            self._looked_s = now_s
            self.add(EventKind.MEMORY, "memory", step, streams.held_bytes())

    def wait(self, begins: bool) -> None:
        """It begins, or ends, to wait for other ranks."""
        self._memory[_WAITS_AT] = begins

    def beat(self) -> None:
        """It is alive."""
        _BEAT.pack_into(self._memory, _BEAT_AT, time.time())
        self._memory[_BEATS_AT] = 1

    def stop(self) -> None:
        """It was asked to end. No event: signals come in the middle of one."""
        self._memory[_STOPS_AT] = 1

    def fail(self, text: str, *, lost: bool = False) -> None:
        """It ends by an error; the first one counts. `lost`: which only says that another rank is gone."""
        if not self._failed:
            self._failed = True
            self.add(EventKind.LOST if lost else EventKind.ERROR, text)


def _mapped(file: Path) -> "mmap.mmap | bytearray":
    """A new file as memory, all of it on the disk, since a full one would end the process later; memory without a file
    where it cannot be.
    """
    with contextlib.suppress(OSError, ValueError):
        file.unlink(missing_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(handle, bytes(SIZE))
            os.fsync(handle)
            return mmap.mmap(handle, SIZE)
        except (OSError, ValueError):  # a full disk, which takes less; or a file system that maps nothing
            file.unlink(missing_ok=True)
        finally:
            os.close(handle)
    return bytearray(SIZE)


def file_of(folder: Path, rank: int) -> Path:
    """The file of a rank in the folder of an attempt."""
    return folder / f"rank-{rank:05}.ring"


# -- by the driver ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(directory: Path | None, *, leads: bool = True) -> Iterator[Path | None]:
    """While open an attempt of a run is at work; ranks write into the folder that is given. When it ends badly, the
    folder gets what the error says, and a name of its own, and the error says where it is.

    `directory`: of the run; None: it has none, and there is no record. Of several drivers the one that `leads` does it.
    """
    if directory is None:
        yield None
        return
    now = directory.absolute() / FLIGHT / NOW
    if leads:
        with contextlib.suppress(OSError):
            _put_by(now)
            now.mkdir(parents=True)
    try:
        yield now
    except BaseException as error:
        orderly = isinstance(error, PreemptedError) and error.saved
        if leads and not orderly:
            with contextlib.suppress(OSError):
                _write_end(now, error)
                _put_by(now)
                if isinstance(error, SpindleError):
                    error.flight = directory
            raise
        if leads:
            _remove(now)
        raise
    if leads:
        _remove(now)


def _write_end(now: Path, error: BaseException) -> None:
    lines = [line for line in str(error).splitlines() if line.strip()]
    rank = error.rank if isinstance(error, LostRankError) else None
    text = lines[0] if lines else type(error).__name__
    end = {"format": "spindle.flight", "version": 1, "error": text[:2000], "rank": rank, "at_s": time.time()}
    (now / END).write_text(json.dumps(end))


def _put_by(now: Path) -> None:
    """Give the record of an attempt that is over its number; of many the newest stay."""
    if not now.exists():
        return
    if not any(now.iterdir()):
        now.rmdir()
        return
    before = numbered_in(now.parent)
    now.rename(now.with_name(str(max(before, default=0) + 1)))
    for old in before[: max(0, len(before) + 1 - KEPT)]:
        shutil.rmtree(now.with_name(str(old)), ignore_errors=True)


def numbered_in(flight: Path) -> list[int]:
    """Numbers of the records in a folder, the oldest first."""
    return sorted(int(p.name) for p in flight.glob("[0-9]*") if p.name.isdecimal() and len(p.name) < 7)


def _remove(now: Path) -> None:
    shutil.rmtree(now, ignore_errors=True)
    with contextlib.suppress(OSError):  # records of other attempts are there
        now.parent.rmdir()
