from spindle.planner.costing.memory import layer_memory_bytes, peak_bytes, saved_bytes
from tests.planner.planner_graphs import graph, metaop, piece


def test_a_slice_takes_its_share_of_the_chain() -> None:
    """Two of four layers of 40 bytes on device 0, the others on device 1."""
    metagraph = graph(metaop("a", 4, memory={1: 40.0}))
    slices = [piece("a", range(0, 2), (0,), 0, 1), piece("a", range(2, 4), (1,), 1, 2)]
    assert peak_bytes(metagraph, slices, 3) == (20.0, 20.0, 0.0)


def test_a_count_without_memory_takes_the_next_smaller_one() -> None:
    chain = metaop("a", 4, memory={2: 40.0, 8: 8.0})
    assert [layer_memory_bytes(chain, n) for n in (1, 2, 4, 8)] == [10.0, 10.0, 10.0, 2.0]
    assert layer_memory_bytes(metaop("b"), 1) == 0


def test_shared_layers_stand_once() -> None:
    """Weight and gradient of 3 bytes each are saved for the one layer that both hold."""
    metagraph = graph(
        metaop("a", 2, memory={1: 40.0}, parameters="w", layer_param_bytes=3.0),
        metaop("b", 2, memory={1: 40.0}, parameters="w", layer_param_bytes=3.0),
    )
    slices = [piece("a", range(0, 2), (0,), 0, 1), piece("b", range(1, 2), (0,), 1, 2)]
    assert peak_bytes(metagraph, slices, 1) == (60.0 - 6.0,)


def test_no_more_is_saved_than_a_layer_takes() -> None:
    metagraph = graph(metaop("a", 2, memory={1: 8.0, 2: 4.0}, parameters="w", layer_param_bytes=3.0))
    assert saved_bytes(metagraph) == {"w": 2.0}
