"""What people would use instead of a plan; steps that can be added up in the head."""

from dataclasses import replace

import pytest

from spindle.cost.metaops import with_costs
from spindle.cost.parallel import parallel_cost
from spindle.errors import InfeasibleError, WorkloadError
from spindle.files.clusterfile import parse_cluster
from spindle.planner.baselines.alternatives import (
    COMPONENT_GROUPS,
    DDP,
    DDP_BY_TASK,
    FSDP,
    NAMES,
    OWN_LAYOUT,
    TASK_GROUPS,
    ZERO,
    Choice,
    Replicas,
    alternatives,
    own_layout,
)
from spindle.planner.baselines.overlap import bucketed_step_s
from spindle.planner.check import check_plan
from spindle.planner.choose import solve_fitting
from spindle.planner.report.rates import rates, work_of
from spindle.planner.solve import solve
from spindle.values.cluster import Cluster, Link
from spindle.values.cost_options import CostOptions
from spindle.values.execution import Parallel
from spindle.values.graph import TaskGraph
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import BUCKET_BYTES, Alternative
from spindle.verbs.source import load_source
from tests.planner.planner_graphs import cluster, graph, metaop, piece

CLIP = "benchmarks/workloads/multitask_clip.yaml"
OURS = {4: 3.0}  # a layer takes 1 s forward and 2 s backward on all four devices


def quick(overlap_cost: float = 0.0, memory_bytes: float = 80e9) -> Cluster:
    """Four devices, on which a bucket's all-reduce takes 1 s and its gathering and scattering half of that."""
    toy = cluster(memory_bytes=memory_bytes)
    link = Link(bytes_per_s=1.5 * BUCKET_BYTES, latency_s=0.0)
    return replace(toy, intra_node=link, device=replace(toy.device, overlap_cost=overlap_cost))


def towers(*names: str, layers: int = 4, memory: float = 0.0, state: float = 0.0) -> MetaGraph:
    """A tower of each task with the same parameters, a bucket a layer; `memory` a chain, `state` of it a layer."""
    metaops = (
        replace(
            metaop(
                f"{name}.tower", layers, OURS, memory={4: memory}, layer_param_bytes=BUCKET_BYTES, parameters="tower"
            ),
            layer_state_bytes=state,
        )
        for name in names
    )
    return graph(*metaops)


def found(metagraph: MetaGraph, where: Cluster) -> dict[str, Alternative]:
    return {other.name: other for other in alternatives([Choice(metagraph)], where)}


@pytest.mark.parametrize(("overlap_cost", "step_s"), [(0.0, 13.0), (0.5, 14.5), (1.0, 16.0)])
def test_buckets_are_reduced_beside_backward(overlap_cost: float, step_s: float) -> None:
    """12 s of layers; four buckets of 1 s, of which only the first layer's comes after backward. The other three cost
    half of their time from it where overlap costs a half, and nothing is gained where it costs all.
    """
    assert found(towers("t"), quick(overlap_cost))[DDP].step_s == pytest.approx(step_s)


@pytest.mark.parametrize(("overlap_cost", "step_s"), [(0.0, 13.0), (0.5, 14.5), (1.0, 16.0)])
def test_a_plan_of_ours_reduces_in_the_same_buckets(overlap_cost: float, step_s: float) -> None:
    """As the checker finds, too."""
    plan = solve(towers("t"), quick(overlap_cost), method="sequential")
    assert plan.step_s == pytest.approx(step_s)
    assert check_plan(plan) == ()


def test_two_tasks_reduce_once_or_twice() -> None:
    """24 s of layers. As one backward, or with no_sync, one bucket is left over; with one reduction a task, two are."""
    others = found(towers("a", "b"), quick())
    assert others[DDP].step_s == pytest.approx(25.0)
    assert others[DDP_BY_TASK].step_s == pytest.approx(26.0)


