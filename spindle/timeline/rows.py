"""Rows: a trace (or the plan's own slices) in, a View out: all of every device's time as items, with reasons for gaps.

Measured gaps below `LEAST_GAP` of the step are drawn as nothing, but booked in the accounts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from spindle.errors import InputError
from spindle.timeline.index import Source, StepIndex, by_step, made_by
from spindle.timeline.items import Cause, Item, Kind, Link, StepView, View, What
from spindle.timeline.table import SliceTable, slice_name
from spindle.values.plan import Plan
from spindle.values.trace import Span, SpanKind, Trace

LEAST_GAP = 5e-4
LEAST_GAP_PREDICTED = 1e-9
MAX_SPANS = 600_000


def plan_view(plan: Plan, table: SliceTable) -> View:
    """The plan's own slices, forward and backward together, as one step."""
    spans = []
    for index, s in enumerate(table.slices):
        metaop = plan.metagraph[s.metaop] if plan.metagraph else None
        task, component = (metaop.task, metaop.component) if metaop else _guess(s.metaop)
        spans += [
            Span(
                rank=device,
                kind=SpanKind.FORWARD,
                name=slice_name(s),
                start_s=s.start_s,
                end_s=s.end_s,
                task=task,
                component=component,
                metaop=s.metaop,
                wave=table.waves[index],
            )
            for device in s.devices
        ]
    return View(source="plan", steps=(_step_view(table, 0, spans, plan.num_devices, "plan"),))


def _guess(metaop: str) -> tuple[str, str]:
    task, dot, component = metaop.partition(".")
    return (task, component) if dot else ("", metaop)


