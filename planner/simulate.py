"""Simulate: a plan in, the Trace of one step that it predicts out.

- Forward: each device runs its slices in the plan's order; a slice starts when its data and its devices are there, then
  receives its input, loads its batch (`loading`) and runs. Backward is the same in reverse: each slice runs, then sends
  its input's gradient back. Reductions run beside the rest of backward or after it (`reduction`); each device's
  optimizer step follows its own, and then what devices with sharded states hand to each other.
- Where tasks run in turns, a turn begins when backward of the one before has ended everywhere.
- A slice's forward share is its MetaOp's `forward_fraction`; a transfer takes as long in either direction.
- Forward plus backward takes at least `makespan_s` (a longest path of sums is no longer than the sum of longest paths)
  and exactly that when nothing is loaded, all MetaOps have one forward_fraction and no slice of the plan starts later
  than it could.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from spindle.errors import PlanError
from spindle.planner.costing.buckets import Computed, Layer, bucketed, layers_of, sizes_to_try, without_gaps
from spindle.planner.costing.loading import Loads, in_line, loads_of, waits_by_device
from spindle.planner.costing.reduction import (
    Reduction,
    handed_out,
    reduced_by_device,
    shares_of,
    slowed_by_device,
    update_by_device,
)
from spindle.planner.costing.traffic import transfer_s
from spindle.values.cluster import Cluster, Collective
from spindle.values.metagraph import Flow, MetaGraph
from spindle.values.plan import Plan, Slice
from spindle.values.trace import Span, SpanKind, Trace


@dataclass(frozen=True, slots=True)
class Timed:
    """When a slice holds its devices in one direction, and how much of that is transfer."""

    start_s: float
    end_s: float
    transfer_s: float


def simulate(plan: Plan, metagraph: MetaGraph | None = None, cluster: Cluster | None = None) -> Trace:
    """Predict one step of `plan`; MetaGraph and cluster are those it carries unless given.

    Without a cluster nothing is charged for transfers, loading and reductions. Raises PlanError when the plan carries
    no MetaGraph and none is given.
    """
    metagraph, cluster = metagraph or plan.metagraph, cluster or plan.cluster
    if metagraph is None:
        raise PlanError(
            "the plan carries no MetaGraph, so its slices have no costs; give the MetaGraph it was made for"
        )
    run = run_of(plan.slices, metagraph, cluster, plan.turn_by_task)
    spans = _forward_spans(plan, metagraph, run) + _backward_spans(plan, metagraph, run)
    if cluster is not None:
        ending = _ending(cluster, _trained(metagraph, run), plan.bucket_bytes)
        spans += _after_backward(run.both_s, ending)
        waits_s = waits_by_device(cluster, run.loads, ending.end_s + run.both_s)
        spans = _late(spans, waits_s)
    spans.sort(key=lambda span: (span.start_s, span.rank, span.end_s))
    return Trace(num_ranks=plan.num_devices, source="predicted", spans=tuple(spans))


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step: loading, forward and backward; what reductions add; what the optimizer's step adds to that,
    with the new parameters that devices send each other.
    """

    both_s: float
    reduction_s: float
    update_s: float

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.both_s + self.reduction_s + self.update_s


def step_times(plan: Plan, metagraph: MetaGraph, cluster: Cluster) -> StepTimes:
    """Predicted seconds of one step."""
    run = run_of(plan.slices, metagraph, cluster, plan.turn_by_task)
    return _step_times(cluster, run, _ending(cluster, _trained(metagraph, run), plan.bucket_bytes))


def best_buckets(plan: Plan, metagraph: MetaGraph, cluster: Cluster) -> tuple[int, StepTimes]:
    """The size of buckets with which the step of a plan is shortest, and its times."""
    run = run_of(plan.slices, metagraph, cluster, plan.turn_by_task)
    trained = _trained(metagraph, run)
    tried = (
        (size, _step_times(cluster, run, _ending(cluster, trained, size))) for size in sizes_to_try(trained.layers)
    )
    return min(tried, key=lambda found: found[1].step_s)


def _step_times(cluster: Cluster, run: "Run", ending: "_Ending") -> StepTimes:
    reduction_s = max(ending.reduced_s.values(), default=0.0)
    waits_s = waits_by_device(cluster, run.loads, run.both_s + ending.end_s)
    return StepTimes(run.both_s + max(waits_s.values(), default=0.0), reduction_s, ending.end_s - reduction_s)


