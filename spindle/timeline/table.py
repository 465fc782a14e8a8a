"""Slice table: a plan and its predicted trace in; what rows need to know of each slice out.

Slices are named by their index among the plan's slices in order of start. A span names its slice by MetaOp and wave: no
MetaOp has two slices in one wave.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from spindle.timeline.items import Kind, kind_of
from spindle.values.plan import Plan, Slice
from spindle.values.trace import Span, SpanKind, Trace


@dataclass(frozen=True)
class SliceTable:
    """Slices of a plan, whom each takes its input from, and the seconds that the plan gives to each.

    feeders      indexes of the slices whose output a slice reads
    forward_s, backward_s, receive_s   planned seconds by slice; 0 where the plan says nothing
    receive_bytes  bytes that each device of a slice receives when its input lies elsewhere; 0 where the plan is silent
    reduce_s     planned seconds of a gradient reduction by its set of devices
    """

    slices: tuple[Slice, ...]
    waves: tuple[int, ...]
    feeders: tuple[tuple[int, ...], ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    receive_s: tuple[float, ...]
    receive_bytes: tuple[int, ...]
    reduce_s: dict[frozenset[int], float]

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Indexes of the slices that read a slice's output."""
        found: list[list[int]] = [[] for _ in self.slices]
        for target, sources in enumerate(self.feeders):
            for source in sources:
                found[source].append(target)
        return tuple(map(tuple, found))

    @cached_property
    def _index(self) -> dict[tuple[str, int], int]:
        return {(s.metaop, wave): i for i, (s, wave) in enumerate(zip(self.slices, self.waves, strict=True))}

    def slice_of(self, span: Span) -> int:
        """Index of the slice that a span belongs to; -1 when it belongs to none."""
        return self._index.get((span.metaop, span.wave), -1) if span.metaop else -1

    def planned_s(self, kind: Kind, index: int) -> float:
        """Seconds that the plan gives to one kind of work of a slice; 0 where it says nothing."""
        by_kind = {Kind.FORWARD: self.forward_s, Kind.BACKWARD: self.backward_s, Kind.WAIT: self.receive_s}
        return by_kind[kind][index] if index >= 0 and kind in by_kind else 0.0


def slice_name(s: Slice) -> str:
    """A slice in words, as predicted traces name it."""
    return f"{s.metaop}[{s.first_layer}:{s.last_layer + 1}]"


def make_table(plan: Plan, predicted: Trace | None) -> SliceTable:
    """The slice table of a plan. Planned seconds are those of the predicted trace, else of the plan's MetaGraph."""
    slices, feeders = plan.slices, _feeders(plan)
    table = SliceTable(
        slices=slices,
        waves=tuple(plan.wave_of(s) for s in slices),
        feeders=feeders,
        forward_s=_own_s(plan, forward=True),
        backward_s=_own_s(plan, forward=False),
        receive_s=(0.0,) * len(slices),
        receive_bytes=tuple(_receive_bytes(plan, index, sources) for index, sources in enumerate(feeders)),
        reduce_s={},
    )
    return _with_predictions(table, predicted) if predicted is not None else table


def _feeders(plan: Plan) -> tuple[tuple[int, ...], ...]:
    by_metaop: dict[str, list[int]] = defaultdict(list)
    for index, s in sorted(enumerate(plan.slices), key=lambda pair: pair[1].first_layer):
        by_metaop[s.metaop].append(index)
    predecessors = plan.metagraph.predecessors if plan.metagraph else {}
    found: list[tuple[int, ...]] = [()] * len(plan.slices)
    for metaop, indexes in by_metaop.items():
        sources = tuple(by_metaop[name][-1] for name in predecessors.get(metaop, ()) if name in by_metaop)
        for index in indexes:
            found[index], sources = sources, (index,)
    return tuple(found)


def _receive_bytes(plan: Plan, index: int, sources: Iterable[int]) -> int:
    """A device's share of what a slice reads from slices on other sets of devices."""
    if plan.metagraph is None:
        return 0
    target, num_bytes = plan.slices[index], 0.0
    flows = {(flow.source, flow.target): plan.metagraph.flow_bytes(flow) for flow in plan.metagraph.flows}
    for source in (plan.slices[i] for i in sources):
        if source.devices != target.devices:
            inside = plan.metagraph[source.metaop].output_bytes
            num_bytes += flows.get((source.metaop, target.metaop), inside)
    return round(num_bytes / len(target.devices))


def _own_s(plan: Plan, *, forward: bool) -> tuple[float, ...]:
    if plan.metagraph is None:
        return (0.0,) * len(plan.slices)
    seconds = []
    for s in plan.slices:
        metaop = plan.metagraph[s.metaop]
        share = metaop.forward_fraction if forward else 1 - metaop.forward_fraction
        seconds.append(s.num_layers * metaop.times.get(len(s.devices), 0.0) * share)
    return tuple(seconds)


def _with_predictions(table: SliceTable, predicted: Trace) -> SliceTable:
    seconds = {kind: [0.0] * len(table.slices) for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.WAIT)}
    for span in predicted:
        kind, index = kind_of(span.kind, span.name), table.slice_of(span)
        if kind in seconds and index >= 0:
            seconds[kind][index] = max(seconds[kind][index], span.end_s - span.start_s)
    return replace(
        table,
        forward_s=tuple(seconds[Kind.FORWARD]),
        backward_s=tuple(seconds[Kind.BACKWARD]),
        receive_s=tuple(seconds[Kind.WAIT]),
        reduce_s=_reductions(predicted),
    )


def _reductions(predicted: Iterable[Span]) -> dict[frozenset[int], float]:
    """Seconds by device set; members of one reduction start and end together in a prediction."""
    members: dict[tuple[str, float, float], set[int]] = defaultdict(set)
    for span in predicted:
        if span.kind is SpanKind.REDUCE:
            members[span.name, span.start_s, span.end_s].add(span.rank)
    seconds: dict[frozenset[int], float] = defaultdict(float)
    for (_, start_s, end_s), ranks in members.items():
        seconds[frozenset(ranks)] += end_s - start_s
    return dict(seconds)
