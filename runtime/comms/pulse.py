"""Pulse: where a rank is and since when, written by the rank, read by others without its help; and whom to blame.

- A rank writes its place (step and instruction, or the method that it was called for) into memory that its driver
  reads too, or a thread of the rank sends it to the store of the run. The place of a rank that was stopped is there.
- A thread of the rank beats. A rank without a beat was stopped, or runs native code that holds Python's lock.
- A rank marks when it waits for other ranks, so that a hang names the rank that others wait for.
"""

import contextlib
import json
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch._C._distributed_c10d import Store

from spindle.errors import LostPeerError, LostRankError
from spindle.runtime.comms.background import start_thread
from spindle.runtime.comms.flight import EventKind, Flight

BEAT_S = 0.25
SILENT_S = 1.5  # without a beat before a rank counts as silent: a busy machine delays beats
SLACK_S = 1.0  # after `timeout_s`, in which the error of a rank that gave up itself may arrive
PAUSE_S = 5.0  # between two looks, after which nothing is made of what the second one sees
LONG = 10  # times `timeout_s` that a call may take which is no step: it moves all weights
STEPPING = "run"  # the call in which places change with each instruction

_PLACE = struct.Struct("=dq240s")  # since when, step (-1: none), what
_BEAT = struct.Struct("=d")
_BEAT_AT = _PLACE.size
_WAITS_AT = _BEAT_AT + _BEAT.size
_STOPS_AT, _FAILED_AT = _WAITS_AT + 1, _WAITS_AT + 2
SIZE = -(-(_FAILED_AT + 1) // 64) * 64
"""Bytes of one rank."""


@dataclass(frozen=True, slots=True)
class Sign:
    """Where a rank is: `at_s` seconds in a place of a step, counted from 1 (-1: of none), `silent_s` since its last
    beat. `waits`: for other ranks. `stops`: it was asked to end (SIGTERM). `failed`: its place is the error that ended
    it.
    """

    place: str
    step: int = -1
    at_s: float = 0.0
    silent_s: float = 0.0
    waits: bool = False
    stops: bool = False
    failed: bool = False

    def __str__(self) -> str:
        return f"step {self.step}, {self.place}" if self.step >= 0 else self.place


class Pulse:
    """What one rank writes; a few hundred nanoseconds an instruction."""

    def __init__(self, memory: Any = None, offset: int = 0) -> None:
        """`memory`: writable, SIZE bytes from `offset` on, perhaps shared with the driver; else its own."""
        self._memory = bytearray(SIZE) if memory is None else memory
        self._offset = offset
        self.flight: Flight | None = None
        self.at("start")
        self.beat()

    def at(self, place: str | bytes, step: int = -1, num_bytes: int = 0) -> None:
        """The rank begins something. `num_bytes`: of the messages that it is about."""
        text = place if isinstance(place, bytes) else place.encode(errors="replace")
        self._put(text, step)
        if self.flight is not None:
            self.flight.add(EventKind.PLACE, text, step, num_bytes)

    def wait(self, begins: bool) -> None:
        """It begins, or ends, to wait for other ranks."""
        self._memory[self._offset + _WAITS_AT] = begins
        if self.flight is not None:
            self.flight.wait(begins)

    def fail(self, error: str) -> None:
        """It ends by an error of its own."""
        self._put(error.encode(errors="replace"), -1)
        self._memory[self._offset + _FAILED_AT] = 1
        if self.flight is not None:
            self.flight.fail(error)

    def _put(self, place: bytes, step: int) -> None:
        _PLACE.pack_into(self._memory, self._offset, time.monotonic(), step, place)

    def stop(self) -> None:
        """It was asked to end."""
        self._memory[self._offset + _STOPS_AT] = 1
        if self.flight is not None:
            self.flight.stop()

    def beat(self) -> None:
        """It is alive."""
        _BEAT.pack_into(self._memory, self._offset + _BEAT_AT, time.monotonic())
        if self.flight is not None:
            self.flight.beat()

    @property
    def stops(self) -> bool:
        """Whether it was asked to end."""
        return bool(self._memory[self._offset + _STOPS_AT])

    def sign(self) -> Sign:
        """Where the rank is now, as any process that shares the memory sees it."""
        since_s, step, text = _PLACE.unpack_from(self._memory, self._offset)
        (beat_s,) = _BEAT.unpack_from(self._memory, self._offset + _BEAT_AT)
        flags = (bool(self._memory[self._offset + at]) for at in (_WAITS_AT, _STOPS_AT, _FAILED_AT))
        now_s, place = time.monotonic(), text.rstrip(b"\0").decode(errors="replace")
        return Sign(place, step, now_s - since_s, now_s - beat_s, *flags)


@contextlib.contextmanager
def noted(pulse: Pulse) -> Iterator[None]:
    """An error that leaves is in the flight record."""
    try:
        yield
    except Exception as error:
        if pulse.flight is not None:
            lines = [line for line in str(error).splitlines() if line.strip()]
            pulse.flight.fail(lines[0] if lines else type(error).__name__, lost=isinstance(error, LostPeerError))
        raise


# -- from one machine to another -----------------------------------------------------------------------------------


def sent(number: int, sign: Sign) -> str:
    """A sign as text, with the number of the beat: clocks of machines differ, so it tells seconds."""
    return json.dumps([number, asdict(sign)])


class StoreSigns:
    """Signs that ranks send through the store of a run; how long each is silent is measured by the reader's clock."""

    def __init__(self, store: Store, num_ranks: int) -> None:
        self._store, self._keys = store, [f"pulse/{rank}" for rank in range(num_ranks)]
        self._seen: dict[int, tuple[str, float]] = {}

    def __call__(self) -> list[Sign | None]:
        """The last sign of each rank; None for a rank that never gave one."""
        return [self._sign(rank, key) for rank, key in enumerate(self._keys)]

    def _sign(self, rank: int, key: str) -> Sign | None:
        if not self._store.check([key]):
            return None
        value, now_s = self._store.get(key).decode(), time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != value:
            self._seen[rank] = value, now_s
        silent_s = now_s - self._seen[rank][1]
        sign = Sign(**json.loads(value)[1])
        return replace(sign, at_s=sign.at_s + silent_s, silent_s=silent_s)


class Heart:
    """A thread that beats for a rank, and sends its sign where a store is given."""

    def __init__(
        self,
        pulse: Pulse,
        *,
        store: Store | None = None,
        key: str = "",
        on_beat: Callable[[], None] | None = None,
    ) -> None:
        """`store`: a connection of its own, since a call may block one for long. `on_beat` is called too."""
        self._pulse, self._store, self._key, self._on_beat = pulse, store, key, on_beat
        self._ended, self._number = threading.Event(), 0
        start_thread(self._beat, "pulse", end=self.close)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S if self._number else 0.0):
            self.beat()
            if self._on_beat is not None:
                self._on_beat()

    def beat(self) -> None:
        """Do so now."""
        self._number += 1
        self._pulse.beat()
        if self._store is not None:
            try:
                self._store.set(self._key, sent(self._number, self._pulse.sign()))
            except Exception:  # the process that holds the store is gone, and nobody reads signs any more
                self._store = None

    def close(self) -> None:
        """Beat no more."""
        self._ended.set()


