"""Trace: its rules, and what is read off its spans."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.errors import InputError
from spindle.values.trace import Span, SpanKind, Trace
from tests.refusals import Refusal, check_refusal, each


def span(
    start: float, end: float, *, rank: int = 0, kind: SpanKind = SpanKind.FORWARD, step: int = 0, name: str = "FORWARD"
) -> Span:
    return Span(rank=rank, kind=kind, name=name, start_s=start, end_s=end, step=step)


RULES: dict[str, Refusal] = {
    "a rank below zero": (lambda: span(0, 1, rank=-1), "span 'FORWARD'", "ranks count from 0", "measure it again"),
    "times that fall": (lambda: span(2.0, 1.0), "from 2.0 to 1.0 s", "times must rise", "measure it again"),
}


@each(RULES)
def test_rules_of_spans(refusal: Refusal) -> None:
    check_refusal(refusal, InputError)


def test_sums_by_hand() -> None:
    """Two steps of two ranks."""
    spans = (
        span(1.0, 2.0),
        span(1.5, 3.0, rank=1, kind=SpanKind.BACKWARD),
        span(4.0, 4.5, step=1),
        span(4.0, 6.0, rank=1, step=1),
    )
    trace = Trace(num_ranks=2, source="measured", spans=spans)
    assert trace.num_steps == 2
    assert (trace.step_s(0), trace.step_s(1), trace.step_s(7)) == (2.0, 2.0, 0.0)
    assert trace.busy_s(SpanKind.FORWARD) == 3.5
    assert trace.busy_s(SpanKind.FORWARD, step=1) == 2.5
    assert trace.busy_s(SpanKind.REDUCE) == 0
    assert list(trace) == list(spans)


@pytest.mark.parametrize("peaks", [(1,), (1, 2, 3), (1, -2)])
def test_peaks_of_memory_are_one_for_each_rank(peaks: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="give a number of bytes for each rank, or none at all"):
        Trace(num_ranks=2, source="measured", peak_bytes=peaks)


def test_an_empty_trace_has_no_steps() -> None:
    trace = Trace(num_ranks=1, source="measured")
    assert (trace.num_steps, trace.step_s(), trace.from_zero()) == (0, 0.0, trace)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 10)), min_size=1, max_size=8))
def test_from_zero_moves_and_keeps_lengths(times: list[tuple[float, float]]) -> None:
    trace = Trace(num_ranks=1, source="measured", spans=tuple(span(s, s + length) for s, length in times))
    moved = trace.from_zero()
    assert min(s.start_s for s in moved) == 0.0
    for before, after in zip(trace, moved, strict=True):
        assert after.end_s - after.start_s == pytest.approx(before.end_s - before.start_s, abs=1e-9)
    assert moved.from_zero() == moved
