"""The paper's evaluation on modeled devices: `python -m benchmarks.paper [--write] [--time-limit S]`, ten minutes.

Everything is what `spindle plan` says of the specs in benchmarks/workloads on benchmarks/clusters/spindle-paper.yaml.
Nothing is fitted on the paper's times but the batches, which it does not state: they fit the times on 8 GPUs.
`--write` also writes benchmarks/results/paper.md, from which `benchmarks.pages.figures` makes the tables of pages.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from spindle.files.calibrationfile import read_steps
from spindle.files.clusterfile import parse_cluster
from spindle.planner.baselines.alternatives import COMPONENT_GROUPS, DDP, DDP_BY_TASK, FSDP, TASK_GROUPS, ZERO
from spindle.planner.simulate import step_times
from spindle.planner.solve import default_limit_s
from spindle.spec.file import read_workload
from spindle.values.cluster import Cluster, Link
from spindle.values.plan import Plan, make_waves
from spindle.verbs.calibrating import make_calibration
from spindle.verbs.planning import plan_source
from spindle.verbs.source import Source, load_source, spec_source

sys.path.insert(0, str(Path(__file__).parent))  # the tables' module stands beside this one

from cost_report.tables import read_table
from cost_report.unfitted import in_sequence_s

HERE = Path(__file__).parent
CLUSTER = HERE / "clusters" / "spindle-paper.yaml"
CELLS = [
    *(("multitask_clip", tasks, devices) for tasks in (4, 7, 10) for devices in (8, 16, 32, 64)),
    *(("ofasys", tasks, devices) for tasks in (4, 7) for devices in (8, 16, 32, 64)),
    *(("qwen_val_9b", 3, devices) for devices in (32, 64)),
]
ABLATED = [("multitask_clip", 10, 16), ("multitask_clip", 10, 32), ("ofasys", 7, 32)]
COLUMNS = (
    (DDP, "DDP, a step"),
    (DDP_BY_TASK, "DDP, a task"),
    (ZERO, "ZeRO-1/2"),
    (FSDP, "FSDP2"),
    (TASK_GROUPS, "task groups"),
    (COMPONENT_GROUPS, "component groups"),
)
PUBLISHED = (
    "Published, as maxima over all cells: 1.71 over DeepSpeed, 1.67 over Megatron-LM, 1.59 over component groups."
)

Row = Sequence[str]


def cluster_of(devices: int) -> Cluster:
    """The paper's cluster with this number of devices."""
    found = parse_cluster(str(CLUSTER))
    return replace(found, nodes=devices // found.devices_per_node)


def source_of(name: str, tasks: int) -> Source:
    """The first tasks of a workload."""
    spec = read_workload(HERE / "workloads" / f"{name}.yaml")
    chosen = spec.only(task.name for task in spec.tasks[:tasks])
    return spec_source(chosen)


def planned(
    name: str, tasks: int, where: Cluster, limit_s: float | None, *, aligned: bool = False, start: Plan | None = None
) -> Plan:
    """What `spindle plan` makes of it."""
    return plan_source(source_of(name, tasks), where, time_limit_s=limit_s, aligned=aligned, start=start)[0]


def table(head: Row, rows: Iterator[Row] | Sequence[Row]) -> str:
    """A Markdown table; columns of numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["--:"] * (len(head) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(name: str, tasks: int, devices: int) -> str:
    """A cell in words."""
    return f"{name}, {tasks} tasks, {devices}"


def sequential(plans: dict[tuple[str, int, int], Plan]) -> str:
    """Tasks one after another, beside the published times: data parallelism with one reduction a step, with sharded
    states where that is shorter, as DeepSpeed may.
    """
    published = {
        (row["workload"], int(row["tasks"]), int(row["gpus"])): float(row["milliseconds"])
        for row in read_table("spindle_paper_sequential")
    }

    def rows() -> Iterator[Row]:
        for key, plan in plans.items():
            told = 1e3 * in_sequence_s(plan)
            measured = published.get(key)
            error = f"{told / measured - 1:+.1%}" if measured else ""
            yield cell(*key), f"{told:.0f}", f"{measured:.0f}" if measured else "", error

    return table(("workload, tasks, devices", "predicted ms", "published ms", "error"), rows())


def gains(plans: dict[tuple[str, int, int], Plan]) -> str:
    """How many times as long as our plan each alternative and the paper's planner take."""

    def rows() -> Iterator[Row]:
        for key, plan in plans.items():
            found = {other.name: other.step_s for other in plan.alternatives if other.fits}
            ratios = [f"{found[name] / plan.step_s:.2f}" if name in found else "-" for name, _ in COLUMNS]
            paper = dict(plan.baseline_steps_s).get("paper")
            last = f"{paper / plan.step_s:.2f}" if paper else "-"
            yield cell(*key), f"{1e3 * plan.step_s:.0f}", *ratios, last, f"{plan.gap:.1%}"

    head = ("workload, tasks, devices", "ours, ms", *(short for _, short in COLUMNS), "paper's planner", "gap")
    return table(head, rows()) + f"\n\n{PUBLISHED}"


def ablations(limit_s: float | None) -> str:
    """A step without one ingredient, over the step with all of them."""
    free = Link(bytes_per_s=1e18, latency_s=0.0)

    def strict(name: str, tasks: int, where: Cluster, plan: Plan) -> float:
        return planned(name, tasks, where, limit_s, aligned=True).step_s

    def short(name: str, tasks: int, where: Cluster, plan: Plan) -> float:
        return planned(name, tasks, where, 0.02 * (limit_s or default_limit_s(where))).step_s

    def blind(name: str, tasks: int, where: Cluster, plan: Plan) -> float:
        made = planned(name, tasks, replace(where, intra_node=free, inter_node=free), limit_s)
        return charged(made, plan)

    def scattered(name: str, tasks: int, where: Cluster, plan: Plan) -> float:
        return charged(strewn(plan, where), plan)

    def paper(name: str, tasks: int, where: Cluster, plan: Plan) -> float:
        return dict(plan.baseline_steps_s)["paper"]

    ways: tuple[tuple[str, Callable[[str, int, Cluster, Plan], float]], ...] = (
        ("strict waves (level barriers)", strict),
        ("a fiftieth of the search (no refinement)", short),
        ("planned without traffic", blind),
        ("devices of a slice strewn over nodes", scattered),
        ("the paper's planner (levels, bi-point rounding)", paper),
    )
    whole = {key: planned(key[0], key[1], cluster_of(key[2]), limit_s) for key in ABLATED}

    def rows() -> Iterator[Row]:
        for words, way in ways:
            yield (
                words,
                *(f"{way(*key[:2], cluster_of(key[2]), plan) / plan.step_s:.2f}" for key, plan in whole.items()),
            )

    return table(("without", *(cell(*key) for key in ABLATED)), rows())


def charged(made: Plan, plan: Plan) -> float:
    """A step of the slices of one plan at the costs of another."""
    assert plan.metagraph is not None, "plans of a spec carry what they were made of"
    assert plan.cluster is not None, "plans of a spec carry what they were made for"
    return step_times(made, plan.metagraph, plan.cluster).step_s


def strewn(plan: Plan, where: Cluster) -> Plan:
    """The same plan with neighboring devices on different nodes."""
    size = where.devices_per_node
    moved = {d: (d % where.nodes) * size + d // where.nodes for d in range(where.num_devices)}
    slices = [replace(s, devices=tuple(sorted(moved[d] for d in s.devices))) for s in plan.slices]
    return replace(plan, waves=make_waves(slices))


def changing(limit_s: float | None) -> str:
    """Tasks that join: planned anew, and from the plan before."""

    def rows() -> Iterator[Row]:
        where, before = cluster_of(32), None
        for tasks in (4, 7, 10, 7):
            begin = time.perf_counter()
            anew = planned("multitask_clip", tasks, where, limit_s)
            middle = time.perf_counter()
            taken = planned("multitask_clip", tasks, where, limit_s, start=before) if before else anew
            seconds = middle - begin, time.perf_counter() - middle
            yield (
                f"{tasks} tasks",
                f"{1e3 * anew.step_s:.0f}",
                f"{seconds[0]:.1f}",
                f"{1e3 * taken.step_s:.0f}" if before else "",
                f"{seconds[1]:.1f}" if before else "",
            )
            before = taken

    return table(("multitask_clip on 32", "anew, ms", "planned in s", "from the former plan, ms", "in s"), rows())


def memory(plans: dict[tuple[str, int, int], Plan]) -> str:
    """The fullest device and the mean of all, and the fullest of plain data parallelism."""

    def rows() -> Iterator[Row]:
        for key, plan in plans.items():
            peaks = [peak / 2**30 for peak in plan.memory.peak_bytes_per_device]
            ddp = {other.name: other for other in plan.alternatives}[COLUMNS[0][0]]
            how = f"{ddp.peak_bytes / 2**30:.1f}" + (f" ({ddp.choice})" if ddp.choice else "")
            yield cell(*key), f"{max(peaks):.1f}", f"{sum(peaks) / len(peaks):.1f}", how

    return table(("workload, tasks, devices", "ours, fullest GiB", "ours, mean GiB", "DDP, GiB"), rows())


def starvla() -> str:
    """StarVLA's two tables, each calibrated on its two rows, and the run that the first one's header states besides."""
    spec, where = str(HERE / "workloads" / "starvla_gr00t.yaml"), parse_cluster("1x8:a100-80g")
    lines, constants = [], []

    def line(name: str, gpus: int, batch: int, measured_s: float, told_s: float, what: str) -> None:
        error = told_s / measured_s - 1
        lines.append((name, str(gpus), str(batch), f"{measured_s:.3f}", f"{told_s:.3f}", f"{error:+.1%}", what))

    for name in ("batch", "nodes"):
        fitted = make_calibration(spec, where, read_steps(HERE / "data" / "starvla_a100.csv", table=name).rows)
        for row in fitted.rows:
            line(name, row.gpus, row.per_gpu_batch, row.seconds, row.predicted_s, "fitted")
        if name == "batch":
            source = load_source(spec, per_device=(8, 8))
            plan, _ = plan_source(source, where, calibration=fitted, method="sequential")
            line(name, 8, 8, 1.131, plan.step_s, "held out")
        values = (f"{key} {getattr(fitted, key):.2f}" for key in ("compute", "host", "network", "step_s"))
        constants.append(f"{name}: {', '.join(values)}")
    head = ("table", "GPUs", "batch each", "measured s", "told s", "error", "row")
    return f"{table(head, lines)}\n\nConstants by table: {'; '.join(constants)}."


BEYOND = (
    ("vla_cotrain", "2x8:h100-80g", None),
    ("anchorvla4d_like", "2x8:a100-80g", None),
    ("at_vla_like", "2x8:a100-80g", None),
    ("multitask_clip", str(HERE / "clusters" / "two-islands.yaml"), None),
    ("multitask_clip", "128x8:a100-80g", 61),
)


def beyond(limit_s: float | None) -> str:
    """What the paper has not: vision-language-action models, links of unequal speed, a thousand devices."""

    def rows() -> Iterator[Row]:
        for name, where, batch in BEYOND:
            cluster = parse_cluster(where)
            per_device = (batch, cluster.num_devices) if batch else None
            loaded = load_source(str(HERE / "workloads" / f"{name}.yaml"), per_device=per_device)
            plan, _ = plan_source(loaded, cluster, time_limit_s=limit_s)
            fitting = [other for other in plan.alternatives if other.fits]
            best = min(fitting, key=lambda other: other.step_s)
            words = f"{name}{f', {batch} samples a device' if batch else ''}"
            yield (
                words,
                Path(where).stem,
                f"{1e3 * plan.expected_s:.0f}",
                best.name,
                f"{best.step_s / plan.expected_s:.2f}",
                f"{plan.gap:.1%}",
            )

    return table(("workload", "cluster", "ours, ms", "best alternative", "takes", "gap"), rows())


def report(limit_s: float | None) -> str:
    """All sections."""
    plans = {key: planned(key[0], key[1], cluster_of(key[2]), limit_s) for key in CELLS}
    sections = (
        ("Tasks in sequence", sequential(plans)),
        ("Gains", gains(plans)),
        ("Ablations", ablations(limit_s)),
        ("Task sets that change", changing(limit_s)),
        ("Memory", memory(plans)),
        ("StarVLA, calibrated", starvla()),
        ("Beyond the paper", beyond(limit_s)),
    )
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections) + "\n"


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/paper.md")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="seconds of search for each plan; none: as counted"
    )
    arguments = parser.parse_args()
    text = report(arguments.time_limit)
    print(text, end="")
    if arguments.write:
        head = (
            "# The paper's evaluation on modeled devices\n\n"
            f"Command: `python -m benchmarks.paper {' '.join(sys.argv[1:])}`. "
            f"Python {platform.python_version()}; two x86_64 cores. "
            "No time of this machine enters but those of planning.\n\n"
        )
        (HERE / "results" / "paper.md").write_text(head + text, encoding="utf-8")


if __name__ == "__main__":
    main()