@dataclass(frozen=True, slots=True)
class Run:
    """Slices in the plan's order, when each runs forward and backward, what its devices load and load in line; and the
    end of backward."""

    slices: list[Slice]
    forward: list[Timed]
    backward: list[Timed]
    loads: Loads
    loads_in_line: Loads
    both_s: float

    @property
    def computed(self) -> list[Computed]:
        """When the backward of each slice starts and ends to compute, from the end of all backward."""
        return [(t.start_s - self.both_s, t.end_s - t.transfer_s - self.both_s) for t in self.backward]


def run_of(
    run: Iterable[Slice],
    metagraph: MetaGraph,
    cluster: Cluster | None,
    turn_by_task: Mapping[str, int] | None = None,
) -> Run:
    """When slices run forward and backward, turn after turn; without a cluster nothing is moved."""
    turns = turn_by_task or {}
    by_turn: dict[int, list[Slice]] = defaultdict(list)
    for s in run:
        by_turn[turns.get(metagraph[s.metaop].task, 0)].append(s)
    ordered = [
        sorted(own, key=lambda s: (s.start_s, s.end_s, s.metaop, s.first_layer)) for _, own in sorted(by_turn.items())
    ]
    slices = [s for own in ordered for s in own]
    loads = loads_of(metagraph, slices)
    loads_in_line = in_line(cluster, loads)
    forward: list[Timed] = []
    backward: list[Timed] = []
    at_s = 0.0
    for own in ordered:
        there = len(forward)
        ahead, back = _turn(own, loads_in_line[there : there + len(own)], metagraph, cluster, at_s)
        forward, backward = forward + ahead, backward + back
        at_s = max(t.end_s for t in back)
    return Run(slices, forward, backward, loads, loads_in_line, both_s=at_s)


def _turn(
    slices: Sequence[Slice], loads: Loads, metagraph: MetaGraph, cluster: Cluster | None, at_s: float
) -> tuple[list[Timed], list[Timed]]:
    """Forward and backward of slices that begin at `at_s`."""
    before = waits(metagraph, slices)
    after: list[list[int]] = [[] for _ in slices]
    for follower, sources in enumerate(before):
        for source in sources:
            after[source].append(follower)
    moved_s = received_s(metagraph, cluster, slices) if cluster is not None else [0.0] * len(slices)
    forward_s = [
        max(load.values(), default=0.0) + _work_s(metagraph, s, forward=True)
        for s, load in zip(slices, loads, strict=True)
    ]
    forward = _timed(range(len(slices)), before, moved_s, forward_s, at_s)
    backward_s = [_work_s(metagraph, s, forward=False) for s in slices]
    middle_s = max(t.end_s for t in forward)
    return forward, _timed(range(len(slices) - 1, -1, -1), after, moved_s, backward_s, middle_s)


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
) -> list[Timed]:
    """Start each slice, in `order`, when all it waits for have ended."""
    timed: dict[int, Timed] = {}
    for i in order:
        start_s = max((timed[b].end_s for b in before[i]), default=at_s)
        timed[i] = Timed(start_s, start_s + moved_s[i] + work_s[i], moved_s[i])
    return [timed[i] for i in range(len(timed))]


def _forward_spans(plan: Plan, metagraph: MetaGraph, run: Run) -> list[Span]:
    """Of each slice on each device: receive its input, load its batch, compute."""
    spans: list[Span] = []
    for s, t, load in zip(run.slices, run.forward, run.loads_in_line, strict=True):
        received_s = t.start_s + t.transfer_s
        computes_s = received_s + max(load.values(), default=0.0)
        parts = ((SpanKind.TRANSFER, t.start_s, received_s), (SpanKind.FORWARD, computes_s, t.end_s))
        for device in s.devices:
            spans += _slice_spans(plan, metagraph, s, device, parts)
        task = metagraph[s.metaop].task
        spans += [
            Span(
                rank=device,
                kind=SpanKind.LOAD,
                name=f"load {task}",
                start_s=received_s,
                end_s=received_s + seconds,
                task=task,
            )
            for device, seconds in load.items()
        ]
    return spans


def _backward_spans(plan: Plan, metagraph: MetaGraph, run: Run) -> list[Span]:
    """Of each slice on each device: compute, send the gradient of its input."""
    spans: list[Span] = []
    for s, t in zip(run.slices, run.backward, strict=True):
        sends_s = t.end_s - t.transfer_s
        parts = ((SpanKind.BACKWARD, t.start_s, sends_s), (SpanKind.TRANSFER, sends_s, t.end_s))
        for device in s.devices:
            spans += _slice_spans(plan, metagraph, s, device, parts)
    return spans


