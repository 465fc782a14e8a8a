"""The flight record: what a rank writes is what a reader finds, and files that no rank wrote are refused."""

import contextlib
import math
import mmap
import os
import random
import re
from pathlib import Path

import pytest
import torch

from spindle.errors import FormatError, LostRankError, PreemptedError, RunError
from spindle.runtime.comms.flight import (
    END,
    EVENT,
    EVENTS,
    EVENTS_AT,
    FLIGHT,
    HEAD,
    KEPT,
    MAGIC,
    NOW,
    SIZE,
    STATE,
    STATE_AT,
    VERSION,
    EventKind,
    Flight,
    file_of,
    numbered_in,
    recorded,
)
from spindle.runtime.comms.pulse import Pulse, noted
from spindle.runtime.devices import Streams
from spindle.runtime.faults.flight_report import first_stopped, read_flight, rows, sentences

FORWARD, AWAIT = "wave 0, FORWARD s0 (t.net.0)", "AWAIT b0 (with ranks 0, 1)"


def written(folder: Path, num_ranks: int = 2) -> list[Pulse]:
    """Pulses whose places are recorded in the folder of an attempt."""
    pulses = [Pulse() for _ in range(num_ranks)]
    for rank, pulse in enumerate(pulses):
        pulse.flight = Flight(file_of(folder, rank), rank, num_ranks)
    return pulses


@pytest.mark.parametrize("count", [0, 1, EVENTS - 1, EVENTS, EVENTS + 1, 3 * EVENTS + 7])
def test_the_last_events_are_found_in_order(tmp_path: Path, count: int) -> None:
    """Of any number of events the newest, whole and in order; the oldest place of a full file may be half written."""
    (pulse,) = written(tmp_path, 1)
    for number in range(count):
        pulse.at(f"place {number}", number, 3 * number)
    (rank,) = read_flight(tmp_path).ranks
    found = [(event.text, event.step, event.number) for event in rank.events]
    expected = [(f"place {n}", n, 3.0 * n) for n in range(count)][-(EVENTS - 1) :]
    assert (found, rank.num_events) == (expected, count)
    assert all(event.kind is EventKind.PLACE for event in rank.events)
    assert os.path.getsize(file_of(tmp_path, 0)) == SIZE


def test_a_step_s_numbers_are_events(tmp_path: Path) -> None:
    """Losses by task, the norm where there is one, and memory once a second."""
    (pulse,) = written(tmp_path, 1)
    assert pulse.flight is not None
    for step in range(3):
        pulse.flight.done(step, {"a": 1.0 + step, "b": math.nan}, 2.0 if step else None, Streams(torch.device("cpu")))
    record = read_flight(tmp_path)
    kinds = [event.kind.name for event in record.events()]
    assert kinds == ["LOSS", "LOSS", "MEMORY", "LOSS", "LOSS", "NORM", "LOSS", "LOSS", "NORM"]
    assert record.events()[2].number > 2**20  # bytes of this process
    assert re.match(
        r"Last numbers: a 3 \(step 2\), b nan \(step 2\), gradient norm 2 \(step 2\), memory of rank 0 [\d.]+ [GM]iB\.",
        sentences(record)[-1],
    )


def test_long_texts_are_cut(tmp_path: Path) -> None:
    (pulse,) = written(tmp_path, 1)
    pulse.at("ä" * 1000)
    (rank,) = read_flight(tmp_path).ranks
    assert rank.events[0].text.startswith("ä" * 51)


def raised(pulse: Pulse) -> None:
    """The rank ends by an error of its own."""
    with contextlib.suppress(ValueError), noted(pulse):
        raise ValueError("too hot")


def attempt(folder: Path, error: Exception) -> None:
    """An attempt of a run in which ranks write and which ends so."""
    with recorded(folder) as now:
        assert now is not None
        written(now)
        raise error


