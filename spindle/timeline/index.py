"""Index of one step: its spans in, who ran what until when out; and from that what each span waited for.

- Measured: a wait is split where the last device that it waits for had finished computing, a reduction where its last
  member came. A reduction is one span ("REDUCE b0") or two: its start, and the wait for it ("AWAIT b0") after whatever
  ran beside it.
- Predicted: there are no waits for data, only gaps; what the next span waited for is read off the plan.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from spindle.timeline.items import Cause, Kind, kind_of
from spindle.timeline.table import SliceTable, slice_name
from spindle.values.trace import Span, SpanKind

Source = Literal["plan", "predicted", "measured"]
Run = tuple[SpanKind, str]
"""Forward or backward of a slice run (measured: "s3") or of a slice (predicted: "vision[0:12]")."""

NEAR = 1e-6  # moments of a prediction closer than this share of the step are one moment


class StepIndex:
    """Spans of one step by rank, by slice run and by reduction. Times are those of the trace."""

    def __init__(self, table: SliceTable, spans: Sequence[Span], num_ranks: int, source: Source) -> None:
        self.table, self.measured = table, source == "measured"
        self.first_s = 0.0 if source == "plan" else min(s.start_s for s in spans)
        self.last_s = max(s.end_s for s in spans)
        self.by_rank: list[list[Span]] = [[] for _ in range(num_ranks)]
        self.ends: dict[Run, dict[int, float]] = defaultdict(dict)
        self.home: dict[str, int] = {}
        self.members: dict[tuple[str, float], list[Span]] = defaultdict(list)
        self._awaited = {target_of(s) for s in spans if s.kind is SpanKind.REDUCE and s.name.startswith("AWAIT ")}
        for span in spans:
            self.by_rank[span.rank].append(span)
            if span.kind in (SpanKind.FORWARD, SpanKind.BACKWARD):
                run = self.run_name(span.name)
                self.ends[span.kind, run][span.rank] = span.end_s
                self.home[run] = table.slice_of(span)
            elif span.kind is SpanKind.REDUCE and not span.name.startswith("AWAIT "):
                self.members[self.reduction(span)].append(span)
        for row in self.by_rank:
            row.sort(key=lambda s: (s.start_s, s.end_s))
        self._row_ends = [[s.end_s for s in row] for row in self.by_rank]
        self._last_member = {k: max(m, key=lambda s: (s.start_s, s.rank)) for k, m in self.members.items()}
        self._places: dict[tuple[Run, int], tuple[list[int], dict[int, int]]] = {}

    @property
    def step_s(self) -> float:
        """Seconds from the first to the last moment."""
        return self.last_s - self.first_s

    def run_name(self, name: str) -> str:
        """The slice run or slice that a compute span names."""
        return name.partition(" ")[2] if self.measured else name

    def kind(self, span: Span) -> Kind:
        """How a span is drawn: the start of a reduction that is awaited later is but a start."""
        if span.kind is SpanKind.REDUCE and self.measured and span.name.startswith("REDUCE "):
            return Kind.ISSUE if target_of(span) in self._awaited else Kind.REDUCE
        return kind_of(span.kind, span.name)

    def reduction(self, span: Span) -> tuple[str, float]:
        """What the members of one reduction have in common; in a prediction they start together."""
        return (target_of(span), 0.0) if self.measured else (span.name, span.start_s)

    def reduction_members(self, span: Span) -> frozenset[int]:
        """Ranks of the reduction that a span is part of."""
        return frozenset(s.rank for s in self.members.get(self.reduction(span), ()))

    def senders(self, run: Run, reader: int, rank: int) -> list[int]:
        """Ranks that send to `rank` of what `run` makes, when slice `reader` (-1: unknown) reads it."""
        key = (run, reader)
        if key not in self._places:
            targets = sorted(self.table.slices[reader].devices) if reader >= 0 else []
            self._places[key] = sorted(self.ends.get(run, ())), {r: place for place, r in enumerate(targets)}
        sources, places = self._places[key]
        if rank not in places:
            return sources
        return overlapping(sources, places[rank], len(places), rank)

    def last_member(self, span: Span) -> Span | None:
        """The member of a span's reduction that came last."""
        return self._last_member.get(self.reduction(span))

    # -- what was waited for --------------------------------------------------------------------------------------

    def blocked(self, span: Span) -> tuple[float, str]:
        """Seconds at the beginning of a span in which what it waits for was not there, and what that was."""
        if not self.measured:
            return 0.0, ""
        if span.kind is SpanKind.REDUCE:
            last = self.last_member(span)
            if last is None or self.kind(span) is Kind.ISSUE:
                return 0.0, ""
            why = f"device {last.rank} came last" if last.rank != span.rank else ""
            return _clamped(last.start_s - span.start_s, span), why
        run = made_by(span.name)
        if kind_of(span.kind, span.name) is not Kind.WAIT or run is None or run not in self.ends:
            return 0.0, ""
        ends = self.ends[run]
        last_rank = max(self.senders(run, self.table.slice_of(span), span.rank), key=lambda rank: (ends[rank], rank))
        home = self.home[run[1]]
        name = f"{slice_name(self.table.slices[home])} ({run[1]})" if home >= 0 else run[1]
        return _clamped(ends[last_rank] - span.start_s, span), f"{_direction(run[0])} of {name} on device {last_rank}"

    def gap_reason(self, rank: int, place: int) -> tuple[Cause, str]:
        """Why a rank stood idle before its span number `place`."""
        if self.measured:
            return (Cause.OVERHEAD, "between instructions") if place else (Cause.NOTHING, "had not begun the step")
        span = self.by_rank[rank][place]
        home = self.table.slice_of(span)
        if home >= 0:
            forward = not self._is_backward(span)
            kind = SpanKind.FORWARD if forward else SpanKind.BACKWARD
            for other in self.table.feeders[home] if forward else self.table.readers[home]:
                if self._there_s(kind, other) >= span.start_s - NEAR * self.step_s:
                    return Cause.UNMADE, f"{_direction(kind)} of {slice_name(self.table.slices[other])}"
        return Cause.NOTHING, self._busy_peer(rank, span)

    def _there_s(self, kind: SpanKind, index: int) -> float:
        """When a slice's output, or the gradient that it sends back, is there; predicted."""
        ends = self.ends.get((kind, slice_name(self.table.slices[index])), {})
        sent_s = self.table.receive_s[index] if kind is SpanKind.BACKWARD else 0.0
        return max(ends.values(), default=float("-inf")) + sent_s

    def _is_backward(self, span: Span) -> bool:
        """Whether a predicted span belongs to backward; a transfer in front of its slice's forward does not."""
        if span.kind is SpanKind.TRANSFER:
            return span.end_s > self.ends.get((SpanKind.FORWARD, span.name), {}).get(span.rank, 0.0)
        return span.kind is SpanKind.BACKWARD

    def _busy_peer(self, rank: int, span: Span) -> str:
        """The device that `span` needs too and that was busy until then, in words."""
        home, near_s = self.table.slice_of(span), NEAR * self.step_s
        for peer in self.table.slices[home].devices if home >= 0 else sorted(self.reduction_members(span)):
            at = bisect_right(self._row_ends[peer], span.start_s + near_s) - 1
            if peer != rank and at >= 0 and self._row_ends[peer][at] >= span.start_s - near_s:
                return f"device {peer}, which ran {self.by_rank[peer][at].name}"
        if span.kind is SpanKind.REDUCE:
            return "the end of all backward slices"
        return "the end of all forward slices" if self._is_backward(span) else "its turn in the plan"


