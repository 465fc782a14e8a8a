"""What the checker says of predicted steps, of the baselines, and of plans edited by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.files.formats import dumps, loads
from spindle.planner.check import check_plan
from spindle.planner.simulate import simulate
from spindle.planner.solve import solve
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan
from tests.laws.planner_strategies import clusters, metagraphs
from tests.planner.planner_graphs import cluster, graph, metaop, piece, plan


def texts(made: Plan) -> list[str]:
    return [str(finding) for finding in check_plan(made)]


# ------------------------------------------------------------------------------------------------------ predicted steps


def stepped(*, load_s: float = 0.0, sharded: bool = False) -> Plan:
    """One layer of 1 s on two devices: its 6 bytes of gradients take 6 s (half there, half back, at 1 byte a second),
    then its update 2 s on each device: 9 s in all, when nothing is loaded and states are not sharded."""
    layer = replace(metaop("a", 1, {2: 1.0}, layer_param_bytes=6.0), layer_update_s=2.0, load_s=load_s)
    made = plan(piece("a", range(1), (0, 1), 0.0, 1.0), metagraph=replace(graph(layer), shard_optimizer=sharded))
    return replace(made, cluster=cluster(), reduction_s=6.0, update_s=2.0, step_s=9.0)


def test_a_step_by_hand() -> None:
    assert texts(stepped()) == []


def test_a_step_with_sharded_states_by_hand() -> None:
    """Each of the two devices gets half of the sums (3 s each), updates its half (1 s) and hands it out (3 s each)."""
    made = stepped(sharded=True)
    assert texts(replace(made, reduction_s=6.0, update_s=1.0 + 6.0, step_s=14.0)) == []
    assert texts(made)


@pytest.mark.parametrize(("name", "load_s", "step_s"), [("cpu", 5.0, 14.0), ("gpu", 5.0, 9.0), ("gpu", 10.0, 10.0)])
def test_a_step_with_a_loader_by_hand(name: str, load_s: float, step_s: float) -> None:
    """On a CPU loading comes on top; beside a GPU it is free until it takes longer than the step."""
    toy = cluster()
    made = replace(stepped(load_s=load_s), cluster=replace(toy, device=replace(toy.device, name=name)))
    assert texts(replace(made, step_s=step_s)) == []
    assert texts(replace(made, step_s=step_s + 0.5))


def test_all_that_hold_a_parameter_reduce_it_regression() -> None:
    """a and b share w, of which b says no bytes but an update: 6 bytes go between both devices."""
    a = replace(metaop("a", 1, {1: 1.0}, layer_param_bytes=6.0, parameters="w"), layer_update_s=2.0)
    b = replace(metaop("b", 1, {1: 1.0}, parameters="w"), layer_update_s=2.0)
    made = solve(graph(a, b), cluster(1, 2), method="task_split")
    assert made.reduction_s == 6.0
    assert texts(made) == []


@pytest.mark.parametrize("field", ["reduction_s", "update_s", "step_s"])
def test_a_tampered_figure_is_found(field: str) -> None:
    told = getattr(stepped(), field)
    (found,) = texts(replace(stepped(), **{field: 0.9 * told}))
    assert found.startswith(f"{field} is {0.9 * told} but the slices take {told} s; ")


def test_a_step_that_is_not_predicted_is_not_judged() -> None:
    assert texts(replace(stepped(), reduction_s=0.0, update_s=0.0, step_s=0.0)) == []


def test_a_reduction_beside_backward_hides() -> None:
    """b's gradients are there after its backward (2/3 s), a's 2/3 s later; b's 6 s begin then, and half of what lies
    beside backward, 1/3 s, comes on top: 6 - 2/3 + 1/3 after backward."""
    layers = [metaop("a", 1, {2: 1.0}), metaop("b", 1, {2: 1.0}, layer_param_bytes=6.0)]
    slices = [piece("a", range(1), (0, 1), 0.0, 1.0), piece("b", range(1), (0, 1), 1.0, 2.0)]
    toy = cluster()
    where = replace(toy, device=replace(toy.device, overlap_cost=0.5))
    made = replace(plan(*slices, metagraph=graph(*layers)), cluster=where)
    takes_s = 6 - 2 / 3 + 1 / 3
    assert texts(replace(made, reduction_s=takes_s, step_s=2 + takes_s)) == []
    assert "reduction_s" in texts(replace(made, reduction_s=6.0, step_s=8.0))[0]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    metagraphs(plannable=1),
    clusters(),
    st.sampled_from(("lp", "paper", "sequential", "component_split")),
    st.sampled_from((0.0, 0.3, 1.0)),
    st.lists(st.floats(0.1, 0.9), min_size=7, max_size=7),
    st.booleans(),
    st.sampled_from(("cpu", "gpu")),
    st.lists(st.sampled_from((0.0, 0.1, 50.0)), min_size=7, max_size=7),
    st.sampled_from((None, 0.02, 0.3)),
)
def test_both_models_of_a_step_agree(
    metagraph: MetaGraph,
    where: Cluster,
    method: str,
    overlap_cost: float,
    fractions: list[float],
    sharded: bool,
    name: str,
    loads_s: list[float],
    ports: float | None,
) -> None:
    """The planner's and the checker's, whatever the shares of forward, the cost of overlap, who keeps the optimizer's
    states, what is loaded, in line or beside, and what the ports of a node carry; a change is seen. The simulated trace
    ends with the step."""
    where = replace(where, device=replace(where.device, overlap_cost=overlap_cost, name=name))
    where = replace(where, inter_node=replace(where.inter_node, node_bytes_per_s=ports))
    metaops = (
        replace(m, forward_fraction=fraction, layer_update_s=0.01 * layer, load_s=load_s)
        for layer, (m, fraction, load_s) in enumerate(zip(metagraph.metaops, fractions, loads_s, strict=False))
    )
    whole = MetaGraph(tuple(metaops), metagraph.flows, sharded)
    made = solve(whole, where, method=method, time_limit_s=0.003)
    assert texts(made) == []
    assert max(span.end_s for span in simulate(made)) == pytest.approx(made.step_s)
    assert "step_s is" in texts(replace(made, step_s=made.step_s * 0.999))[0]


# --------------------------------------------------------------------------------------------------------- baselines


def test_a_usual_way_cannot_beat_the_bound() -> None:
    """Nor its step."""
    made = solve(graph(metaop("a.x", 2), metaop("b.y", 2)), cluster())
    short = made.lower_bound_s * 0.9
    (found,) = texts(replace(made, baselines_s=(("paper", short),)))
    assert found.startswith(f"baselines_s says 'paper' takes {short} s, below lower_bound_s")
    (found,) = texts(replace(made, baseline_steps_s=(("paper", short),)))
    assert found.startswith("baseline_steps_s says 'paper'")


def test_a_usual_way_has_one_makespan() -> None:
    made = solve(graph(metaop("a.x", 2), metaop("b.y", 2)), cluster(), method="sequential")
    others = tuple((name, 2 * s if name == "sequential" else s) for name, s in made.baselines_s)
    (found,) = texts(replace(made, baselines_s=others))
    assert found.startswith("the plan is 'sequential', whose makespan baselines_s gives as")


# ---------------------------------------------------------------------------------------------------- edited by hand

Data = dict[str, Any]
# on one device a takes 1 s and b 2 s; c follows a and takes 1 s on another
HAND = graph(metaop("a", 1, {1: 1.0}), metaop("b", 1, {1: 2.0}), metaop("c", 1, {1: 1.0}), flows="a>c")


def written() -> Data:
    """The file of a plan: a then b on device 0, c on device 1 as soon as a has ended; 3 s."""
    slices = [
        piece("a", range(1), (0,), 0.0, 1.0),
        piece("b", range(1), (0,), 1.0, 3.0),
        piece("c", range(1), (1,), 1.0, 2.0),
    ]
    made = replace(plan(*slices, num_devices=2, per_node=2, metagraph=HAND), cluster=cluster(1, 2))
    data: Data = json.loads(dumps(replace(made, step_s=3.0, lower_bound_s=2.0)))
    return data


def slice_of(data: Data, name: str) -> Data:
    return next(s for wave in data["waves"] for s in wave["slices"] if s["metaop"] == name)


def move_to_the_idle_device(data: Data) -> None:
    """b on device 1 from the start, c on device 0 after a: 2 s."""
    b, c = slice_of(data, "b"), slice_of(data, "c")
    b.update(devices=[1], start_s=0.0, end_s=2.0)
    c.update(devices=[0])
    data["waves"] = [
        {"index": 0, "start_s": 0.0, "end_s": 2.0, "slices": [slice_of(data, "a"), b]},
        {"index": 1, "start_s": 1.0, "end_s": 2.0, "slices": [c]},
    ]
    data.update(makespan_s=2.0, step_s=2.0)


def swap_a_and_b(data: Data) -> None:
    """b, then a on device 0, then c: 4 s."""
    a, b, c = (slice_of(data, name) for name in "abc")
    b.update(start_s=0.0, end_s=2.0)
    a.update(start_s=2.0, end_s=3.0)
    c.update(start_s=3.0, end_s=4.0)
    data["waves"] = [
        {"index": i, "start_s": s["start_s"], "end_s": s["end_s"], "slices": [s]} for i, s in enumerate((b, a, c))
    ]
    data.update(makespan_s=4.0, step_s=4.0)


def swap_and_forget_c(data: Data) -> None:
    swap_a_and_b(data)
    slice_of(data, "c").update(start_s=2.0, end_s=3.0)
    data["waves"][2].update(start_s=2.0, end_s=3.0)
    data.update(makespan_s=3.0)


def move_to_a_busy_device(data: Data) -> None:
    slice_of(data, "c").update(devices=[0])


def move_to_two_devices(data: Data) -> None:
    slice_of(data, "b").update(devices=[0, 1])


def move_and_keep_the_step(data: Data) -> None:
    move_to_the_idle_device(data)
    data.update(step_s=3.0)


def checked(edit: Callable[[Data], None]) -> list[str]:
    data = written()
    edit(data)
    return texts(loads(json.dumps(data), Plan))


def test_the_plan_before_any_edit() -> None:
    assert texts(loads(json.dumps(written()), Plan)) == []


@pytest.mark.parametrize("edit", [move_to_the_idle_device, swap_a_and_b])
def test_an_edit_that_keeps_the_rules_is_accepted(edit: Callable[[Data], None]) -> None:
    assert checked(edit) == []


@pytest.mark.parametrize(
    ("edit", "finding"),
    [
        (swap_and_forget_c, "c[0:1] starts at 2.0 s but needs 'a', which ends at 3.0 s"),
        (move_to_a_busy_device, "device 0 runs b[0:1] from 1.0 s while c[0:1] holds it until 2.0 s"),
        (move_to_two_devices, "b[0:1] runs on 2 devices; valid counts are 1"),
        (move_and_keep_the_step, "step_s is 3.0 but the slices take 2.0 s"),
    ],
)
def test_an_edit_that_breaks_a_rule_is_named(edit: Callable[[Data], None], finding: str) -> None:
    assert any(finding in text for text in checked(edit)), checked(edit)
