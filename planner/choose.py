"""Choice: a MetaGraph, a cluster and how it is trained, in; a plan that fits memory, and what it chose, out.

What costs no time is tried first: as asked for, then optimiser states sharded, then activations recomputed, then both.
Where only some of the usual ways fit, memory may cost more time than the next choice: the shortest step of those wins.
"""

from collections.abc import Callable

from spindle.cluster import Cluster
from spindle.cost.price import price
from spindle.errors import InfeasibleError
from spindle.metagraph import MetaGraph
from spindle.plan import Plan
from spindle.planner.baselines import WAVES_BY_BASELINE
from spindle.pricing import Pricing, memory_choices
from spindle.profile import Profile

WORTH = 0.01  # of the step: what a further choice must save to be preferred

Solve = Callable[[MetaGraph, Cluster], Plan]


def solve_fitting(
    metagraph: MetaGraph,
    cluster: Cluster,
    solve: Solve,
    *,
    profile: Profile | None = None,
    pricing: Pricing | None = None,
    usual_ways: bool = True,
) -> tuple[Plan, Pricing]:
    """The plan that fits under the first memory choice that leaves room, or one before that which is as short.

    Raises the last InfeasibleError when there is none; a plan that does not fit is returned where only such are found.

    `usual_ways`: whether `solve` costs them; with pins it does not. `metagraph` still carries its operators; one from a
    file is planned as it is, since its costs cannot change.
    """
    choices = memory_choices(pricing or Pricing())
    if not any(metaop.operators for metaop in metagraph):
        choices = choices[:1]
    last: InfeasibleError | None = None
    best: tuple[Plan, Pricing] | None = None
    for choice in choices:
        try:
            plan = solve(price(metagraph, cluster, profile, pricing=choice), cluster)
        except InfeasibleError as error:
            last = error
            continue
        if best is None or plan.memory.fits > best[0].memory.fits or _is_worth_it(plan, best[0]):
            best = plan, choice
        if plan.memory.fits and (not usual_ways or len(plan.baselines_s) == len(WAVES_BY_BASELINE)):
            break
    if best is not None:
        return best
    assert last is not None, "each choice gives a plan or an InfeasibleError"
    raise last


def _is_worth_it(plan: Plan, best: Plan) -> bool:
    return plan.memory.fits >= best.memory.fits and plan.step_s < (1 - WORTH) * best.step_s