def ended(pulses: list[Pulse], case: str) -> Exception | None:
    """Let two ranks come to an end; what the driver says of it."""
    zero, one = pulses
    zero.at(AWAIT, 3, 4096)
    zero.wait(True)
    one.at(FORWARD, 3)
    match case:
        case "raised":
            one.fail("too cold")
            raised(zero)
        case "told":
            one.wait(True)
            return LostRankError.at(1, "rank 1 died (exit code -9)")
        case "at work":
            return RunError("no rank is known")
        case "behind":
            one.wait(True)
            one.at(AWAIT, 2)
            return RunError("no rank is known")
        case "silent":
            assert one.flight is not None
            one.wait(True)
            for pulse in pulses:
                pulse.beat()
            STATE.pack_into(one.flight._memory, STATE_AT, 1, 1e9, 1, 1, 0)
            EVENT.pack_into(one.flight._memory, EVENTS_AT, 1e9, 3, 0.0, EventKind.PLACE, AWAIT.encode())
    return None


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("raised", "it failed: too cold"),
        ("told", "so the driver found"),
        ("at work", "it was at work while others waited"),
        ("behind", "it was the furthest behind; perhaps all were ended from outside"),
        ("silent", "its last sign of life came"),
    ],
)
def test_which_rank_stopped_first(tmp_path: Path, case: str, why: str) -> None:
    """Rank 1 in each case, and never rank 0, which waited for it; that is told with what it waited for."""
    with contextlib.suppress(RunError), recorded(tmp_path) as now:
        assert now is not None
        error = ended(written(now), case)
        if error is None:
            now.parent.rename(tmp_path / "left")  # as if the driver were gone
        else:
            raise error
    left = tmp_path / "left"
    record = read_flight(left if left.exists() else tmp_path)
    rank, said = first_stopped(record)
    assert rank.rank == 1
    assert said.startswith(why)
    first, second, third, *_ = sentences(record)
    assert first.startswith("Nobody said how the run ended" if record.end is None else "The run ended at 20")
    assert second.startswith(f"Rank 1 ({rank.host}) stopped first: {why}")
    assert third.startswith(f"Rank 0 was waiting for other ranks in step 3, {AWAIT}, for 0.0 s")
    assert "about messages of 4.0 KiB" in third


def test_a_good_end_leaves_nothing(tmp_path: Path) -> None:
    """And an orderly one, after SIGTERM and a checkpoint, neither."""
    with recorded(tmp_path) as now:
        assert now is not None
        written(now)
    with pytest.raises(PreemptedError):
        attempt(tmp_path, PreemptedError("SIGTERM", saved=True))
    assert list(tmp_path.iterdir()) == []


def test_bad_ends_are_numbered_and_the_newest_stay(tmp_path: Path) -> None:
    """That of a driver which was killed gets its number when the next attempt begins."""
    for number in range(KEPT + 2):
        with pytest.raises(RunError) as caught:
            attempt(tmp_path, RunError(f"end {number}"))
        assert caught.value.flight == tmp_path
    for folder in (tmp_path, tmp_path / FLIGHT / str(KEPT + 2)):
        assert sentences(read_flight(folder))[0].endswith(f": end {KEPT + 1}")
    (tmp_path / FLIGHT / NOW).mkdir()
    written(tmp_path / FLIGHT / NOW)
    with recorded(tmp_path, leads=False):
        pass  # another driver of the run, which touches nothing
    assert (tmp_path / FLIGHT / NOW).exists()
    with recorded(tmp_path):
        pass
    assert numbered_in(tmp_path / FLIGHT) == list(range(4, 4 + KEPT))
    assert sentences(read_flight(tmp_path))[0].startswith("Nobody said how the run ended")


def test_a_folder_that_cannot_be_written_costs_the_record_alone(tmp_path: Path) -> None:
    (tmp_path / FLIGHT).write_text("a file")
    with recorded(tmp_path) as now:
        assert now is not None
        for pulse in written(now):
            pulse.at(FORWARD, 1)
    assert (tmp_path / FLIGHT).read_text() == "a file"


def test_a_disk_without_room_costs_the_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of a file stays, which would make the others' records unreadable."""
    (pulse,) = written(tmp_path, 1)

    def full(file: int, size: int) -> mmap.mmap:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mmap, "mmap", full)
    other = Flight(file_of(tmp_path, 1), 1, 2)
    other.add(EventKind.PLACE, FORWARD)
    pulse.at(FORWARD, 1)
    assert [rank.rank for rank in read_flight(tmp_path).ranks] == [0]


