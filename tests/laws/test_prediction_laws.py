"""A predicted step has the rare instructions of the program that the same plan is lowered to, on the same ranks."""

import random
from collections import defaultdict
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.files.clusterfile import parse_cluster
from spindle.planner.simulate import simulate
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.program import Op, Program
from spindle.values.cluster import Cluster
from spindle.values.contract import contract
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Plan
from spindle.values.trace import SpanKind, Trace
from tests.random_plans import random_plan
from tests.task_graphs import random_task_graph

LOAD_S = 0.25


def lowered_and_predicted(seed: int, *, sharded: bool) -> tuple[Plan, Program, Trace]:
    """A random plan on CPUs, all of whose MetaOps need a batch."""
    rng = random.Random(seed)
    sample = random_task_graph(seed, num_tasks=rng.randint(1, 3), operators_per_task=rng.randint(1, 7))
    metagraph = contract(sample.graph)
    plan = random_plan(metagraph, rng.randint(1, 5), seed)
    shard = {"losses": sample.losses, "weights": sample.weights, "shard_optimizer": sharded}
    program = lower(plan, metagraph, sample.graph, **shard)  # type: ignore[arg-type]
    costs = MetaGraph(tuple(_costed(m, plan) for m in metagraph), metagraph.flows, shard_optimizer=sharded)
    return replace(plan, metagraph=metagraph), program, simulate(plan, costs, _cluster(plan))


def _costed(metaop: MetaOp, plan: Plan) -> MetaOp:
    trained = any(p.trainable for op in metaop.operators for p in op.parameters)
    return replace(
        metaop,
        layer_time_s=tuple((n, 1.0) for n in range(1, plan.num_devices + 1)),
        layer_param_bytes=8.0 if trained else 0.0,
        load_s=LOAD_S,
    )


def _cluster(plan: Plan) -> Cluster:
    return parse_cluster(f"1x{plan.num_devices}:cpu")


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, 10**9), st.booleans())
def test_ranks_load_what_they_are_predicted_to(seed: int, sharded: bool) -> None:
    """Each rank each task of which it has runs, once, and for as long as was measured."""
    _, program, trace = lowered_and_predicted(seed, sharded=sharded)
    loads = sorted((s.rank, s.task) for s in trace if s.kind is SpanKind.LOAD)
    assert loads == sorted(
        (rank, i.target) for rank, own in enumerate(program.instructions) for i in own if i.op is Op.LOAD
    )
    assert all(abs(s.end_s - s.start_s - LOAD_S) < 1e-9 for s in trace if s.kind is SpanKind.LOAD)


def is_layered(metagraph: MetaGraph) -> bool:
    """Whether each parameter stands in one layer of one parameter set, and all layers of a MetaOp are trained or none:
    costs are told by layer and set, and know no more."""
    places = defaultdict[str, set[tuple[str, int]]](set)
    for metaop in metagraph:
        for layer, operator in enumerate(metaop.operators):
            for parameter in operator.parameters:
                places[parameter.name].add((metaop.parameters, layer))
    trained = [{any(p.trainable for p in op.parameters) for op in metaop.operators} for metaop in metagraph]
    return all(len(of) == 1 for of in places.values()) and all(len(of) == 1 for of in trained)


def test_new_parameters_go_where_they_are_predicted_to() -> None:
    """To the ranks that hold what another has updated, and nowhere where states are not sharded."""
    compared = 0

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.integers(0, 10**9), st.booleans())
    def holds(seed: int, sharded: bool) -> None:
        nonlocal compared
        plan, program, trace = lowered_and_predicted(seed, sharded=sharded)
        gathering = {rank for rank, own in enumerate(program.instructions) if any(i.op is Op.GATHER for i in own)}
        assert sharded or not gathering
        assert plan.metagraph is not None
        if is_layered(plan.metagraph):
            compared += sharded and bool(gathering)
            assert {s.rank for s in trace if s.name.startswith("new parameters")} == gathering

    holds()
    assert compared > 5
