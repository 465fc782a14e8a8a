import pytest

from spindle.errors import InfeasibleError
from spindle.planner.baselines.place import place
from spindle.planner.baselines.waves import WaveSlice
from spindle.planner.problem import make_problem
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Slice
from tests.planner.planner_graphs import cluster, graph, metaop


def run(
    metagraph: MetaGraph,
    waves: list[list[WaveSlice]],
    *,
    aligned: bool = False,
    nodes: int = 2,
    memory_bytes: float = 80e9,
) -> tuple[Slice, ...]:
    problem = make_problem(metagraph, cluster(nodes, memory_bytes=memory_bytes))
    return place(problem, tuple(map(tuple, waves)), aligned=aligned)


def whole(op: int, layers: int, count: int) -> WaveSlice:
    return WaveSlice(op=op, first_layer=0, num_layers=layers, count=count)


def test_a_slice_stays_in_one_node() -> None:
    """Three devices are left in node 0 after the first item takes one; four go to node 1."""
    metagraph = graph(metaop("a"), metaop("b"))
    slices = run(metagraph, [[whole(0, 1, 1), whole(1, 1, 4)]])
    assert {s.metaop: s.devices for s in slices} == {"a": (0,), "b": (4, 5, 6, 7)}


def test_a_wide_slice_takes_whole_nodes() -> None:
    metagraph = graph(metaop("a", times={6: 1.0}))
    (only,) = run(metagraph, [[whole(0, 1, 6)]])
    assert only.devices == (0, 1, 2, 3, 4, 5)


def test_the_consumer_follows_the_heavy_flow() -> None:
    """b hands over 100 bytes, a 1 byte: the loss runs where b ran, and receives a's byte: twice 1 byte at 0.1 B/s."""
    a, b = metaop("a", times={4: 1.0}, output_bytes=1.0), metaop("b", times={4: 1.0}, output_bytes=100.0)
    metagraph = graph(a, b, metaop("loss", times={4: 1.0}), flows="a>loss b>loss")
    slices = run(metagraph, [[whole(0, 1, 4), whole(1, 1, 4)], [whole(2, 1, 4)]])
    by_name = {s.metaop: s for s in slices}
    assert by_name["loss"].devices == by_name["b"].devices
    assert by_name["loss"].span_s == pytest.approx(1.0 + 2 * (1 / 4) / 0.1)


def test_shared_parameters_go_together() -> None:
    """c has b's parameters, so it follows b to node 1 although node 0 is just as free."""
    metagraph = graph(
        metaop("a", times={4: 1.0}, memory={4: 10.0}),
        metaop("b", times={4: 1.0}, memory={4: 10.0}, parameters="w", layer_param_bytes=4.0),
        metaop("c", times={4: 1.0}, memory={4: 10.0}, parameters="w", layer_param_bytes=4.0),
        flows="a>c b>c",
    )
    slices = run(metagraph, [[whole(0, 1, 4), whole(1, 1, 4)], [whole(2, 1, 4)]])
    by_name = {s.metaop: s for s in slices}
    assert by_name["c"].devices == by_name["b"].devices != by_name["a"].devices


def test_memory_is_balanced() -> None:
    """Nothing else to choose by: the second MetaOp goes to the empty node."""
    metagraph = graph(metaop("a", memory={4: 10.0}), metaop("b", memory={4: 10.0}), flows="a>b")
    first, second = run(metagraph, [[whole(0, 1, 4)], [whole(1, 1, 4)]])
    assert set(first.devices).isdisjoint(second.devices)


def test_choices_are_made_again_when_memory_runs_out() -> None:
    """The flow would draw b onto a's node, where there is no room then for the wide c; b must go elsewhere."""
    a = metaop("a", times={4: 1.0}, memory={4: 60.0}, output_bytes=5.0)
    b = metaop("b", times={4: 1.0}, memory={4: 40.0})
    c = metaop("c", times={8: 1.0}, memory={8: 30.0})
    slices = run(
        graph(a, b, c, flows="a>b b>c"), [[whole(0, 1, 4)], [whole(1, 1, 4)], [whole(2, 1, 8)]], memory_bytes=100
    )
    by_name = {s.metaop: s.devices for s in slices}
    assert by_name["a"] == (0, 1, 2, 3)
    assert by_name["b"] == (4, 5, 6, 7)


def test_a_chain_too_large_for_one_node_is_cut() -> None:
    """Four layers of 30 bytes each on nodes of 100: no node holds all, two hold two each."""
    metagraph = graph(metaop("a", 4, times={4: 1.0}, memory={4: 120.0}))
    slices = run(metagraph, [[whole(0, 4, 4)]], memory_bytes=100)
    assert [(s.first_layer, s.num_layers) for s in slices] == [(0, 2), (2, 2)]
    assert set(slices[0].devices).isdisjoint(slices[1].devices)


def test_what_fits_nowhere_is_infeasible() -> None:
    """Each fits alone, both need the one node: the error names MetaOp, bytes and remedy."""
    metagraph = graph(metaop("a", times={3: 1.0}, memory={3: 70.0}), metaop("b", times={3: 1.0}, memory={3: 50.0}))
    with pytest.raises(InfeasibleError, match=r"MetaOp 'b': layers 0\.\.0 need .* on each of 3 devices .* recompute"):
        run(metagraph, [[whole(0, 1, 3)], [whole(1, 1, 3)]], nodes=1, memory_bytes=100)


def test_without_barrier_a_piece_starts_when_its_data_is_there() -> None:
    """b waits for a only; the longer c of the same wave does not hold it back."""
    metagraph = graph(
        metaop("a", times={2: 1.0}), metaop("c", times={2: 3.0}), metaop("b", times={2: 1.0}), flows="a>b"
    )
    waves = [[whole(0, 1, 2), whole(1, 1, 2)], [whole(2, 1, 2)]]
    assert {s.metaop: s.start_s for s in run(metagraph, waves, nodes=1)} == {"a": 0.0, "c": 0.0, "b": 1.0}
    assert {s.metaop: s.start_s for s in run(metagraph, waves, nodes=1, aligned=True)} == {"a": 0.0, "c": 0.0, "b": 3.0}


def test_slices_that_go_on_are_joined() -> None:
    metagraph = graph(metaop("a", 3, times={4: 1.0}))
    waves = [[WaveSlice(op=0, first_layer=i, num_layers=1, count=4)] for i in range(3)]
    (only,) = run(metagraph, waves, nodes=1)
    assert (only.first_layer, only.num_layers, only.end_s) == (0, 3, 3.0)
    assert len(run(metagraph, waves, nodes=1, aligned=True)) == 3


def test_strict_waves_may_spill_over_nodes() -> None:
    """Two and two of four are taken in each node by a wave of 3 + 3 + 2: the last must straddle."""
    metagraph = graph(*(metaop(name, times={n: 1.0}) for name, n in (("a", 3), ("b", 3), ("c", 2))))
    slices = run(metagraph, [[whole(0, 1, 3), whole(1, 1, 3), whole(2, 1, 2)]], aligned=True)
    assert {s.metaop: s.devices for s in slices}["c"] == (3, 7)
    assert {s.start_s for s in slices} == {0.0}


def test_a_piece_with_named_devices_runs_there() -> None:
    metagraph = graph(metaop("a"))
    (only,) = run(metagraph, [[WaveSlice(op=0, first_layer=0, num_layers=1, count=2, devices=(5, 7))]])
    assert only.devices == (5, 7)
