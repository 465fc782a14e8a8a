"""The search's parts, each on something solvable in the head."""

import random
from pathlib import Path

import pytest

from spindle.errors import SpindleWarning
from spindle.files.clusterfile import parse_cluster
from spindle.planner.check import check_plan
from spindle.planner.costing.traffic import transfer_s
from spindle.planner.problem import make_problem
from spindle.planner.search.decode import Draft, FlatDecoder, draft_of
from spindle.planner.search.device_pool import bits_of, make_device_pool
from spindle.planner.search.heuristics import Heuristics
from spindle.planner.search.list_scheduler import Tracker, runs_of, start_state
from spindle.planner.search.model import Model, make_model
from spindle.planner.search.orders import by_level, by_schedule
from spindle.planner.search.placed import PlacedDecoder
from spindle.planner.search.wave_lp import WaveLp, residual_waves
from spindle.planner.solve import solve
from spindle.planner.work import UNITS_PER_S, Work
from spindle.values.metagraph import MetaGraph
from spindle.verbs.planning import plan_source
from spindle.verbs.source import load_source
from tests.planner.planner_graphs import cluster, graph, metaop

ROOT = Path(__file__).parents[2]
PERFECT = {1: 4.0, 2: 2.0, 4: 1.0}
FLAT = {1: 1.0}
PAIR = graph(metaop("x.a", 4, PERFECT), metaop("y.b", 4, FLAT), metaop("x.c", 2, PERFECT), flows="x.a>x.c")


def model_of(metagraph: MetaGraph, bound_s: float = 1.0) -> Model:
    return make_model(make_problem(metagraph, cluster()), bound_s)


def plenty() -> Work:
    return Work(1.0, lambda: 0.0)


def test_the_wave_lp_is_the_area_where_chains_allow_it() -> None:
    """16 + 4 + 8 device-seconds on four devices: 7 s, b spread beside a and c."""
    model = model_of(PAIR)
    targets = WaveLp(model, plenty()).solve([4.0, 4.0, 2.0], [0, 0, 1])
    assert targets is not None
    assert targets.ends_s[-1] == pytest.approx(7.0)
    assert targets.rest[0][0] == pytest.approx(0.0)
    assert targets.rest[2] == pytest.approx([2.0, 0.0])


def test_what_is_left_keeps_its_order_without_empty_waves() -> None:
    model = model_of(PAIR)
    assert residual_waves(model, [0.0, 1.0, 2.0], [True, True, True], [0, 0, 5]) == [0, 0, 0]
    assert residual_waves(model, [1.0, 1.0, 2.0], [True, True, False], [0, 0, 5]) == [0, 0, 1]


def test_tracking_keeps_layers_whole_and_counts_valid() -> None:
    model, work = model_of(PAIR), plenty()
    targets = WaveLp(model, work).solve([4.0, 4.0, 2.0], by_level(model))
    assert targets is not None
    state = start_state(model, None)
    Tracker(model, None, work).advance(state, targets, 0.0, Heuristics(), random.Random(0), float("inf"))
    runs = runs_of(state.chain)
    assert state.is_done
    assert [sum(run[2] for run in runs if run[0] == m) for m in range(3)] == [4, 4, 2]
    assert state.t >= 7.0


def test_a_draft_of_a_schedule_decodes_to_it() -> None:
    """Also where devices idle on purpose: b could start at once but is held until a has its four devices."""
    model = model_of(graph(metaop("x.a", 1, {4: 1.0}), metaop("y.b", 1, {1: 5.0})))
    decoder = FlatDecoder(model)
    runs = [(0, 0, 1, 0.0, 1.0, 0), (1, 0, 1, 1.0, 6.0, 0)]
    decoded = decoder.decode(draft_of(decoder, runs), float("inf"))
    assert decoded is not None
    assert (decoded[0], decoded[2]) == (6.0, [[0.0], [1.0]])
    assert decoder.decode(draft_of(decoder, runs), 5.9) is None


def test_reversed_twice_is_the_same() -> None:
    model = model_of(PAIR)
    assert model.reversed.before == model.after
    assert model.reversed.reversed == model
    assert model.levels == (0, 0, 1)
    assert model.tail_s == (2.0, 0.0, 0.0)


def test_orders_respect_flows() -> None:
    model = model_of(PAIR)
    assert by_level(model) == [0, 0, 1]
    first = by_schedule(model, [(0, 0, 4, 0.0, 1.0, 0), (1, 0, 4, 3.0, 4.0, 0), (2, 0, 2, 1.0, 2.0, 0)], 3)
    assert first[2] > first[0]


TRAFFIC = graph(
    metaop("t.a", 2, PERFECT, output_bytes=8.0), metaop("t.b", 2, PERFECT, output_bytes=4.0), flows="t.a>t.b"
)


@pytest.mark.parametrize(("source", "target"), [(0b1, 0b1), (0b1, 0b10), (0b11, 0b1111), (0b1, 0b10000), (0b110, 0b11)])
def test_the_search_charges_what_the_simulator_charges(source: int, target: int) -> None:
    where = cluster(2, 4)
    pool = make_device_pool(make_problem(TRAFFIC, where))
    expected = 2 * transfer_s(where, 8.0, bits_of(source), bits_of(target))
    assert pool.cost_s(target, target.bit_count(), [(source, 8.0)]) == pytest.approx(expected)


