"""Recost: a plan, and what its costs were made of with some factors changed, in; seconds of its step out.

Nothing is searched: the slices stay as they are, in their order; times, transfers and reductions are those of the
changed costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from spindle.cost.sampled import Costed, cost_steps
from spindle.planner.costing.memory import peak_bytes
from spindle.planner.simulate import step_times
from spindle.values.calibration import Calibration, calibrated
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan
from spindle.values.profile import Profile


@dataclass(frozen=True)
class Costs:
    """What the MetaOps of a plan were costed from; `metagraph` still carries its operators.

    steps, is_mean     as in `spindle.cost.sampled.cost_steps`
    """

    metagraph: MetaGraph
    cluster: Cluster
    cost_options: CostOptions
    profile: Profile | None = None
    steps: Sequence[MetaGraph] = ()
    is_mean: bool = False

    def under(self, factors: Calibration | None = None) -> "Recosted":
        """The same with seconds of computation, host and network times these factors; `step_s` is left out."""
        cluster = self.cluster if factors is None else calibrated(self.cluster, factors)
        costed = cost_steps(self.metagraph, self.steps, cluster, self.profile, self.cost_options, is_mean=self.is_mean)
        return Recosted(costed, cluster)


@dataclass(frozen=True)
class Recosted:
    """A MetaGraph with costs, the same in several steps where batches differ, and the cluster that they hold for."""

    costed: Costed
    cluster: Cluster

    def step_s(self, plan: Plan) -> float | None:
        """Seconds of a step of the plan's slices, on average where batches differ; None where a slice has no time on
        its number of devices.
        """
        graphs = self.costed.steps or (self.costed.metagraph,)
        if any(len(s.devices) not in graph[s.metaop].times for graph in graphs for s in plan.slices):
            return None
        return fmean(step_times(plan, graph, self.cluster).step_s for graph in graphs)

    def fits(self, plan: Plan) -> bool:
        """Whether the plan's slices fit the memory of the devices."""
        peaks = peak_bytes(self.costed.metagraph, plan.slices, plan.num_devices, plan.turn_by_task)
        return max(peaks) <= self.cluster.device.memory_bytes
