"""Accounts: every moment of every device is booked exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.planner.simulate import simulate
from spindle.timeline.accounts import account, idle_share, total
from spindle.timeline.items import Cause, Item, Kind, What
from spindle.timeline.rows import trace_view
from spindle.timeline.table import make_table
from spindle.values.trace import Span, SpanKind, Trace
from tests.timeline.timeline_samples import by_hand, made_up_run, planned

NAMES = {
    SpanKind.LOAD: ("LOAD t",),
    SpanKind.FORWARD: ("FORWARD s0", "FORWARD s1"),
    SpanKind.BACKWARD: ("BACKWARD s0", "BACKWARD s1"),
    SpanKind.TRANSFER: ("TRANSFER s0>s1", "AWAIT s0>s1", "AWAIT s0<s1", "AWAIT nothing"),
    SpanKind.REDUCE: ("REDUCE b0", "REDUCE b1", "AWAIT b1", "AWAIT b2"),
    SpanKind.STEP: ("STEP",),
}


@st.composite
def spans(draw: st.DrawFn) -> Span:
    """Any span of either device; spans may overlap, as communication beside computation does."""
    kind = draw(st.sampled_from(SpanKind))
    start_s = draw(st.integers(0, 40)) / 8
    of_slice = draw(st.sampled_from([("", -1), ("t.a", 0), ("t.b", 1)]))
    return Span(
        rank=draw(st.integers(0, 1)),
        kind=kind,
        name=draw(st.sampled_from(NAMES[kind])),
        start_s=start_s,
        end_s=start_s + draw(st.integers(0, 16)) / 8,
        metaop=of_slice[0],
        wave=of_slice[1],
        step=draw(st.integers(0, 1)),
    )


@given(st.lists(spans(), min_size=1, max_size=12), st.booleans())
def test_accounts_add_up_to_the_step(found: list[Span], measured: bool) -> None:
    """Whatever a trace holds, the causes of each device sum to the step, and none is negative."""
    trace = Trace(num_ranks=2, source="measured" if measured else "predicted", spans=tuple(found))
    view = trace_view(trace, make_table(by_hand(), None), measured=measured)
    for step in view.steps:
        for row in step.rows:
            accounts = account(row, step.step_s)
            assert sum(accounts.values()) == pytest.approx(step.step_s, rel=1e-9, abs=1e-12)
            assert min(accounts.values(), default=0.0) >= 0
        assert sum(total(step).values()) == pytest.approx(2 * step.step_s, rel=1e-9, abs=1e-12)


def test_accounts_of_a_predicted_step() -> None:
    plan = by_hand()
    view = trace_view(simulate(plan), make_table(plan, None), measured=False).shown
    assert account(view.rows[1], view.step_s) == pytest.approx(
        {Cause.UNMADE: 1.0, Cause.UNDERWAY: 2.0, Cause.FORWARD: 0.5, Cause.BACKWARD: 1.0, Cause.NOTHING: 2.0}
    )
    assert idle_share(total(view)) == pytest.approx((2 + 5) / 13)


def test_a_prediction_has_no_time_between_instructions() -> None:
    plan, predicted = planned(8)
    view = trace_view(predicted, make_table(plan, predicted), measured=False).shown
    assert Cause.OVERHEAD not in total(view)


def test_small_gaps_are_booked_though_they_are_not_drawn() -> None:
    plan, predicted = planned()
    view = trace_view(made_up_run(plan, predicted), make_table(plan, predicted), measured=True).shown
    assert not any(item.what.idle is Cause.OVERHEAD for row in view.rows for item in row if item.what.kind is Kind.IDLE)
    assert 0 < total(view)[Cause.OVERHEAD] < 0.01 * view.step_s


def test_communication_beside_computation_is_not_booked_twice() -> None:
    """Backward from 0 to 4 s, a reduction from 1 to 6 s whose last member comes at 5 s."""
    row = (Item(What(Kind.BACKWARD, "b"), 0.0, 4.0), Item(What(Kind.REDUCE, "r"), 1.0, 6.0, blocked_s=4.0))
    assert account(row, 7.0) == {Cause.BACKWARD: 4.0, Cause.PEERS: 1.0, Cause.REDUCE: 1.0, Cause.OVERHEAD: 1.0}
