"""Shared batches: on each machine one rank reads the batches of a task, and the others there get them from it.

- Which rank reads is agreed once, from what all ranks say that they load: the one that reads for the fewest tasks so far,
  of equals the lowest. Ranks are on one machine when they find the same directory for temporary files there.
- A batch goes through shared memory; its descriptor, through a socket between the two ranks. No store or process group
  takes part, so that a wait for a batch holds up no other message, and a rank that dies is noticed at once.
- The reader is at most `AHEAD` batches ahead of what the slowest of the others has received; each receives as many as it
  reads ahead.
- Threads of a feed wait here without a limit of time: who needs a batch waits for them no longer than the feed allows, and
  closing a feed wakes them.
- Threads of one process read each for themselves. That launcher is there to test and to debug: a loader then runs where
  its rank does, and a test can see that ranks whose loaders differ are found out.
"""

import contextlib
import os
import shutil
import socket
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from spindle.errors import RunError, WorkloadError
from spindle.runtime.shared_memory import packed, unpacked
from spindle.runtime.transport import ProcessTransport, Transport

T = TypeVar("T")

AHEAD = 4  # batches that are sent and not yet received
LONGEST_PATH = 80  # of a directory in which a socket gets a name; systems allow about a hundred characters in all

_HEAD = struct.Struct("<Q")  # generation of a batch that is sent
_TAKEN = struct.Struct("<Q")  # generation of a batch that was received
_HELLO = struct.Struct("<II")  # a rank, and a task by its place in the reader's list


