from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.planner.costing.reduction import (
    Reduction,
    Share,
    Wanted,
    hand_out_s,
    handed_out,
    reduce_s,
    reduced_by_device,
    schedule,
    shares_of,
    slowed_by_device,
    update_by_device,
)
from spindle.planner.costing.traffic import Devices
from spindle.values.plan import BUCKET_BYTES
from tests.planner.planner_graphs import cluster, graph, metaop, piece

NODES = cluster(2, 4)  # 1 byte/s inside, 0.1 between; overlap gains nothing
BESIDE = replace(NODES, device=replace(NODES.device, overlap_cost=0.25))


def ready(devices: Devices, num_bytes: float, at_s: float) -> Wanted:
    """Gradients that are ready all at once."""
    return Wanted(devices, num_bytes, at_s, at_s)


def test_a_reduction_is_a_ring_inside_and_between_nodes() -> None:
    """Eight bytes: 2 * 3/4 * 8 inside a node; a ring of eight over two nodes carries a quarter through each port."""
    assert reduce_s(NODES, 8.0, (3,)) == 0
    assert reduce_s(NODES, 8.0, (0, 1, 2, 3)) == pytest.approx(12.0)
    assert reduce_s(NODES, 8.0, tuple(range(8))) == pytest.approx(2 * 7 / 8 * 2.0 / 0.1)
    assert reduce_s(NODES, 8.0, (0, 4)) == pytest.approx(2 * 0.5 * 8.0 / 0.1)


def test_devices_of_a_node_share_its_ports() -> None:
    """A node's four devices send 0.2 bytes a second together: half of 0.1 each. Eight bytes over two nodes pass each
    port 2 * 7/8 times. Two groups of four share the ports: both messages are through after the time of their sum."""
    shared = replace(NODES, inter_node=replace(NODES.inter_node, node_bytes_per_s=0.2))
    assert reduce_s(shared, 8.0, tuple(range(8))) == pytest.approx(2 * 7 / 8 * 8.0 / 0.2)
    assert reduce_s(shared, 8.0, (0, 4)) == pytest.approx(2 * 0.5 * 8.0 / 0.1)  # one device has its own rate
    large, small = (0, 1, 4, 5), (2, 3, 6, 7)
    done = schedule(shared, [ready(large, 8.0, 0.0), ready(small, 4.0, 0.0)])
    assert [r.devices for r in done] == [large, small]
    assert [r.end_s for r in done] == pytest.approx([1.5 * 8 / 0.2, 1.5 * 12 / 0.2])
    inside = schedule(shared, [ready((0, 1), 8.0, 0.0), ready((2, 3), 8.0, 0.0)])
    assert [r.start_s for r in inside] == [0.0, 0.0]
    assert [r.end_s for r in inside] == pytest.approx([8.0, 8.0])


def test_shares_are_layers_held_by_the_same_slices() -> None:
    """a and b share two layers: layer 0 lives on devices 0-2, layer 1 on 0 and 1; c is updated but not reduced."""
    metagraph = graph(
        metaop("a", 2, parameters="w", layer_param_bytes=6.0),
        metaop("b", 2, parameters="w", layer_param_bytes=6.0),
        replace(metaop("c", 1), layer_update_s=0.5),
        metaop("frozen", 1),
    )
    slices = [
        piece("a", range(0, 2), (0,), 0, 1),
        piece("b", range(0, 1), (1, 2), 0, 1),
        piece("b", range(1, 2), (1,), 1, 2),
        piece("c", range(0, 1), (3,), 0, 1),
        piece("frozen", range(0, 1), (3,), 1, 2),
    ]
    shares = shares_of(metagraph, slices)
    assert shares == (
        Share((0, 1, 2), 6.0, 0.0, (0, 1)),
        Share((0, 1), 6.0, 0.0, (0, 2)),
        Share((3,), 0.0, 0.5, (3,)),
    )
    assert update_by_device(shares) == {3: 0.5}


def test_reductions_on_one_device_follow_each_other() -> None:
    """8 s on devices 0-2 (2 * 2/3 * 6), then 6 s on 0 and 1; devices 2 and 3 reduce beside that."""
    done = schedule(
        NODES, [ready((0, 1), 6.0, -9.0), ready((0, 1, 2), 6.0, -1.0), ready((2, 3), 1.0, -5.0), ready((3,), 7.0, -5.0)]
    )
    assert [r.devices for r in done] == [(0, 1, 2), (0, 1), (2, 3)]
    assert [r.start_s for r in done] == pytest.approx([0.0, 8.0, 8.0])
    assert [r.end_s for r in done] == pytest.approx([8.0, 14.0, 9.0])
    assert reduced_by_device(NODES, done) == pytest.approx({0: 14.0, 1: 14.0, 2: 9.0, 3: 9.0})


