"""Collectives by protocol, segments through points, and what tensor parallelism and sharding add."""

from dataclasses import replace

import pytest

from spindle.cost.layout import overlapped_s, sharded_s, tensor_parallel_s
from spindle.cost.links import collective_s, spread_over_nodes
from spindle.cost.measured.segments import fit_segments, held_out_error
from spindle.cost.optimizers import moved_bytes
from spindle.cost.roofline import OperatorTime
from spindle.files.clusterfile import parse_cluster
from spindle.values.cluster import Link, Protocol

PLAIN = replace(
    parse_cluster("2x4:a100-80g"),
    intra_node=Link(bytes_per_s=100e9, latency_s=1e-6),
    inter_node=Link(bytes_per_s=10e9, latency_s=2e-6),
)


def test_ring_by_hand() -> None:
    """Four members: a tree of depth two up and down, and 3/4 of the buffer twice."""
    assert collective_s("all_reduce", 4e9, PLAIN, (4,)) == pytest.approx(4e-6 + 1.5 * 4e9 / 100e9)
    assert collective_s("all_gather", 4e9, PLAIN, (4,)) == pytest.approx(4e-6 + 0.75 * 4e9 / 100e9)


def test_from_one_to_all_and_back_the_buffer_passes_each_link_once() -> None:
    """As a ring's two halves, which each carry all but one part of it; nothing on one device, and no switch helps."""
    for operation in ("reduce", "broadcast"):
        assert collective_s(operation, 4e9, PLAIN, (4,)) == pytest.approx(4e-6 + 4e9 / 100e9)
        assert collective_s(operation, 4e9, PLAIN, (1,)) == 0.0
        assert collective_s(operation, 4e9, PLAIN, (2,)) == pytest.approx(collective_s("all_reduce", 4e9, PLAIN, (2,)))


def test_nothing_to_do() -> None:
    assert collective_s("all_reduce", 1e9, PLAIN, (1,)) == 0.0
    assert collective_s("all_reduce", 0.0, PLAIN, (4,)) == 0.0


def test_members_of_a_node_share_its_ports() -> None:
    """Two nodes: with four members in each, four links carry what one would."""
    one = collective_s("all_reduce", 1e9, PLAIN, (1, 1))
    four = collective_s("all_reduce", 1e9, PLAIN, (4, 4))
    assert one == pytest.approx(2 * 2e-6 + 1e9 / 10e9)
    assert four == pytest.approx(2 * 3 * 2e-6 + 2 * 7 / 8 * 1e9 / 4 / 10e9)


def test_the_fastest_protocol_is_taken() -> None:
    """A switch of algorithms: low latency for small messages, high rate for large ones, the network's own reduction."""
    quick = Protocol(latency_s=1e-6, hop_s=0.0, bytes_per_s=1e9)
    wide = Protocol(latency_s=1e-3, hop_s=0.0, bytes_per_s=100e9)
    switch = Protocol(latency_s=2e-3, hop_s=0.0, bytes_per_s=100e9, in_network=True)
    cluster = replace(PLAIN, intra_node=Link(bytes_per_s=1e9, latency_s=0.0, protocols=(quick, wide, switch)))
    assert collective_s("all_reduce", 1e3, cluster, (2,)) == pytest.approx(1e-6 + 1e-6)
    assert collective_s("all_reduce", 1e9, cluster, (4,)) == pytest.approx(
        2e-3 + 1e9 / 100e9
    )  # sent once, not 1.5 times
    assert collective_s("all_gather", 1e9, cluster, (4,)) == pytest.approx(1e-3 + 0.75 * 1e9 / 100e9)


def test_a_protocol_begins_at_a_size() -> None:
    """From there on it counts though another were quicker; below the first one the first serves."""
    short = Protocol(latency_s=1e-6, hop_s=0.0, bytes_per_s=10e9, from_bytes=100.0)
    long = Protocol(latency_s=0.0, hop_s=0.0, bytes_per_s=1e9, from_bytes=1e6)
    cluster = replace(PLAIN, intra_node=Link(bytes_per_s=1e9, latency_s=0.0, protocols=(short, long)))
    assert collective_s("reduce", 10.0, cluster, (2,)) == pytest.approx(1e-6 + 1e-9)
    assert collective_s("reduce", 9e5, cluster, (2,)) == pytest.approx(1e-6 + 9e-5)
    assert collective_s("reduce", 1e6, cluster, (2,)) == pytest.approx(1e-3)


