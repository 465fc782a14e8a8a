"""Pulse: what ranks say of their places, and the rank that a hang is blamed on."""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from torch._C._distributed_c10d import HashStore

from spindle.runtime.comms.pulse import SIZE, Heart, Lookout, Pulse, Sign, StoreSigns, sent

FORWARD, AWAIT = "wave 0, FORWARD s0 (t.net.0)", "AWAIT b0 (with ranks 0, 1)"


def lookout(*signs: Sign | None, moves: bool = True) -> Lookout:
    """Of ranks that gave these signs; each may stay ten seconds at one place."""
    return Lookout(lambda: signs, 10.0, moves=moves)


@pytest.mark.parametrize(
    ("signs", "waited", "told"),
    [
        (
            [Sign(FORWARD, 3, at_s=12.0), Sign(AWAIT, 3, at_s=30.0, waits=True)],
            1,
            f"rank 0 hangs in step 3, {FORWARD}, for 12.0 s now; rank 1 waited for it in step 3, {AWAIT}. See what",
        ),
        (
            [Sign(AWAIT, 3, at_s=2.0, waits=True, silent_s=9.0), Sign(FORWARD, 3, at_s=1.0)],
            1,
            "rank 0 gives no sign of life for 9.0 s (stopped, or in native code), the last one in step 3, AWAIT b0",
        ),
        (
            [Sign(AWAIT, 3, at_s=9.0, waits=True), Sign(AWAIT, 2, at_s=8.0, waits=True)],
            0,
            f"rank 1 is behind all others, which wait too, in step 2, {AWAIT}, for 8.0 s now",
        ),
        ([Sign("too hot", failed=True), Sign(AWAIT, 3, waits=True)], 1, "rank 0 failed: too hot; rank 1 waited for it"),
        ([Sign("save", at_s=3.0), None], 1, "rank 0 hangs in save, for 3.0 s now"),
    ],
    ids=["busy", "silent", "behind", "failed", "one never gave a sign"],
)
def test_who_is_blamed(signs: Sequence[Sign | None], waited: int, told: str) -> None:
    """The rank that others wait for, wherever it is, and not the one that noticed."""
    assert str(lookout(*signs).blamed([0, 1], waited)).startswith(told)


@pytest.mark.parametrize(
    ("sign", "moves", "late"),
    [
        (Sign(FORWARD, 3, at_s=10.5), True, False),
        (Sign(FORWARD, 3, at_s=11.5), True, True),
        (Sign("save", at_s=100.0), True, False),
        (Sign("save", at_s=111.0), True, True),
        (Sign("measure", at_s=1e6), False, False),
        (Sign("measure", silent_s=11.5), False, True),
        (Sign("save", silent_s=11.5), True, True),
    ],
)
def test_when_a_rank_is_late(sign: Sign, moves: bool, late: bool) -> None:
    """An instruction has its time; a call that moves all weights has ten times as much; silence has none of these."""
    watch = lookout(sign, moves=moves)
    assert watch.overdue([0]) is None  # nothing is made of a look after a pause, as after one of the whole machine
    assert (watch.overdue([0]) is not None) == late
    assert watch.overdue([]) is None


def test_ranks_share_memory() -> None:
    """What one writes, another reads, and only at its own place."""
    memory = bytearray(2 * SIZE)
    one, two = Pulse(memory), Pulse(memory, SIZE)
    one.at(FORWARD, 3)
    one.wait(True)
    two.stop()
    first, second = one.sign(), two.sign()
    assert (first.place, first.step, first.waits, first.stops) == (FORWARD, 3, True, False)
    assert (second.place, second.step, second.waits, second.stops) == ("start", -1, False, True)


def test_a_long_place_is_cut() -> None:
    pulse = Pulse()
    pulse.at("x" * 1000)
    assert pulse.sign().place == "x" * 240


def test_signs_through_a_store() -> None:
    """Clocks of other machines play no part: only the reader's own."""
    store = HashStore()
    signs = StoreSigns(store, 2)
    store.set("pulse/1", sent(1, Sign(FORWARD, 3, at_s=5.0)))
    none, first = signs()
    assert none is None
    assert first is not None
    assert first.at_s >= 5.0
    assert replace(first, at_s=0.0, silent_s=0.0) == Sign(FORWARD, 3)
    (_, again) = signs()
    assert again is not None
    assert again.silent_s > first.silent_s


def test_a_heart_beats_until_it_is_closed() -> None:
    """It sends signs, and goes on when nobody takes them any more."""
    store, beats, enough = HashStore(), [0], threading.Event()

    def on_beat() -> None:
        beats[0] += 1
        if beats[0] == 2:
            enough.set()

    heart = Heart(Pulse(), store=store, key="pulse/0", on_beat=on_beat)
    assert enough.wait(10.0)
    heart.close()
    number, told = json.loads(store.get("pulse/0"))
    assert number >= 2
    assert told["place"] == "start"
