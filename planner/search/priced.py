"""Priced: a Problem in, the same with layers that take longer where their gradients are reduced, out.

What a step takes is the makespan and then the reductions of the device that has most of them. A search that sees only
the makespan spreads layers over nodes, whose reductions cost more than it gained. So beams get layers that last as long
as they compute and reduce: of two counts they choose the one that is better for the step. What they find is read with
the true times.
"""

from collections import Counter
from dataclasses import replace

from spindle.metagraph import MetaOp
from spindle.planner.problem import Problem, make_problem
from spindle.planner.reduction import reduce_s


def priced(problem: Problem) -> Problem:
    """The problem with reductions in the times of its layers; itself where nothing is reduced."""
    metagraph = problem.metagraph
    if not any(metaop.layer_param_bytes for metaop in metagraph):
        return problem
    sharing = Counter(metaop.parameters or metaop.name for metaop in metagraph)
    changed = tuple(_priced(problem, metaop, sharing[metaop.parameters or metaop.name]) for metaop in metagraph)
    found = make_problem(replace(metagraph, metaops=changed), problem.cluster, problem.turns)
    return replace(found, pins=problem.pins)


def _priced(problem: Problem, metaop: MetaOp, sharing: int) -> MetaOp:
    """`sharing`: MetaOps with the same parameters, which are reduced once."""
    cluster = problem.cluster
    cost = min(1.0, cluster.device.overlap_cost) / (sharing * metaop.layers)
    num_bytes = metaop.layers * metaop.layer_param_bytes
    curve = problem.curves[problem.index[metaop.name]].time_by_count
    times = (
        (n, t + cost * reduce_s(cluster, num_bytes, tuple(range(n)), sharded=problem.metagraph.shard_optimizer))
        for n, t in sorted(curve.items())
    )
    return replace(metaop, layer_time_s=tuple(times))
