"""Sampled: a MetaGraph, and the same on batches of other sizes, in; costed for their mean, with memory for the largest,
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from spindle.cost.metaops import with_costs
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points
from spindle.values.profile import Profile


@dataclass(frozen=True)
class Costed:
    """A MetaGraph with costs to plan, and the same in several steps, where batches differ."""

    metagraph: MetaGraph
    steps: tuple[MetaGraph, ...] = ()


def cost_steps(
    metagraph: MetaGraph,
    steps: Sequence[MetaGraph],
    cluster: Cluster,
    profile: Profile | None = None,
    cost_options: CostOptions | None = None,
    *,
    is_mean: bool = False,
) -> Costed:
    """`metagraph` with costs for the mean of `steps`, which are the same on other batches; as it is where there are
    none, or where it stands for their mean already.
    """
    costed = with_costs(metagraph, cluster, profile, cost_options)
    others = tuple(with_costs(step, cluster, profile, cost_options) for step in steps)
    return Costed(mean_of(costed, others) if others and not is_mean else costed, others)


def mean_of(costed: MetaGraph, others: Sequence[MetaGraph]) -> MetaGraph:
    """Times, messages and the share of forward are means over `others`, bytes in memory those of the largest."""
    metaops = tuple(_mean(own, [other[own.name] for other in others]) for own in costed)
    flows = [{(flow.source, flow.target): other.flow_bytes(flow) for flow in other.flows} for other in others]
    return replace(
        costed,
        metaops=metaops,
        flows=tuple(replace(f, num_bytes=fmean(by_ends[_ends(f)] for by_ends in flows)) for f in costed.flows),
    )


def _ends(flow: Flow) -> tuple[str, str]:
    return flow.source, flow.target


def _mean(own: MetaOp, others: Sequence[MetaOp]) -> MetaOp:
    if not own.operators:  # read from a file: its costs cannot change
        return own
    times = {n: fmean(other.times[n] for other in others) for n in own.times}
    least = min(times)
    forward_s = fmean(other.times[least] * other.forward_fraction for other in others)
    return replace(
        own,
        layer_time_s=points(times),
        memory_bytes=points({n: max(other.memory[n] for other in others) for n in own.memory}),
        kept_bytes=max(other.kept_bytes for other in others),
        recomputed_bytes=max(other.recomputed_bytes for other in others),
        output_bytes=fmean(other.output_bytes for other in others),
        forward_fraction=forward_s / times[least],
    )