class Dropped(Exception):  # noqa: N818 - nobody sees it
    """A batch that nobody waits for any more: its feed was resumed elsewhere, or closed."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """What is sent in place of a batch: the words of the error that the loader ended with."""

    words: str


class SharedReads(Protocol):
    """How a feed gets its batches where several ranks of a machine need them. One thread reads; others may do the rest."""

    reads: bool
    """Whether this rank runs the loader."""

    def read(self, own: Callable[[], T]) -> T:
        """The next batch, by `own` or from the rank that reads. Raises WorkloadError where the loader failed, RunError
        where that rank has left, and Dropped after `restart` or `leave`.
        """

    def restart(self) -> None:
        """Begin a generation: batches of earlier ones are never given, and a thread that waits for one wakes up."""

    def leave(self) -> None:
        """Wake up a thread that waits, and have the other ranks see that this one has left."""

    def release(self) -> None:
        """Free what is left, when no thread reads any more."""

    def waits_for(self) -> str:
        """Why no batch has come so far, to be said when the time is up."""


class _Side:
    """What both sides have: sockets, a generation, and a way to wake up the thread that waits."""

    def __init__(self, task: str, sockets: Mapping[int, socket.socket]) -> None:
        """`sockets`: those to the other ranks."""
        self.task = task
        self.sockets = dict(sockets)
        self.generation = 0
        self.left = False
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)

    def restart(self) -> None:
        """See SharedReads. All ranks do so between two steps."""
        self.generation += 1
        self._wake_up()

    def leave(self) -> None:
        """See SharedReads."""
        self.left = True
        for end in list(self.sockets.values()):
            with contextlib.suppress(OSError):  # the other rank has left before
                end.shutdown(socket.SHUT_RDWR)
        self._wake_up()

    def release(self) -> None:
        """See SharedReads."""
        for end in (*self.sockets.values(), self._woken, self._wake):
            end.close()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # full, so that it wakes up anyway; or released
            self._wake.send(b"x")

    def _check(self, generation: int) -> None:
        if self.left or generation != self.generation:
            raise Dropped

    def _wait(self, sockets: Collection[socket.socket], generation: int) -> None:
        """Until one of the sockets has something to read; raises Dropped when woken up by a new generation."""
        if self._woken in wait([*sockets, self._woken]):
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(64)
        self._check(generation)


class Reader(_Side):
    """The rank that runs the loader, and sends what it reads to the other ranks of its machine."""

    reads = True

    def __init__(self, task: str, sockets: Mapping[int, socket.socket]) -> None:
        """`sockets`: one to each rank that gets the batches."""
        super().__init__(task, sockets)
        self._untaken = dict.fromkeys(sockets, 0)
        self._unread = dict.fromkeys(sockets, b"")
        self._full = False
        for end in sockets.values():
            end.setblocking(True)

    def read(self, own: Callable[[], T]) -> T:
        """See SharedReads. The loader runs once there is room for what it gives."""
        generation = self.generation
        self._make_room(generation)
        try:
            found = own()
            sent: int | None = self._packed(found)
        except WorkloadError as error:
            self._send(generation, packed(_Failed(str(error))))
            raise
        self._send(generation, sent)
        return found

    def restart(self) -> None:
        """See SharedReads."""
        super().restart()
        self._full = False

    def waits_for(self) -> str:
        """See SharedReads."""
        slowest = max(self._untaken, key=lambda rank: self._untaken[rank], default=None)
        if self._full and slowest is not None:
            return f"rank {slowest}, which gets its batches from this one, has received none"
        return "its loader gave no batch"

    def _packed(self, found: object) -> int | None:
        if not self.sockets:
            return None
        try:
            return packed(found)
        except Exception as error:
            raise WorkloadError(
                f"task {self.task!r}: a batch cannot be passed on to the other ranks of this machine "
                f"({type(error).__name__}: {error}); give fields that can be pickled"
            ) from error

    def _make_room(self, generation: int) -> None:
        """Wait until the slowest of the other ranks has received enough."""
        self._check(generation)
        if self._begun != generation:
            self._begun, self._untaken = generation, dict.fromkeys(self.sockets, 0)
        self._count_taken()
        while any(count >= AHEAD for count in self._untaken.values()):
            self._full = True
            self._wait(self.sockets.values(), generation)
            self._count_taken()
        self._full = False

    _begun = 0

    def _count_taken(self) -> None:
        for rank, end in list(self.sockets.items()):
            try:
                came = end.recv(4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                came = b""
            if not came:
                self._lose(rank)
                continue
            came = self._unread[rank] + came
            whole = len(came) // _TAKEN.size * _TAKEN.size
            self._unread[rank] = came[whole:]
            taken = [generation for (generation,) in _TAKEN.iter_unpack(came[:whole])]
            self._untaken[rank] -= taken.count(self._begun)

    def _send(self, generation: int, descriptor: int | None) -> None:
        """Send to all; closes the descriptor. What was read for an earlier generation stays here."""
        if descriptor is None:
            return
        try:
            for rank, end in list(self.sockets.items()):
                self._check(generation)
                try:
                    socket.send_fds(end, [_HEAD.pack(generation)], [descriptor])
                    self._untaken[rank] += 1
                except OSError:
                    self._lose(rank)
        finally:
            os.close(descriptor)

    def _lose(self, rank: int) -> None:
        """Go on without a rank that has left: the next exchange between ranks says so."""
        self.sockets.pop(rank).close()
        self._untaken.pop(rank, None)


class Receiver(_Side):
    """A rank that gets its batches from the one that reads."""

    reads = False

    def __init__(self, task: str, reader: int, end: socket.socket) -> None:
        """`end`: a socket to the rank that reads."""
        super().__init__(task, {reader: end})
        self.reader, self._end = reader, end
        self._arrived: tuple[int, int] | None = None  # generation and descriptor

    def read(self, own: Callable[[], T]) -> T:
        """See SharedReads; `own` stays unused."""
        del own
        generation = self.generation
        self._check(generation)
        while self._arrived is None or self._arrived[0] != generation:
            if self._arrived is not None and self._arrived[0] > generation:
                self._wait((), generation)  # the reader was resumed already, this rank is about to be
            else:
                self._drop()
                self._wait((self._end,), generation)
                self._arrived = self._receive()
        descriptor, self._arrived = self._arrived[1], None
        found = unpacked(descriptor)
        with contextlib.suppress(OSError):  # the reader left, having sent this one
            self._end.send(_TAKEN.pack(generation))
        if isinstance(found, _Failed):
            raise WorkloadError(found.words)
        return found  # type: ignore[no-any-return]

    def waits_for(self) -> str:
        """See SharedReads."""
        return f"its loader, which rank {self.reader} runs for the ranks of this machine, gave no batch"

    def release(self) -> None:
        """See SharedReads."""
        super().release()
        self._drop()

    def _drop(self) -> None:
        if self._arrived is not None:
            os.close(self._arrived[1])
            self._arrived = None

    def _receive(self) -> tuple[int, int] | None:
        try:
            head, descriptors, _, _ = socket.recv_fds(self._end, _HEAD.size, 1)
        except BlockingIOError:
            return None
        except OSError:
            head, descriptors = b"", []
        if len(head) < _HEAD.size or not descriptors:
            self._check(self.generation)
            raise RunError(
                f"task {self.task!r}: no batch came from rank {self.reader}, which reads them for the ranks of this "
                "machine: it left"
            )
        return _HEAD.unpack(head)[0], descriptors[0]


# -- who reads for whom -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seat:
    """What a rank says of itself: its machine, where to reach it there, and the tasks that it loads."""

    machine: str
    address: str
    tasks: tuple[str, ...]


def shared_reads(transport: Transport, tasks: Collection[str], timeout_s: float) -> dict[str, SharedReads]:
    """How this rank gets the batches of each of its `tasks` that others of its machine load too. Called by all ranks."""
    if not isinstance(transport, ProcessTransport) or transport.num_ranks == 1:
        return {}
    with _Door(timeout_s) as door:
        seats: list[Seat] = transport.exchanged(Seat(machine(), door.address, tuple(sorted(tasks))))
        rank = transport.rank
        sharing = {task: ranks for task, ranks in readers(seats, seats[rank].machine).items() if rank in ranks}
        found: dict[str, SharedReads] = {}
        for task, (reader, *_) in sharing.items():
            if reader != rank:
                hello = _HELLO.pack(rank, seats[reader].tasks.index(task))
                found[task] = Receiver(task, reader, door.entered(seats[reader].address, reader, hello))
        expected = {
            (other, seats[rank].tasks.index(task)): task
            for task, (reader, *others) in sharing.items()
            for other in others
            if reader == rank
        }
        came = door.let_in(set(expected))
        for task in dict.fromkeys(expected.values()):
            found[task] = Reader(task, {place[0]: end for place, end in came.items() if expected[place] == task})
    return found


def readers(seats: Sequence[Seat], name: str) -> dict[str, list[int]]:
    """Of each task that several ranks of a machine load: these ranks, the one that reads first. All ranks find the same."""
    loading: dict[str, list[int]] = {}
    for rank, seat in enumerate(seats):
        for task in seat.tasks if seat.machine == name else ():
            loading.setdefault(task, []).append(rank)
    busy = Counter[int]()
    found = {}
    for task, ranks in sorted(loading.items()):
        reader = min(ranks, key=lambda rank: (busy[rank], rank))
        busy[reader] += 1
        if len(ranks) > 1:
            found[task] = [reader, *(rank for rank in ranks if rank != reader)]
    return found


def machine() -> str:
    """Equal for processes that reach each other's sockets by name: of one running system, with one temporary directory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    system = boot.read_text().strip() if boot.exists() else socket.gethostname()
    directory = os.stat(_directory())
    return f"{system}/{directory.st_dev}/{directory.st_ino}"


