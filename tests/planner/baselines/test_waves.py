import pytest

from spindle.planner.baselines.allocate import Tuple
from spindle.planner.baselines.waves import Waves, level_optimum_s, paper_waves, slice_waves
from spindle.planner.costing.curves import Curve
from spindle.planner.problem import make_problem
from tests.planner.planner_graphs import cluster, graph, metaop

# MetaOps 1, 2, 4, 5, 6 of the paper's Fig. 5b, with times under which its trace is the right one
FIG_5B = {
    1: (Curve((4, 8), (2.5, 1.4)), (Tuple(8, 2), Tuple(4, 9))),
    2: (Curve((1, 2), (2.5, 1.25)), (Tuple(2, 14), Tuple(1, 2))),
    4: (Curve((1, 2), (5 / 3, 1.0)), (Tuple(2, 3), Tuple(1, 13))),
    5: (Curve((1,), (2.5,)), (Tuple(1, 6),)),
    6: (Curve((1,), (0.7,)), (Tuple(1, 6),)),
}


def trace(waves: Waves, names: list[int]) -> list[dict[int, str]]:
    """Each wave as {MetaOp: "count x layers"}."""
    return [{names[p.op]: f"{p.count}x{p.num_layers}" for p in wave} for wave in waves]


def test_figure_5b_trace() -> None:
    """Eight devices, MetaLevel 1: the four waves of the paper, MetaOp 4 extended to two devices in the last."""
    curves, tuples = zip(*FIG_5B.values(), strict=True)
    assert trace(slice_waves(curves, tuples, 8), list(FIG_5B)) == [
        {1: "8x2"},
        {1: "4x1", 2: "2x2", 4: "2x3"},
        {1: "4x6", 2: "2x12", 4: "1x9", 5: "1x6"},
        {1: "4x2", 2: "1x2", 4: "2x4", 6: "1x6"},
    ]


def test_layers_are_numbered_through() -> None:
    """First layers go on where the wave before stopped."""
    curves, tuples = zip(*FIG_5B.values(), strict=True)
    firsts = [p.first_layer for wave in slice_waves(curves, tuples, 8) for p in wave if p.op == 0]
    assert firsts == [0, 2, 3, 9]


def test_each_wave_ends_a_tuple() -> None:
    """At most as many waves as tuples (paper, section 3.4)."""
    curves, tuples = zip(*FIG_5B.values(), strict=True)
    assert len(slice_waves(curves, tuples, 8)) <= sum(map(len, tuples))


def test_levels_follow_each_other() -> None:
    """Two encoders side by side on two devices each, then the loss on all four."""
    metagraph = graph(metaop("t.a", 2), metaop("t.b", 2), metaop("t.loss"), flows="t.a>t.loss t.b>t.loss")
    problem = make_problem(metagraph, cluster())
    assert [[(p.op, p.count, p.num_layers) for p in wave] for wave in paper_waves(problem)] == [
        [(0, 2, 2), (1, 2, 2)],
        [(2, 4, 1)],
    ]
    assert level_optimum_s(problem) == pytest.approx(10.0)
