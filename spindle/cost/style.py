"""Style: measured layers and what the cost model says of them in; the way of running layers that explains them out.

Layers that were not measured run in the same program as the measured ones, so their predictions take its style.
"""

from dataclasses import replace
from math import log
from statistics import fmean
from typing import get_args

from spindle.cost.metaops import with_costs
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.execution import Execution, LayerStyle, as_run
from spindle.values.metagraph import MetaGraph
from spindle.values.profile import Profile


def style_of(metagraph: MetaGraph, cluster: Cluster, profile: Profile, cost_options: CostOptions) -> Execution:
    """The execution of `cost_options`, with the style of layers under which predictions are nearest to the profile.

    As it is where all layers of the workload were measured, or none.
    """
    measured = {m.name for m in metagraph if m.operators and m.operators[0].kind in profile.by_kind}
    if not measured or len(measured) == len(metagraph):
        return cost_options.execution
    styles = {style: replace(cost_options.execution, layers=style) for style in get_args(LayerStyle)}
    return min(styles.values(), key=lambda execution: _miss(metagraph, cluster, profile, cost_options, execution))


def _miss(
    metagraph: MetaGraph, cluster: Cluster, profile: Profile, cost_options: CostOptions, execution: Execution
) -> float:
    """Mean distance of predicted from measured times, in logarithms."""
    predicted = with_costs(
        metagraph, as_run(cluster, execution), cost_options=replace(cost_options, execution=execution, recompute=False)
    )
    misses = [
        abs(log(metaop.times[count] / (entry.forward_s + entry.backward_s)))
        for metaop in predicted
        if metaop.operators
        for count, entry in profile.by_kind.get(metaop.operators[0].kind, {}).items()
        if count in metaop.times and entry.forward_s + entry.backward_s > 0
    ]
    return fmean(misses) if misses else 0.0
