import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.files.formats import dumps, loads
from spindle.planner.bounds.bound import Bound, lower_bound, tightened
from spindle.planner.bounds.timed import timed_bound, worth
from spindle.planner.check import check_plan
from spindle.planner.problem import Problem, make_problem
from spindle.planner.solve import solve
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Certificate, Plan, TimePrices
from tests.laws.planner_strategies import clusters, metagraphs
from tests.planner.planner_graphs import cluster, graph, metaop

# two encoders that one device runs in 1 s each, each followed by 8 device-seconds that any count divides, on 4 devices
LATE = graph(
    *(metaop(name, 1, {1: 1.0}) for name in ("a.in", "b.in")),
    *(metaop(name, 4, {1: 2.0, 2: 1.0, 4: 0.5}) for name in ("a.out", "b.out")),
    flows="a.in>a.out b.in>b.out",
)


def prove(problem: Problem, units: float = 5e4) -> TimePrices | None:
    return timed_bound(problem, lower_bound(problem).bound_s, 1e9, units)


def test_what_must_wait_cannot_fill_devices_at_the_start() -> None:
    """In the first second two of four devices idle, so 18 device-seconds take 5 s; device time and chains say 4.5 s."""
    problem = make_problem(LATE, cluster())
    assert lower_bound(problem).bound_s == pytest.approx(4.5)
    prices = prove(problem, units=1e6)
    assert prices is not None
    assert 4.995 < prices.horizon_s <= 5.0
    assert worth(problem, prices) > 1


def test_prices_by_hand() -> None:
    """Device time after the first second is worth 1 a second: 16 of the outs at least, and 4 (C - 1) there are."""
    problem = make_problem(LATE, cluster())
    by_hand = TimePrices(edges_s=(0.0, 1.0, 4.9), device_prices=(0.0, 1.0))
    assert worth(problem, by_hand) == pytest.approx(16 / 15.6)
    assert worth(problem, replace(by_hand, edges_s=(0.0, 1.0, 5.1))) == pytest.approx(16 / 16.4)


def test_no_room_is_a_proof_too() -> None:
    """a takes 1 s, then b 2 s at least: nothing fits 2.9 s, whatever the prices."""
    chain = make_problem(graph(metaop("a", 1, {1: 1.0}), metaop("b", 2, {1: 2.0, 2: 1.0}), flows="a>b"), cluster(1, 2))
    prices = TimePrices(edges_s=(0.0, 3.1), device_prices=(1.0,))
    assert worth(chain, prices) == pytest.approx(5 / 6.2)
    assert worth(chain, replace(prices, edges_s=(0.0, 2.9))) == float("inf")


def test_without_gap_or_work_the_bound_stays() -> None:
    problem = make_problem(LATE, cluster())
    bound = lower_bound(problem)
    assert tightened(problem, bound, 4.51, 10.0) is bound
    assert tightened(problem, bound, 5.0, 0.001) is bound
    better = tightened(problem, bound, 5.0, 10.0)
    assert better.kind == "tix"
    assert better.certificate == replace(bound.certificate, over_time=better.certificate.over_time)


def test_many_metaops_are_left_alone() -> None:
    many = make_problem(graph(*(metaop(f"t.{i}") for i in range(41))), cluster())
    assert timed_bound(many, 1.0, 2.0, 1e12) is None


def test_the_same_input_gives_the_same_prices() -> None:
    problem = make_problem(LATE, cluster())
    assert prove(problem) == prove(problem)


# --------------------------------------------------------------------------------------------------------- validity


def random_makespan_s(problem: Problem, seed: int) -> float:
    """A valid schedule: layers in any order that flows allow, on any counts, each as soon as devices are free."""
    rng = random.Random(seed)
    done, ends_s, free_s = [0] * len(problem), [0.0] * len(problem), [0.0] * problem.num_devices
    while ready := [
        m
        for m in range(len(problem))
        if done[m] < problem.layers[m] and all(done[p] == problem.layers[p] for p in problem.predecessors[m])
    ]:
        m = rng.choice(ready)
        count, time_s = rng.choice(list(problem.curves[m].time_by_count.items()))
        free_s.sort()
        start_s = max(free_s[count - 1], ends_s[m], *(ends_s[p] for p in problem.predecessors[m]), 0.0)
        free_s[:count] = [start_s + time_s] * count
        ends_s[m] = start_s + time_s
        done[m] += 1
    return max(ends_s)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(metagraphs(plannable=1, traffic=False), clusters(), st.integers(0, 99))
