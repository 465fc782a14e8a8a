"""Flight report: the record of an attempt in; which rank stopped first, where, and what the others waited for, out.

Files are read as data of strangers: sizes, counts and numbers have limits, and texts are made harmless.
"""

import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spindle.errors import FormatError
from spindle.files.filetypes import Prose
from spindle.files.formats import explain_validation, read_text
from spindle.runtime.comms.flight import (
    END,
    EVENT,
    EVENTS,
    EVENTS_AT,
    FLIGHT,
    HEAD,
    MAGIC,
    NOW,
    SIZE,
    STATE,
    STATE_AT,
    VERSION,
    EventKind,
    numbered_in,
)
from spindle.runtime.comms.pulse import SILENT_S
from spindle.words.harmless import harmless

MOST_RANKS = 100_000
_MOST_END_BYTES = 2**16
_MOST_ERROR = 500
_SHOWN = 6  # ranks that have a sentence of their own
_MOST_S = 1e11  # since 1970


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a rank. `at_s`: since 1970, by the clock of the rank's machine; `step` from 1, -1: of none."""

    at_s: float
    rank: int
    step: int
    kind: EventKind
    text: str
    number: float


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one rank left; its events in order. `beat_s`: its last sign of life, None where no thread gave any."""

    rank: int
    num_ranks: int
    host: str
    begun_s: float
    events: tuple[Event, ...]
    num_events: int
    beat_s: float | None
    waits: bool
    stops: bool

    @property
    def last_s(self) -> float:
        """Its last sign of any kind."""
        return max(self.beat_s or 0.0, self.events[-1].at_s if self.events else self.begun_s)

    @property
    def place(self) -> Event | None:
        """Where it was last."""
        return next((event for event in reversed(self.events) if event.kind is EventKind.PLACE), None)

    def ended_by(self, kind: EventKind) -> Event | None:
        """Its event of a kind that ends a rank."""
        return next((event for event in self.events if event.kind is kind), None)


class End(BaseModel):
    """`end.json`: what the driver said."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["spindle.flight"]
    version: Literal[1]
    error: Prose
    rank: Annotated[int, Field(ge=0, lt=MOST_RANKS)] | None
    at_s: Annotated[float, Field(ge=0, le=_MOST_S)]


@dataclass(frozen=True, slots=True)
class FlightRecord:
    """The record of one attempt; `end` None: nobody said how it ended."""

    folder: Path
    ranks: tuple[RankRecord, ...]
    end: End | None

    @property
    def last_s(self) -> float:
        """The last moment that any rank left."""
        return max(rank.last_s for rank in self.ranks)

    def events(self) -> list[Event]:
        """Those of all ranks in order of time."""
        return sorted((event for rank in self.ranks for event in rank.events), key=lambda e: (e.at_s, e.rank))


# -- reading ---------------------------------------------------------------------------------------------------------


def read_flight(folder: Path) -> FlightRecord:
    """The record in the folder of a run, the newest of several, or in the folder of one record.

    Raises FormatError where there is none, or it is not as ranks write it.
    """
    where = _record_in(folder)
    try:
        with os.scandir(where) as entries:
            names = sorted(entry.name for entry, _ in zip(entries, range(MOST_RANKS + 2), strict=False))
    except OSError as error:
        raise FormatError(f"{where}: cannot be read ({error.strerror}); give the folder of a run") from None
    names = [name for name in names if name.startswith("rank-") and name.endswith(".ring")]
    if not names or len(names) > MOST_RANKS:
        raise FormatError(
            f"{where}: holds the records of {len(names)} ranks; give the folder of a run that ended badly, in which "
            f"`{FLIGHT}` stands"
        )
    ranks = sorted((_rank_in(where / name) for name in names), key=lambda rank: rank.rank)
    if len({rank.rank for rank in ranks}) < len(ranks) or len({rank.num_ranks for rank in ranks}) > 1:
        raise FormatError(f"{where}: its files are of several runs; keep those of one")
    return FlightRecord(where, tuple(ranks), _end_in(where / END))


