"""Choice: a MetaGraph, a cluster and how it is trained, in; a plan that fits memory, and what it chose, out.

What costs no time is tried first: as asked for, then optimizer states sharded, then activations recomputed, then both.
Where only some of the baselines fit, memory may cost more time than the next choice: the shortest step of those wins.
So it may where the quickest alternative (`usual.alternatives`) makes a later choice: sharded states also divide the
optimizer's step. Where not all baselines fit at once, tasks are planned in turns too (`turns`), which costs no
computation as recomputing does.

Where nothing of all this fits, parameters are sharded, those of the largest component first; and those of all where
sharding them (FSDP2) is the quickest alternative.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from spindle.cost.sampled import Costed, cost_steps
from spindle.cost.shards import shardable
from spindle.errors import InfeasibleError
from spindle.planner.baselines.alternatives import FSDP, Choice, alternatives, own_layout
from spindle.planner.turns import turns_to_try
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions, memory_choices, sharded_choices
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Alternative, Plan
from spindle.values.profile import Profile
from spindle.values.turns import Turns

MOST_STATES = 0.875  # of a device's memory that parameters and states may take where layers may be spread over devices
WORTH = 0.01  # of the step: what a further choice must save to be preferred

Solve = Callable[[Costed, Cluster, float], Plan]
"""A MetaGraph with costs, a cluster and a share of the time limit in; raises InfeasibleError."""
SolveInTurns = Callable[[Costed, Cluster, float, Turns], Plan]
"""The same for tasks that run in turns."""
AllFit = Callable[[MetaGraph, Cluster], bool]
"""Whether all baselines of a MetaGraph with costs fit."""


def solve_fitting(
    metagraph: MetaGraph,
    cluster: Cluster,
    solve: Solve,
    *,
    profile: Profile | None = None,
    cost_options: CostOptions | None = None,
    steps: Sequence[MetaGraph] = (),
    is_mean: bool = False,
    all_fit: AllFit | None = None,
    in_turns: SolveInTurns | None = None,
    with_alternatives: bool = False,
) -> tuple[Plan, CostOptions]:
    """The shortest plan of the memory choices up to the first under which all baselines fit.

    Without `all_fit` the plan of the first choice under which one fits. The choices share the time limit. `in_turns`
    plans tasks in turns, under choices whose memory is too short for some baseline at once.
    Raises the last InfeasibleError when there is no plan; one that does not fit is returned where only such are found.
    `metagraph` still carries its operators; one from a file is planned as it is, since its costs cannot change. `steps`
    are the same on other batches, for whose mean it is planned; `is_mean`: it stands for that already.
    `with_alternatives`: the plan carries what people would use instead, each under its own memory choice.
    """
    choices = memory_choices(cost_options or CostOptions())
    if not any(metaop.operators for metaop in metagraph):
        choices = choices[:1]

    def costed_by(choice: CostOptions) -> Costed:
        return cost_steps(metagraph, steps, cluster, profile, choice, is_mean=is_mean)

    costed = [(choice, costed_by(choice)) for choice in choices]
    others = _alternatives(costed, cluster, costed_by) if with_alternatives else ()
    others += own_layout(metagraph, cluster, choices[0]) if with_alternatives else ()
    quicker = _quickest(choices, others)
    if costed[0][0].degrees:
        roomy = [(choice, graph) for choice, graph in costed if _leaves_room(graph.metagraph, cluster)]
        costed = roomy or costed[-1:]
    short = len(costed) if all_fit is None else 0  # choices whose memory may be too short
    if all_fit is not None:  # the last choice is tried in any case
        fitting = (i for i, (_, graph) in enumerate(costed[:-1]) if all_fit(graph.metagraph, cluster))
        short = next(fitting, len(costed) - 1)
        if short == len(costed) - 1 and in_turns and _may_be_short(costed[-1][1].metagraph, cluster):
            short += not all_fit(costed[-1][1].metagraph, cluster)
        costed = costed[: short + 1] + [(choice, graph) for choice, graph in costed[short + 1 :] if choice in quicker]
    tries = [*_tries(costed, short if in_turns else 0, cluster)]
    best, last = _shortest(tries, cluster, solve, in_turns, tries_all=all_fit is not None)
    more = _sharding(choices, shardable(metagraph, cluster, choices[0]), best, others)
    if more:
        in_shards = [*_tries([(choice, costed_by(choice)) for choice in more], len(more) if in_turns else 0, cluster)]
        best, last = _shortest(in_shards, cluster, solve, in_turns, tries_all=False, best=best, last=last)
    if best is not None:
        return replace(best[0], alternatives=others), best[1]
    assert last is not None, "each choice gives a plan or an InfeasibleError"
    if others:
        raise InfeasibleError(f"{last}. {_instead(others)}") from last
    raise last


def _sharding(
    choices: Sequence[CostOptions],
    components: Sequence[str],
    best: tuple[Plan, CostOptions] | None,
    others: Sequence[Alternative],
) -> tuple[CostOptions, ...]:
    """Choices that shard parameters, to be tried after the `best` of others; none where that is good enough."""
    if not components:
        return ()
    if best is None or not best[0].memory.fits:
        return sharded_choices(choices[0], components)
    quickest = min((other for other in others if other.fits), key=lambda other: other.step_s, default=None)
    if quickest is None or quickest.name != FSDP or quickest.step_s >= (1 - WORTH) * best[0].expected_s:
        return ()
    return sharded_choices(replace(choices[0], recompute=quickest.recompute), components)[-1:]


@dataclass(frozen=True)
class _Try:
    """A memory choice to be planned, all tasks at once or in turns; no schedule takes less than `least_s`."""

    choice: CostOptions
    graph: Costed
    turns: Turns
    least_s: float


def _tries(costed: Sequence[tuple[CostOptions, Costed]], short: int, cluster: Cluster) -> Iterator[_Try]:
    """Each choice at once, and the first `short` ones in turns."""
    for number, (choice, graph) in enumerate(costed):
        work_s = (m.layers * min(n * t for n, t in m.layer_time_s) for m in graph.metagraph)
        least_s = sum(work_s) / cluster.num_devices
        for turns in ((), *(turns_to_try(graph.metagraph, cluster) if number < short else ())):
            yield _Try(choice, graph, turns, least_s)


def _shortest(
    tries: Sequence[_Try],
    cluster: Cluster,
    solve: Solve,
    in_turns: SolveInTurns | None,
    *,
    tries_all: bool,
    best: tuple[Plan, CostOptions] | None = None,
    last: InfeasibleError | None = None,
) -> tuple[tuple[Plan, CostOptions] | None, InfeasibleError | None]:
    """The shortest plan that fits, or the first one unless all are tried, and why the last try at once had none; `best`
    and `last` are those of tries before, beside which these have the time limit once more.
    """
    share = 1 / len(tries) if tries_all or last or best else 1.0
    for each in tries:
        if best is not None and best[0].memory.fits and each.least_s >= (1 - WORTH) * best[0].expected_s:
            continue
        try:
            graph, turns = each.graph, each.turns
            plan = in_turns(graph, cluster, share, turns) if in_turns and turns else solve(graph, cluster, share)
        except InfeasibleError as error:
            last = last if last and each.turns else error
            continue
        saves = WORTH if best and each.choice != best[1] else 0.0  # turns by themselves make training no different
        if best is None or plan.memory.fits > best[0].memory.fits or _is_worth_it(plan, best[0], saves):
            best = plan, each.choice
        if not tries_all and plan.memory.fits:
            break
    return best, last


def _may_be_short(metagraph: MetaGraph, cluster: Cluster) -> bool:
    """Whether all tasks at once may not fit; cheap to see."""
    most = sum(max((num_bytes for _, num_bytes in metaop.memory_bytes), default=0.0) for metaop in metagraph)
    return most > cluster.device.memory_bytes


def _quickest(choices: Sequence[CostOptions], others: Sequence[Alternative]) -> list[CostOptions]:
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
    costed: Sequence[tuple[CostOptions, Costed]], cluster: Cluster, costed_by: Callable[[CostOptions], Costed]
) -> tuple[Alternative, ...]:
    """Those of each memory choice. Where a workload wants its states sharded, some alternatives do not, so they are
    costed without that too.
    """
    if any(m.layer_time_s[0][0] > cluster.num_devices for m in costed[0][1].metagraph):
        return ()  # nothing runs on so few devices; the plan says so
    known: dict[CostOptions, Costed] = {}
    for choice, graph in costed:
        plain = replace(choice, shard_parameters=())
        known[plain] = graph if plain == choice else costed_by(plain)
    for choice, graph in tuple(known.items()):
        if choice.shard_optimizer and any(metaop.operators for metaop in graph.metagraph):
            whole = replace(choice, shard_optimizer=False)
            known[whole] = known.get(whole) or costed_by(whole)
    found = [Choice(graph.metagraph, graph.steps, choice.recompute) for choice, graph in known.items()]
    return alternatives(found, cluster)


def _leaves_room(metagraph: MetaGraph, cluster: Cluster) -> bool:
    """Whether a device that held every layer, at its largest degree, had room for activations; cheap to see."""
    held = {m.parameters or m.name: m.layers * m.layer_state_bytes for m in metagraph}
    return sum(held.values()) <= MOST_STATES * cluster.device.memory_bytes


def _is_worth_it(plan: Plan, best: Plan, saves: float) -> bool:
    return plan.memory.fits >= best.memory.fits and plan.expected_s < (1 - saves) * best.expected_s