def _directory() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) < LONGEST_PATH else "/tmp"


class _Door:
    """Where other ranks of this machine reach this one, while they find each other. Its directory is for this user alone."""

    def __init__(self, timeout_s: float) -> None:
        """Nobody waits longer than `timeout_s`."""
        self.timeout_s = timeout_s
        self._room = tempfile.mkdtemp(prefix="spindle-", dir=_directory())
        self.address = f"{self._room}/door"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.bind(self.address)
        self._socket.listen(1024)

    def __enter__(self) -> "_Door":
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        shutil.rmtree(self._room, ignore_errors=True)

    def entered(self, address: str, rank: int, hello: bytes) -> socket.socket:
        """A socket to another rank, which has been told who comes."""
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(self.timeout_s)
        try:
            end.connect(address)
            end.sendall(hello)
        except OSError as error:
            end.close()
            raise RunError(
                f"rank {rank}, which reads batches for the ranks of its machine, was not reached: {error}"
            ) from error
        end.settimeout(None)
        return end

    def let_in(self, expected: set[tuple[int, int]]) -> dict[tuple[int, int], socket.socket]:
        """Sockets to all of these, by rank and task."""
        found: dict[tuple[int, int], socket.socket] = {}
        while expected - found.keys():
            try:
                end, _ = self._socket.accept()
                end.settimeout(self.timeout_s)
                hello = end.recv(_HELLO.size, socket.MSG_WAITALL)
            except OSError as error:
                ranks = sorted({rank for rank, _ in expected - found.keys()})
                raise RunError(
                    f"ranks {ranks} did not come within {self.timeout_s:g} s for the batches that this rank reads"
                ) from error
            end.settimeout(None)
            found[_HELLO.unpack(hello)] = end
        return found
