from dataclasses import replace

import pytest

from spindle.errors import InfeasibleError, PlanError
from spindle.files.formats import dumps, loads
from spindle.planner.check import check_plan
from spindle.planner.problem import make_problem
from spindle.planner.solve import METHODS, evaluate, fitting, solve
from spindle.values.plan import Plan
from tests.planner.planner_graphs import cluster, graph, metaop, piece

# two encoders that stop scaling at two devices, twice
PAIRS = graph(
    *(metaop(f"{t}.{part}", 4, {1: 2.0, 2: 1.1, 4: 1.0}) for t in "xy" for part in "ab"),
    metaop("x.loss", 1, {4: 0.1}),
    metaop("y.loss", 1, {4: 0.1}),
    flows="x.a>x.loss x.b>x.loss y.a>y.loss y.b>y.loss",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("aligned", [False, True])
def test_every_method_makes_a_plan_that_passes_the_check(method: str, aligned: bool) -> None:
    made = solve(PAIRS, cluster(), method=method, aligned=aligned)
    assert check_plan(made) == ()
    assert made.lower_bound_s <= made.makespan_s


def test_baselines_are_costed() -> None:
    """Sequential: 4 x 4 x 1.0 + 2 x 0.1; split by task: two devices each, 8 x 1.1, then both losses on all four."""
    made = solve(PAIRS, cluster())
    baselines = dict(made.baselines_s)
    assert baselines["sequential"] == pytest.approx(16.2)
    assert baselines["component_split"] == pytest.approx(2 * 4.5)
    assert set(baselines) == {"sequential", "task_split", "component_split", "paper"}


def test_what_gets_no_faster_stays_where_its_input_is_regression() -> None:
    """b takes 1 s on any count. On all four devices nothing moves: 2 + 1 s; on one, 8 bytes would take 2 * 8 s."""
    metagraph = graph(
        metaop("t.a", 1, {1: 8.0, 4: 2.0}, output_bytes=8.0), metaop("t.b", 1, {1: 1.0, 4: 1.0}), flows="t.a>t.b"
    )
    made = solve(metagraph, cluster())
    assert dict(made.baseline_steps_s) == pytest.approx(
        {"sequential": 3.0, "task_split": 3.0, "component_split": 3.0, "paper": 19.0}
    )
    assert made.step_s == pytest.approx(3.0)
    assert check_plan(made) == ()


def test_auto_is_never_slower_than_a_usual_way() -> None:
    made = solve(PAIRS, cluster())
    assert made.makespan_s <= min(s for _, s in made.baselines_s)
    assert made.step_s <= min(s for _, s in made.baseline_steps_s)


def test_the_same_input_gives_the_same_plan() -> None:
    first, second = (dumps(replace(solve(PAIRS, cluster(2, 2)), planner_s=0.0)) for _ in range(2))
    assert first == second


def test_a_plan_carries_all_that_a_check_needs() -> None:
    made = solve(PAIRS, cluster())
    again = loads(dumps(made), Plan)
    assert again == made
    assert check_plan(again) == ()


def test_strict_waves_do_not_overlap() -> None:
    made = solve(PAIRS, cluster(), aligned=True)
    for before, after in zip(made.waves, made.waves[1:], strict=False):
        assert before.end_s <= after.start_s


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(PlanError, match="method 'magic' is not known; choose one of auto, lp"):
        solve(PAIRS, cluster(), method="magic")


def test_one_layer_too_large_for_a_device() -> None:
    with pytest.raises(InfeasibleError, match=r"MetaOp 'a' needs .* GiB a device for one of its 2 layers .* recompute"):
        solve(graph(metaop("a", 2, memory={1: 300.0, 4: 250.0})), cluster(memory_bytes=100))


def test_too_much_memory_for_all_devices_together() -> None:
    metagraph = graph(metaop("a", 4, memory={1: 380.0}), metaop("b", 1, memory={1: 90.0}))
    with pytest.raises(InfeasibleError, match=r"the MetaOps need .* 'a' alone needs .* Use 5 devices or more"):
        solve(metagraph, cluster(memory_bytes=100))


def test_a_method_that_does_not_fit_says_which_do() -> None:
    """Sequential puts both chains on all devices; each alone on two devices fits."""
    times, memory = {2: 1.0, 4: 0.9}, {2: 95.0, 4: 60.0}
    metagraph = graph(*(metaop(name, 1, times, memory=memory) for name in ("x.a", "y.a")))
    assert solve(metagraph, cluster(memory_bytes=100)).memory.fits
    with pytest.raises(InfeasibleError, match="method 'sequential' needs more memory"):
        solve(metagraph, cluster(memory_bytes=100), method="sequential")


def test_a_schedule_that_fits_is_preferred_regression() -> None:
    """The search estimates memory; a shorter schedule that needs more than there is stands behind one that fits."""
    metagraph = graph(
        metaop("a", times={1: 1.0}, memory={1: 6.0}), metaop("b", times={1: 1.0, 2: 0.9}, memory={1: 6.0, 2: 3.0})
    )
    problem = make_problem(metagraph, cluster(1, 2, memory_bytes=9.0))
    tight = evaluate(problem, "lp", (piece("a", range(1), (0,), 0, 1), piece("b", range(1), (0,), 1, 2)))
    roomy = evaluate(problem, "lp", (piece("a", range(1), (0,), 0, 1), piece("b", range(1), (1,), 0, 1)))
    assert fitting(problem, [tight, roomy]) == [roomy]
    assert fitting(problem, [tight]) == [tight]
