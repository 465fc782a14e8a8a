"""Sharded parameters: what they cost, when a plan takes them, and what the checker says of them."""

from dataclasses import replace
from typing import Any

import pytest

from spindle.cost.layout import sharded_s
from spindle.cost.metaops import with_costs
from spindle.cost.roofline import OperatorTime
from spindle.cost.sampled import Costed
from spindle.cost.shards import all_sharded, shardable
from spindle.errors import InfeasibleError, WorkloadError
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import dumps, loads
from spindle.planner import choose
from spindle.planner.baselines.alternatives import FSDP, Choice, alternatives
from spindle.planner.check import check_plan
from spindle.planner.choose import solve_fitting
from spindle.planner.solve import solve, usual_ways_fit
from spindle.planner.turns import solve_in_turns
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.values.cluster import Cluster
from spindle.values.contract import contract
from spindle.values.cost_options import CostOptions, memory_choices, sharded_choices
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Alternative, Plan
from spindle.values.turns import Turns

SPEC = """
format: spindle.workload
version: 1
name: vl
components:
  vision: {layers: 8, hidden: 512, heads: 8, tokens: 64}
  lm: {layers: 24, hidden: 2048, heads: 16, tokens: 128}
tasks:
  a: {batch_size: 64, flow: [vision, lm]}
  b: {batch_size: 32, flow: [vision, lm]}
"""
CLUSTER = parse_cluster("1x8:a100-80g")
SHARDED = CostOptions(shard_parameters=("lm",))


@pytest.fixture(scope="module")
def metagraph() -> MetaGraph:
    return contract(build_graph(parse_workload(SPEC)))


def with_memory(num_bytes: float) -> Cluster:
    return replace(CLUSTER, device=replace(CLUSTER.device, memory_bytes=num_bytes))


def quick(costed: Costed, cluster: Cluster, share: float = 1.0) -> Plan:
    return solve(costed.metagraph, cluster, time_limit_s=0.05)


def sequential(graph: MetaGraph, cluster: Cluster = CLUSTER) -> Plan:
    return replace(solve(graph, cluster, method="sequential"), shard_parameters=SHARDED.shard_parameters)


# -- costs ------------------------------------------------------------------------------------------------------------


def test_each_device_holds_an_eighth_and_two_layers(metagraph: MetaGraph) -> None:
    """Parameters, gradients and states divided by eight, activations as they were; layers run on all devices only."""
    plain, cut = with_costs(metagraph, CLUSTER), with_costs(metagraph, CLUSTER, cost_options=SHARDED)
    for whole, part in zip(plain, cut, strict=True):
        if part.component != "lm":
            assert part == whole
            continue
        assert list(part.times) == [8]
        assert not part.tensor_parallel
        assert part.layer_state_bytes == pytest.approx(whole.layer_state_bytes / 8)
        elsewhere = whole.layers * whole.layer_state_bytes * 7 / 8
        assert part.memory[8] == pytest.approx(whole.memory[8] - elsewhere)
        assert part.gathered_bytes == pytest.approx(4 * whole.layer_param_bytes)
        assert part.layer_param_bytes == 0
        assert part.layer_update_s == whole.layer_update_s


def test_a_gather_each_way_and_a_scatter_beside_computation(metagraph: MetaGraph) -> None:
    plain, cut = with_costs(metagraph, CLUSTER)["a.lm"], with_costs(metagraph, CLUSTER, cost_options=SHARDED)["a.lm"]
    time = OperatorTime(plain.times[8] * plain.forward_fraction, plain.times[8] * (1 - plain.forward_fraction))
    due = sharded_s(time, plain.layer_param_bytes, CLUSTER, 8)
    assert cut.times[8] == pytest.approx(due.total_s)
    assert cut.forward_fraction == pytest.approx(due.forward_s / due.total_s, rel=0.01)