def _record_in(folder: Path) -> Path:
    flight = folder / FLIGHT if (folder / FLIGHT).is_dir() else folder
    if (flight / NOW).is_dir():
        return flight / NOW
    numbers = numbered_in(flight) if flight.is_dir() else []
    return flight / str(numbers[-1]) if numbers else flight


def _end_in(file: Path) -> End | None:
    if not file.exists():
        return None
    try:
        return End.model_validate_json(read_text(file, _MOST_END_BYTES))
    except ValidationError as error:
        raise FormatError(f"{file}: {explain_validation(error, End)}") from None


def _rank_in(file: Path) -> RankRecord:
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as stream:
            is_file = stat.S_ISREG(os.fstat(handle).st_mode)
            data = stream.read(SIZE + 1) if is_file else b""
    except OSError as error:
        raise FormatError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    if len(data) != SIZE:
        raise FormatError(f"{file}: has not the {SIZE} bytes of a rank's flight record; it was cut, or is another file")
    magic, version, rank, num_ranks, capacity, begun_s, host = HEAD.unpack_from(data)
    if (magic, version, capacity) != (MAGIC, VERSION, EVENTS):
        raise FormatError(
            f"{file}: is no flight record that this Spindle reads (version {version}); read it with the one that wrote "
            "it"
        )
    count, beat_s, waits, beats, stops = STATE.unpack_from(data, STATE_AT)
    if not rank < num_ranks <= MOST_RANKS or not _is_moment(begun_s) or (beats and not _is_moment(beat_s)):
        raise FormatError(f"{file}: is of rank {rank} of {num_ranks}, begun at {begun_s:g}; no rank has written that")
    kept = min(count, EVENTS - 1)  # the oldest may be half overwritten
    events = tuple(_event(file, data, rank, number % EVENTS) for number in range(count - kept, count))
    return RankRecord(
        rank, num_ranks, _text(host), begun_s, events, count, beat_s if beats else None, bool(waits), bool(stops)
    )


def _event(file: Path, data: bytes, rank: int, place: int) -> Event:
    at_s, step, number, kind, text = EVENT.unpack_from(data, EVENTS_AT + place * EVENT.size)
    if kind not in list(EventKind) or not _is_moment(at_s) or not -1 <= step < 2**53:
        raise FormatError(f"{file}: event {place} is of kind {kind}, step {step}, at {at_s:g}; no rank writes that")
    return Event(at_s, rank, step, EventKind(kind), _text(text), number)


def _is_moment(at_s: float) -> bool:
    return math.isfinite(at_s) and 0.0 <= at_s < _MOST_S


def _text(raw: bytes) -> str:
    text = raw.rstrip(b"\0").decode(errors="replace")
    return harmless(text).replace("\n", " ").replace("\t", " ")


# -- what it says ----------------------------------------------------------------------------------------------------


def first_stopped(record: FlightRecord) -> tuple[RankRecord, str]:
    """The rank that stopped first, and why it is this one: an error of its own; what the driver said; no sign of life;
    not waiting; the furthest behind.
    """
    raised = [(event.at_s, rank, event) for rank in record.ranks if (event := rank.ended_by(EventKind.ERROR))]
    if raised:
        _, rank, event = min(raised, key=lambda found: found[0])
        return rank, f"it failed: {event.text}"
    named = record.end.rank if record.end is not None else None
    for rank in record.ranks:
        if rank.rank == named:
            return rank, "so the driver found"
    silent = [rank for rank in record.ranks if rank.beat_s is not None and record.last_s - rank.last_s > SILENT_S]
    if silent:
        rank = min(silent, key=lambda rank: rank.last_s)
        return rank, f"its last sign of life came {record.last_s - rank.last_s:.1f} s before that of the others"
    busy = [rank for rank in record.ranks if not rank.waits and rank.ended_by(EventKind.LOST) is None]
    if busy and len(busy) < len(record.ranks):
        rank = min(busy, key=lambda rank: rank.place.at_s if rank.place else rank.begun_s)
        return rank, "it was at work while others waited"
    rank = min(record.ranks, key=lambda rank: (rank.place.step, rank.place.at_s) if rank.place else (-1, rank.begun_s))
    return rank, "it was the furthest behind; perhaps all were ended from outside"


