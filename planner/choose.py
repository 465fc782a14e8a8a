"""Choice: a MetaGraph, a cluster and how it is trained, in; a plan that fits memory, and what it chose, out.

What costs no time is tried first: as asked for, then optimiser states sharded, then activations recomputed, then both.
Where only some of the usual ways fit, memory may cost more time than the next choice: the shortest step of those wins.
"""

from collections.abc import Callable, Sequence

from spindle.cluster import Cluster
from spindle.cost.sampled import Priced, price_steps
from spindle.errors import InfeasibleError
from spindle.metagraph import MetaGraph
from spindle.plan import Plan
from spindle.pricing import Pricing, memory_choices
from spindle.profile import Profile

MOST_STATES = 0.875  # of a device's memory that parameters and states may take where layers may be spread over devices
WORTH = 0.01  # of the step: what a further choice must save to be preferred

Solve = Callable[[Priced, Cluster, float], Plan]
"""A priced MetaGraph, a cluster and a share of the time limit in; raises InfeasibleError."""
AllFit = Callable[[MetaGraph, Cluster], bool]
"""Whether all usual ways of a priced MetaGraph fit."""


def solve_fitting(
    metagraph: MetaGraph,
    cluster: Cluster,
    solve: Solve,
    *,
    profile: Profile | None = None,
    pricing: Pricing | None = None,
    steps: Sequence[MetaGraph] = (),
    is_mean: bool = False,
    all_fit: AllFit | None = None,
) -> tuple[Plan, Pricing]:
    """The shortest plan of the memory choices up to the first under which all usual ways fit.

    Without `all_fit` the plan of the first choice under which one fits. The choices share the time limit.
    Raises the last InfeasibleError when there is no plan; one that does not fit is returned where only such are found.
    `metagraph` still carries its operators; one from a file is planned as it is, since its costs cannot change. `steps`
    are the same on other batches, for whose mean it is planned; `is_mean`: it stands for that already.
    """
    choices = memory_choices(pricing or Pricing())
    if not any(metaop.operators for metaop in metagraph):
        choices = choices[:1]
    priced = [(choice, price_steps(metagraph, steps, cluster, profile, choice, is_mean=is_mean)) for choice in choices]
    if priced[0][0].degrees:
        roomy = [(choice, graph) for choice, graph in priced if _leaves_room(graph.metagraph, cluster)]
        priced = roomy or priced[-1:]
    if all_fit is not None:  # the last choice is tried in any case
        fitting = (i for i, (_, graph) in enumerate(priced[:-1]) if all_fit(graph.metagraph, cluster))
        least = next(fitting, len(priced) - 1)
        priced = priced[: least + 1]
    last: InfeasibleError | None = None
    best: tuple[Plan, Pricing] | None = None
    for choice, graph in priced:
        try:
            plan = solve(graph, cluster, 1 / len(priced) if all_fit else 1.0)
        except InfeasibleError as error:
            last = error
            continue
        if best is None or plan.memory.fits > best[0].memory.fits or _is_worth_it(plan, best[0]):
            best = plan, choice
        if all_fit is None and plan.memory.fits:
            break
    if best is not None:
        return best
    assert last is not None, "each choice gives a plan or an InfeasibleError"
    raise last


def _leaves_room(metagraph: MetaGraph, cluster: Cluster) -> bool:
    """Whether a device that held every layer, at its largest degree, had room for activations; cheap to see."""
    held = {m.parameters or m.name: m.layers * m.layer_state_bytes for m in metagraph}
    return sum(held.values()) <= MOST_STATES * cluster.device.memory_bytes


def _is_worth_it(plan: Plan, best: Plan) -> bool:
    return plan.memory.fits >= best.memory.fits and plan.expected_s < (1 - WORTH) * best.expected_s