def trace_view(trace: Trace, table: SliceTable, *, measured: bool) -> View:
    """Every step of a trace as rows; beyond `MAX_SPANS` spans, steps far from the median length are left out.

    The step of median length is shown first. Raises InputError when the trace has no spans.
    """
    source: Source = "measured" if measured else "predicted"
    spans_by_step = by_step(trace)
    if not spans_by_step:
        raise InputError(f"the {source} trace has no spans; record at least one step")
    lengths = {k: max(s.end_s for s in spans) - min(s.start_s for s in spans) for k, spans in spans_by_step.items()}
    ranked = sorted(spans_by_step, key=lambda step: (lengths[step], step))
    median = ranked[(len(ranked) - 1) // 2]
    kept = _within_limit({step: len(spans) for step, spans in spans_by_step.items()}, ranked, median)
    steps = tuple(
        _step_view(table, step, spans_by_step[step], trace.num_ranks, source, _around(spans_by_step, step))
        for step in kept
    )
    total_s = max(s.end_s for s in trace) - min(s.start_s for s in trace)
    return View(
        source=source,
        steps=steps,
        first=kept.index(median),
        num_steps=len(ranked),
        total_s=total_s,
        peak_bytes=trace.peak_bytes,
    )


class _Around(NamedTuple):
    """When each rank ended the step before, and began the step after."""

    ended_s: Mapping[int, float]
    begins_s: Mapping[int, float]


def _around(spans_by_step: Mapping[int, Sequence[Span]], step: int) -> _Around:
    ended: dict[int, float] = {}
    for span in spans_by_step.get(step - 1, ()):
        ended[span.rank] = max(ended.get(span.rank, span.end_s), span.end_s)
    begins: dict[int, float] = {}
    for span in spans_by_step.get(step + 1, ()):
        begins[span.rank] = min(begins.get(span.rank, span.start_s), span.start_s)
    return _Around(ended, begins)


def _within_limit(sizes: Mapping[int, int], ranked: Sequence[int], median: int) -> list[int]:
    """Steps from the median outwards while their spans are few enough; the median in any case. In rising order."""
    middle = ranked.index(median)
    kept, room = [median], MAX_SPANS - sizes[median]
    for _, step in sorted((abs(place - middle), step) for place, step in enumerate(ranked))[1:]:
        room -= sizes[step]
        if room < 0:
            break
        kept.append(step)
    return sorted(kept)


def _step_view(
    table: SliceTable,
    step: int,
    spans: Sequence[Span],
    num_ranks: int,
    source: Source,
    around: "_Around | None" = None,
) -> StepView:
    index = StepIndex(table, spans, num_ranks, source)
    maker = _Maker(index, source, around or _Around({}, {}))
    rows = tuple(tuple(maker.row(rank)) for rank in range(num_ranks))
    return StepView(step=step, step_s=index.step_s, rows=rows, links=tuple(_links(index, rows)))


class _Maker:
    """Makes the items of one step."""

    def __init__(self, index: StepIndex, source: Source, around: _Around) -> None:
        self.index, self.source, self.around = index, source, around
        self.least_gap_s = index.step_s * (LEAST_GAP if index.measured else LEAST_GAP_PREDICTED)
        self.whats: dict[tuple[object, ...], What] = {}

    def row(self, rank: int) -> Iterator[Item]:
        """All of a rank's time."""
        index, at_s = self.index, self.index.first_s
        begin_s = min((span.start_s for span in index.by_rank[rank][:1]), default=at_s)
        before_s = min(self.around.ended_s.get(rank, at_s), begin_s)
        if before_s - at_s > self.least_gap_s:
            yield self.item(self.gap(Cause.OTHER, ""), at_s, before_s)
            at_s = before_s
        for place, span in enumerate(index.by_rank[rank]):
            if span.start_s - at_s > self.least_gap_s:
                yield self.item(self.gap(*index.gap_reason(rank, place)), at_s, span.start_s)
            blocked_s, why = index.blocked(span)
            yield self.item(self.what(span, why), span.start_s, span.end_s, blocked_s)
            at_s = max(at_s, span.end_s)
        after_s = max(at_s, min(self.around.begins_s.get(rank, index.last_s), index.last_s))
        if after_s - at_s > self.least_gap_s:
            why = "done, the step ends elsewhere" if index.by_rank[rank] else "has no part in this step"
            yield self.item(self.gap(Cause.NOTHING, why), at_s, after_s)
            at_s = after_s
        if index.last_s - after_s > self.least_gap_s:
            yield self.item(self.gap(Cause.OTHER, ""), at_s, index.last_s)

    def item(self, what: What, start_s: float, end_s: float, blocked_s: float = 0.0) -> Item:
        """An item; its times count from the step's first moment."""
        return Item(what, start_s - self.index.first_s, end_s - self.index.first_s, blocked_s)

    def gap(self, cause: Cause, why: str) -> What:
        """Idle time."""
        key = (cause, why)
        if key not in self.whats:
            self.whats[key] = What(kind=Kind.IDLE, name="idle", idle=cause, why=why)
        return self.whats[key]

    def what(self, span: Span, why: str) -> What:
        """What a span is."""
        key = (span.kind, span.name, span.task, span.component, span.metaop, span.wave, span.num_bytes, why)
        if key not in self.whats:
            kind = Kind.WORK if self.source == "plan" else self.index.kind(span)
            home = self.index.table.slice_of(span)
            self.whats[key] = What(
                kind=kind,
                name=span.name,
                task=span.task,
                component=span.component,
                metaop=span.metaop,
                wave=span.wave,
                num_bytes=span.num_bytes or self.planned_bytes(kind, home),
                slice=home,
                planned_s=self.planned_s(kind, home, span),
                why=why,
            )
        return self.whats[key]

    def planned_bytes(self, kind: Kind, home: int) -> int:
        """Bytes of a predicted transfer; predicted spans carry none."""
        known = kind is Kind.WAIT and home >= 0 and not self.index.measured
        return self.index.table.receive_bytes[home] if known else 0

    def planned_s(self, kind: Kind, home: int, span: Span) -> float:
        """Seconds that the plan gives a span; 0 when it says nothing."""
        if kind is Kind.REDUCE and not span.name.startswith("AWAIT "):  # what is awaited ran beside other work
            return self.index.table.reduce_s.get(self.index.reduction_members(span), 0.0)
        if kind is Kind.WAIT and self.index.measured and "<" in span.name:
            return 0.0  # the plan charges gradients to the slice that sends them
        return self.index.table.planned_s(kind, home)


# -- links --------------------------------------------------------------------------------------------------------

Places = Mapping[tuple[Kind, str, int], int]
"""Where in its row the forward or backward of a slice run stands, by kind, run and rank."""


def _links(index: StepIndex, rows: Sequence[Sequence[Item]]) -> Iterator[Link]:
    """From each slice's compute to the waits for it; from a predicted transfer of gradients on to their reader."""
    places: Places = {
        (Kind(item.what.kind), index.run_name(item.what.name), rank): place
        for rank, row in enumerate(rows)
        for place, item in enumerate(row)
        if item.what.kind in (Kind.FORWARD, Kind.BACKWARD)
    }
    find = _measured_links if index.measured else _predicted_links
    for rank, row in enumerate(rows):
        for place, item in enumerate(row):
            if item.what.kind is Kind.WAIT:
                yield from find(index, item.what, rank, place, places)


def _measured_links(index: StepIndex, what: What, rank: int, place: int, places: Places) -> Iterator[Link]:
    run = made_by(what.name)
    if run is None or run not in index.ends:
        return
    for source in index.senders(run, what.slice, rank):
        yield Link(source, places[Kind(run[0].value), run[1], source], rank, place)


def _predicted_links(index: StepIndex, what: What, rank: int, place: int, places: Places) -> Iterator[Link]:
    if what.slice < 0:
        return
    own = places.get((Kind.FORWARD, what.name, rank))
    forward = own is not None and place < own
    kind = SpanKind.FORWARD if forward else SpanKind.BACKWARD
    for other in index.table.feeders[what.slice]:
        name = slice_name(index.table.slices[other])
        for peer in index.senders((kind, name), what.slice, rank):
            there = places[Kind(kind.value), name, peer]
            yield Link(peer, there, rank, place) if forward else Link(rank, place, peer, there)
