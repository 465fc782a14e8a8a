"""Islands: components that stay in a node each, where gradients would cross a slow link."""

from dataclasses import replace

import pytest

from spindle.planner.check import check_plan
from spindle.planner.islands import is_slow_between_nodes, island_pins
from spindle.planner.problem import make_problem
from spindle.planner.solve import solve
from spindle.values.cluster import Cluster, Link
from spindle.values.metagraph import MetaGraph
from tests.planner.planner_graphs import cluster, graph, metaop

TIMES = {1: 4.0, 2: 2.0, 4: 1.0}


def towers(size: float = 4.0) -> MetaGraph:
    """Two tasks of two towers each, which share them; a tower's gradients have `size` bytes a layer."""
    return graph(
        *(
            metaop(f"{task}.{part}", 2, TIMES, layer_param_bytes=size, parameters=part)
            for task in "xy"
            for part in ("eye", "ear")
        ),
        *(metaop(f"{task}.loss", times={1: 0.01}) for task in "xy"),
        flows=" ".join(f"{task}.{part}>{task}.loss" for task in "xy" for part in ("eye", "ear")),
    )


def slow(rate: float, nodes: int = 2) -> Cluster:
    """Links of 100 bytes a second in a node, and of `rate` between nodes."""
    made = cluster(nodes, 2)
    return replace(
        made, intra_node=Link(bytes_per_s=100.0, latency_s=0.0), inter_node=Link(bytes_per_s=rate, latency_s=0)
    )


@pytest.mark.parametrize(("rate", "nodes", "expected"), [(1.0, 2, True), (1000.0, 2, False), (1.0, 8, False)])
def test_which_links_are_slow(rate: float, nodes: int, expected: bool) -> None:
    """Few nodes, and a reduction over all devices that takes a good part of the bound."""
    assert is_slow_between_nodes(make_problem(towers(), slow(rate, nodes)), 8.0) is expected


def test_a_component_stays_in_one_node() -> None:
    """Each has one node; what has no parameters is free."""
    pins = island_pins(make_problem(towers(), slow(1.0)))
    assert pins == {"x.eye": (2, 3), "y.eye": (2, 3), "x.ear": (0, 1), "y.ear": (0, 1)}


def test_gradients_stay_on_their_side_of_a_slow_link() -> None:
    """Side by side in a node each 8 s and little to reduce; on all devices 8 s, and 16 bytes over the slow link."""
    made = solve(towers(), slow(1.0), time_limit_s=0.5)
    assert check_plan(made) == ()
    nodes: dict[str, set[int]] = {}
    for s in made.slices:
        nodes.setdefault(s.metaop.partition(".")[2], set()).update(device // 2 for device in s.devices)
    assert len(nodes["eye"]) == len(nodes["ear"]) == 1
    assert made.step_s < 0.75 * dict(made.baseline_steps_s)["sequential"]


def test_islands_that_gain_nothing_are_left() -> None:
    """On fast links the plan is what it was."""
    assert not is_slow_between_nodes(make_problem(towers(0.001), slow(1.0)), 8.0)
    assert solve(towers(0.001), slow(1.0), time_limit_s=0.5).makespan_s == pytest.approx(8.0, rel=0.02)
