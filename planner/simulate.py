"""Simulate: a plan in, the Trace of one step that it predicts out.

- Forward: each device runs its slices in the plan's order; a slice starts when its data and its devices are there, then
  receives its input and runs. Backward is the same in reverse: each slice runs, then sends its input's gradient back.
  Reductions run beside the rest of backward or after it (`reduction`); each device's optimiser step follows its own.
- A slice's forward share is its MetaOp's `forward_fraction`; a transfer takes as long in either direction.
- Forward plus backward takes at least `makespan_s` (a longest path of sums is no longer than the sum of longest paths)
  and exactly that when all MetaOps have one forward_fraction and no slice of the plan starts later than it could.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from spindle.cluster import Cluster
from spindle.errors import PlanError
from spindle.metagraph import Flow, MetaGraph
from spindle.plan import Plan, Slice
from spindle.planner.reduction import (
    Reduction,
    Share,
    reduced_by_device,
    schedule,
    shares_of,
    slowed_by_device,
    update_by_device,
)
from spindle.planner.traffic import transfer_s
from spindle.trace import Span, SpanKind, Trace


@dataclass(frozen=True, slots=True)
class _Timed:
    """When a slice holds its devices in one direction, and how much of that is transfer."""

    start_s: float
    end_s: float
    transfer_s: float


def simulate(plan: Plan, metagraph: MetaGraph | None = None, cluster: Cluster | None = None) -> Trace:
    """Predict one step of `plan`; MetaGraph and cluster are those it carries unless given.

    Without a cluster nothing is charged for transfers and reductions. Raises PlanError when the plan carries no
    MetaGraph and none is given.
    """
    metagraph, cluster = metagraph or plan.metagraph, cluster or plan.cluster
    if metagraph is None:
        raise PlanError(
            "the plan carries no MetaGraph, so its slices have no costs; give the MetaGraph it was made for"
        )
    slices, forward, backward = _timings(plan, metagraph, cluster)
    spans = _spans(plan, metagraph, slices, forward, SpanKind.FORWARD)
    spans += _spans(plan, metagraph, slices, backward, SpanKind.BACKWARD)
    if cluster is not None:
        spans += _after_backward(cluster, metagraph, slices, backward)
    spans.sort(key=lambda span: (span.start_s, span.rank, span.end_s))
    return Trace(num_ranks=plan.num_devices, source="predicted", spans=tuple(spans))


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step: forward and backward, what reductions add, and what the optimiser's step adds to that."""

    both_s: float
    reduction_s: float
    update_s: float

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.both_s + self.reduction_s + self.update_s


def step_times(plan: Plan, metagraph: MetaGraph, cluster: Cluster) -> StepTimes:
    """Predicted seconds of one step."""
    slices, _, backward = _timings(plan, metagraph, cluster)
    shares = shares_of(metagraph, slices)
    reduced_s = reduced_by_device(cluster, _reductions(cluster, shares, backward))
    reduction_s = max(reduced_s.values(), default=0.0)
    ends_s = [reduced_s.get(device, 0.0) + seconds for device, seconds in update_by_device(shares).items()]
    both_s = max(t.end_s for t in backward)
    return StepTimes(both_s, reduction_s, max([reduction_s, *ends_s]) - reduction_s)


def _timings(
    plan: Plan, metagraph: MetaGraph, cluster: Cluster | None
) -> tuple[list[Slice], list[_Timed], list[_Timed]]:
    """Slices in the plan's order, and when each runs forward and backward."""
    slices = sorted(plan.slices, key=lambda s: (s.start_s, s.end_s, s.metaop, s.first_layer))
    before = waits(metagraph, slices)
    after: list[list[int]] = [[] for _ in slices]
    for follower, sources in enumerate(before):
        for source in sources:
            after[source].append(follower)
    moved_s = received_s(metagraph, cluster, slices) if cluster is not None else [0.0] * len(slices)
    forward_s = [_work_s(metagraph, s, forward=True) for s in slices]
    forward = _timed(range(len(slices)), before, moved_s, forward_s, 0.0)
    backward_s = [_work_s(metagraph, s, forward=False) for s in slices]
    middle_s = max(t.end_s for t in forward)
    return slices, forward, _timed(range(len(slices) - 1, -1, -1), after, moved_s, backward_s, middle_s)


def waits(metagraph: MetaGraph, slices: Sequence[Slice]) -> list[list[int]]:
    """For each slice the earlier ones that it waits for: its data's and its devices' last."""
    last_on_device: dict[int, int] = {}
    last_of_metaop: dict[str, int] = {}
    before: list[list[int]] = []
    for i, s in enumerate(slices):
        sources = {last_on_device[d] for d in s.devices if d in last_on_device}
        sources |= {
            last_of_metaop[name] for name in (s.metaop, *metagraph.predecessors[s.metaop]) if name in last_of_metaop
        }
        before.append(sorted(sources))
        last_of_metaop[s.metaop] = i
        last_on_device.update(dict.fromkeys(s.devices, i))
    return before


