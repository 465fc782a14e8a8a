"""Spread: slices and what their MetaOps take in several steps in; how long whole steps take out."""

from collections.abc import Mapping, Sequence
from statistics import fmean, quantiles

from spindle.planner.simulate import step_times
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan, StepSpread, sorted_pairs


def steps_s(plan: Plan, steps: Sequence[MetaGraph], cluster: Cluster) -> tuple[float, ...]:
    """Seconds of each step of a plan, by what its MetaOps take in it."""
    return tuple(step_times(plan, step, cluster).step_s for step in steps)


def spread_of(seconds: Sequence[float], baselines_s: Mapping[str, float]) -> StepSpread | None:
    """Mean and percentiles of steps, beside the means of the baselines; None where there are none."""
    if not seconds:
        return None
    tenths = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else list(seconds) * 9
    return StepSpread(
        steps=len(seconds),
        mean_s=fmean(seconds),
        p10_s=tenths[0],
        p90_s=tenths[-1],
        baselines_s=sorted_pairs(baselines_s),
    )
