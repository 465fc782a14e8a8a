"""Spread: a plan and what its MetaOps take in several steps in; mean, 10th and 90th percentile of a step out."""

from collections.abc import Sequence
from statistics import fmean, quantiles

from spindle.cluster import Cluster
from spindle.metagraph import MetaGraph
from spindle.plan import Plan, StepSpread
from spindle.planner.simulate import step_times


def step_spread(plan: Plan, steps: Sequence[MetaGraph], cluster: Cluster) -> StepSpread | None:
    """How long steps of the plan take whose batches are those of priced `steps`; None where there are none."""
    seconds = [step_times(plan, step, cluster).step_s for step in steps]
    if not seconds:
        return None
    tenths = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    return StepSpread(steps=len(seconds), mean_s=fmean(seconds), p10_s=tenths[0], p90_s=tenths[-1])
