from dataclasses import replace

from spindle.planner.report.figures import WIDTH, seconds
from spindle.planner.report.render import gantt, render, summary, table
from spindle.planner.solve import solve
from spindle.values.plan import Alternative, Memory, StepWork, make_waves
from tests.planner.planner_graphs import cluster, graph, metaop, piece, plan

GRAPH = graph(metaop("t.a", 2, {2: 1.0}), metaop("t.b", 1, {2: 1.5}), metaop("t.loss", 1, {4: 0.5}))
MADE = plan(
    piece("t.a", range(2), (0, 1), 0.0, 2.0),
    piece("t.b", range(1), (2, 3), 0.0, 1.5),
    piece("t.loss", range(1), range(4), 2.0, 2.5),
    metagraph=GRAPH,
)


def test_gantt_text() -> None:
    assert gantt(MADE, width=60) == (
        "            0                   1.25                  2.5 s\n"
        "device 0-1 |AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA|CCCCCCCC|\n"
        "device 2-3 |BBBBBBBBBBBBBBBBBBBBBBBBBBBB..........|CCCCCCCC|\n"
        " A t.a   B t.b   C t.loss"
    )


def test_table_text() -> None:
    assert table(MADE) == (
        " wave    start s      end s  MetaOp    layers    n  devices\n"
        "    0   0.000000   2.000000  t.a         0..1    2  0-1\n"
        "    0   0.000000   1.500000  t.b            0    2  2-3\n"
        "    1   2.000000   2.500000  t.loss         0    4  0-3"
    )


def test_summary_text() -> None:
    made = replace(
        MADE,
        lower_bound_s=2.0,
        step_s=2.75,
        reduction_s=0.25,
        baselines_s=(("paper", 2.5), ("sequential", 5.0)),
        memory=Memory(peak_bytes_per_device=(2.0**30, 2.0**31), fits=True),
        cluster=cluster(memory_bytes=2.0**32),
    )
    assert summary(made) == (
        "plan       4 x toy (1 x 4), method hand, planned in 0.00 s\n"
        "           3 MetaOps (runs of equal layers of a task), 3 slices, 2 waves\n"
        "step       2.75 s: forward and backward 2.50 s, gradient reduction 0.250 s\n"
        "memory     fits: at most 2.00 GiB of 4.00 GiB (device 1), 2.00 GiB free; 1.50 GiB on average\n"
        "choices    none for memory: nothing is sharded or recomputed but what the workload says\n"
        "baselines  makespans\n"
        "  sequential           5.00 s   50.0 % shorter  all devices, one after another\n"
        "  paper                2.50 s    0.0 % shorter  the paper's planner\n"
        "  does not fit in memory: task_split, component_split\n"
        "makespan   2.50 s: forward and backward as drawn, devices idle 10.0 %\n"
        "bound      2.00 s: no schedule of these layers takes less; the makespan is 25.00 % above (gap)"
    )


STEP = replace(
    MADE,
    step_s=2.75,
    baselines_s=(("paper", 2.5),),
    baseline_steps_s=(("paper", 3.0), ("sequential", 9.0)),
    cluster=cluster(memory_bytes=2.0**32),
    work=StepWork(samples=1000.0, tokens=5e6, flops=2.2e12),
    alternatives=(
        Alternative(name="DDP, one all-reduce a step", step_s=5.5, choice="no_sync, recompute", peak_bytes=2.0**31),
        Alternative(name="DDP, one all-reduce a task", peak_bytes=2.0**33, choice="recompute", fits=False),
        Alternative(name="devices divided among tasks", fits=False),
    ),
)


def test_what_is_used_instead_is_told_with_its_memory_choice() -> None:
    """Model FLOPs 2.2e12 in 2.75 s of four devices of 1e12: 20 %."""
    assert summary(STEP).splitlines()[2:-2] == [
        "step       2.75 s: forward and backward 2.75 s, gradient reduction 0 s",
        "speed      MFU 20.0 %, 364 samples/s, 1.82 M tokens/s",
        "baselines                                  step  this plan is    fastest memory choice",
        "  DDP, one all-reduce a step             5.50 s   50.0 % shorter  no_sync, recompute",
        "  the paper's planner (Spindle)          3.00 s    8.3 % shorter  as this plan",
        "  DDP, one all-reduce a task          does not fit: 8.00 GiB of 4.00 GiB, recompute",
        "  devices divided among tasks         does not fit in memory",
    ]


def test_the_chart_and_the_step_are_told_apart() -> None:
    """The chart has forward and backward of a slice together, a step all forward before all backward."""
    *_, line, more = summary(STEP).splitlines()
    assert f"{line} {more.strip()}" == (
        "makespan   2.50 s: forward and backward as drawn, devices idle 10.0 %; 2.75 s in a step, which runs all "
        "forward before all backward"
    )


def test_memory_choices_are_printed() -> None:
    memory = Memory(peak_bytes_per_device=(2.0**30,) * 4, fits=True)
    made = replace(MADE, memory=memory, recompute=True, shard_optimizer=True, shard_parameters=("a", "b"))
    assert (
        "\nchoices    optimizer states sharded (ZeRO-1), parameters of a, b sharded (ZeRO-3), activations"
        in summary(made)
    )


def test_an_alternative_that_is_faster_is_said_to_be() -> None:
    faster = Alternative(name="FSDP2 / ZeRO-3, parameters sharded", step_s=2.5)
    assert (
        "this plan is 10.0 % slower than FSDP2 / ZeRO-3, parameters sharded: consider that instead"
        in summary(replace(STEP, alternatives=(faster,))).splitlines()
    )


def test_seconds_have_three_significant_digits() -> None:
    values = (0.0, 5.88e-05, 0.04567, 0.41234, 1.2345, 12.345, 123.45, 1234.5)
    assert [seconds(value) for value in values] == [
        "0 s", "0.0000588 s", "0.0457 s", "0.412 s", "1.23 s", "12.3 s", "123 s", "1234 s"
    ]  # fmt: skip


def test_it_says_when_waves_gain_nothing() -> None:
    """One MetaOp that scales perfectly: all devices, one after another, is as good as anything."""
    assert "waves gain nothing here: component_split is as fast" in render(solve(graph(metaop("a", 4)), cluster()))


def test_large_plans_stay_within_the_page() -> None:
    """Sixty-four devices and seventy MetaOps with long names."""
    names = [f"task{i}.a-rather-long-component-name-{i}" for i in range(70)]
    made = solve(graph(*(metaop(name, 3, {1: 1.0 + i % 7, 2: 0.9}) for i, name in enumerate(names))), cluster(8, 8))
    for text in (render(made), table(made)):
        assert max(map(len, text.splitlines())) <= WIDTH
    assert len(gantt(made).splitlines()) < 90


def test_memory_of_small_models_is_told_in_mebibytes() -> None:
    made = replace(
        MADE,
        memory=Memory(peak_bytes_per_device=(3 * 2.0**20, 2.0**20), fits=True),
        cluster=cluster(memory_bytes=2.0**32),
    )
    assert "at most 3.0 MiB of 4.00 GiB (device 0), 4.00 GiB free; 2.0 MiB on average" in summary(made)


def test_the_legend_has_what_the_chart_shows() -> None:
    short, long = piece("t.b", range(1), (0,), 0.0, 0.001), piece("t.a", range(2), (0, 1), 0.001, 2.0)
    made = replace(MADE, waves=make_waves([short, long]))
    assert gantt(made, width=60).splitlines()[-1] == " B t.a   ... 1 more, too short for a cell"
