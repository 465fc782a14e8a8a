"""Tiny MetaGraphs whose true optimum an exhaustive search finds."""

import random
from collections.abc import Callable

import pytest

from spindle.planner.bounds.bound import lower_bound
from spindle.planner.bounds.timed import timed_bound
from spindle.planner.problem import make_problem
from spindle.planner.solve import solve
from spindle.values.metagraph import Flow, MetaGraph
from tests.optimal.exhaustive import OutOfNodes, optimum_s
from tests.planner.planner_graphs import cluster, graph, metaop


def tiny(seed: int) -> MetaGraph:
    """Two to four MetaOps of one to three layers, six layers at most, on up to four devices."""
    rng = random.Random(seed)
    metaops, left = [], 6
    for i in range(rng.randint(2, 4)):
        layers = min(left, rng.randint(1, 3))
        if layers:
            left -= layers
            serial, parallel = rng.uniform(0.05, 1), rng.uniform(0.5, 4)
            times = {n: serial + parallel / n for n in sorted(rng.sample((1, 2, 3, 4), rng.randint(1, 3)))}
            metaops.append(metaop(f"t{i}.m", layers, times))
    pairs = [(a, b) for b in range(len(metaops)) for a in range(b) if rng.random() < 0.35]
    return MetaGraph(tuple(metaops), tuple(Flow(metaops[a].name, metaops[b].name) for a, b in pairs))


def test_the_search_finds_most_optima() -> None:
    """Of sixty random instances, nearly all are planned to the optimum, and none far from it."""
    missed = []
    for seed in range(60):
        metagraph = tiny(seed)
        plan = solve(metagraph, cluster(1, 4), time_limit_s=0.1)
        try:
            best_s = optimum_s(metagraph, cluster(1, 4), plan.makespan_s, most_nodes=20_000)
        except OutOfNodes:
            continue
        assert plan.lower_bound_s <= best_s * (1 + 1e-9)
        if plan.makespan_s > best_s * (1 + 1e-6):
            missed.append(plan.makespan_s / best_s - 1)
    assert len(missed) <= 3
    assert max(missed, default=0.0) < 0.05


def test_two_chains_side_by_side() -> None:
    """In the head: two layers of 2 s on two devices each beat four layers of 1.5 s on all four."""
    metagraph = graph(metaop("x.a", 2, {2: 2.0, 4: 1.5}), metaop("y.b", 2, {2: 2.0, 4: 1.5}))
    assert solve(metagraph, cluster(1, 4)).makespan_s == pytest.approx(4.0)
    assert optimum_s(metagraph, cluster(1, 4), 100.0) == pytest.approx(4.0)


def odd(seed: int) -> MetaGraph:
    """The same with curves that are no part of any formula: in any order, super-linear, flat."""
    rng = random.Random(seed)
    curves = [{n: rng.uniform(0.2, 4) for n in rng.sample((1, 2, 3, 4), rng.randint(1, 3))} for _ in range(4)]
    metagraph = tiny(seed)
    named = (metaop(m.name, m.layers, times) for m, times in zip(metagraph, curves, strict=False))
    return MetaGraph(tuple(named), metagraph.flows)


@pytest.mark.parametrize("make", [tiny, odd])
def test_prices_over_time_never_prove_more_than_the_optimum(make: Callable[[int], MetaGraph]) -> None:
    """Of fifty graphs of each kind; in some they prove more than device time and chains do."""
    stronger = searched = 0
    for seed in range(50):
        metagraph = make(seed)
        problem = make_problem(metagraph, cluster(1, 4))
        bound_s = lower_bound(problem).bound_s
        prices = timed_bound(problem, bound_s, 1e9, 1e5)
        try:
            best_s = optimum_s(metagraph, cluster(1, 4), 1e9, most_nodes=40_000)
        except OutOfNodes:
            continue
        searched += 1
        if prices is not None:
            assert prices.horizon_s <= best_s * (1 + 1e-9)
            stronger += prices.horizon_s > bound_s * 1.0001
    assert searched >= 40
    assert stronger >= 1