def test_more_bytes_never_take_less() -> None:
    for name in ("a100-80g", "h200-141g", "b200-192g", "cpu"):
        cluster = parse_cluster(f"4x8:{name}")
        for members in ((2,), (8,), (8, 8), (3, 1)):
            times = [collective_s("all_reduce", 2.0**power, cluster, members) for power in range(10, 34)]
            assert times == sorted(times)


def test_groups_fill_nodes_one_after_another() -> None:
    assert spread_over_nodes(6, PLAIN) == (4, 2)
    assert spread_over_nodes(8, PLAIN) == (4, 4)


def test_pieces_find_the_switch() -> None:
    """Two exact lines: two segments, exact at every point."""
    points = [(float(x), 10.0 + x) for x in (1, 2, 4, 8)] + [(float(x), 100.0 + 0.1 * x) for x in (400, 800, 1600)]
    fitted = fit_segments(points, tolerance=0.01)
    assert len(fitted.segments) == 2
    assert fitted.segments[1].start == pytest.approx((8 * 400) ** 0.5)
    for size, time in points:
        assert fitted.time_s(size) == pytest.approx(time)


def test_pieces_keep_a_spike() -> None:
    """An irregular point is kept, not smeared over its neighbors."""
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, 9.0), (4.0, 4.0), (5.0, 5.0)]
    assert fit_segments(points, tolerance=0.05).time_s(3.0) == pytest.approx(9.0)
    assert fit_segments(points, tolerance=0.05).time_s(2.0) == pytest.approx(2.0)


def test_held_out_error_is_that_of_points_not_fitted() -> None:
    line = [(float(x), 1.0 + x) for x in range(1, 8)]
    assert held_out_error(line) == pytest.approx((0.0, 0.0), abs=1e-9)
    spike = [(x, 3 * t if x == 4.0 else t) for x, t in line]
    assert held_out_error(spike)[1] == pytest.approx(2 / 3)
    assert held_out_error(line[:2]) == (float("inf"), float("inf"))


def test_bad_points_are_refused() -> None:
    for points in ([], [(1.0, 0.0)], [(2.0, 1.0), (1.0, 1.0)]):
        with pytest.raises(ValueError, match="rising sizes"):
            fit_segments(points)


def test_overlap_has_its_cost() -> None:
    """Communication beside computation costs overlap_cost of itself; what sticks out costs all."""
    cluster = replace(PLAIN, device=replace(PLAIN.device, overlap_cost=0.25))
    assert overlapped_s(10.0, 4.0, cluster) == pytest.approx(11.0)
    assert overlapped_s(4.0, 10.0, cluster) == pytest.approx(11.0)


def test_sharding_gathers_twice_unless_kept() -> None:
    cluster = replace(PLAIN, device=replace(PLAIN.device, overlap_cost=1.0))
    gather = collective_s("all_gather", 8e9, cluster, (4,))
    again = sharded_s(OperatorTime(1.0, 2.0), 8e9, cluster, 4)
    kept = sharded_s(OperatorTime(1.0, 2.0), 8e9, cluster, 4, regather=False)
    assert again.forward_s == kept.forward_s == pytest.approx(1.0 + gather)
    assert again.backward_s - kept.backward_s == pytest.approx(gather)


def test_tensor_parallelism_of_one_is_free() -> None:
    assert tensor_parallel_s(1e9, PLAIN, 1) == 0.0
    assert tensor_parallel_s(1e9, PLAIN, 2) > 0.0


def test_optimizer_step_by_hand() -> None:
    """Bytes a parameter: AdamW in mixed precision 2 + 3 * 8 + 2, in float32 4 + 4 + 4 + 2 * 8, plain SGD 12."""
    assert moved_bytes("adamw", 2) == pytest.approx(28)
    assert moved_bytes("adamw", 4) == pytest.approx(28)
    assert moved_bytes("sgd", 4) == pytest.approx(12)
