import pytest

from spindle.planner.traffic import reduce_s, reduction_groups, reduction_s, schedule_reductions, transfer_s
from tests.planner.planner_graphs import cluster, graph, metaop, piece

NODES = cluster(2, 4)  # 1 byte/s inside, 0.1 between


def test_a_transfer_is_shared_by_the_smaller_set() -> None:
    assert transfer_s(NODES, 8.0, (0, 1), (0, 1)) == 0
    assert transfer_s(NODES, 8.0, (0, 1), (2, 3)) == 4.0
    assert transfer_s(NODES, 8.0, (0, 1), (0, 1, 2, 3)) == 4.0
    assert transfer_s(NODES, 8.0, (0, 1), (4, 5)) == pytest.approx(40.0)
    assert transfer_s(NODES, 0.0, (0, 1), (4, 5)) == 0


def test_a_reduction_is_a_ring_inside_and_between_nodes() -> None:
    """Eight bytes: 2 * 3/4 * 8 inside a node; a ring of eight over two nodes carries a quarter through each port."""
    assert reduce_s(NODES, 8.0, (3,)) == 0
    assert reduce_s(NODES, 8.0, (0, 1, 2, 3)) == pytest.approx(12.0)
    assert reduce_s(NODES, 8.0, tuple(range(8))) == pytest.approx(2 * 7 / 8 * 2.0 / 0.1)
    assert reduce_s(NODES, 8.0, (0, 4)) == pytest.approx(2 * 0.5 * 8.0 / 0.1)


def test_layers_held_by_the_same_devices_are_reduced_together() -> None:
    """a and b share two layers: layer 0 lives on devices 0-2, layer 1 on 0 and 1; c's alone on one device."""
    metagraph = graph(
        metaop("a", 2, parameters="w", layer_param_bytes=6.0),
        metaop("b", 2, parameters="w", layer_param_bytes=6.0),
        metaop("c", 1, layer_param_bytes=6.0),
    )
    slices = [
        piece("a", range(0, 2), (0,), 0, 1),
        piece("b", range(0, 1), (1, 2), 0, 1),
        piece("b", range(1, 2), (1,), 1, 2),
        piece("c", range(0, 1), (3,), 0, 1),
    ]
    assert reduction_groups(metagraph, slices) == {(0, 1): 6.0, (0, 1, 2): 6.0}


def test_reductions_on_one_device_follow_each_other() -> None:
    """8 s on devices 0-2 (2 * 2/3 * 6), then 6 s on 0 and 1; devices 2 and 3 reduce beside that."""
    scheduled = schedule_reductions(NODES, {(0, 1): 6.0, (0, 1, 2): 6.0, (2, 3): 1.0})
    assert [devices for devices, _, _ in scheduled] == [(0, 1, 2), (0, 1), (2, 3)]
    assert [start_s for _, start_s, _ in scheduled] == pytest.approx([0.0, 8.0, 8.0])
    assert [end_s for _, _, end_s in scheduled] == pytest.approx([8.0, 14.0, 9.0])


def test_nothing_to_reduce_takes_no_time() -> None:
    assert reduction_s(NODES, graph(metaop("a")), [piece("a", range(1), range(4), 0, 1)]) == 0