def test_nothing_is_reduced_and_each_device_steps_its_part(metagraph: MetaGraph) -> None:
    """A step's update takes an eighth; with the vision tower's states sharded too, of all."""
    steps = [sequential(with_costs(metagraph, CLUSTER, cost_options=p)) for p in (CostOptions(), SHARDED)]
    lm, vision = (
        sum(m.layers * m.layer_update_s for m in steps[0].metagraph or () if (m.component, m.task) == (name, "a"))
        for name in ("lm", "vision")
    )
    assert steps[0].update_s == pytest.approx(lm + vision, rel=0.05)
    assert steps[1].update_s == pytest.approx(lm / 8 + vision, rel=0.05)
    assert steps[1].reduction_s < steps[0].reduction_s


def test_fsdp2_is_the_same_function_of_all_metaops(metagraph: MetaGraph) -> None:
    """Where both shard everything and nothing else differs, our plan in sequence and the alternative agree."""
    cost_options = CostOptions(shard_parameters=("lm", "vision"))
    own = with_costs(metagraph, CLUSTER, cost_options=cost_options)
    other = all_sharded(with_costs(metagraph, CLUSTER), CLUSTER)
    for one, two in zip(own, other, strict=True):
        figures = [(m.times[8], m.memory[8], m.gathered_bytes, m.layer_state_bytes) for m in (one, two)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3)  # the share of forward differs a little by count
    plan = sequential(own)
    (found,) = (a for a in alternatives([Choice(with_costs(metagraph, CLUSTER))], CLUSTER) if a.name == FSDP)
    assert found.step_s == pytest.approx(plan.step_s, rel=0.02)


def test_what_cannot_run_on_all_devices_is_refused() -> None:
    graph = contract(build_graph(parse_workload(SPEC.replace("batch_size: 32", "batch_size: 12"))))
    why = r"component 'lm' are to be sharded over all 8 devices, .* runs 12 samples, which these do not share evenly"
    with pytest.raises(InfeasibleError, match=why):
        with_costs(graph, CLUSTER, cost_options=SHARDED)
    assert shardable(graph, CLUSTER, CostOptions()) == ()
    mixing = replace(graph, metaops=tuple(_mixing(m) if m.component == "lm" else m for m in graph))
    with pytest.raises(InfeasibleError, match=r"mixes samples, so that it runs on one"):
        with_costs(mixing, CLUSTER, cost_options=SHARDED)


def _mixing(metaop: MetaOp) -> MetaOp:
    return replace(metaop, operators=tuple(replace(operator, splittable=False) for operator in metaop.operators))


def test_one_device_has_nothing_to_shard(metagraph: MetaGraph) -> None:
    alone = parse_cluster("1x1:a100-80g")
    assert with_costs(metagraph, alone, cost_options=SHARDED) == with_costs(metagraph, alone)


def test_which_components_may_be_sharded(metagraph: MetaGraph) -> None:
    """The largest first; not those that are nearly nothing, forbidden, or stepped as whole matrices."""
    assert shardable(metagraph, CLUSTER, CostOptions()) == ("lm",)  # the vision tower has 2 % of all
    assert shardable(metagraph, CLUSTER, CostOptions(never_sharded=("lm",))) == ()
    assert shardable(metagraph, CLUSTER, CostOptions(optimizer="muon")) == ()
    assert shardable(metagraph, CLUSTER, SHARDED) == ()
    found = sharded_choices(CostOptions(), ("x", "b"))
    assert [(c.shard_parameters, c.recompute, c.shard_optimizer) for c in found] == [
        (("x",), False, True),
        (("x",), True, True),
        (("b", "x"), False, True),
        (("b", "x"), True, True),
    ]


def test_a_spec_says_so() -> None:
    text = SPEC.replace("name: vl\n", "name: vl\nshard_parameters: [lm]\n")
    assert parse_workload(text).cost_options.shard_parameters == ("lm",)
    with pytest.raises(
        WorkloadError, match=r"'llm', which is no component \(did you mean 'lm'\?\); the components are lm, vision"
    ):
        parse_workload(text.replace("[lm]", "[llm]"))


# -- choice -----------------------------------------------------------------------------------------------------------


def in_turns(costed: Costed, cluster: Cluster, share: float, turns: Turns) -> Plan:
    return solve_in_turns(costed.metagraph, cluster, turns, time_limit_s=0.05)