def sentences(record: FlightRecord) -> list[str]:
    """What happened, in a few plain sentences."""
    rank, why = first_stopped(record)
    found = [_ending(record), f"Rank {rank.rank} ({rank.host}) stopped first: {why}. It was {_where(record, rank)}."]
    others = [other for other in record.ranks if other is not rank]
    found += [f"Rank {other.rank} was {_where(record, other)}." for other in others[:_SHOWN]]
    if len(others) > _SHOWN:
        waiting = sum(other.waits for other in others[_SHOWN:])
        found.append(f"Of {len(others) - _SHOWN} other ranks {waiting} waited; --json has all.")
    missing = record.ranks[0].num_ranks - len(record.ranks)
    if missing:
        found.append(f"{missing} ranks left no record: they did not start, or could not write into the folder.")
    return found + _numbers(record)


def _ending(record: FlightRecord) -> str:
    if record.end is None:
        return (
            f"Nobody said how the run ended: its driver is gone, or it is still at work; its last event was at "
            f"{_clock(record.last_s)}."
        )
    error = harmless(record.end.error).replace("\n", " ")
    shown = error if len(error) <= _MOST_ERROR else f"{error[:_MOST_ERROR]}..."
    return f"The run ended at {_clock(record.end.at_s)}: {shown}"


def _where(record: FlightRecord, rank: RankRecord) -> str:
    place = rank.place
    if place is None:
        return "at its start"
    step = f"step {place.step}, " if place.step >= 0 else ""
    verb = "waiting for other ranks in" if rank.waits else "in"
    size = f", about messages of {size_text(place.number)}" if place.number else ""
    asked = ", and was asked to end (SIGTERM)" if rank.stops else ""
    return f"{verb} {step}{place.text}, for {max(0.0, record.last_s - place.at_s):.1f} s{size}{asked}"


def _numbers(record: FlightRecord) -> list[str]:
    """The last losses and norm, and the most memory."""
    events = record.events()
    losses = {e.text: e for e in events if e.kind is EventKind.LOSS}
    found = [f"{task} {e.number:.4g} (step {e.step})" for task, e in list(losses.items())[:_SHOWN]]
    found += [f"gradient norm {e.number:.4g} (step {e.step})" for e in events if e.kind is EventKind.NORM][-1:]
    held = [event for event in events if event.kind is EventKind.MEMORY]
    if held:
        most = max(held, key=lambda event: event.number)
        found.append(f"memory of rank {most.rank} {size_text(most.number)}")
    return [f"Last numbers: {', '.join(found)}."] if found else []


def rows(events: Sequence[Event], last_s: float) -> list[str]:
    """A table of events, a line each; seconds count back from the record's last moment."""
    found = [f"{'seconds':>9} {'rank':>5} {'step':>8}  what"]
    for event in events:
        step = "" if event.step < 0 else str(event.step)
        found.append(f"{event.at_s - last_s:>9.3f} {event.rank:>5} {step:>8}  {_what(event)}")
    return found


def _what(event: Event) -> str:
    match event.kind:
        case EventKind.PLACE:
            return event.text + (f"; {size_text(event.number)}" if event.number else "")
        case EventKind.LOSS:
            return f"loss of {event.text}: {event.number:.6g}"
        case EventKind.NORM:
            return f"gradient norm: {event.number:.6g}"
        case EventKind.MEMORY:
            return f"memory: {size_text(event.number)}"
        case EventKind.ERROR:
            return f"FAILED: {event.text}"
        case EventKind.LOST:
            return f"waited in vain: {event.text}"


def size_text(num_bytes: float) -> str:
    """Bytes with a unit that fits.

    >>> [size_text(n) for n in (512, 2048, 3 * 2**30)]
    ['512 B', '2.0 KiB', '3.0 GiB']
    """
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if num_bytes < 1024 or unit == "GiB":
            break
    return f"{num_bytes:.1f} {unit}"


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).isoformat(" ", "seconds")
