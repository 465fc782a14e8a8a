"""What stands in the rows: kinds, gaps with their reasons, waits split, links; on plans that can be run in the head."""

from dataclasses import replace

import pytest

from spindle.errors import InputError
from spindle.planner.simulate import simulate
from spindle.timeline import rows
from spindle.timeline.accounts import account, idle_share, total
from spindle.timeline.index import made_by, overlapping
from spindle.timeline.items import Cause, Item, StepView
from spindle.timeline.rows import plan_view, trace_view
from spindle.timeline.table import make_table
from spindle.values.trace import Span, SpanKind, Trace
from tests.timeline.timeline_samples import by_hand, made_up_run, planned


def told(row: tuple[Item, ...]) -> list[tuple[str, str, float, float]]:
    return [(i.what.kind.value, i.what.why or i.what.name, round(i.start_s, 6), round(i.end_s, 6)) for i in row]


def span(rank: int, kind: SpanKind, name: str, start_s: float, end_s: float, metaop: str = "", wave: int = -1) -> Span:
    return Span(rank=rank, kind=kind, name=name, start_s=start_s, end_s=end_s, metaop=metaop, wave=wave)


def measured(*spans: Span, num_ranks: int = 2) -> StepView:
    plan = by_hand()
    trace = Trace(num_ranks=num_ranks, source="measured", spans=spans)
    return trace_view(trace, make_table(plan, simulate(plan)), measured=True).shown


def test_a_predicted_step() -> None:
    """a 1 s forward, 4 bytes move in 1 s, b 0.5 s; back b 1 s, its gradient 1 s, a 2 s."""
    plan = by_hand()
    view = trace_view(simulate(plan), make_table(plan, simulate(plan)), measured=False).shown
    assert view.step_s == pytest.approx(6.5)
    assert told(view.rows[0]) == [
        ("forward", "t.a[0:1]", 0.0, 1.0),
        ("wait", "t.b[0:2]", 1.0, 2.0),
        ("forward", "t.b[0:2]", 2.0, 2.5),
        ("backward", "t.b[0:2]", 2.5, 3.5),
        ("wait", "t.b[0:2]", 3.5, 4.5),
        ("backward", "t.a[0:1]", 4.5, 6.5),
    ]
    assert told(view.rows[1]) == [
        ("idle", "output of t.a[0:1]", 0.0, 1.0),
        ("wait", "t.b[0:2]", 1.0, 2.0),
        ("forward", "t.b[0:2]", 2.0, 2.5),
        ("backward", "t.b[0:2]", 2.5, 3.5),
        ("wait", "t.b[0:2]", 3.5, 4.5),
        ("idle", "done, the step ends elsewhere", 4.5, 6.5),
    ]
    assert view.rows[1][1].what.num_bytes == 2  # its half of the four bytes
    assert view.rows[1][1].what.planned_s == pytest.approx(1.0)


def test_predicted_links_lead_to_the_transfer_and_on_from_the_gradient() -> None:
    plan = by_hand()
    view = trace_view(simulate(plan), make_table(plan, simulate(plan)), measured=False).shown
    ends = {
        (view.rows[a][i].what.kind.value, a, view.rows[b][j].what.kind.value, b) for a, i, b, j in view.links if a != b
    }
    assert ends == {("forward", 0, "wait", 1), ("wait", 1, "backward", 0)}


def test_a_measured_wait_is_split_where_its_input_was_made() -> None:
    """Device 1 waits from 0 to 3 s for what device 0 makes until 2 s."""
    view = measured(
        span(0, SpanKind.FORWARD, "FORWARD s0", 0.0, 2.0, "t.a", 0),
        span(0, SpanKind.TRANSFER, "TRANSFER s0>s1", 2.0, 2.1, "t.b", 1),
        span(1, SpanKind.TRANSFER, "AWAIT s0>s1", 0.0, 3.0, "t.b", 1),
        span(1, SpanKind.FORWARD, "FORWARD s1", 3.0, 4.0, "t.b", 1),
    )
    wait = view.rows[1][0]
    assert (wait.what.kind.value, wait.blocked_s) == ("wait", 2.0)
    assert wait.what.why == "output of t.a[0:1] (s0) on device 0"
    assert view.rows[0][1].what.kind.value == "issue"
    assert [tuple(link) for link in view.links] == [(0, 0, 1, 0)]
    assert view.rows[1][1].what.planned_s == pytest.approx(0.5)


