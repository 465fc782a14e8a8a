"""Rates: a MetaGraph in, what one step of it does out; with a plan's step, samples and tokens a second and the share of
the devices' peak that the model's own operations reach (MFU).
"""

from dataclasses import dataclass
from math import prod

from spindle.values.graph import Operator
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan, StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per second of a step; `mfu` is a share of the peak of all devices, 0 where the device is not known."""

    samples_per_s: float
    tokens_per_s: float
    mfu: float


def work_of(metagraph: MetaGraph) -> StepWork | None:
    """What a step does; None where the MetaGraph carries no operators."""
    operators = [operator for metaop in metagraph for operator in metaop.operators]
    if not operators:
        return None
    samples: dict[str, int] = {}
    tokens: dict[tuple[str, str], int] = {}
    for operator in operators:
        samples[operator.task] = max(samples.get(operator.task, 0), operator.batch_size)
        part = operator.task, operator.component
        tokens[part] = max(tokens.get(part, 0), _positions(operator))
    return StepWork(
        samples=float(sum(samples.values())),
        tokens=float(sum(tokens.values())),
        flops=sum(operator.forward_flops + operator.backward_flops for operator in operators),
    )


def _positions(operator: Operator) -> int:
    """Positions that it computes: entries of its outputs but for the last dimension; none where it has no parameters,
    such as a loss."""
    if not operator.parameters:
        return 0
    return max((prod(tensor.shape[:-1]) for tensor in operator.outputs if tensor.shape), default=0)


def rates(plan: Plan) -> Rates | None:
    """Rates of a plan's step, the mean one where batches differ; None where work or step are not known."""
    step_s = plan.expected_s
    if plan.work is None or not step_s:
        return None
    peak = plan.num_devices * plan.cluster.device.peak_flops if plan.cluster else 0.0
    return Rates(
        samples_per_s=plan.work.samples / step_s,
        tokens_per_s=plan.work.tokens / step_s,
        mfu=plan.work.flops / (peak * step_s) if peak else 0.0,
    )
