"""Profile: every rule of its entries, and how profiles merge."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.errors import ProfileError
from spindle.values.profile import LinkEntry, LoadEntry, Profile, ProfileEntry
from tests.refusals import Refusal, check_refusal, each

NAN, INF = float("nan"), float("inf")


def entry(kind: str = "Block-1", devices: int = 1, forward: float = 1.0, backward: float = 2.0) -> ProfileEntry:
    return ProfileEntry(kind=kind, num_devices=devices, forward_s=forward, backward_s=backward)


def link(members: int = 2, num_bytes: int = 1024, seconds: float = 0.1) -> LinkEntry:
    return LinkEntry(operation="all_reduce", level="intra_node", members=members, num_bytes=num_bytes, seconds=seconds)


def load(task: str = "speech", batch_size: int = 8, seconds: float = 0.1) -> LoadEntry:
    return LoadEntry(task=task, batch_size=batch_size, seconds=seconds)


def merged(first: str, second: str) -> Profile:
    return Profile(first).merge(Profile(second))


RULES: dict[str, Refusal] = {
    "no devices": (lambda: entry(devices=0), "'Block-1'", "0 devices", "counts start at 1"),
    "forward in no time": (
        lambda: entry(forward=0.0),
        "'Block-1' on 1 devices",
        "must be positive",
        "Measure it again",
    ),
    "forward below zero": (lambda: entry(forward=-1.0), "forward -1.0 s", "must be positive", "Measure it again"),
    "forward that is no number": (lambda: entry(forward=NAN), "forward nan s", "must be positive", "Measure it again"),
    "forward without end": (lambda: entry(forward=INF), "forward inf s", "must be positive", "Measure it again"),
    "backward below zero": (lambda: entry(backward=-1.0), "backward -1.0 s", "zero or more", "Measure it again"),
    "backward that is no number": (lambda: entry(backward=NAN), "backward nan s", "zero or more", "Measure it again"),
    "a link of one": (lambda: link(members=1), "by 1 devices", "at least two devices", "Measure it again"),
    "a link of no bytes": (lambda: link(num_bytes=0), "0 bytes", "one byte", "Measure it again"),
    "a link in no time": (lambda: link(seconds=0.0), "0.0 s", "a positive time", "Measure it again"),
    "a link of no number": (lambda: link(seconds=NAN), "nan s", "a positive time", "Measure it again"),
    "a load of no samples": (lambda: load(batch_size=0), "'speech'", "0 samples", "Measure it again"),
    "a load in no time": (lambda: load(seconds=0.0), "0.0 s", "a positive time", "Measure it again"),
    "a load of no number": (lambda: load(seconds=NAN), "nan s", "a positive time", "Measure it again"),
    "one entry twice": (
        lambda: Profile("cpu", (), (entry(), entry(forward=3.0))).by_kind,
        "'Block-1' on 1 devices",
        "given twice",
        "keep one",
    ),
    "two device types": (lambda: merged("cpu", "a100-80g"), "'cpu' and 'a100-80g'", "do not merge", "measure both"),
}


@each(RULES)
def test_rules_of_profiles(refusal: Refusal) -> None:
    check_refusal(refusal, ProfileError)


def test_backward_may_take_no_time() -> None:
    """Frozen layers have no backward."""
    assert entry(backward=0.0).backward_s == 0.0


def test_entries_by_layout() -> None:
    """By kind and count there are data-parallel ones alone; a degree divides the devices."""
    cut = replace(entry("a", 2), tensor_parallel=2)
    profile = Profile("cpu", (), (entry("a", 2), cut))
    assert profile.by_layout["a"] == {(2, 1): entry("a", 2), (2, 2): cut}
    assert profile.by_kind["a"] == {2: entry("a", 2)}
    assert profile.merge(Profile("cpu", (), (cut,))).entries == profile.entries
    with pytest.raises(ProfileError, match="divide"):
        replace(cut, num_devices=3)


def test_entries_by_kind_and_count() -> None:
    profile = Profile("cpu", (), (entry("a", 1), entry("a", 2), entry("b", 1)))
    assert {kind: sorted(counts) for kind, counts in profile.by_kind.items()} == {"a": [1, 2], "b": [1]}


profiles = st.builds(
    lambda entries, links, loads, versions: Profile(
        "cpu",
        tuple(sorted(versions.items())),
        tuple(entry(kind, n, time) for (kind, n), time in entries.items()),
        tuple(link(members, size, time) for (members, size), time in links.items()),
        tuple(load(task, size, time) for (task, size), time in loads.items()),
    ),
    st.dictionaries(st.tuples(st.sampled_from("ab"), st.integers(1, 3)), st.floats(0.1, 1.0), max_size=4),
    st.dictionaries(st.tuples(st.integers(2, 3), st.integers(1, 3)), st.floats(0.1, 1.0), max_size=4),
    st.dictionaries(st.tuples(st.sampled_from("ab"), st.integers(1, 3)), st.floats(0.1, 1.0), max_size=4),
    st.dictionaries(st.sampled_from(("torch", "nccl")), st.sampled_from("12"), max_size=2),
)


@given(profiles, profiles)
def test_merge_keeps_all_and_the_newer(first: Profile, second: Profile) -> None:
    """All of the second, of the first what the second has not; nothing twice."""
    both = first.merge(second)
    assert set(second.entries) <= set(both.entries)
    assert set(second.links) <= set(both.links)
    assert both.load_s == first.load_s | second.load_s
    assert len(both.loads) == len(both.load_s)
    measured = {(e.kind, e.num_devices) for e in (*first.entries, *second.entries)}
    assert sorted(measured) == sorted((e.kind, e.num_devices) for e in both.entries)
    assert both.by_kind.keys() == {kind for kind, _ in measured}
    assert dict(both.versions) == {**dict(first.versions), **dict(second.versions)}
    assert first.merge(first) == first


def test_merge_is_associative_by_example() -> None:
    parts = [Profile("cpu", (), (entry("a", 1, time),)) for time in (1.0, 2.0, 3.0)]
    left, right = parts[0].merge(parts[1]).merge(parts[2]), parts[0].merge(parts[1].merge(parts[2]))
    assert left == right
    assert left.by_kind["a"][1].forward_s == pytest.approx(3.0)