def test_a_gradient_comes_from_the_backward_behind_the_sign() -> None:
    view = measured(
        span(1, SpanKind.BACKWARD, "BACKWARD s1", 0.0, 1.5, "t.b", 1),
        span(0, SpanKind.TRANSFER, "AWAIT s0<s1", 1.0, 2.0, "t.a", 0),
    )
    wait = view.rows[0][1]
    assert wait.blocked_s == 0.5
    assert wait.what.why == "gradient of t.b[0:2] (s1) on device 1"
    assert wait.what.planned_s == 0.0


def test_a_reduction_waits_for_its_last_member() -> None:
    view = measured(span(0, SpanKind.REDUCE, "REDUCE b0", 0.0, 3.0), span(1, SpanKind.REDUCE, "REDUCE b0", 2.0, 3.0))
    first, last = view.rows[0][0], view.rows[1][1]
    assert (first.blocked_s, first.what.why) == (2.0, "device 1 came last")
    assert (last.blocked_s, last.what.why) == (0.0, "")


def test_a_reduction_beside_backward_is_started_and_awaited() -> None:
    """Device 0 starts at 1 s, runs backward until 4 s and waits; device 1 starts at 5 s; both have it at 6 s."""
    view = measured(
        span(0, SpanKind.REDUCE, "REDUCE b0", 1.0, 1.5),
        span(0, SpanKind.BACKWARD, "BACKWARD s0", 1.5, 4.0, "t.a", 0),
        span(0, SpanKind.REDUCE, "AWAIT b0", 4.0, 6.0),
        span(1, SpanKind.REDUCE, "REDUCE b0", 5.0, 5.5),
        span(1, SpanKind.REDUCE, "AWAIT b0", 5.5, 6.0),
    )
    start, _, wait = view.rows[0]
    assert (start.what.kind.value, start.blocked_s, start.what.why) == ("issue", 0.0, "")
    assert (wait.what.kind.value, wait.blocked_s, wait.what.why) == ("reduce", 1.0, "device 1 came last")
    assert account(view.rows[0], view.step_s)[Cause.PEERS] == 1.0
    assert (view.rows[1][2].what.kind.value, view.rows[1][2].blocked_s) == ("reduce", 0.0)


def test_a_wait_that_ends_before_its_input_was_made_is_blocked_throughout() -> None:
    """Clocks of two machines may differ."""
    view = measured(
        span(0, SpanKind.FORWARD, "FORWARD s0", 0.0, 2.0, "t.a", 0),
        span(1, SpanKind.TRANSFER, "AWAIT s0>s1", 0.5, 1.0, "t.b", 1),
    )
    assert view.rows[1][1].blocked_s == 0.5


def test_measured_gaps() -> None:
    view = measured(
        span(0, SpanKind.LOAD, "LOAD t", 1.0, 2.0),
        span(0, SpanKind.STEP, "STEP", 5.0, 6.0),
        span(1, SpanKind.STEP, "STEP", 0.0, 10.0),
    )
    assert told(view.rows[0]) == [
        ("idle", "had not begun the step", 0.0, 1.0),
        ("load", "LOAD t", 1.0, 2.0),
        ("idle", "between instructions", 2.0, 5.0),
        ("step", "STEP", 5.0, 6.0),
        ("idle", "done, the step ends elsewhere", 6.0, 10.0),
    ]


