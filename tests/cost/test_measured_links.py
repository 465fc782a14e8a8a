"""Links from a profile: what was measured is found again, noise and switches included; profiles merge."""

import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from spindle.cost.links import collective_s, times_sent
from spindle.cost.measured.links import check_device, measured_links, warn_of_gaps
from spindle.errors import ProfileError, SpindleWarning
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import dumps, loads
from spindle.spec.file import read_workload
from spindle.spec.graph import build_graph
from spindle.values.cluster import Link
from spindle.values.contract import contract
from spindle.values.profile import LinkEntry, Profile, ProfileEntry

TRUE = parse_cluster("1x8:a100-80g")
START = replace(TRUE, intra_node=Link(bytes_per_s=1e9, latency_s=1.0))


def entry(members: int, num_bytes: int, seconds: float) -> LinkEntry:
    return LinkEntry(operation="all_reduce", level="intra_node", members=members, num_bytes=num_bytes, seconds=seconds)


def test_two_protocols_are_found_again() -> None:
    """Times made by the shipped protocols with 2 % noise: the refitted link agrees within 6 % everywhere."""
    noise = random.Random(0)
    sizes = [2**power for power in range(20, 31)]
    links = tuple(
        entry(members, size, collective_s("all_reduce", size, TRUE, (members,)) * noise.uniform(0.98, 1.02))
        for members in (2, 4, 8)
        for size in sizes
    )
    found = measured_links(START, Profile("a100", links=links))
    assert len(found.intra_node.protocols) == 2
    for members in (2, 3, 4, 8):
        for size in sizes:
            again = collective_s("all_reduce", size, found, (members,))
            assert again == pytest.approx(collective_s("all_reduce", size, TRUE, (members,)), rel=0.06)


def test_one_line_needs_one_protocol() -> None:
    links = tuple(entry(2, size, 1e-4 + size / 1e9) for size in (1000, 10**5, 10**6, 10**7, 10**8))
    (protocol,) = measured_links(START, Profile("x", links=links)).intra_node.protocols
    assert protocol.latency_s + protocol.hop_s == pytest.approx(1e-4)
    assert protocol.bytes_per_s == pytest.approx(1e9)


def test_transfers_give_rate_and_latency() -> None:
    links = tuple(
        LinkEntry(operation="transfer", level="inter_node", members=2, num_bytes=size, seconds=2e-5 + size / 5e9)
        for size in (10**4, 10**6, 10**8)
    )
    found = measured_links(START, Profile("x", links=links))
    assert found.inter_node.latency_s == pytest.approx(2e-5)
    assert found.inter_node.bytes_per_s == pytest.approx(5e9)
    assert found.intra_node == START.intra_node  # not measured


def test_times_on_no_line_are_told() -> None:
    """A shaped network lets the first bytes of a message pass in 1 ms; then a megabyte takes a tenth of a second."""
    links = tuple(
        LinkEntry(
            operation="transfer", level="inter_node", members=2, num_bytes=size, seconds=max(1e-3, (size - 256e3) / 1e7)
        )
        for size in (4_000, 16_000, 64_000, 256_000, 10**6, 4 * 10**6, 16 * 10**6)
    )
    with pytest.warns(
        SpindleWarning, match=r"times of transfer over inter_node links do not lie on a line: \d+ bytes took"
    ):
        found = measured_links(START, Profile("x", links=links)).inter_node
    assert 1e7 < found.bytes_per_s < 4e7  # not what the many small ones alone would make of it


def test_collectives_that_slow_down_are_found_again() -> None:
    """Large ones at a quarter of the rate, as where a cache is too small: their line counts, and the other is below."""
    seconds = {
        size: 1e-4 + size / 4e9 if size < 10**6 else size / 1e9 for size in (2**power for power in range(12, 26))
    }
    links = tuple(entry(2, size, took) for size, took in seconds.items())
    found = measured_links(START, Profile("x", links=links))
    for size, took in seconds.items():
        assert collective_s("all_reduce", size, found, (2,)) == pytest.approx(took, rel=0.01)