def test_no_schedule_is_shorter(metagraph: MetaGraph, where: Cluster, seed: int) -> None:
    """Whatever curves and flows: neither a planned nor a random schedule ends by the horizon."""
    problem = make_problem(metagraph, where)
    prices = prove(problem)
    plan = solve(metagraph, where, time_limit_s=0.003)
    made_s = [plan.makespan_s, *(random_makespan_s(problem, seed + i) for i in range(20))]
    if prices is not None:
        assert prices.horizon_s <= min(made_s) * (1 + 1e-9)
        claimed = replace(plan, lower_bound_s=prices.horizon_s, certificate=Certificate(over_time=prices))
        assert check_plan(claimed) == ()  # the checker sees the same proof


@st.composite
def any_prices(draw: st.DrawFn, metagraph: MetaGraph, horizon_s: float) -> TimePrices:
    """Prices of any size over up to five intervals that end at the horizon."""
    lengths = draw(st.lists(st.floats(0.1, 1.0), min_size=1, max_size=5))
    edges = [horizon_s * sum(lengths[:k]) / sum(lengths) for k in range(len(lengths))]
    prices = st.lists(st.floats(0.0, 4.0), min_size=len(lengths), max_size=len(lengths)).map(tuple)
    waits = tuple((flow.source, flow.target, draw(prices)) for flow in metagraph.flows)
    return TimePrices(edges_s=(*edges, horizon_s), device_prices=draw(prices.filter(any)), wait_prices=waits)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data(), metagraphs(plannable=1, traffic=False, max_size=4), clusters())
def test_no_prices_prove_what_is_false(data: st.DataObject, metagraph: MetaGraph, where: Cluster) -> None:
    """The checker takes no prices for a proof that a plan which exists does not, not even by rounding."""
    plan = solve(metagraph, where, method="paper")
    prices = data.draw(any_prices(metagraph, plan.makespan_s * 1.000001))
    claimed = replace(plan, lower_bound_s=plan.makespan_s, certificate=Certificate(over_time=prices))
    assert any("proves only" in str(finding) for finding in check_plan(claimed))


# ---------------------------------------------------------------------------------------------------------- checker


def proved_plan() -> Plan:
    """LATE's optimal plan with the bound over time."""
    return solve(LATE, cluster(), time_limit_s=10.0)


def over_time(plan: Plan) -> TimePrices:
    assert plan.certificate is not None
    assert plan.certificate.over_time is not None
    return plan.certificate.over_time


def tampered(plan: Plan, prices: TimePrices) -> Plan:
    assert plan.certificate is not None
    return replace(plan, certificate=replace(plan.certificate, over_time=prices))


def test_the_checker_finds_a_proof_that_is_none() -> None:
    """A later horizon, a moved edge, other prices of devices or waits: each leaves the claim without proof."""
    plan = proved_plan()
    assert check_plan(plan) == ()
    prices = over_time(plan)
    edges, dear = prices.edges_s, next(k for k, price in enumerate(prices.device_prices) if price)
    edges, dear = prices.edges_s, next(k for k, price in enumerate(prices.device_prices) if price)
    later = replace(prices, edges_s=(*edges[:-1], 5.0))
    moved = replace(prices, edges_s=(*edges[:dear], (edges[dear - 1] + edges[dear]) / 2, *edges[dear + 1 :]))
    raised = [3 * price if k == dear else price for k, price in enumerate(prices.device_prices)]
    waits = (("a.in", "a.out", tuple(0.5 for _ in prices.device_prices)),)
    for broken in (
        replace(tampered(plan, later), lower_bound_s=later.horizon_s),
        tampered(plan, moved),
        tampered(plan, replace(prices, device_prices=tuple(raised))),
        tampered(plan, replace(prices, wait_prices=waits)),
    ):
        assert any("its certificate proves only 4.5" in str(finding) for finding in check_plan(broken))


def test_the_checker_knows_the_flows() -> None:
    plan = proved_plan()
    prices = over_time(plan)
    wrong = replace(prices, wait_prices=(("a.out", "a.in", prices.device_prices),))
    (found,) = check_plan(tampered(plan, wrong))
    assert str(found) == "the certificate prices a flow a.out -> a.in that the MetaGraph does not have"


def test_the_checker_bears_a_plan_for_too_few_devices() -> None:
    """b.out then runs on no count that there is: findings, not a crash."""
    wide = (*LATE.metaops[:3], replace(LATE.metaops[3], layer_time_s=((4, 0.5),)))
    few = replace(proved_plan(), num_devices=2, metagraph=MetaGraph(wide, LATE.flows), cluster=None)
    assert any("valid counts are 4" in str(finding) or "has 2 devices" in str(finding) for finding in check_plan(few))


def test_prices_survive_a_file() -> None:
    plan = proved_plan()
    assert loads(dumps(plan), Plan) == plan


def test_kind_and_value_go_together() -> None:
    """The plan's bound is the horizon."""
    problem = make_problem(LATE, cluster())
    bound: Bound = tightened(problem, lower_bound(problem), 5.0, 10.0)
    assert bound.certificate.over_time is not None
    assert bound.bound_s == bound.certificate.over_time.horizon_s
