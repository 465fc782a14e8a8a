"""How good and how fast plans are. Each table is printed as Markdown; the results stand in results/planner.md.

    python benchmarks/planner.py gaps        gap to the bound on 45 instances: baselines, paper, lp at 2 and 10 s
    python benchmarks/planner.py fresh       the same on seeds that nothing was tuned on
    python benchmarks/planner.py few         20 instances on fresh seeds, some with traffic, those by their whole step
    python benchmarks/planner.py others      the same on other numbers of tasks and devices, none of the easy ones
    python benchmarks/planner.py islands     islands and switch costs: charged afterwards, and inside the search
    python benchmarks/planner.py scale       1024 devices, 60 to 180 tasks: the whole process
    python benchmarks/planner.py change      a task leaves or joins: planned anew, and from the former plan
    python benchmarks/planner.py tiny        against the true optimum
    python benchmarks/planner.py paper       the paper's planner against its own level optimum, on Multitask-CLIP

Gaps are per cent of the bound on ANY schedule without traffic. Every plan is checked by `spindle.planner.check`.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from instances.suites import Instance, suite

from spindle.files.formats import write
from spindle.planner.baselines.paper import paper_slices
from spindle.planner.baselines.waves import level_optimum_s
from spindle.planner.check import check_plan
from spindle.planner.problem import make_problem
from spindle.planner.search.decode import draft_of
from spindle.planner.search.device_pool import DevicePool, make_device_pool
from spindle.planner.search.list_scheduler import Run
from spindle.planner.search.model import Model, make_model
from spindle.planner.search.placed import PlacedDecoder
from spindle.planner.solve import solve
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan
from tests.optimal.exhaustive import OutOfNodes, optimum_s
from tests.optimal.test_optimal import tiny
from tests.planner.baselines.test_paper import end_s, first_that_fits, without_traffic
from tests.planner.planner_graphs import cluster as toy_cluster

USUAL = ("sequential", "task_split", "component_split", "paper")
FRESH_SEED = 20
FEW_SEED = 60
FEW = [
    *(Instance(family, tasks, 64, FEW_SEED) for family, tasks in (("clip", 4), ("ofasys", 7), ("vla", 6))),
    *(Instance(family, tasks, 32, FEW_SEED) for family, tasks in (("clip", 10), ("ofasys", 4), ("vla", 6))),
    *(Instance(family, tasks, 64, FEW_SEED) for family, tasks in (("qwenval", 3), ("unified", 8), ("omni", 12))),
    Instance("layered", 6, 16, FEW_SEED),
    Instance("vla", 6, 32, FEW_SEED, "div"),
    Instance("vla", 30, 256, FEW_SEED),
]
FEW_WITH_TRAFFIC = [
    *(Instance(family, tasks, 64, FEW_SEED) for family, tasks in (("clip", 4), ("clip", 10), ("ofasys", 7))),
    *(Instance(family, tasks, 64, FEW_SEED) for family, tasks in (("vla", 6), ("omni", 12), ("unified", 8))),
    *(Instance(family, 60, 1024, FEW_SEED) for family in ("clip", "vla")),
]
OTHERS = [
    *(Instance(family, 6, 32, seed) for seed in (11, 12) for family in ("clip", "ofasys", "vla", "omni", "layered")),
    *(Instance(family, 9, 64, 13, "div") for family in ("clip", "ofasys", "vla", "unified")),
    *(Instance(family, 24, 256, 14) for family in ("clip", "ofasys", "vla", "omni")),
]


CHANGING = [
    *(Instance(family, tasks, 32) for family, tasks in (("clip", 10), ("ofasys", 7), ("vla", 6), ("omni", 12))),
    *(Instance(family, tasks, 64) for family, tasks in (("clip", 10), ("ofasys", 7), ("vla", 6), ("omni", 12))),
    *(Instance(family, tasks, 256) for family, tasks in (("clip", 30), ("vla", 30), ("omni", 60))),
]


def planned(
    metagraph: MetaGraph,
    cluster: Cluster,
    limit_s: float | None = None,
    method: str = "lp",
    start: Plan | None = None,
) -> tuple[Plan, float]:
    """A plan that passed the check, and the processor seconds it took."""
    begun = time.process_time()
    plan = solve(metagraph, cluster, method=method, time_limit_s=limit_s, start=start)
    cpu_s = time.process_time() - begun
    findings = check_plan(plan)
    if findings:
        raise AssertionError(f"a plan breaks a rule: {findings[0]}")
    return plan, cpu_s


def gaps(instances: Sequence[Instance]) -> None:
    """One row for each instance."""
    print(
        "| instance | MetaOps | bound s | sequential | task | component | paper | lp 2 s | lp 10 s | slices | cpu s |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    columns: list[list[float]] = [[] for _ in range(6)]
    for instance in instances:
        metagraph, cluster = instance.metagraph(), instance.cluster()
        short, _ = planned(metagraph, cluster, 2.0)
        plan, cpu_s = planned(metagraph, cluster, 10.0)
        usual = dict(plan.baselines_s)
        row = [100 * (usual[name] / plan.lower_bound_s - 1) for name in USUAL] + [100 * short.gap, 100 * plan.gap]
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        cells = " | ".join(f"{value:.1f}" for value in row[:4]) + " | " + " | ".join(f"{v:.2f}" for v in row[4:])
        print(
            f"| {instance.name} | {len(metagraph)} | {plan.lower_bound_s:.3f} | {cells} | {len(plan.slices)} "
            f"| {cpu_s:.1f} |",
            flush=True,
        )
    for name, of in (("mean", statistics.mean), ("median", statistics.median), ("p90", p90), ("max", max)):
        cells = " | ".join(f"{of(column):.2f}" for column in columns)
        print(f"| **{name}** | | | {cells} | | |")
    worse = sum(lp > paper + 1e-9 for paper, lp in zip(columns[3], columns[5], strict=True))
    print(f"\nThe paper's planner is better on {worse} of {len(columns[3])} instances.")


def few(name: str) -> None:
    """Gaps at 2 and 10 s: of the makespan, and with islands, transfers and reductions of the whole step, both over the
    bound without traffic.
    """
    print("| instance | MetaOps | traffic | 2 s | 10 s | makespan alone, 10 s |")
    print("|---|--:|---|--:|--:|--:|")
    for traffic, instances in ((False, FEW), (True, FEW_WITH_TRAFFIC)):
        columns: list[list[float]] = [[] for _ in range(3)]
        for instance in instances:
            if not instance.name.startswith(name):
                continue
            metagraph, cluster = instance.metagraph(traffic=traffic), instance.cluster(islands=traffic)
            # a clock that stands still: a slow machine does the work of the whole limit too
            short, plan = (
                solve(metagraph, cluster, method="lp", time_limit_s=limit_s, clock=lambda: 0.0)
                for limit_s in (2.0, 10.0)
            )
            row = [100 * (p.step_s / p.lower_bound_s - 1) for p in (short, plan)] + [100 * plan.gap]
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            cells = " | ".join(f"{value:.2f}" for value in row)
            print(f"| {instance.name} | {len(metagraph)} | {'yes' if traffic else 'no'} | {cells} |", flush=True)
        for kind, of in (("mean", statistics.mean), ("median", statistics.median), ("p90", p90), ("max", max)):
            if columns[0]:
                print(f"| **{kind}** | | | {' | '.join(f'{of(column):.2f}' for column in columns)} |", flush=True)


def p90(values: Sequence[float]) -> float:
    """The 90th percentile."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def islands(instances: Sequence[Instance]) -> None:
    """Switch costs charged to plans made without them, and plans made with them."""
    print("| instance | MetaOps | afterwards | overtaking | inside | slices | cpu s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    columns: list[list[float]] = [[] for _ in range(3)]
    for instance in instances:
        full, cluster = instance.metagraph(traffic=True), instance.cluster(islands=True)
        metagraph = MetaGraph(tuple(replace(m, layer_param_bytes=0.0) for m in full), full.flows)
        blind, _ = planned(instance.metagraph(), cluster, 2.0)
        after, moved = charged(blind, metagraph, cluster)
        plan, cpu_s = planned(metagraph, cluster, 10.0)
        bound_s = plan.lower_bound_s
        row = [100 * (value / bound_s - 1) for value in (after, moved, plan.makespan_s)]
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        print(
            f"| {instance.name} | {len(metagraph)} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} | {len(plan.slices)} "
            f"| {cpu_s:.1f} |",
            flush=True,
        )
    for name, of in (("mean", statistics.mean), ("median", statistics.median), ("p90", p90), ("max", max)):
        cells = [f"{of(column):.2f}" for column in columns]
        print(f"| **{name}** | | {cells[0]} | {cells[1]} | {cells[2]} | | |")


def charged(blind: Plan, metagraph: MetaGraph, cluster: Cluster) -> tuple[float, float]:
    """Makespan of a plan's slices on compact sets with switch costs: in the plan's order, and with overtaking."""
    problem = make_problem(metagraph, cluster)
    model, floor = make_model(problem, blind.lower_bound_s), make_device_pool(problem)
    runs = []
    for s in sorted(blind.slices, key=lambda s: (s.start_s, s.metaop)):
        m = problem.index[s.metaop]
        runs.append((m, model.counts[m].index(len(s.devices)), s.num_layers, s.start_s, s.end_s, 0))
    strict_s = in_order_s(problem.predecessors, model, floor, runs)
    decoder = PlacedDecoder(model, floor)
    decoded = decoder.decode(draft_of(decoder, runs), float("inf"))
    if decoded is None:
        raise AssertionError("without memory every draft decodes")
    return strict_s, decoded[0]


def in_order_s(predecessors: Sequence[Sequence[int]], model: Model, floor: DevicePool, runs: Sequence[Run]) -> float:
    """Makespan when each slice waits until a compact set is free, none overtaking another."""
    running: list[tuple[float, int]] = []
    free, now = floor.all_devices, 0.0
    ends, where, done = [0.0] * len(model), [0] * len(model), [0] * len(model)
    for m, c, layers, _, _, _ in runs:
        count = model.counts[m][c]
        now = max(now, ends[m], *(ends[p] for p in predecessors[m]))
        while True:
            for entry in [r for r in running if r[0] <= now]:
                running.remove(entry)
                free |= entry[1]
            found = floor.choose(m, count, free, floor.sources(m, not done[m], where))
            if found is not None:
                break
            now = min(end for end, _ in running)
        devices, cost_s = found
        free &= ~devices
        ends[m] = now + cost_s + layers * model.times[m][c]
        where[m], done[m] = devices, done[m] + layers
        running.append((ends[m], devices))
    return max(ends)


def change() -> None:
    """The last task leaves, or joins: a plan made anew with the default limit, and one from the former plan."""
    print("| instance | change | MetaOps | anew | cpu s | from the former plan | cpu s |")
    print("|---|---|--:|--:|--:|--:|--:|")
    columns: list[list[float]] = [[] for _ in range(4)]
    for instance in CHANGING:
        whole, cluster = instance.metagraph(), instance.cluster()
        less = without_last_task(whole)
        for name, before, after in (("leaves", whole, less), ("joins", less, whole)):
            former, _ = planned(before, cluster)
            anew, anew_s = planned(after, cluster)
            again, again_s = planned(after, cluster, start=former)
            row = [100 * anew.gap, anew_s, 100 * again.gap, again_s]
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            cells = f"{row[0]:.2f} | {row[1]:.1f} | {row[2]:.2f} | {row[3]:.1f}"
            print(f"| {instance.name} | a task {name} | {len(after)} | {cells} |", flush=True)
    cells = " | ".join(f"{statistics.mean(column):.2f}" for column in columns)
    print(f"| **mean** | | | {cells} |")


def without_last_task(metagraph: MetaGraph) -> MetaGraph:
    """The MetaGraph of all tasks but the last."""
    last = metagraph.metaops[-1].task
    kept = tuple(m for m in metagraph if m.task != last)
    names = {m.name for m in kept}
    return MetaGraph(kept, tuple(f for f in metagraph.flows if {f.source, f.target} <= names))


def scale() -> None:
    """1024 devices, 60 tasks and 1000 MetaOps: `spindle plan` from start to end, default limit."""
    print("| instance | MetaOps | traffic | wall s | cpu s | gap % | peak MiB |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for family, tasks in (("vla", 60), ("omni", 60), ("ofasys", 60), ("clip", 60), ("vla", 180)):
        for traffic in (False, True):
            instance = Instance(family, tasks, 1024)
            metagraph = instance.metagraph(traffic=traffic)
            with tempfile.TemporaryDirectory() as folder:
                source, out = Path(folder) / "graph.json", Path(folder) / "plan.json"
                write(metagraph, source)
                command = [sys.executable, "-m", "spindle", "plan", str(source), "-c", "128x8:a100-80g", "-o", str(out)]
                before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                wall_s, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            gap = done.stdout.partition("gap ")[2].partition(" ")[0]
            print(
                f"| {instance.name} | {len(metagraph)} | {'yes' if traffic else 'no'} | {wall_s:.1f} | {cpu_s:.1f} "
                f"| {gap} | {after.ru_maxrss // 1024} |",
                flush=True,
            )


def against_optimum(count: int = 200) -> None:
    """Tiny instances: how often the plan is the true optimum."""
    solved, excess = 0, []
    for seed in range(count):
        metagraph, cluster = tiny(seed), toy_cluster(1, 4)
        plan, _ = planned(metagraph, cluster, 0.2, "auto")
        try:
            best_s = optimum_s(metagraph, cluster, plan.makespan_s, most_nodes=100_000)
        except OutOfNodes:
            continue
        solved += 1
        excess.append(plan.makespan_s / best_s - 1)
    missed = sorted(e for e in excess if e > 1e-6)
    print(f"{solved} of {count} tiny instances solved to proven optimality by exhaustive search.")
    print(f"The plan is optimal in {solved - len(missed)}, and longer in {len(missed)}", end="")
    print(f" (by {', '.join(f'{100 * e:.2f} %' for e in missed)})." if missed else ".")


def paper() -> None:
    """Multitask-CLIP's first tasks on A100 nodes of eight: distance from the sum of level optima."""
    print("| tasks | devices | optimum s | without transfers % | with transfers % |")
    print("|--:|--:|--:|--:|--:|")
    for num_tasks in (4, 7, 10):
        for nodes in (1, 2, 4):
            problem, slices = first_that_fits(num_tasks, nodes)
            alone = paper_slices(make_problem(without_traffic(problem.metagraph), problem.cluster))
            optimum_s = level_optimum_s(problem)
            gaps = " | ".join(f"{100 * (end_s(found) / optimum_s - 1):.1f}" for found in (alone, slices))
            print(f"| {num_tasks} | {8 * nodes} | {optimum_s:.3f} | {gaps} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "table", choices=("gaps", "fresh", "few", "others", "islands", "scale", "change", "tiny", "paper")
    )
    parser.add_argument("--only", default="", help="instances whose name begins so")
    chosen = parser.parse_args()
    print(f"{os.cpu_count()} cores of a shared {platform.machine()} machine, Python {platform.python_version()}\n")
    wanted = [i for i in suite() if i.name.startswith(chosen.only)]
    tables = {
        "gaps": lambda: gaps(wanted),
        "fresh": lambda: gaps([replace(i, seed=i.seed + FRESH_SEED) for i in wanted]),
        "few": lambda: few(chosen.only),
        "others": lambda: gaps(OTHERS),
        "islands": lambda: islands(wanted),
        "scale": scale,
        "change": change,
        "tiny": against_optimum,
        "paper": paper,
    }
    tables[chosen.table]()


if __name__ == "__main__":
    main()