def target_of(span: Span) -> str:
    """What the instruction of a measured span works on: "b0" of "REDUCE b0"."""
    return span.name.partition(" ")[2]


def made_by(wait: str) -> Run | None:
    """The run that makes what an AWAIT waits for: of "AWAIT s3>s7" s3's forward, of "AWAIT s3<s7" s7's backward."""
    target = wait.partition(" ")[2]
    source, forward, _ = target.partition(">")
    if forward:
        return SpanKind.FORWARD, source
    _, backward, source = target.partition("<")
    return (SpanKind.BACKWARD, source) if backward else None


def overlapping(sources: Sequence[int], place: int, count: int, rank: int) -> list[int]:
    """Those of `sources` that hold samples which `rank`, reader number `place` of `count`, reads.

    Both sides hold equal shares in order. What lies on `rank` itself needs no message; where all of it does, the first
    source is named.
    """
    low = place * len(sources) // count
    high = -(-(place + 1) * len(sources) // count)
    return [source for source in sources[low:high] if source != rank] or list(sources[:1])


def by_step(spans: Iterable[Span]) -> dict[int, list[Span]]:
    """Spans of each step, steps in rising order."""
    found: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        found[span.step].append(span)
    return dict(sorted(found.items()))


def _direction(kind: SpanKind) -> str:
    return "gradient" if kind is SpanKind.BACKWARD else "output"


def _clamped(seconds: float, span: Span) -> float:
    return min(max(seconds, 0.0), span.end_s - span.start_s)