# -- whom to blame -------------------------------------------------------------------------------------------------


class Lookout:
    """Sees from the signs of all ranks whether one hangs, and which."""

    def __init__(self, signs: Callable[[], Sequence[Sign | None]], timeout_s: float, *, moves: bool = True) -> None:
        """`timeout_s`: how long a rank may stay at one instruction. `moves`: whether its place tells what it does; a
        rank that only says which method it was called for may take as long as it likes.
        """
        self._signs, self._timeout_s, self._moves = signs, timeout_s, moves
        self._looked_s = 0.0

    def overdue(self, ranks: Collection[int]) -> LostRankError | None:
        """The error of a run in which one of these ranks, which have not answered yet, takes too long."""
        now_s, before_s = time.monotonic(), self._looked_s
        self._looked_s = now_s
        if now_s - before_s > PAUSE_S:  # this process itself was stopped, and ranks perhaps with it
            return None
        signs = self._read()
        late = {rank: sign for rank, sign in signs.items() if rank in ranks and self._is_late(sign)}
        return self._error(signs, ranks, next(iter(late))) if late else None

    def blamed(self, ranks: Collection[int], waited: int, patience_s: float = 0.0) -> LostRankError | None:
        """The error of a run in which `waited` gave up to wait for another rank; None when nothing is known of others.

        `ranks` have not answered yet. `patience_s`: how long to wait for one that failed or is silent.
        """
        others, until_s = [rank for rank in ranks if rank != waited], time.monotonic() + patience_s
        while True:
            signs = self._read()
            found = any(signs[r].failed or signs[r].silent_s > SILENT_S for r in others if r in signs)
            if found or not signs or time.monotonic() > until_s:
                return self._error(signs, others, waited)
            time.sleep(BEAT_S)

    def last_of(self, rank: int, words: str) -> str:
        """Where a rank was when it gave its last sign, after some words; nothing when it never gave one."""
        sign = self._read().get(rank)
        return f"{words}{sign}" if sign is not None else ""

    def _read(self) -> dict[int, Sign]:
        with contextlib.suppress(Exception):  # the store went with its process: then nothing is known
            return {rank: sign for rank, sign in enumerate(self._signs()) if sign is not None}
        return {}

    def _is_late(self, sign: Sign) -> bool:
        allowed_s = self._timeout_s + SLACK_S
        if sign.silent_s > max(allowed_s, SILENT_S):
            return True
        if not self._moves:
            return False
        return sign.at_s > (allowed_s if sign.step >= 0 else LONG * allowed_s)

    def _error(self, signs: Mapping[int, Sign], ranks: Collection[int], seen: int) -> LostRankError | None:
        others = {rank: sign for rank, sign in signs.items() if rank in ranks}
        if not others:
            return None
        rank, reason = _culprit(others)
        waiting = signs.get(seen)
        more = f"; rank {seen} waited for it in {waiting}" if waiting is not None and seen != rank else ""
        remedy = "" if signs[rank].failed else ". See what keeps it (py-spy dump), or raise timeout_s"
        return LostRankError.at(rank, f"rank {rank} {reason}{more}{remedy}")


def _culprit(signs: Mapping[int, Sign]) -> tuple[int, str]:
    """The rank for which the others wait, and what to say of it."""
    for rank, sign in signs.items():
        if sign.failed:
            return rank, f"failed: {sign.place}"
    silent = {rank: sign for rank, sign in signs.items() if sign.silent_s > SILENT_S}
    if silent:
        rank = max(silent, key=lambda r: silent[r].silent_s)
        sign = silent[rank]
        words = f"gives no sign of life for {sign.silent_s:.1f} s (stopped, or in native code)"
        return rank, f"{words}, the last one in {sign}"
    busy = {rank: sign for rank, sign in signs.items() if not sign.waits}
    if busy:
        rank = max(busy, key=lambda r: busy[r].at_s)
        return rank, f"hangs in {busy[rank]}, for {busy[rank].at_s:.1f} s now"
    rank = min(signs, key=lambda r: (signs[r].step, -signs[r].at_s))
    return rank, f"is behind all others, which wait too, in {signs[rank]}, for {signs[rank].at_s:.1f} s now"