def test_reductions_beside_backward_take_a_share_of_their_time_from_it() -> None:
    """Devices 0 and 1 reduce for 4 s from 6 s before the end: 1 s is lost. Then 4 s, 2 of them after it: 0.5 s."""
    done = schedule(BESIDE, [ready((0, 1), 4.0, -2.0), ready((0, 1), 4.0, -6.0), ready((2, 3), 1.0, 0.0)])
    assert [r.devices for r in done] == [(0, 1), (0, 1), (2, 3)]
    assert [r.start_s for r in done] == pytest.approx([-6.0, -2.0, 0.0])
    assert [r.end_s for r in done] == pytest.approx([-2.0, 2.0, 1.0])
    assert slowed_by_device(BESIDE, done) == pytest.approx({0: 1.5, 1: 1.5})
    assert reduced_by_device(BESIDE, done) == pytest.approx({0: 3.5, 1: 3.5, 2: 1.0, 3: 1.0})


@given(
    st.lists(
        st.tuples(
            st.sets(st.integers(0, 5), min_size=2).map(lambda found: tuple(sorted(found))),
            st.floats(-9.0, 9.0),
            st.floats(0.0, 9.0),
        ),
        max_size=8,
    ),
    st.floats(0.0, 0.9),
)
def test_what_reductions_add_is_added_up_by_device(
    rows: list[tuple[Devices, float, float]], overlap_cost: float
) -> None:
    """Sets of devices added up first give what each device by itself gives."""
    where = replace(NODES, device=replace(NODES.device, overlap_cost=overlap_cost))
    reductions = [Reduction(devices, 1.0, start_s, start_s + seconds) for devices, start_s, seconds in rows]
    by_device: dict[int, float] = {}
    for device in {device for devices, _, _ in rows for device in devices}:
        own = [r for r in reductions if device in r.devices]
        beside_s = sum(max(0.0, min(r.end_s, 0.0) - r.start_s) for r in own)
        by_device[device] = max(0.0, *(r.end_s for r in own)) + overlap_cost * beside_s
    assert reduced_by_device(where, reductions) == pytest.approx(by_device)


def test_a_search_takes_what_is_reduced_as_one_message() -> None:
    """Four buckets that become ready second by second from -3 s on, of 1 s each, end at 1 s: the last waits for its
    gradients. Of 2 s each they end when the link has carried all, at 5 s.
    """
    (slow, quick) = (
        replace(BESIDE, intra_node=replace(BESIDE.intra_node, bytes_per_s=rate * BUCKET_BYTES)) for rate in (0.5, 1.0)
    )
    row = Wanted((0, 1), 4.0 * BUCKET_BYTES, -3.0, 0.0)
    assert [r.end_s for r in schedule(quick, [row])] == pytest.approx([1.0])
    assert [r.end_s for r in schedule(slow, [row])] == pytest.approx([5.0])


def test_what_is_reduced_in_time_adds_only_what_it_takes_from_backward() -> None:
    assert reduced_by_device(BESIDE, [Reduction((0,), 1.0, -8.0, -4.0)]) == {0: 1.0}


def test_sharded_states_are_updated_by_one_and_handed_out_to_all() -> None:
    """Twelve bytes: three parts are summed to one device each, 4 s each, and handed out alike. Two bytes of devices 0
    and 1 wait for that."""
    assert reduce_s(NODES, 12.0, (0, 1, 2), sharded=True) == pytest.approx(3 * 4.0)
    assert hand_out_s(NODES, 12.0, (0, 1, 2)) == pytest.approx(3 * 4.0)
    done = schedule(NODES, [ready((0, 1, 2), 12.0, 0.0), ready((0, 1), 2.0, 0.0)], sharded=True)
    assert [r.end_s for r in done] == pytest.approx([12.0, 14.0])
    out = handed_out(NODES, done, {0: 15.0, 1: 15.0, 2: 12.5})
    assert [(r.devices, r.num_bytes) for r in out] == [((0, 1, 2), 12.0), ((0, 1), 2.0)]
    assert [r.start_s for r in out] == pytest.approx([15.0, 27.0])
    assert [r.end_s for r in out] == pytest.approx([27.0, 29.0])


def test_devices_divide_the_update_of_sharded_states() -> None:
    layer = replace(metaop("a", 2), layer_update_s=3.0)
    pieces = [piece("a", range(1), (0, 1, 2), 0, 1), piece("a", range(1, 2), (0,), 1, 2)]
    assert update_by_device(shares_of(graph(layer), pieces)) == {0: 6.0, 1: 3.0, 2: 3.0}
    assert update_by_device(shares_of(replace(graph(layer), shard_optimizer=True), pieces)) == {0: 4.0, 1: 1.0, 2: 1.0}


def test_nothing_to_reduce_takes_no_time() -> None:
    shares = shares_of(graph(metaop("a")), [piece("a", range(1), range(4), 0, 1)])
    assert shares == ()
    assert schedule(NODES, []) == ()
