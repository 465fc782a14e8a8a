"""A larger time limit is never worse: what a search finds in a small budget of work, it finds first in a larger one."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spindle.errors import InfeasibleError
from spindle.planner.bounds.bound import lower_bound
from spindle.planner.problem import make_problem
from spindle.planner.search.run import search
from spindle.planner.solve import solve
from spindle.planner.work import Work
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from tests.laws.planner_strategies import clusters, metagraphs

FIXED = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMITS_S = st.tuples(st.floats(0, 0.1), st.floats(0, 0.1)).map(sorted)


@settings(FIXED, max_examples=15)
@given(metagraphs(max_size=10, plannable=1, memory=True), clusters(), LIMITS_S, st.integers(0, 9))
def test_a_larger_budget_finds_what_a_smaller_one_finds_first(
    metagraph: MetaGraph, cluster: Cluster, limits_s: list[float], seed: int
) -> None:
    try:
        problem = make_problem(metagraph, cluster)
    except InfeasibleError:
        return
    bound_s = 0.9 * lower_bound(problem).bound_s  # so that no schedule is good enough to stop at
    small, large = (search(problem, bound_s, Work(limit_s, lambda: 0.0), seed=seed) for limit_s in limits_s)
    assert large[: len(small)] == small


@settings(FIXED, max_examples=15)
@given(metagraphs(max_size=10, plannable=1, memory=True), clusters(), LIMITS_S, st.integers(0, 9))
def test_a_larger_limit_never_gives_a_longer_step(
    metagraph: MetaGraph, cluster: Cluster, limits_s: list[float], seed: int
) -> None:
    try:
        small, large = (
            solve(metagraph, cluster, method="lp", time_limit_s=limit_s, seed=seed, clock=lambda: 0.0)
            for limit_s in limits_s
        )
    except InfeasibleError:
        return
    assert (not large.memory.fits, large.step_s) <= (not small.memory.fits, small.step_s)
    assert large.lower_bound_s >= small.lower_bound_s * (1 - 1e-9) or large.gap < 0.003
