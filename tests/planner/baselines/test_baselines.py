from spindle.planner.baselines.baselines import (
    component_group_waves,
    component_split_waves,
    sequential_waves,
    task_split_waves,
)
from spindle.planner.baselines.waves import Waves
from spindle.planner.problem import Problem, make_problem
from spindle.planner.solve import solve
from tests.planner.planner_graphs import cluster, graph, metaop


def shape(problem: Problem, waves: Waves) -> list[dict[str, int]]:
    return [{problem.metaops[p.op].name: p.count for p in wave} for wave in waves]


HALVES = {1: 4.0, 2: 2.2, 4: 1.5}


def test_sequential_gives_all_devices_to_each() -> None:
    problem = make_problem(graph(metaop("t.b"), metaop("t.a"), flows="t.a>t.b"), cluster())
    assert shape(problem, sequential_waves(problem)) == [{"t.a": 4}, {"t.b": 4}]


def test_task_split_keeps_tasks_on_their_own_devices() -> None:
    """Task x has three times the work of y: of four devices it gets two (three is no valid count), y two."""
    metagraph = graph(metaop("x.a", 3, HALVES), metaop("x.b", 3, HALVES), metaop("y.a", 2, HALVES), flows="x.a>x.b")
    problem = make_problem(metagraph, cluster())
    devices = {problem.metaops[p.op].name: p.devices for wave in task_split_waves(problem) for p in wave}
    assert devices == {"x.a": (0, 1), "x.b": (0, 1), "y.a": (2, 3)}


def test_light_tasks_share_when_there_are_too_few_devices() -> None:
    """Three tasks that need two devices each, on four: the two lightest take turns."""
    pair = {2: 1.0}
    problem = make_problem(graph(metaop("x.a", 9, pair), metaop("y.a", 1, pair), metaop("z.a", 2, pair)), cluster())
    devices = {problem.metaops[p.op].name: p.devices for wave in task_split_waves(problem) for p in wave}
    assert devices["y.a"] == devices["z.a"] != devices["x.a"]


def test_component_split_runs_encoders_side_by_side_and_tasks_in_turn() -> None:
    """Encoders that gain little from four devices share them; the loss of each task follows alone."""
    metaops = [metaop(f"{task}.{part}", 1, HALVES) for task in "xy" for part in ("a", "b", "loss")]
    flows = "x.a>x.loss x.b>x.loss y.a>y.loss y.b>y.loss"
    problem = make_problem(graph(*metaops, flows=flows), cluster())
    assert shape(problem, component_split_waves(problem)) == [
        {"x.a": 2, "x.b": 2},
        {"x.loss": 4},
        {"y.a": 2, "y.b": 2},
        {"y.loss": 4},
    ]


def test_component_split_takes_turns_where_that_is_faster() -> None:
    """A heavy and a light encoder that both scale: half the devices would idle."""
    problem = make_problem(graph(metaop("x.a", 9), metaop("x.b", 1)), cluster())
    assert shape(problem, component_split_waves(problem)) == [{"x.a": 4}, {"x.b": 4}]


def test_a_task_that_waits_for_another_hands_over() -> None:
    """x.a feeds y.b which feeds x.c: the task steps follow the data."""
    problem = make_problem(graph(metaop("x.a"), metaop("x.c"), metaop("y.b"), flows="x.a>y.b y.b>x.c"), cluster())
    assert [name for wave in shape(problem, component_split_waves(problem)) for name in wave] == ["x.a", "y.b", "x.c"]


def test_components_have_their_own_devices() -> None:
    """Part a of both tasks on one half of the devices, part b on the other."""
    metaops = [metaop(f"{task}.{part}", 1, HALVES) for task in "xy" for part in ("a", "b")]
    problem = make_problem(graph(*metaops), cluster())
    devices = {problem.metaops[p.op].name: p.devices for wave in component_group_waves(problem) for p in wave}
    assert devices == {"x.a": (0, 1), "y.a": (0, 1), "x.b": (2, 3), "y.b": (2, 3)}


def test_a_plan_is_no_worse_than_components_on_their_own_devices() -> None:
    """Each part has parameters that are heavy to reduce and are on one device only when its component has its own."""
    metaops = [
        metaop(f"{task}.{part}", 1, {1: 2.0, 2: 1.0}, layer_param_bytes=100.0, parameters=part)
        for task in "xy"
        for part in ("a", "b")
    ]
    made = solve(graph(*metaops), cluster(per_node=2))
    assert dict(made.baseline_steps_s)["component_split"] == made.step_s == 4.0