def _work_s(metagraph: MetaGraph, s: Slice, *, forward: bool) -> float:
    metaop = metagraph[s.metaop]
    share = metaop.forward_fraction if forward else 1 - metaop.forward_fraction
    return s.num_layers * metaop.times[len(s.devices)] * share


def received_s(metagraph: MetaGraph, cluster: Cluster, slices: Sequence[Slice]) -> list[float]:
    """Seconds in which each slice receives its input, one direction; slices in order of start."""
    flows: dict[str, list[Flow]] = defaultdict(list)
    for flow in metagraph.flows:
        flows[flow.target].append(flow)
    last: dict[str, tuple[int, ...]] = {}
    seconds = []
    for s in slices:
        if s.first_layer:
            sources = [(metagraph[s.metaop].output_bytes, last[s.metaop])]
        else:
            sources = [(metagraph.flow_bytes(flow), last[flow.source]) for flow in flows[s.metaop]]
        seconds.append(sum(transfer_s(cluster, num_bytes, source, s.devices) for num_bytes, source in sources))
        last[s.metaop] = s.devices
    return seconds


def _timed(
    order: Sequence[int],
    before: Sequence[Sequence[int]],
    moved_s: Sequence[float],
    work_s: Sequence[float],
    at_s: float,
) -> list[_Timed]:
    """Start each slice, in `order`, when all it waits for have ended."""
    timed: dict[int, _Timed] = {}
    for i in order:
        start_s = max((timed[b].end_s for b in before[i]), default=at_s)
        timed[i] = _Timed(start_s, start_s + moved_s[i] + work_s[i], moved_s[i])
    return [timed[i] for i in range(len(timed))]


def _spans(
    plan: Plan, metagraph: MetaGraph, slices: Sequence[Slice], timed: Sequence[_Timed], kind: SpanKind
) -> list[Span]:
    spans: list[Span] = []
    parts: tuple[tuple[SpanKind, float, float], ...]
    for s, t in zip(slices, timed, strict=True):
        name = f"{s.metaop}[{s.first_layer}:{s.last_layer + 1}]"
        if kind is SpanKind.FORWARD:
            middle_s = t.start_s + t.transfer_s
            parts = ((SpanKind.TRANSFER, t.start_s, middle_s), (kind, middle_s, t.end_s))
        else:
            middle_s = t.end_s - t.transfer_s
            parts = ((kind, t.start_s, middle_s), (SpanKind.TRANSFER, middle_s, t.end_s))
        for part, start_s, end_s in parts:
            if end_s > start_s:
                spans += [_span(plan, metagraph, s, device, part, name, start_s, end_s) for device in s.devices]
    return spans


def _span(
    plan: Plan, metagraph: MetaGraph, s: Slice, device: int, kind: SpanKind, name: str, start_s: float, end_s: float
) -> Span:
    metaop = metagraph[s.metaop]
    return Span(
        rank=device,
        kind=kind,
        name=name,
        start_s=start_s,
        end_s=end_s,
        task=metaop.task,
        component=metaop.component,
        metaop=s.metaop,
        wave=plan.wave_of(s),
    )


def _reductions(cluster: Cluster, shares: Sequence[Share], backward: Sequence[_Timed]) -> tuple[Reduction, ...]:
    """Reductions of gradients that are ready when the last backward slice of their layers has run."""
    end_s = max(t.end_s for t in backward)
    computed_s = [t.end_s - t.transfer_s - end_s for t in backward]
    wanted = [(share.devices, share.num_bytes, max(computed_s[i] for i in share.slices)) for share in shares]
    return schedule(cluster, wanted)


def _after_backward(
    cluster: Cluster, metagraph: MetaGraph, slices: Sequence[Slice], backward: Sequence[_Timed]
) -> list[Span]:
    """Reductions, what they take from backward, and the optimiser's steps."""
    at_s = max(t.end_s for t in backward)
    shares = shares_of(metagraph, slices)
    reductions = _reductions(cluster, shares, backward)
    done_s = reduced_by_device(cluster, reductions)
    spans = [
        Span(
            rank=device,
            kind=SpanKind.REDUCE,
            name=f"reduce over {len(r.devices)} devices from {r.devices[0]}",
            start_s=at_s + r.start_s,
            end_s=at_s + r.end_s,
            num_bytes=int(r.num_bytes),
        )
        for r in reductions
        for device in r.devices
    ]
    after = [
        (device, SpanKind.BACKWARD, "slowed by reductions", done_s[device] - seconds, done_s[device])
        for device, seconds in slowed_by_device(cluster, reductions).items()
    ]
    after += [
        (device, SpanKind.STEP, "optimizer step", done_s.get(device, 0.0), done_s.get(device, 0.0) + seconds)
        for device, seconds in update_by_device(shares).items()
    ]
    return spans + [
        Span(rank=device, kind=kind, name=name, start_s=at_s + start_s, end_s=at_s + end_s)
        for device, kind, name, start_s, end_s in after
    ]