# -- files of strangers ----------------------------------------------------------------------------------------------


def spoiled(folder: Path, case: str) -> None:
    """A record with one thing wrong."""
    for pulse in written(folder):
        pulse.at(FORWARD, 3)
    file = file_of(folder, 1)
    data = bytearray(file.read_bytes())
    match case:
        case "cut":
            del data[-1:]
        case "long":
            data += b"\0"
        case "magic":
            data[0] ^= 1
        case "version":
            HEAD.pack_into(data, 0, MAGIC, VERSION + 1, 1, 2, EVENTS, 1e9, b"")
        case "rank":
            HEAD.pack_into(data, 0, MAGIC, VERSION, 2, 2, EVENTS, 1e9, b"")
        case "begun":
            HEAD.pack_into(data, 0, MAGIC, VERSION, 1, 2, EVENTS, math.nan, b"")
        case "runs":
            HEAD.pack_into(data, 0, MAGIC, VERSION, 1, 3, EVENTS, 1e9, b"")
        case "twice":
            HEAD.pack_into(data, 0, MAGIC, VERSION, 0, 2, EVENTS, 1e9, b"")
        case "kind":
            EVENT.pack_into(data, EVENTS_AT, 1e9, 0, 0.0, 99, b"")
        case "time":
            EVENT.pack_into(data, EVENTS_AT, math.inf, 0, 0.0, 0, b"")
        case "step":
            EVENT.pack_into(data, EVENTS_AT, 1e9, -2, 0.0, 0, b"")
        case "count":
            STATE.pack_into(data, STATE_AT, 2**64 - 1, 1e9, 0, 1, 0)
            EVENT.pack_into(data, EVENTS_AT + EVENT.size, -1.0, 0, 0.0, 0, b"")
        case "end":
            (folder / END).write_text('{"format": "spindle.flight", "version": 1, "error": 3}')
        case "end rank":
            (folder / END).write_text(
                '{"format": "spindle.flight", "version": 1, "error": "", "rank": -1, "at_s": 1.0}'
            )
    file.unlink()
    if case == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(data)


HOSTILE = {
    "cut": "has not the",
    "long": "has not the",
    "pipe": "has not the",
    "magic": "is no flight record that this Spindle reads",
    "version": f"reads (version {VERSION + 1})",
    "rank": "is of rank 2 of 2",
    "begun": "begun at nan",
    "runs": "are of several runs",
    "twice": "are of several runs",
    "kind": "is of kind 99",
    "time": "at inf; no rank writes that",
    "step": "step -2",
    "count": "at -1; no rank writes that",
    "end": "error is '3': input should be a valid string",
    "end rank": "rank is '-1'",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_no_rank_wrote_are_refused(tmp_path: Path, case: str) -> None:
    spoiled(tmp_path, case)
    with pytest.raises(FormatError, match=re.escape(HOSTILE[case])):
        read_flight(tmp_path)


def test_a_folder_without_a_record(tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "holds the records of 0 ranks"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(FormatError, match=words):
            read_flight(folder)


def test_random_changes_are_refused_or_read(tmp_path: Path) -> None:
    """Whatever bytes are in the files: an error in words, or sentences and rows without control characters."""
    draw = random.Random(0)
    for pulse in written(tmp_path):
        for number in range(40):
            pulse.at(FORWARD, number, number)
    whole, refused = file_of(tmp_path, 1).read_bytes(), 0
    places = [*range(EVENTS_AT), *range(EVENTS_AT, EVENTS_AT + 40 * EVENT.size)]
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.choice(places)] = draw.choice((0, 1, 27, 127, 128, 255, draw.randrange(256)))
        file_of(tmp_path, 1).write_bytes(data)
        try:
            record = read_flight(tmp_path)
        except FormatError:
            refused += 1
            continue
        told = "\n".join([*sentences(record), *rows(record.events(), record.last_s)])
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", told)
    assert 20 < refused < 380
