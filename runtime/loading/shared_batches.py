"""Shared batches: on each machine one rank reads the batches of a task, and the others there get them from it.

- Which rank reads is decided once, from the tasks that each rank says it loads: the rank that reads the fewest tasks so
  far, and of equals the lowest. Ranks are on one machine when they find the same directory for temporary files there.
- A batch goes through shared memory; its descriptor goes through a socket between the two ranks. No store or process
  group takes part: a wait for a batch holds up no other message, and the death of the reader is noticed at once.
- The reader is a few batches ahead of what the slowest of the others has received, and each of these receives
  `prefetch` batches before it needs them. The few are more than one round of a step takes of a task: else two ranks
  that read for each other, and load their tasks in another order, would wait for each other.
- The thread of a feed waits here without a time limit. A reader of a batch waits for that thread no longer than the
  feed allows, and closing a feed wakes the thread.
- With the "threads" launcher each rank reads for itself. That launcher is for tests and debugging: a loader then runs
  where its rank does, nothing is copied, and ranks whose loaders differ are found without a second machine.
"""

import contextlib
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Protocol, TypeVar

from spindle.errors import RunError, WorkloadError
from spindle.runtime.comms.transport import ProcessTransport, Transport
from spindle.runtime.loading.machines import Door, called, machine
from spindle.runtime.loading.shared_memory import packed, unpacked

T = TypeVar("T")

AHEAD = 2  # batches that are sent and not yet received, beside the batches of one round of a step

_HEAD = struct.Struct("<Q")  # generation of a batch that is sent
_TAKEN = struct.Struct("<Q")  # generation of a batch that was received


class Dropped(Exception):
    """A batch that nobody waits for any more: its feed was resumed elsewhere, or closed."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """What is sent in place of a batch: the words of the error that the loader ended with."""

    words: str


class SharedReads(Protocol):
    """How a feed gets batches that several ranks of a machine need. One thread reads; any may call the rest."""

    reads: bool
    """Whether this rank runs the loader."""

    generation: int
    """How often the feeds were resumed."""

    def read(self, own: Callable[[], T], generation: int) -> T:
        """The next batch of a generation, by `own` or from the rank that reads. Raises WorkloadError where the loader
        failed, RunError where that rank has left, and Dropped after `restart` or `leave`.
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
        """`sockets`: connections to the other ranks."""
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

    def __init__(self, task: str, sockets: Mapping[int, socket.socket], ahead: int) -> None:
        """`sockets`: one to each rank that gets the batches. `ahead`: how many of them no rank need have received."""
        super().__init__(task, sockets)
        self.ahead = ahead
        self._untaken = dict.fromkeys(sockets, 0)
        self._unread = dict.fromkeys(sockets, b"")
        self._begun = 0  # the generation that `_untaken` counts
        self._slowest: int | None = None  # the rank for which this one waits

    def read(self, own: Callable[[], T], generation: int) -> T:
        """See SharedReads. The loader runs once there is room for what it gives."""
        self._make_room(generation)
        try:
            found = own()
            sent = self._packed(found)
        except BaseException as error:
            words = str(error) if isinstance(error, WorkloadError) else f"{type(error).__name__}: {error}"
            self._send(generation, packed(_Failed(words)))
            raise
        self._send(generation, sent)
        return found

    def waits_for(self) -> str:
        """See SharedReads."""
        if self._slowest is not None:
            return f"rank {self._slowest}, which gets its batches from this one, has received none"
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
        try:
            while full := [rank for rank, count in self._untaken.items() if count >= self.ahead]:
                self._slowest = full[0]
                self._wait(self.sockets.values(), generation)
                self._count_taken()
        finally:
            self._slowest = None
        self._check(generation)

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

    def read(self, own: Callable[[], T], generation: int) -> T:
        """See SharedReads; `own` stays unused."""
        del own
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
            head, descriptors, _, _ = socket.recv_fds(self._end, _HEAD.size, 1, socket.MSG_DONTWAIT)
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


# -- who reads for whom ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seat:
    """What a rank says of itself: its machine, where to reach it there, and the tasks that it loads."""

    machine: str
    address: str
    tasks: tuple[str, ...]


def shared_reads(
    transport: Transport, tasks: Collection[str], *, in_flight: int, timeout_s: float
) -> dict[str, SharedReads]:
    """How this rank gets the batches of its `tasks` that other ranks of its machine load too. All ranks call it.

    `in_flight`: batches that one round of a step takes of each task.
    """
    if not isinstance(transport, ProcessTransport) or transport.num_ranks == 1:
        return {}
    with Door(timeout_s) as door:
        seats: list[Seat] = transport.exchanged(Seat(machine(), door.address, tuple(sorted(tasks))))
        rank = transport.rank
        own, found = seats[rank], dict[str, SharedReads]()
        sharing = {task: ranks for task, ranks in readers(seats, own.machine).items() if rank in ranks}
        for task, (reader, *_) in sharing.items():
            if reader != rank:
                caller = rank, seats[reader].tasks.index(task)
                found[task] = Receiver(task, reader, called(seats[reader].address, caller, timeout_s))
        served = {task: others for task, (reader, *others) in sharing.items() if reader == rank}
        came = door.let_in({(other, own.tasks.index(task)) for task, others in served.items() for other in others})
        for task, others in served.items():
            sockets = {other: came[other, own.tasks.index(task)] for other in others}
            found[task] = Reader(task, sockets, AHEAD + in_flight)
    return found


def readers(seats: Sequence[Seat], name: str) -> dict[str, list[int]]:
    """Of each task that several ranks of a machine load: these ranks, the one that reads it first."""
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