def test_no_sync_keeps_one_task_at_a_time() -> None:
    """States of 4 bytes and 6 of activations a task: 16 bytes with losses summed, 10 with no_sync. At 12 it fits so."""
    metagraph = towers("a", "b", memory=10.0, state=1.0)
    wide, narrow = (found(metagraph, quick(memory_bytes=room))[DDP] for room in (20.0, 12.0))
    assert (wide.choice, wide.peak_bytes) == ("losses summed", 16.0)
    assert (narrow.choice, narrow.peak_bytes, narrow.fits) == ("no_sync", 10.0, True)
    assert not found(metagraph, quick(memory_bytes=9.0))[DDP].fits


def test_the_least_need_is_told_when_nothing_fits() -> None:
    short = found(towers("a", "b", memory=10.0, state=1.0), quick(memory_bytes=9.0))[DDP_BY_TASK]
    assert short == Alternative(name=DDP_BY_TASK, peak_bytes=10.0, fits=False)


def test_sharded_parameters_are_gathered_twice_and_scattered_once() -> None:
    """0.5 s each, beside 1 s of forward and 2 s of backward: hidden where overlap costs nothing, else 0.5 * 1.5 s of
    each layer of 3 s; nothing comes after backward.
    """
    assert found(towers("t"), quick())[FSDP].step_s == pytest.approx(12.0)
    assert found(towers("t"), quick(0.5))[FSDP].step_s == pytest.approx(12.0 + 4 * 0.5 * 1.5)


def test_sharded_states_scatter_gradients_and_gather_parameters() -> None:
    """Half a second a bucket beside backward, and 4 * 0.5 s to gather new parameters after the step."""
    other = found(replace(towers("t"), shard_optimizer=True), quick())[ZERO]
    assert other.step_s == pytest.approx(12.0 + 0.5 + 2.0)


def test_layers_of_one_slice_follow_each_other() -> None:
    """Half of a tower on each pair of devices: their buckets do not wait for each other (0.667 s each on two)."""
    metagraph = graph(metaop("t.tower", 4, {2: 3.0}, layer_param_bytes=BUCKET_BYTES))
    slices = (piece("t.tower", range(2), (0, 1), 0.0, 6.0), piece("t.tower", range(2, 4), (2, 3), 6.0, 12.0))
    assert bucketed_step_s(slices, metagraph, quick()) == pytest.approx(12.0 + 1.0 / 1.5)


def test_tasks_that_hand_each_other_data_are_one_group() -> None:
    metagraph = graph(metaop("a.x"), metaop("b.y"), metaop("c.z"), flows="a.x>b.y")
    names = [[s.metaop for s in group] for group in Replicas(metagraph, cluster()).groups]
    assert names == [["a.x", "b.y"], ["c.z"]]


def test_devices_are_divided_among_components() -> None:
    """Two encoders that get no faster beyond two devices: side by side, for both tasks, on their own devices."""
    pair = {1: 2.0, 2: 1.0}
    metagraph = graph(*(metaop(f"{task}.{part}", 2, pair) for task in "xy" for part in ("a", "b")))
    others = found(metagraph, cluster())
    assert others[COMPONENT_GROUPS].step_s == others[TASK_GROUPS].step_s == pytest.approx(4.0)
    assert others[DDP].step_s == pytest.approx(8.0)


def test_each_has_its_own_memory_choice() -> None:
    """Of three, DDP takes the quickest that fits, FSDP the one that it fits with anyway."""
    slow = {4: 4.0}
    plain = towers("t", memory=100.0, state=10.0)
    small = graph(replace(plain["t.tower"], layer_time_s=tuple(slow.items()), memory_bytes=((4, 50.0),)))
    where = quick(memory_bytes=60.0)
    others = {o.name: o for o in alternatives([Choice(plain), Choice(small, recompute=True)], where)}
    assert others[DDP].choice == "recompute"
    assert others[DDP].step_s == pytest.approx(16.0 + 1.0)


def test_all_are_named_whatever_fits() -> None:
    metagraph = towers("t", memory=1e12, state=1.0)
    choices = [Choice(metagraph), Choice(replace(metagraph, shard_optimizer=True))]
    others = alternatives(choices, quick())
    assert tuple(other.name for other in others) == NAMES
    assert not any(other.fits for other in others)


def test_what_is_not_costed_is_not_judged() -> None:
    assert ZERO not in found(towers("t"), quick())
    assert DDP not in found(replace(towers("t"), shard_optimizer=True), quick())


