"""Parallel layouts: sums by hand, laws, and what cannot be divided."""

from dataclasses import replace

import pytest

from spindle.cost.links import collective_s
from spindle.cost.metaops import with_costs
from spindle.cost.parallel import ParallelCost, parallel_cost
from spindle.errors import WorkloadError
from spindle.files.clusterfile import parse_cluster
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.values.cluster import Cluster
from spindle.values.contract import contract
from spindle.values.cost_options import CostOptions
from spindle.values.execution import STAGES, Parallel
from spindle.values.graph import TaskGraph

SPEC = """
format: spindle.workload
version: 1
name: small
components:
  tower: {layers: 8, hidden: 2048, heads: 16, tokens: 512, gated: true, causal: true,
          vocab: 32000, logits: true, tied: false}
tasks:
  a: {batch_size: 64, flow: [tower], loss: cross_entropy}
  b: {batch_size: 32, flow: [tower], loss: cross_entropy}
"""
GRAPH = build_graph(parse_workload(SPEC))
OPTIONS = CostOptions()


def cost(layout: Parallel, where: str | Cluster = "2x8:a100-80g", graph: TaskGraph = GRAPH) -> ParallelCost:
    cluster = parse_cluster(where) if isinstance(where, str) else where
    return parallel_cost(graph, cluster, OPTIONS, layout)


def test_one_device_runs_all_layers_one_after_another() -> None:
    """As long as all MetaOps on one device, and the optimizer's step over what tasks share once; nothing is reduced."""
    found = cost(Parallel(), "1x1:a100-80g")
    costed = with_costs(contract(GRAPH), parse_cluster("1x1:a100-80g"))
    layers_s = sum(m.layers * m.times[1] for m in costed)
    shared = {m.parameters: m.layers * m.layer_update_s for m in costed}
    assert found.reduction_s == 0
    assert found.update_s == pytest.approx(sum(shared.values()))
    assert found.step_s == pytest.approx(layers_s + found.update_s)


def test_reduction_beside_backward_costs_what_the_device_says() -> None:
    """Without overlap all of it, of every gradient once."""
    cluster = parse_cluster("2x8:a100-80g")
    alone = replace(cluster, device=replace(cluster.device, overlap_cost=1.0))
    trained = {p.name: p.num_bytes for o in GRAPH.operators for p in o.parameters}
    reduced_s = collective_s("all_reduce", sum(trained.values()), cluster, (8, 8))
    assert cost(Parallel(), alone).reduction_s == pytest.approx(reduced_s)
    assert 0 < cost(Parallel()).reduction_s < reduced_s


def test_a_pipeline_waits_for_its_first_micro_batch() -> None:
    """Of m micro-batches in p stages of equal layers, (m + p - 1) / p times a micro-batch's layers: with few, much is
    idle."""
    steps = [cost(Parallel(pipeline=4, micro_batch=size)).step_s for size in (1, 2, 4, 8, 16)]
    assert steps[-1] > 1.5 * min(steps)


def test_sharding_frees_memory_stage_by_stage() -> None:
    held = [cost(Parallel(shard=stage)).memory_bytes for stage in STAGES]
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4
    assert cost(Parallel(shard="parameters")).step_s > cost(Parallel(shard="optimizer")).step_s


def test_tensor_parallelism_divides_layers_and_pays_for_it() -> None:
    whole, cut = cost(Parallel()), cost(Parallel(tensor=8))
    assert cut.memory_bytes < whole.memory_bytes
    assert cut.step_s > whole.step_s  # at a batch that data parallelism divides well
    divided = cost(Parallel(tensor=8, sequence_parallel=True))
    assert divided.memory_bytes < cut.memory_bytes
    assert divided.step_s < cut.step_s


def test_tasks_in_turn_hold_one_task_at_a_time() -> None:
    """The smaller task adds no memory; its time is added."""
    only = TaskGraph(tuple(o for o in GRAPH.operators if o.task == "a"))
    assert cost(Parallel(), graph=only).memory_bytes == cost(Parallel()).memory_bytes
    assert cost(Parallel(), graph=only).step_s < cost(Parallel()).step_s


@pytest.mark.parametrize("layout", [Parallel(tensor=3), Parallel(tensor=16), Parallel(pipeline=5)])
def test_what_does_not_divide_the_cluster_is_refused(layout: Parallel) -> None:
    with pytest.raises(WorkloadError, match=f"16 devices, 8 a node, are not divided by tensor {layout.tensor}"):
        cost(layout)
