"""Choice: a MetaGraph, a cluster and how it is trained, in; the first plan that fits memory, and what it chose, out.

What costs no time is tried first: as asked for, then optimiser states sharded, then activations recomputed, then both.
"""

from collections.abc import Callable

from spindle.cluster import Cluster
from spindle.cost.price import price
from spindle.errors import InfeasibleError
from spindle.metagraph import MetaGraph
from spindle.plan import Plan
from spindle.pricing import Pricing, memory_choices
from spindle.profile import Profile

Solve = Callable[[MetaGraph, Cluster], Plan]


def solve_fitting(
    metagraph: MetaGraph,
    cluster: Cluster,
    solve: Solve,
    *,
    profile: Profile | None = None,
    pricing: Pricing | None = None,
) -> tuple[Plan, Pricing]:
    """The plan of the first memory choice under which it fits; raises the last InfeasibleError when none does.

    `metagraph` still carries its operators; one from a file is planned as it is, since its costs cannot change.
    """
    choices = memory_choices(pricing or Pricing())
    if not any(metaop.operators for metaop in metagraph):
        choices = choices[:1]
    last: InfeasibleError | None = None
    kept: tuple[Plan, Pricing] | None = None
    for choice in choices:
        try:
            plan = solve(price(metagraph, cluster, profile, pricing=choice), cluster)
        except InfeasibleError as error:
            last = error
            continue
        if plan.memory.fits:
            return plan, choice
        kept = plan, choice
    if kept is not None:
        return kept
    assert last is not None, "each choice gives a plan or an InfeasibleError"
    raise last