def test_each_collective_has_protocols_of_its_own() -> None:
    """A reduce is told by its own times, what was not measured by those of the all-reduce."""
    seconds = {"all_reduce": (1e-4, 1e9), "reduce": (5e-5, 4e9)}
    links = tuple(
        LinkEntry(
            operation=operation,  # type: ignore[arg-type]
            level="intra_node",
            members=members,
            num_bytes=size,
            seconds=latency + times_sent(operation, members) * size / rate,  # type: ignore[arg-type]
        )
        for operation, (latency, rate) in seconds.items()
        for members in (2, 4)
        for size in (1000, 10**5, 10**6, 10**7)
    )
    found = measured_links(START, Profile("x", links=links))
    assert collective_s("all_reduce", 2e6, found, (4,)) == pytest.approx(1e-4 + 3e6 / 1e9, rel=1e-3)
    assert collective_s("reduce", 2e6, found, (4,)) == pytest.approx(5e-5 + 2e6 / 4e9, rel=1e-3)
    assert collective_s("all_gather", 2e6, found, (4,)) == pytest.approx(1e-4 + 1.5e6 / 1e9, rel=1e-3)


def test_profiles_merge_and_round_trip() -> None:
    """A second workload's profile adds what is new; of what both measured the later one counts."""

    def operator(kind: str, seconds: float) -> ProfileEntry:
        return ProfileEntry(kind=kind, num_devices=1, forward_s=seconds, backward_s=seconds)

    first = Profile("x", (("torch", "1"),), (operator("a", 1.0), operator("b", 1.0)), (entry(2, 8, 1.0),))
    second = Profile("x", (("torch", "2"),), (operator("b", 2.0), operator("c", 2.0)))
    both = first.merge(second)
    assert {(e.kind, e.forward_s) for e in both.entries} == {("a", 1.0), ("b", 2.0), ("c", 2.0)}
    assert both.links == first.links
    assert dict(both.versions) == {"torch": "2"}
    assert loads(dumps(both), Profile) == both
    with pytest.raises(ProfileError, match="do not merge"):
        first.merge(Profile("y"))


def test_bad_link_entries_are_refused() -> None:
    with pytest.raises(ProfileError, match="at least two devices"):
        entry(1, 8, 1.0)
    with pytest.raises(ProfileError, match="nan"):
        entry(2, 8, float("nan"))


def test_a_cpu_profile_is_refused_for_gpus() -> None:
    """And the other way round; either names both and what to do."""
    with pytest.raises(ProfileError, match=r"'cpu X' do not hold for a cluster of 'a100-80g'.*measure on its devices"):
        check_device(parse_cluster("1x2:a100-80g"), Profile("cpu X"))
    with pytest.raises(ProfileError, match="cpu"):
        check_device(parse_cluster("1x2:cpu"), Profile("NVIDIA A100-SXM4-80GB"))
    check_device(parse_cluster("1x2:cpu"), Profile("cpu X"))
    check_device(parse_cluster("1x2:a100-80g"), Profile("NVIDIA A100-SXM4-80GB"))


def test_a_profile_of_another_workload_is_told() -> None:
    """With not one kind in common, the plan would be predicted from end to end without a word."""
    spec = read_workload(Path(__file__).parents[2] / "benchmarks" / "workloads" / "multitask_clip.yaml")
    metagraph = contract(build_graph(spec))
    known = ProfileEntry(kind=metagraph.metaops[0].operators[0].kind, num_devices=1, forward_s=1.0, backward_s=1.0)
    with pytest.warns(SpindleWarning, match="dtype bf16.*none of the"):
        warn_of_gaps(metagraph, Profile("cpu", (("dtype", "bf16"),), (replace(known, kind="other"),)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_gaps(metagraph, Profile("cpu", entries=(known,)))
