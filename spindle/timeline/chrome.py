"""Chrome trace: a Trace in, the JSON object that Perfetto and chrome://tracing read out.

A process is a rank; its threads are compute and communication. Names are those of the program. An arrow leads from the
compute whose result a transfer carries to the wait for it.
"""

from collections.abc import Iterator

from spindle.timeline.items import Item, Kind, StepView
from spindle.timeline.page.data import Json
from spindle.timeline.rows import trace_view
from spindle.timeline.table import SliceTable, make_table
from spindle.values.plan import Plan
from spindle.values.trace import Trace

COMPUTE, COMMUNICATION = 0, 1
_MICROSECONDS = 1e6
_COMMUNICATION_KINDS = (Kind.ISSUE, Kind.WAIT, Kind.REDUCE)
_NO_SLICES = SliceTable(
    slices=(), waves=(), feeders=(), forward_s=(), backward_s=(), receive_s=(), receive_bytes=(), reduce_s={}
)


def chrome_trace(trace: Trace, *, plan: Plan | None = None) -> dict[str, Json]:
    """Trace events of all steps, times in microseconds.

    With `plan`, spans carry their planned seconds, and predicted transfers have arrows too. Steps follow each other as
    they did when measured. Raises InputError when the trace has no spans.
    """
    table = make_table(plan, None) if plan is not None else _NO_SLICES
    view = trace_view(trace, table, measured=trace.source != "predicted")
    events: list[Json] = [event for rank in range(trace.num_ranks) for event in _names(rank)]
    first_s = min(span.start_s for span in trace)
    starts_s: dict[int, float] = {}
    for span in trace:
        starts_s[span.step] = min(starts_s.get(span.step, span.start_s), span.start_s)
    arrows = 0
    for step in view.steps:
        shift_s = starts_s[step.step] - first_s
        events += _spans(step, shift_s)
        events += _arrows(step, shift_s, arrows)
        arrows += len(step.links)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"source": trace.source, "num_ranks": trace.num_ranks, "num_steps": view.num_steps},
    }


def _names(rank: int) -> Iterator[Json]:
    yield {"ph": "M", "name": "process_name", "pid": rank, "tid": COMPUTE, "args": {"name": f"rank {rank}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": COMPUTE, "args": {"sort_index": rank}}
    for thread, name in ((COMPUTE, "compute"), (COMMUNICATION, "communication")):
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}}


def _thread(item: Item) -> int:
    return COMMUNICATION if item.what.kind in _COMMUNICATION_KINDS else COMPUTE


def _spans(step: StepView, shift_s: float) -> Iterator[Json]:
    for rank, row in enumerate(step.rows):
        for item in row:
            if item.what.kind is not Kind.IDLE:
                yield {
                    "ph": "X",
                    "name": item.what.name,
                    "cat": item.what.kind.value,
                    "pid": rank,
                    "tid": _thread(item),
                    "ts": (item.start_s + shift_s) * _MICROSECONDS,
                    "dur": (item.end_s - item.start_s) * _MICROSECONDS,
                    "args": _arguments(item, step.step),
                }


def _arguments(item: Item, step: int) -> dict[str, Json]:
    what = item.what
    values: dict[str, Json] = {"step": step}
    for name in ("task", "component", "metaop", "num_bytes", "planned_s", "why"):
        if getattr(what, name):
            values[name] = getattr(what, name)
    if what.wave >= 0:
        values["wave"] = what.wave
    if item.blocked_s:
        values["blocked_s"] = item.blocked_s
    return values


def _arrows(step: StepView, shift_s: float, first_id: int) -> Iterator[Json]:
    for number, link in enumerate(step.links):
        source = step.rows[link.source_rank][link.source_item]
        target = step.rows[link.target_rank][link.target_item]
        yield _end("s", link.source_rank, source, shift_s, first_id + number)
        yield _end("f", link.target_rank, target, shift_s, first_id + number)


def _end(phase: str, rank: int, item: Item, shift_s: float, number: int) -> Json:
    """One end of an arrow, just inside the item that it binds to."""
    inside_s = item.end_s - 0.001 * (item.end_s - item.start_s)
    return {
        "ph": phase,
        "bp": "e",
        "cat": "transfer",
        "name": "transfer",
        "id": number,
        "pid": rank,
        "tid": _thread(item),
        "ts": (inside_s + shift_s) * _MICROSECONDS,
    }
