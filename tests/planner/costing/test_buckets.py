"""Buckets: gradients fill them as backward makes them ready, and each is a collective that its devices meet in turn."""

from dataclasses import replace
from typing import Any

import pytest

from spindle.files.formats import dumps, loads
from spindle.planner.check import check_plan
from spindle.planner.costing.buckets import Layer, bucketed, layers_of, without_gaps
from spindle.planner.costing.reduction import Reduction
from spindle.planner.solve import solve
from spindle.values.plan import BUCKET_BYTES, Plan
from tests.planner.planner_graphs import cluster, graph, metaop, piece

SLOW = cluster(2, 4)
WHERE = replace(
    SLOW,
    device=replace(SLOW.device, overlap_cost=0.5),
    intra_node=replace(SLOW.intra_node, bytes_per_s=float(BUCKET_BYTES)),  # two devices reduce a bucket in 1 s
)
PAIR, OTHERS = frozenset((0, 1)), frozenset((1, 2))
HALF = BUCKET_BYTES / 2


def times(found: tuple[Reduction, ...]) -> list[tuple[Any, ...]]:
    return [(r.devices, pytest.approx(r.start_s), pytest.approx(r.end_s)) for r in found]


def test_layers_of_a_slice_are_ready_from_the_last_to_the_first() -> None:
    """Backward from -4 to 0 s over four layers: the last is ready at -3. A layer that two slices use waits for both."""
    chain = graph(
        metaop("a", 4, parameters="w", layer_param_bytes=6.0), metaop("b", 4, parameters="w", layer_param_bytes=6.0)
    )
    slices = [piece("a", range(4), (0, 1), 0, 1), piece("b", range(2, 4), (2,), 1, 2)]
    found = layers_of(chain, slices, [(-4.0, 0.0), (-9.0, -2.5)])
    assert [(number, layer.ready_s) for (_, number), layer in found.items()] == [
        (0, 0.0),
        (1, -1.0),
        (2, -2.0),
        (3, -3.0),
    ]
    assert [sorted(layer.devices) for layer in found.values()] == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]


def test_a_bucket_goes_when_it_is_full() -> None:
    """Halves at -4, -3 and -1 s: the first two go at -3 together, the third with what is left, half as long."""
    found = bucketed(WHERE, [Layer(PAIR, HALF, at_s) for at_s in (-1.0, -4.0, -3.0)], "all_reduce")
    assert times(found) == [((0, 1), -3.0, -2.0), ((0, 1), -1.0, -0.5)]


def test_devices_meet_buckets_one_after_another() -> None:
    """Device 1 is in both sets: the second bucket waits for it; devices that share none do not wait."""
    layers = [Layer(PAIR, BUCKET_BYTES, -2.0), Layer(OTHERS, BUCKET_BYTES, -1.5), Layer(frozenset((2, 3)), HALF, -1.9)]
    found = bucketed(WHERE, layers, "all_reduce")
    assert times(found) == [((0, 1), -2.0, -1.0), ((2, 3), -1.9, -1.4), ((1, 2), -1.0, 0.0)]


def test_nothing_is_gained_where_overlap_costs_all() -> None:
    dear = replace(WHERE, device=replace(WHERE.device, overlap_cost=1.0))
    found = bucketed(dear, [Layer(PAIR, BUCKET_BYTES, at_s) for at_s in (-4.0, -2.0)], "all_reduce")
    assert times(found) == [((0, 1), 0.0, 1.0), ((0, 1), 1.0, 2.0)]


def test_devices_share_the_buckets_of_sharded_states() -> None:
    """One small layer of two devices makes two buckets, one for each of them."""
    found = bucketed(WHERE, [Layer(PAIR, HALF, -1.0)], "reduce", divided=True)
    assert [r.num_bytes for r in found] == [HALF / 2, HALF / 2]


def test_what_one_device_holds_is_not_reduced() -> None:
    assert bucketed(WHERE, [Layer(frozenset((3,)), 9.0, -1.0)], "all_reduce") == ()


def test_buckets_without_a_gap_are_drawn_as_one() -> None:
    rows = [((0, 1), -3.0, -2.0), ((2, 3), -2.5, -1.0), ((0, 1), -2.0, -1.0), ((0, 1), 0.0, 1.0)]
    merged = without_gaps([Reduction(devices, 1.0, start_s, end_s) for devices, start_s, end_s in rows])
    assert times(merged) == [((0, 1), -3.0, -1.0), ((2, 3), -2.5, -1.0), ((0, 1), 0.0, 1.0)]
    assert [r.num_bytes for r in merged] == [2.0, 1.0, 1.0]


def test_larger_buckets_where_each_message_is_slow_to_start() -> None:
    """A message takes 10 s to start: one of 400 MiB is sooner through than sixteen. Where it takes none, small ones
    start earlier. The checker takes the size from the plan, and so does a run.
    """
    chain = graph(metaop("t.a", 16, {2: 3.0}, layer_param_bytes=BUCKET_BYTES))
    slow = replace(WHERE, intra_node=replace(WHERE.intra_node, latency_s=5.0))
    for where, size in ((WHERE, BUCKET_BYTES), (slow, 16 * BUCKET_BYTES)):
        plan = solve(chain, where, method="sequential")
        assert plan.bucket_bytes == size
        assert check_plan(plan) == ()
    assert check_plan(replace(plan, bucket_bytes=BUCKET_BYTES))
    assert loads(dumps(plan), Plan).bucket_bytes == 16 * BUCKET_BYTES