def test_a_slice_takes_few_nodes_near_its_input() -> None:
    """Two nodes of four: the same devices if free, else the same node, else the tightest; never a split pair."""
    pool = make_device_pool(make_problem(TRAFFIC, cluster(2, 4)))
    assert pool.choose(1, 2, 0b11111111, [(0b1100, 8.0)]) == (0b1100, 0.0)
    assert pool.choose(1, 2, 0b11110011, [(0b1100, 8.0)]) == (0b0011, 8.0)
    assert pool.choose(1, 2, 0b01110001, []) == (0b00110000, 0.0)
    assert pool.choose(1, 2, 0b00010001, []) is None
    assert pool.choose(1, 4, 0b11110111, []) == (0b11110000, 0.0)
    assert pool.choose(1, 6, 0b11111111, []) == (0b00111111, 0.0)


def test_layers_of_the_same_parameters_share_devices_where_their_input_lies_anywhere() -> None:
    """So their gradients are reduced over few devices; the input comes first, and what is free."""
    pool = make_device_pool(make_problem(TRAFFIC, cluster(2, 4)))
    assert pool.choose(1, 2, 0b11111111, [], shared=0b11000000) == (0b11000000, 0.0)
    assert pool.choose(1, 2, 0b01110111, [], shared=0b11000000) == (0b01010000, 0.0)
    assert pool.choose(1, 4, 0b11111111, [], shared=0b11000000) == (0b11110000, 0.0)
    assert pool.choose(1, 2, 0b11111101, [(0b10, 8.0)], shared=0b1100) == (0b1100, 4.0 * 4)
    assert pool.choose(1, 1, 0b11111101, [(0b10, 8.0)], shared=0b11000000) == (0b1, 16.0)


def test_a_schedule_knows_where_parameters_are() -> None:
    """Three MetaOps of one device each; the last is held until all is free, and returns to where its parameters are."""
    metagraph = graph(
        metaop("t.b", 1, {1: 1.0}, layer_param_bytes=1.0),
        metaop("u.a", 1, {1: 1.0}, layer_param_bytes=1.0, parameters="s"),
        metaop("v.a", 1, {1: 1.0}, layer_param_bytes=1.0, parameters="s"),
    )
    problem = make_problem(metagraph, cluster(2, 1))
    model, pool = make_model(problem, 0.0), make_device_pool(problem)
    draft: Draft = [[(0, 1, float(m), 3.0 if m == 2 else 0.0, 0)] for m in range(3)]
    decoded = PlacedDecoder(model, pool).decode(draft, float("inf"))
    assert decoded is not None
    assert decoded[3] == [[0b01], [0b10], [0b10]]


def test_full_devices_are_not_taken() -> None:
    """Device 0 holds 60 of 100 bytes; 50 more do not fit there."""
    metagraph = graph(metaop("t.a", 1, {1: 1.0}, memory={1: 60.0}), metaop("t.b", 1, {1: 1.0}, memory={1: 50.0}))
    pool = make_device_pool(make_problem(metagraph, cluster(1, 2, memory_bytes=100)))
    memory = pool.start_memory()
    assert memory is not None
    pool.occupy(0, 1, 0b01, memory, 0, 1)
    assert pool.choose(1, 1, 0b11, [], memory=memory) == (0b10, 0.0)
    assert pool.choose(1, 1, 0b01, [], memory=memory) is None


def test_memory_is_part_of_the_search() -> None:
    """Four chains of 60 bytes on four devices of 100: each needs its own, though one after another is as fast."""
    metagraph = graph(*(metaop(f"t.{i}", 1, {1: 1.0}, memory={1: 60.0}) for i in range(4)))
    plan = solve(metagraph, cluster(memory_bytes=100), method="lp", time_limit_s=0.05)
    assert check_plan(plan) == ()
    assert len({s.devices for s in plan.slices}) == 4


def test_the_clock_only_brakes() -> None:
    now = [0.0]
    work = Work(1.0, lambda: now[0])
    assert not work.is_stopped
    now[0] = 100.0
    assert work.is_stopped
    assert work.braked


def test_a_larger_budget_looks_where_a_smaller_one_does() -> None:
    small, large = (list(Work(limit_s, lambda: 0.0).looks()) for limit_s in (0.3, 10.0))
    assert large[: len(small)] == small
    assert small[-1] == pytest.approx(0.25 * UNITS_PER_S)
    assert large[-1] == pytest.approx(10 * UNITS_PER_S)
    assert len(list(Work(0.0, lambda: 0.0).looks())) == 1


def test_small_problems_get_less_work() -> None:
    few, many = (list(Work(10.0, lambda: 0.0, num_layers=layers).looks()) for layers in (10, 100))
    assert len(few) < len(many)


def test_a_search_that_was_stopped_says_so() -> None:
    """A clock that jumps an hour each time it is read."""
    hours = iter(range(0, 10**9, 3600))
    with pytest.warns(SpindleWarning, match="the search was stopped by the clock"):
        plan = solve(PAIR, cluster(), clock=lambda: float(next(hours)))
    assert check_plan(plan) == ()


def test_slices_of_different_levels_run_side_by_side() -> None:
    """x.c starts at 1 s while y.b, of the level before, runs until 2 s: no barrier stands between levels."""
    metagraph = graph(
        metaop("x.a", 1, {2: 1.0}), metaop("y.b", 1, {2: 2.0}), metaop("x.c", 1, {2: 1.0}), flows="x.a>x.c"
    )
    plan = solve(metagraph, cluster(), time_limit_s=0.1)
    assert plan.makespan_s == pytest.approx(2.0)
    assert next(s.start_s for s in plan.slices if s.metaop == "x.c") == pytest.approx(1.0)


def test_the_best_draft_decodes_again_where_memory_is_tight_regression() -> None:
    """Starts as ranks let ties fall otherwise; then memory filled, and the search ended in an assertion."""
    source = load_source(str(ROOT / "benchmarks/workloads/vla_cotrain.yaml"))
    made, _ = plan_source(source, parse_cluster("4x8:a100-80g"), time_limit_s=2.0)
    assert check_plan(made) == ()
