"""Memory choices: the first that leaves room is taken, or what is shorter; shared layers stand in memory once."""

from dataclasses import replace

import pytest

from spindle.cost.metaops import with_costs
from spindle.cost.sampled import Costed
from spindle.errors import InfeasibleError
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import dumps, loads
from spindle.planner.check import check_plan
from spindle.planner.choose import solve_fitting
from spindle.planner.solve import solve, usual_ways_fit
from spindle.planner.turns import solve_in_turns
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.values.cluster import Cluster
from spindle.values.contract import contract
from spindle.values.cost_options import CostOptions, memory_choices
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan, without_operators
from spindle.values.turns import Turns

SPEC = """
format: spindle.workload
version: 1
name: text
components:
  text: {layers: 6, hidden: 512, heads: 8, tokens: 128}
tasks:
  t: {batch_size: 64, flow: [text]}
  again: {batch_size: 64, flow: [text]}
"""
CLUSTER = parse_cluster("1x4:a100-80g")


@pytest.fixture(scope="module")
def metagraph() -> MetaGraph:
    return contract(build_graph(parse_workload(SPEC)))


def plan(costed: Costed, cluster: Cluster, share: float = 1.0) -> Plan:
    return solve(costed.metagraph, cluster, method="paper")


def with_memory(num_bytes: float) -> Cluster:
    return replace(CLUSTER, device=replace(CLUSTER.device, memory_bytes=num_bytes))


def peak(metagraph: MetaGraph, cost_options: CostOptions) -> float:
    return max(
        plan(Costed(with_costs(metagraph, CLUSTER, cost_options=cost_options)), CLUSTER).memory.peak_bytes_per_device
    )


def test_the_first_choice_that_leaves_room_is_taken(metagraph: MetaGraph) -> None:
    plain, both = CostOptions(), CostOptions(shard_optimizer=True, recompute=True)
    roomy = solve_fitting(metagraph, with_memory(2 * peak(metagraph, plain)), plan)
    assert roomy[1] == plain
    tight = solve_fitting(metagraph, with_memory(1.2 * peak(metagraph, both)), plan)
    assert tight[1] != plain
    assert tight[0].memory.fits
    with pytest.raises(InfeasibleError):
        solve_fitting(metagraph, with_memory(1e6), plan)


UNEVEN = """
format: spindle.workload
version: 1
name: uneven
components:
  small: {layers: 2, hidden: 256, heads: 4, tokens: 64}
  large: {layers: 12, hidden: 1024, heads: 16, tokens: 256}
tasks:
  a: {batch_size: 16, flow: [small]}
  b: {batch_size: 16, flow: [large]}
"""


@pytest.mark.parametrize("share", [1.0, 0.95, 0.7, 0.5])
def test_no_usual_way_is_shorter_under_any_memory_choice_regression(share: float) -> None:
    """A plan that just fits may idle where all tasks in sequence with sharded states would not."""
    graph = contract(build_graph(parse_workload(UNEVEN)))
    cluster = with_memory(share * peak(graph, CostOptions()))

    shares = []

    def solved(costed: Costed, where: Cluster, share: float) -> Plan:
        shares.append(share)
        return solve(costed.metagraph, where, time_limit_s=0.05)

    made, _ = solve_fitting(graph, cluster, solved, all_fit=usual_ways_fit)
    assert sum(shares) == pytest.approx(1.0)
    assert made.memory.fits
    for choice in memory_choices(CostOptions()):
        for method in ("sequential", "task_split", "component_split", "paper"):
            try:
                usual = solve(with_costs(graph, cluster, cost_options=choice), cluster, method=method)
            except InfeasibleError:
                continue
            assert made.step_s <= usual.step_s * 1.011, (choice, method)


MANY = """
format: spindle.workload
version: 1
name: many
components:
  tower: {layers: 12, hidden: 256, heads: 4, tokens: 512}
tasks:
  a: {batch_size: 32, flow: [tower]}
  b: {batch_size: 32, flow: [tower]}
  c: {batch_size: 32, flow: [tower]}
  d: {batch_size: 32, flow: [tower]}
"""


def test_turns_are_taken_before_anything_is_computed_again() -> None:
    """Activations of four tasks do not fit, those of two do: nothing is recomputed, no time limit is given twice."""
    graph = contract(build_graph(parse_workload(MANY)))
    cluster = with_memory(0.6 * peak(graph, CostOptions()))
    shares = []

    def solved(costed: Costed, cluster: Cluster, share: float) -> Plan:
        shares.append(share)
        return solve(costed.metagraph, cluster, time_limit_s=0.05)

    def in_turns(costed: Costed, cluster: Cluster, share: float, turns: Turns) -> Plan:
        shares.append(share)
        return solve_in_turns(costed.metagraph, cluster, turns, time_limit_s=0.05)

    at_once, cost_options = solve_fitting(graph, cluster, solved, all_fit=usual_ways_fit)
    assert cost_options.recompute
    assert at_once.memory.fits
    shares.clear()
    made, cost_options = solve_fitting(graph, cluster, solved, all_fit=usual_ways_fit, in_turns=in_turns)
    assert not cost_options.recompute
    assert made.turns == (("a", "b"), ("c", "d"))
    assert check_plan(made) == ()
    assert made.step_s < 0.9 * at_once.step_s
    assert sum(shares) <= 1.0
    by_name, cost_options = solve_fitting(graph, cluster, plan, in_turns=in_turns)
    assert (by_name.turns, cost_options) == (made.turns, CostOptions())


def test_room_for_all_tasks_needs_no_turns(metagraph: MetaGraph) -> None:
    def in_turns(costed: Costed, cluster: Cluster, share: float, turns: Turns) -> Plan:
        raise AssertionError("memory is not short")

    made, _ = solve_fitting(metagraph, CLUSTER, plan, all_fit=usual_ways_fit, in_turns=in_turns)
    assert made.turns == ()


def test_costs_from_a_file_offer_no_choice(metagraph: MetaGraph) -> None:
    given = without_operators(with_costs(metagraph, CLUSTER))
    assert solve_fitting(given, CLUSTER, plan)[1] == CostOptions()


def test_shared_state_of_a_layer(metagraph: MetaGraph) -> None:
    """Sixteen bytes a parameter with Adam in sixteen bits; divided states only where they are sharded."""
    parameters = sum(p.num_bytes // 2 for p in metagraph["t.text"].operators[0].parameters)
    costed = with_costs(metagraph, CLUSTER)["t.text"]
    assert costed.layer_state_bytes == pytest.approx(16 * parameters)
    sharded = with_costs(metagraph, CLUSTER, cost_options=CostOptions(shard_optimizer=True))["t.text"]
    assert sharded.layer_state_bytes == pytest.approx((4 + 12 / 4) * parameters)
    graph = without_operators(with_costs(metagraph, CLUSTER))
    assert loads(dumps(graph), MetaGraph) == graph
