"""Plan: every rule of its values, and how slices fall into waves."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.errors import PlanError
from spindle.values.graph import Operator
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Certificate, Plan, Slice, TimePrices, make_waves, sorted_pairs, without_operators
from tests.refusals import Refusal, check_refusal, each

NAN, INF = float("nan"), float("inf")


def piece(
    name: str = "t.a", first: int = 0, layers: int = 1, devices: Sequence[int] = (0,), start: float = 0, end: float = 1
) -> Slice:
    return Slice(metaop=name, first_layer=first, num_layers=layers, devices=tuple(devices), start_s=start, end_s=end)


def plan(*slices: Slice, num_devices: int = 2, per_node: int = 2, makespan: float = 1.0, bound: float = 0.0) -> Plan:
    return Plan(
        num_devices=num_devices,
        devices_per_node=per_node,
        method="hand",
        waves=make_waves(slices),
        makespan_s=makespan,
        lower_bound_s=bound,
    )


def in_turns(*turns: tuple[str, ...], tasks: str = "") -> Plan:
    metaops = (MetaOp(name=f"{task}.a", task=task, component="a", layers=1) for task in tasks)
    metagraph = MetaGraph(tuple(metaops)) if tasks else None
    return replace(plan(piece()), turns=turns, metagraph=metagraph)


def over_time(*edges_s: float, prices: tuple[float, ...]) -> TimePrices:
    return TimePrices(edges_s=(0.0, *edges_s), device_prices=prices)


RULES: dict[str, Refusal] = {
    "a layer below zero": (lambda: piece(first=-1), "'t.a'", "layers -1..+1", "the first is 0 or more"),
    "no layers": (lambda: piece(layers=0), "'t.a'", "layers 0..+0", "there is at least one"),
    "no devices": (lambda: piece(devices=()), "'t.a'", "devices []", "name at least one"),
    "a device below zero": (lambda: piece(devices=(-1, 0)), "'t.a'", "devices [-1, 0]", "from 0 up"),
    "one device twice": (lambda: piece(devices=(1, 1)), "'t.a'", "devices [1, 1]", "each once"),
    "times that fall": (lambda: piece(start=2.0, end=1.0), "'t.a'", "from 2.0 to 1.0", "give rising times"),
    "a start before time": (lambda: piece(start=-1.0), "'t.a'", "from -1.0", "give rising times"),
    "a start that is no number": (lambda: piece(start=NAN), "'t.a'", "from nan", "give rising times"),
    "an end that is no number": (lambda: piece(end=NAN), "'t.a'", "to nan", "give rising times"),
    "an end that never comes": (lambda: piece(end=INF), "'t.a'", "to inf", "give rising times"),
    "no device in the plan": (lambda: plan(piece(), num_devices=0), "0 devices", "both are at least 1", "both"),
    "no device in a node": (lambda: plan(piece(), per_node=0), "0 a node", "both are at least 1", "both"),
    "one turn": (lambda: in_turns(("t", "u")), "turns of 2 tasks", "give none, or several", "at least one"),
    "an empty turn": (lambda: in_turns(("t",), ()), "turns of 1, 0 tasks", "give none, or several", "task each"),
    "a task in two turns": (lambda: in_turns(("t",), ("u", "t")), "'t'", "more than once", "name each task once"),
    "a task in no turn": (lambda: in_turns(("t",), ("u",), tasks="tuv"), "'v'", "in none of them", "give no turns"),
    "a turn of no task": (
        lambda: in_turns(("t",), ("w",), tasks="t"),
        "'w'",
        "is no task of its MetaGraph",
        "name each task",
    ),
    "no waves": (lambda: plan(), "the plan", "no waves", "plan a workload"),
    "a price below zero": (lambda: Certificate(area_price=-1.0), "certificate", "negative price", "plan again"),
    "edges that fall": (lambda: over_time(2.0, 1.0, prices=(1.0, 1.0)), "the edges", "rise from 0", "plan again"),
    "a price too few": (
        lambda: over_time(1.0, 2.0, prices=(1.0,)),
        "over time",
        "one price of 0 or more",
        "plan again",
    ),
    "edges without end": (lambda: over_time(*range(1, 999), prices=(1.0,) * 998), "999 edges", "at most", "plan again"),
    "a price over time below zero": (lambda: over_time(1.0, prices=(-1.0,)), "over time", "0 or more", "plan again"),
    "only free devices": (lambda: over_time(1.0, prices=(0.0,)), "over time", "proves nothing", "plan again"),
    "a path below zero": (lambda: Certificate(paths=((-1.0, ("a",)),)), "certificate", "0 or more", "plan again"),
}


@each(RULES)
def test_rules_of_plans(refusal: Refusal) -> None:
    check_refusal(refusal, PlanError)


def test_a_slice_by_hand() -> None:
    made = piece(first=3, layers=4, start=0.5, end=2.0)
    assert (made.last_layer, made.span_s) == (6, 1.5)


def test_gap_and_idle_by_hand() -> None:
    """Two devices for two seconds, three device-seconds busy; the bound is 1.6 s."""
    made = plan(piece("a", end=2.0), piece("b", devices=(1,), end=1.0), makespan=2.0, bound=1.6)
    assert made.gap == pytest.approx(0.25)
    assert made.idle_fraction == pytest.approx(0.25)
    assert plan(piece(), makespan=1.0).gap == 0.0  # no bound is known


def test_waves_by_hand() -> None:
    """What starts together is a wave; it ends with its last slice, and slices stand by device."""
    waves = make_waves(
        [piece("late", start=1.0, end=3.0), piece("b", devices=(1,), end=5.0), piece("a", devices=(0,), end=1.0)]
    )
    assert [[s.metaop for s in wave.slices] for wave in waves] == [["a", "b"], ["late"]]
    assert [(wave.index, wave.start_s, wave.end_s) for wave in waves] == [(0, 0.0, 5.0), (1, 1.0, 3.0)]


slices = st.lists(
    st.builds(
        lambda i, devices, start, span: piece(f"m{i % 3}", i, 1, sorted(devices), start, start + span),
        st.integers(0, 9),
        st.sets(st.integers(0, 5), min_size=1),
        st.sampled_from((0.0, 0.5, 1.0, 1.0 + 1e-13)),  # the last starts with the third but for rounding
        st.floats(0.0, 3.0),
    ),
    max_size=12,
    unique_by=lambda s: (s.metaop, s.first_layer),
)


@given(slices)
def test_waves_hold_every_slice_once_in_order_of_start(given_slices: list[Slice]) -> None:
    """Nothing is lost, starts of a wave agree, starts rise from wave to wave, the order given does not matter."""
    waves = make_waves(given_slices)
    assert sorted(map(repr, given_slices)) == sorted(repr(s) for wave in waves for s in wave.slices)
    assert [wave.index for wave in waves] == list(range(len(waves)))
    for wave in waves:
        assert wave.slices
        assert max(s.start_s for s in wave.slices) - wave.start_s <= 1e-12
        assert wave.end_s == max(s.end_s for s in wave.slices)
    starts = [wave.start_s for wave in waves]
    assert starts == sorted(set(starts))
    assert make_waves(given_slices[::-1]) == waves


def test_a_plan_knows_the_wave_of_a_slice() -> None:
    first, second = piece("a"), piece("b", start=1.0, end=2.0)
    made = plan(second, first)
    assert made.slices == (first, second)
    assert [made.wave_of(s) for s in (first, second)] == [0, 1]


def test_without_operators_keeps_costs_and_flows() -> None:
    layer = Operator(name="x", task="t", component="a", kind="k", batch_size=1)
    metaop = MetaOp(name="t.a", task="t", component="a", layers=1, layer_time_s=((1, 2.0),), operators=(layer,))
    bare = without_operators(MetaGraph((metaop,)))
    assert bare["t.a"].operators == ()
    assert bare["t.a"].times == {1: 2.0}


def test_pairs_are_sorted() -> None:
    assert sorted_pairs({"b": 1.0, "a": 2.0}) == (("a", 2.0), ("b", 1.0))
