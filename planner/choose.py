"""Choice: a MetaGraph, a cluster and how it is trained, in; a plan that fits memory, and what it chose, out.

What costs no time is tried first: as asked for, then optimiser states sharded, then activations recomputed, then both.
Where only some of the usual ways fit, memory may cost more time than the next choice: the shortest step of those wins.
So it may where the quickest alternative (`usual.alternatives`) makes a later choice: sharded states also divide the
optimizer's step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from spindle.cluster import Cluster
from spindle.cost.sampled import Priced, price_steps
from spindle.errors import InfeasibleError
from spindle.metagraph import MetaGraph
from spindle.plan import Alternative, Plan
from spindle.planner.usual.alternatives import Choice, alternatives, own_layout
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
    with_alternatives: bool = False,
) -> tuple[Plan, Pricing]:
    """The shortest plan of the memory choices up to the first under which all usual ways fit.

    Without `all_fit` the plan of the first choice under which one fits. The choices share the time limit.
    Raises the last InfeasibleError when there is no plan; one that does not fit is returned where only such are found.
    `metagraph` still carries its operators; one from a file is planned as it is, since its costs cannot change. `steps`
    are the same on other batches, for whose mean it is planned; `is_mean`: it stands for that already.
    `with_alternatives`: the plan carries what people would use instead, each under its own memory choice.
    """
    choices = memory_choices(pricing or Pricing())
    if not any(metaop.operators for metaop in metagraph):
        choices = choices[:1]

    def priced_by(choice: Pricing) -> Priced:
        return price_steps(metagraph, steps, cluster, profile, choice, is_mean=is_mean)

    priced = [(choice, priced_by(choice)) for choice in choices]
    others = _alternatives(priced, cluster, priced_by) if with_alternatives else ()
    others += own_layout(metagraph, cluster, choices[0]) if with_alternatives else ()
    quicker = _quickest(choices, others)
    if priced[0][0].degrees:
        roomy = [(choice, graph) for choice, graph in priced if _leaves_room(graph.metagraph, cluster)]
        priced = roomy or priced[-1:]
    if all_fit is not None:  # the last choice is tried in any case
        fitting = (i for i, (_, graph) in enumerate(priced[:-1]) if all_fit(graph.metagraph, cluster))
        least = next(fitting, len(priced) - 1)
        priced = priced[: least + 1] + [(choice, graph) for choice, graph in priced[least + 1 :] if choice in quicker]
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
        return replace(best[0], alternatives=others), best[1]
    assert last is not None, "each choice gives a plan or an InfeasibleError"
    if others:
        raise InfeasibleError(f"{last}. {_instead(others)}") from last
    raise last


def _quickest(choices: Sequence[Pricing], others: Sequence[Alternative]) -> list[Pricing]:
    """The choice of the quickest alternative that fits: a plan may gain by it too."""
    quickest = min((other for other in others if other.fits), key=lambda other: other.step_s, default=None)
    if quickest is None:
        return []
    flags = quickest.recompute, quickest.shard_optimizer
    return [choice for choice in choices if (choice.recompute, choice.shard_optimizer) == flags]


def _instead(others: Sequence[Alternative]) -> str:
    """What fits where no plan does."""
    fitting = [other for other in others if other.fits]
    if fitting:
        way = min(fitting, key=lambda other: other.step_s)
        return f"What fits is {_named(way)}: {way.step_s:.3g} s a step"
    known = [other for other in others if other.peak_bytes]
    if not known:
        return "Nothing else fits either"
    way = min(known, key=lambda other: other.peak_bytes)
    return f"Nothing else fits either: {_named(way)} takes {way.peak_bytes / 2**30:.1f} GiB a device"


def _named(other: Alternative) -> str:
    return f"{other.name} ({other.choice})" if other.choice else other.name


def _alternatives(
    priced: Sequence[tuple[Pricing, Priced]], cluster: Cluster, priced_by: Callable[[Pricing], Priced]
) -> tuple[Alternative, ...]:
    """Those of each memory choice. Where a workload wants its states sharded, some alternatives do not, so they are
    priced without that too.
    """
    if any(m.layer_time_s[0][0] > cluster.num_devices for m in priced[0][1].metagraph):
        return ()  # nothing runs on so few devices; the plan says so
    known = dict(priced)
    for choice, graph in priced:
        if choice.shard_optimizer and any(metaop.operators for metaop in graph.metagraph):
            whole = replace(choice, shard_optimizer=False)
            known[whole] = known.get(whole) or priced_by(whole)
    found = [Choice(graph.metagraph, graph.steps, choice.recompute) for choice, graph in known.items()]
    return alternatives(found, cluster)


def _leaves_room(metagraph: MetaGraph, cluster: Cluster) -> bool:
    """Whether a device that held every layer, at its largest degree, had room for activations; cheap to see."""
    held = {m.parameters or m.name: m.layers * m.layer_state_bytes for m in metagraph}
    return sum(held.values()) <= MOST_STATES * cluster.device.memory_bytes


def _is_worth_it(plan: Plan, best: Plan) -> bool:
    return plan.memory.fits >= best.memory.fits and plan.expected_s < (1 - WORTH) * best.expected_s