def fits(graph: MetaGraph, cluster: Cluster, choice: CostOptions) -> bool:
    try:
        return solve(with_costs(graph, cluster, cost_options=choice), cluster, method="sequential").memory.fits
    except InfeasibleError:
        return False


@pytest.mark.parametrize("gib", [5.0, 4.0])
def test_a_plan_where_nothing_else_fits(metagraph: MetaGraph, gib: float) -> None:
    """The language model's layers fit no device with all of them; the plan says what it chose, and keeps all rules."""
    cluster = with_memory(gib * 2**30)
    assert not any(fits(metagraph, cluster, choice) for choice in memory_choices(CostOptions()))
    made, cost_options = solve_fitting(
        metagraph, cluster, quick, all_fit=usual_ways_fit, in_turns=in_turns, with_alternatives=True
    )
    made = replace(made, shard_parameters=cost_options.shard_parameters)
    assert made.memory.fits
    assert check_plan(made) == ()
    if cost_options.shard_parameters:
        assert cost_options.shard_parameters == ("lm",)
        assert all(len(s.devices) == 8 for s in made if ".lm" in s.metaop)
    assert loads(dumps(made), Plan) == made


def test_quicker_than_all_else(metagraph: MetaGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FSDP2 is the quickest alternative and beats the plan, sharding is tried, and taken when it is worth it."""
    found: list[CostOptions] = []

    def solved(costed: Costed, cluster: Cluster, share: float) -> Plan:
        cut = any(m.is_sharded for m in costed.metagraph)
        found.extend([SHARDED] if cut else [CostOptions()])
        made = quick(costed, cluster)
        return made if cut else replace(made, step_s=9 * made.step_s)

    other = Alternative(name=FSDP, step_s=1e-6)
    monkeypatch.setattr(choose, "_alternatives", lambda *_: (other,))
    _, cost_options = solve_fitting(metagraph, CLUSTER, solved, all_fit=usual_ways_fit, with_alternatives=True)
    assert found[-1] == SHARDED
    assert cost_options.shard_parameters == ("lm",)
    monkeypatch.setattr(choose, "_alternatives", lambda *_: (replace(other, name="DDP"),))
    _, cost_options = solve_fitting(metagraph, CLUSTER, solved, all_fit=usual_ways_fit, with_alternatives=True)
    assert cost_options.shard_parameters == ()


# -- checker ----------------------------------------------------------------------------------------------------------


def moved(plan: Plan, **changes: Any) -> Plan:
    """The first slice of the language model, changed."""
    waves = []
    done = False
    for wave in plan.waves:
        slices = []
        for s in wave.slices:
            hit = not done and s.metaop == "a.lm"
            done |= hit
            slices.append(replace(s, **changes) if hit else s)
        waves.append(replace(wave, slices=tuple(slices)))
    return replace(plan, waves=tuple(waves))


def test_the_checker_knows_the_rules(metagraph: MetaGraph) -> None:
    plan = sequential(with_costs(metagraph, CLUSTER, cost_options=SHARDED))
    assert check_plan(plan) == ()
    assert plan.metagraph is not None
    reduced = tuple(replace(m, layer_param_bytes=1.0) if m.name == "a.lm" else m for m in plan.metagraph)
    faults: list[tuple[Plan, str]] = [
        (moved(plan, devices=(0, 1, 2, 3)), "run on different devices"),
        (replace(plan, shard_parameters=()), "costed with sharded parameters, but shard_parameters does not name"),
        (replace(plan, shard_parameters=("lm", "ear")), "shard_parameters names component 'ear', of which the plan"),
        (
            replace(plan, metagraph=replace(plan.metagraph, metaops=reduced)),
            "layer_param_bytes are reduced after backward",
        ),
        (
            replace(plan, memory=replace(plan.memory, peak_bytes_per_device=tuple(
                peak - 4 * with_costs(metagraph, CLUSTER)["a.lm"].layer_param_bytes
                for peak in plan.memory.peak_bytes_per_device
            ))),
            "bytes but the plan says",
        ),
    ]  # fmt: skip
    for faulty, message in faults:
        findings = [str(finding) for finding in check_plan(faulty)]
        assert any(message in finding for finding in findings), (message, findings)