def _slice_spans(
    plan: Plan, metagraph: MetaGraph, s: Slice, device: int, parts: Sequence[tuple[SpanKind, float, float]]
) -> list[Span]:
    """Parts of a slice's time on a device that take any."""
    metaop, wave = metagraph[s.metaop], plan.wave_of(s)
    return [
        Span(
            rank=device,
            kind=kind,
            name=f"{s.metaop}[{s.first_layer}:{s.last_layer + 1}]",
            start_s=start_s,
            end_s=end_s,
            task=metaop.task,
            component=metaop.component,
            metaop=s.metaop,
            wave=wave,
        )
        for kind, start_s, end_s in parts
        if end_s > start_s
    ]


@dataclass(frozen=True, slots=True)
class _Ending:
    """What follows backward; times from its end. By device: when its reductions are done, and when it has stepped."""

    reductions: tuple[Reduction, ...]
    slowed_s: dict[int, float]
    reduced_s: dict[int, float]
    stepped_s: dict[int, float]
    handed_out: tuple[Reduction, ...]

    @property
    def end_s(self) -> float:
        return max([0.0, *self.stepped_s.values(), *(r.end_s for r in self.handed_out)])


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a run trains: its layers, seconds of each device's optimizer step, and whether states are sharded."""

    layers: tuple[Layer, ...]
    update_s: dict[int, float]
    sharded: bool


def _trained(metagraph: MetaGraph, run: Run) -> _Trained:
    layers = layers_of(metagraph, run.slices, run.computed)
    updates_s = update_by_device(shares_of(metagraph, run.slices))
    return _Trained(tuple(layers.values()), updates_s, metagraph.shard_optimizer)


def _ending(cluster: Cluster, trained: _Trained, bucket_bytes: int) -> _Ending:
    """Gradients are reduced in buckets, as they become ready."""
    operation: Collective = "reduce" if trained.sharded else "all_reduce"
    reductions = bucketed(cluster, trained.layers, operation, divided=trained.sharded, bucket_bytes=bucket_bytes)
    reduced_s = reduced_by_device(cluster, reductions)
    stepped_s = dict(reduced_s)
    for device, seconds in trained.update_s.items():
        stepped_s[device] = reduced_s.get(device, 0.0) + seconds
    out = handed_out(cluster, reductions, stepped_s) if trained.sharded else ()
    return _Ending(reductions, slowed_by_device(cluster, reductions), reduced_s, stepped_s, out)


def _after_backward(at_s: float, ending: _Ending) -> list[Span]:
    """Reductions, what they take from backward, the optimizer's steps, and what is handed out."""
    spans = [
        Span(
            rank=device,
            kind=SpanKind.REDUCE,
            name=f"{what} over {len(r.devices)} devices from {r.devices[0]}",
            start_s=at_s + r.start_s,
            end_s=at_s + r.end_s,
            num_bytes=int(r.num_bytes),
        )
        for what, messages in (("reduce", without_gaps(ending.reductions)), ("new parameters", ending.handed_out))
        for r in messages
        for device in r.devices
    ]
    done_s = ending.reduced_s
    after = [
        (device, SpanKind.BACKWARD, "slowed by reductions", done_s[device] - seconds, done_s[device])
        for device, seconds in ending.slowed_s.items()
    ]
    after += [
        (device, SpanKind.STEP, "optimizer step", done_s.get(device, 0.0), end_s)
        for device, end_s in ending.stepped_s.items()
        if end_s > done_s.get(device, 0.0)
    ]
    return spans + [
        Span(rank=device, kind=kind, name=name, start_s=at_s + start_s, end_s=at_s + end_s)
        for device, kind, name, start_s, end_s in after
    ]


def _late(spans: list[Span], waits_s: Mapping[int, float]) -> list[Span]:
    """The same after the longest wait for a loader."""
    last_s = max(waits_s.values(), default=0.0)
    moved = [replace(span, start_s=span.start_s + last_s, end_s=span.end_s + last_s) for span in spans]
    return moved + [
        Span(rank=device, kind=SpanKind.LOAD, name="wait for loaders", start_s=last_s - seconds, end_s=last_s)
        for device, seconds in waits_s.items()
    ]