def test_a_plan_that_does_not_fit_names_what_does() -> None:
    """On devices of 9 GB no schedule holds the states that DDP with sharded ones does."""
    source = load_source(CLIP)
    where = parse_cluster("1x8:a100-80g")
    small = replace(where, device=replace(where.device, memory_bytes=9e9))
    with pytest.raises(InfeasibleError, match=r"What fits is ZeRO-1/2, optimizer states sharded \(.*recompute\): "):
        solve_fitting(
            source.metagraph,
            small,
            lambda costed, cluster, share: solve(costed.metagraph, cluster, time_limit_s=0.1),
            cost_options=source.cost_options,
            with_alternatives=True,
        )


def test_a_plan_tries_the_choice_of_the_quickest_alternative() -> None:
    """Everything fits as it is, but with sharded states the optimizer's step is an eighth."""
    source = load_source("benchmarks/workloads/pi0.yaml")

    def made(*, with_alternatives: bool) -> tuple[float, bool]:
        plan, cost_options = solve_fitting(
            source.metagraph,
            parse_cluster("1x8:a100-80g"),
            lambda costed, where, share: solve(costed.metagraph, where, method="sequential"),
            cost_options=source.cost_options,
            all_fit=lambda metagraph, where: True,
            with_alternatives=with_alternatives,
        )
        return plan.step_s, cost_options.shard_optimizer

    (plain_s, plain), (tried_s, tried) = made(with_alternatives=False), made(with_alternatives=True)
    assert (plain, tried) == (False, True)
    assert tried_s < plain_s


def test_one_reduction_is_no_slower_than_one_a_task() -> None:
    where = parse_cluster("2x8:a100-80g")
    metagraph = with_costs(load_source(CLIP).metagraph, where, None, CostOptions())
    others = found(metagraph, where)
    assert 0 < others[DDP].step_s <= others[DDP_BY_TASK].step_s
    assert others[DDP].step_s <= solve(metagraph, where, method="sequential").step_s * (1 + 1e-9)


def test_rates_count_what_the_model_does() -> None:
    """Samples are the tasks' batches; FLOPs are forward and backward once, whatever is recomputed."""
    source = load_source(CLIP)
    work = work_of(source.metagraph)
    assert work is not None
    assert work.samples == 3904
    made = replace(solve(towers("t"), quick()), work=replace(work, flops=4e12 * 13.0 / 2))
    told = rates(made)
    assert told is not None
    assert told.mfu == pytest.approx(13.0 / 2 / made.step_s)
    assert told.samples_per_s == pytest.approx(3904 / made.step_s)


def test_no_operators_no_rates() -> None:
    assert work_of(towers("t")) is None
    assert rates(solve(towers("t"), quick())) is None


def test_the_layout_that_a_workload_names() -> None:
    """As `spindle.cost.parallel` has it; one that does not fit has no step, and one that is not named no row."""
    loaded, where = load_source(CLIP), parse_cluster("2x8:a100-80g")
    assert own_layout(loaded.metagraph, where, loaded.cost_options) == ()
    layout = Parallel(tensor=2, micro_batch=8, shard="optimizer")
    cost_options = replace(loaded.cost_options, layout=layout)
    (found,) = own_layout(loaded.metagraph, where, cost_options)
    operators = tuple(operator for m in loaded.metagraph for operator in m.operators)
    told = parallel_cost(TaskGraph(operators), where, cost_options, layout)
    assert (found.name, found.fits, found.step_s) == (OWN_LAYOUT, True, told.step_s)
    assert found.choice == "tensor 2, optimizer sharded, micro-batches of 8"
    tight = replace(where, device=replace(where.device, memory_bytes=told.memory_bytes / 2))
    (found,) = own_layout(loaded.metagraph, tight, cost_options)
    assert (found.fits, found.step_s, found.peak_bytes) == (False, 0.0, told.memory_bytes)
    with pytest.raises(WorkloadError, match="are not divided by tensor 3 and pipeline 1"):
        own_layout(loaded.metagraph, where, replace(cost_options, layout=Parallel(tensor=3)))
