"""Rounds: each new kind is measured once on each of its counts, beside the others, in the room that there is."""

import functools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.capture import capture
from spindle.runtime.profiling.profiler import Message
from spindle.runtime.profiling.rounds import MOST_REST_BYTES, counts_to_measure, kinds_of, other_work, rounds_of
from spindle.values.contract import contract
from spindle.values.metagraph import MetaGraph
from spindle.values.profile import Profile, ProfileEntry
from tests.tiny_workloads import two_towers


@functools.cache
def metagraph() -> MetaGraph:
    return contract(capture(two_towers()).graph)


def entries(keys: set[tuple[str, int]]) -> Profile:
    return Profile(
        "cpu", entries=tuple(ProfileEntry(kind=k, num_devices=n, forward_s=1.0, backward_s=1.0) for k, n in keys)
    )


ALL = [(name, n) for name, kind in kinds_of(metagraph()).items() for n in counts_to_measure(kind.limit, 4)]


@given(st.sets(st.sampled_from(ALL)), st.floats(1.0, 1e6))
def test_each_new_entry_comes_once(known: set[tuple[str, int]], room_bytes: float) -> None:
    kinds = kinds_of(metagraph())
    rounds = list(rounds_of(metagraph(), kinds, entries(known), 4, 2, room_bytes))
    new = Counter((kind, item.layouts[kind][0]) for item in rounds for kind in item.new)
    assert new == Counter(set(ALL) - known)
    for item in rounds:
        num_bytes = sum(kinds[kind].num_bytes(layout) for kind, layout in item.layouts.items())
        assert num_bytes <= room_bytes or len(item.layouts) == 1
        assert {(kind, count) for kind, (count, _) in item.layouts.items()} <= set(ALL)
        assert 0 <= item.rest_bytes <= MOST_REST_BYTES


def test_what_is_known_runs_beside_what_is_new() -> None:
    """So that the one new kind does not find its weights where it left them."""
    kinds = kinds_of(metagraph())
    (item,) = rounds_of(metagraph(), kinds, entries(set(ALL[1:])), 4, 2, 1e9)
    assert item.new == (ALL[0][0],)
    assert item.layouts.keys() == kinds.keys()


def test_what_has_no_room_beside_the_others_goes_through_the_caches() -> None:
    """What a step touches is the same however its kinds are divided."""
    kinds = kinds_of(metagraph())
    for room_bytes in (1.0, 1e9):
        for item in rounds_of(metagraph(), kinds, entries(set()), 1, 1, room_bytes):
            there = sum(kinds[kind].num_bytes(layout) for kind, layout in item.layouts.items())
            whole = sum(op.activation_bytes + 4 * op.parameter_bytes for m in metagraph() for op in m.operators)
            assert item.rest_bytes == pytest.approx(whole - there, abs=1.0)


def test_other_work_is_one_kind_that_can_run_so() -> None:
    ((kind, (count, _)),) = other_work(kinds_of(metagraph()), 2).items()
    assert (kind, count) in ALL


def test_a_transfer_takes_its_sender_s_time_too() -> None:
    """From 1.0 the sender posts until 1.2, at 1.5 the message is there; and 2.0, 2.1, 2.6."""
    sender = ((1.0, 1.2), (2.0, 2.1))
    receiver = ((1.5, 1.5), (2.6, 2.6))
    entry = Message("transfer", "inter_node", (0, 2), 4096).entry([sender, (), receiver])
    assert (entry.operation, entry.level, entry.members, entry.num_bytes) == ("transfer", "inter_node", 2, 4096)
    assert entry.seconds == pytest.approx(0.7)


def test_a_sum_takes_from_the_last_to_begin_to_the_last_to_end() -> None:
    timings = [((1.0, 1.9), (3.0, 3.6)), ((1.5, 2.0), (3.1, 3.5)), ()]
    entry = Message("all_reduce", "intra_node", (0, 1), 4096).entry(timings)
    assert entry.seconds == pytest.approx(0.5)


def test_messages_over_slow_links_are_few() -> None:
    """Told by the next smaller one of the same kind; thirty where nothing is known, three at least."""
    known = Message("reduce", "inter_node", (0, 2), 2**20).entry([((0.0, 0.1), (1.0, 1.1))] * 3)
    profile = Profile("cpu", links=(known,))
    assert Message("reduce", "inter_node", (0, 2), 2**22).repeats(profile) == 5  # 0.4 s each
    assert Message("reduce", "inter_node", (0, 2), 2**24).repeats(profile) == 3
    assert Message("reduce", "intra_node", (0, 1), 2**22).repeats(profile) == 30
    assert Message("reduce", "inter_node", (0, 2), 2**12).repeats(profile) == 30
