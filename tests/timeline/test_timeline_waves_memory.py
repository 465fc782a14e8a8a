"""Waves that missed their prediction, and memory over time."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.planner.simulate import simulate
from spindle.timeline.items import Kind, StepView
from spindle.timeline.memory import memory_model
from spindle.timeline.rows import plan_view, trace_view
from spindle.timeline.table import make_table
from spindle.timeline.waves import WaveTime, leading, wave_times
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Memory
from spindle.values.trace import SpanKind, Trace
from tests.timeline.timeline_samples import GIB, by_hand, made_up_run, planned


def stretched(factor: float) -> StepView:
    """The prediction of `by_hand` as if measured, its slice b forward `factor` times as long."""
    plan = by_hand()
    spans = [
        replace(
            s,
            name=f"{s.kind.name} s{s.wave}",
            end_s=s.start_s + (s.end_s - s.start_s) * (factor if s.metaop == "t.b" else 1.0),
        )
        for s in simulate(plan)
        if s.kind is SpanKind.FORWARD
    ]
    trace = Trace(num_ranks=2, source="measured", spans=tuple(spans))
    return trace_view(trace, make_table(plan, simulate(plan)), measured=True).shown


@pytest.mark.parametrize(("factor", "miss"), [(1.19, 0.0), (1.5, 0.5), (0.5, -0.5), (0.9, 0.0)])
def test_a_wave_is_marked_beyond_the_threshold(factor: float, miss: float) -> None:
    first, second = wave_times(stretched(factor), threshold=0.2)
    assert (first.wave, first.miss) == (0, 0.0)
    assert second.wave == 1
    assert second.planned_s == pytest.approx(0.5)
    assert second.miss == pytest.approx(miss)
    assert second.seconds == pytest.approx(0.5 * factor)


def test_a_miss_of_next_to_nothing_is_noise() -> None:
    """Half as long again, but half a millisecond in a step of a thousand."""
    view = replace(stretched(1.5), step_s=1000.0)
    assert [wave.miss for wave in wave_times(view, threshold=0.2)] == [0.0, 0.0]


def test_without_a_prediction_the_metagraph_tells_the_times() -> None:
    plan = by_hand()
    assert make_table(plan, None).forward_s == pytest.approx((1.0, 0.5))
    assert make_table(replace(plan, metagraph=None), None).forward_s == (0.0, 0.0)


@given(st.permutations([(wave, kind) for wave in range(4) for kind in (Kind.FORWARD, Kind.BACKWARD)]))
def test_numbers_on_a_strip_never_interleave(order: list[tuple[int, Kind]]) -> None:
    """However waves begin: turn after turn, numbers rise through forward and then fall through backward."""
    turns = {0: 0, 1: 0, 2: 1, 3: 1}
    begun = [WaveTime(*wave, at, at + 1.0, 1.0, 1.0, 0.0) for at, wave in enumerate(order)]
    shown = [(w.wave, w.kind) for w, leads in zip(begun, leading(begun, turns), strict=True) if leads]
    whole = [(0, True), (1, True), (1, False), (0, False), (2, True), (3, True), (3, False), (2, False)]
    places = [whole.index((wave, kind is Kind.FORWARD)) for wave, kind in shown]
    assert places == sorted(set(places))
    assert shown[0] == order[0]
    assert places[-1] == len(whole) - 1


def test_waves_come_forward_in_order_and_backward_in_reverse() -> None:
    plan, predicted = planned()
    waves = wave_times(trace_view(predicted, make_table(plan, predicted), measured=False).shown, threshold=0.0)
    forward = [w.wave for w in waves if w.kind.value == "forward"]
    assert forward == sorted(forward)
    assert [w.wave for w in waves if w.kind.value == "backward"] == sorted(forward, reverse=True)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_memory_reaches_the_planned_peak_and_falls_to_what_stays(num_devices: int) -> None:
    plan, predicted = planned(num_devices)
    run = made_up_run(plan, predicted, steps=1)
    table, model = make_table(plan, predicted), memory_model(plan)
    assert model is not None
    for trace, measured in ((predicted, False), (run, True)):
        view = trace_view(trace, table, measured=measured).shown
        for device, row in enumerate(view.rows):
            levels = model.levels(device, row)
            assert levels[0][0] == 0.0
            assert max(level for _, level in levels) == pytest.approx(plan.memory.peak_bytes_per_device[device])
            assert levels[-1][1] == pytest.approx(model.fixed_bytes[device], abs=1.0)


def test_memory_of_the_plan_itself_only_rises() -> None:
    plan, _ = planned()
    model = memory_model(plan)
    assert model is not None
    for device, row in enumerate(plan_view(plan, make_table(plan, None)).shown.rows):
        levels = [level for _, level in model.levels(device, row)]
        assert levels == sorted(levels)


def test_shared_parameters_stand_in_memory_once() -> None:
    """Both vision encoders have layers of 10 MB with gradients; without a known peak nothing is scaled."""
    plan, _ = planned(2)
    model = memory_model(replace(plan, memory=Memory()))
    assert model is not None
    assert max(model.fixed_bytes) <= 2e7 * (6 + 4 + 1 + 3)
    assert sum(map(sum, (slices.values() for slices in model.passing_bytes))) > GIB


def test_no_memory_model_where_the_metagraph_is_silent() -> None:
    plan, _ = planned(2)
    assert plan.metagraph is not None
    silent = MetaGraph(tuple(replace(m, memory_bytes=()) for m in plan.metagraph), plan.metagraph.flows)
    assert memory_model(replace(plan, metagraph=silent)) is None
    assert memory_model(replace(plan, metagraph=None)) is None