def test_a_device_may_be_at_another_step() -> None:
    """Device 1 ends step 0 at 5 s, when device 0 has been at step 1 for 4 s; it starts at once."""
    spans = (
        span(0, SpanKind.STEP, "STEP", 0.0, 1.0),
        span(1, SpanKind.STEP, "STEP", 0.0, 5.0),
        replace(span(0, SpanKind.STEP, "STEP", 1.0, 6.0), step=1),
        replace(span(1, SpanKind.STEP, "STEP", 5.0, 9.0), step=1),
    )
    trace = Trace(num_ranks=2, source="measured", spans=spans)
    view = trace_view(trace, make_table(by_hand(), None), measured=True)
    first, second = view.steps
    assert (first.step_s, second.step_s, view.total_s) == (5.0, 8.0, 9.0)
    assert told(second.rows[1]) == [("idle", "idle", 0.0, 4.0), ("step", "STEP", 4.0, 8.0)]
    assert second.rows[1][0].what.cause is Cause.OTHER
    assert told(first.rows[0]) == [("step", "STEP", 0.0, 1.0), ("idle", "idle", 1.0, 5.0)]
    assert idle_share(total(first)) == 0.0
    assert idle_share(total(second)) == pytest.approx(3 / 16)  # device 0 from 6 to 9 s; 4 s belong to step 0


def test_a_device_without_work_is_idle_all_the_time() -> None:
    assert told(measured(span(0, SpanKind.STEP, "STEP", 0.0, 1.0)).rows[1]) == [
        ("idle", "has no part in this step", 0.0, 1.0)
    ]


def test_the_plan_itself_shows_forward_and_backward_together() -> None:
    plan = by_hand()
    view = plan_view(plan, make_table(plan, None)).shown
    assert told(view.rows[1]) == [("idle", "output of t.a[0:1]", 0.0, 3.0), ("work", "t.b[0:2]", 3.0, 6.5)]


@pytest.mark.parametrize(
    ("wait", "made"),
    [
        ("AWAIT s3>s7", (SpanKind.FORWARD, "s3")),
        ("AWAIT s3<s7", (SpanKind.BACKWARD, "s7")),
        ("AWAIT odd", None),
        ("vision[0:12]", None),
    ],
)
def test_who_made_it(wait: str, made: tuple[SpanKind, str] | None) -> None:
    assert made_by(wait) == made


@pytest.mark.parametrize(
    ("sources", "place", "count", "rank", "found"),
    [
        ([0, 1], 0, 2, 4, [0]),  # as many on both sides: one each
        ([0, 1], 1, 2, 5, [1]),
        ([0, 1], 0, 1, 4, [0, 1]),  # one reads all
        ([0], 1, 4, 5, [0]),
        ([0, 1, 2], 0, 2, 4, [0, 1]),  # the middle one is cut
        ([0, 1, 2], 1, 2, 5, [1, 2]),
        ([4, 5], 0, 1, 4, [5]),  # what lies on the rank itself needs no message
        ([4], 0, 1, 4, [4]),
    ],
)
def test_who_sends_to_whom(sources: list[int], place: int, count: int, rank: int, found: list[int]) -> None:
    assert overlapping(sources, place, count, rank) == found


def test_the_median_step_is_shown_first() -> None:
    spans = [span(0, SpanKind.STEP, "STEP", at, at + length) for at, length in ((0, 3), (10, 1), (20, 2), (30, 9))]
    trace = Trace(num_ranks=2, source="measured", spans=tuple(replace(s, step=7 + i) for i, s in enumerate(spans)))
    view = trace_view(trace, make_table(by_hand(), None), measured=True)
    assert [step.step for step in view.steps] == [7, 8, 9, 10]
    assert (view.shown.step, view.shown.step_s) == (9, 2)


def test_too_many_spans_leave_the_steps_near_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_SPANS", 200)
    plan, predicted = planned()
    run = made_up_run(plan, predicted, steps=5)
    view = trace_view(run, make_table(plan, predicted), measured=True)
    assert view.num_steps == 5
    assert 1 <= len(view.steps) < 5
    assert view.shown.step_s == sorted(run.step_s(step) for step in range(5))[2]


def test_names_of_a_run_find_their_slices() -> None:
    plan, predicted = planned()
    table = make_table(plan, predicted)
    view = trace_view(made_up_run(plan, predicted), table, measured=True).shown
    for row in view.rows:
        for item in row:
            if item.what.kind.value in ("forward", "backward"):
                assert plan.slices[item.what.slice].metaop == item.what.metaop
                assert item.what.planned_s > 0


def test_a_trace_without_spans_is_refused() -> None:
    with pytest.raises(InputError, match="the measured trace has no spans; record at least one step"):
        trace_view(Trace(num_ranks=2, source="measured"), make_table(by_hand(), None), measured=True)
