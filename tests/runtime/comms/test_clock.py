"""Clock: ranks whose machines started at other times agree on moments; those of one machine change nothing."""

import concurrent.futures
import time
from collections.abc import Sequence

import pytest

from spindle.runtime.comms.transport import ThreadTransport
from spindle.runtime.steps.clock import Clock


def agreed(ahead_s: Sequence[float], ranks: tuple[int, ...]) -> list[Clock]:
    """Clocks of as many threads, each ahead of this machine's by so much, after some of them have agreed."""
    clocks = [Clock(lambda ahead=ahead: time.perf_counter() + ahead) for ahead in ahead_s]  # type: ignore[misc]
    transports = ThreadTransport.connect(len(clocks), timeout_s=30.0)
    with concurrent.futures.ThreadPoolExecutor(len(ranks)) as threads:
        for one in [threads.submit(clocks[rank].agree, transports[rank], ranks) for rank in ranks]:
            one.result(timeout=60)
    return clocks


@pytest.mark.parametrize("ahead_s", [(0.0, 1000.0, -5e5), (3e4, 0.0, 1e6)])
def test_all_take_over_the_clock_of_the_first(ahead_s: Sequence[float]) -> None:
    """Wrong by less than the time of an answer, which even on a crowded machine is far below a second."""
    clocks = agreed(ahead_s, (0, 1, 2))
    for clock, ahead in zip(clocks, ahead_s, strict=True):
        assert clock.offset_s == pytest.approx(ahead_s[0] - ahead, abs=0.2)
        assert clock.now() == pytest.approx(clocks[0].now(), abs=0.2)


def test_the_first_is_who_is_named_first_and_others_are_left_alone() -> None:
    clocks = agreed((1.0, 2000.0, 30.0), (2, 0))
    assert [clock.offset_s for clock in clocks] == [pytest.approx(29.0, abs=0.2), 0.0, 0.0]


def test_ranks_of_one_machine_keep_their_clock() -> None:
    """To the bit: what they have measured of each other stays exact."""
    assert [clock.offset_s for clock in agreed((5.0, 5.0, 5.0), (0, 1, 2))] == [0.0, 0.0, 0.0]


def test_agreeing_again_follows_a_clock_that_drifts() -> None:
    clocks = agreed((0.0, 100.0), (0, 1))
    transports = ThreadTransport.connect(2, timeout_s=30.0)
    clocks[1]._seconds = lambda: time.perf_counter() + 300.0
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for one in [threads.submit(clocks[rank].agree, transports[rank], (0, 1)) for rank in (0, 1)]:
            one.result(timeout=60)
    assert clocks[1].offset_s == pytest.approx(-300.0, abs=0.2)
