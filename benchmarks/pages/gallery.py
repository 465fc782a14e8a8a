"""The examples of docs/gallery: what waves gain, planned at true size and measured at small size.

    python -m benchmarks.pages.gallery --planned [--write] [--only multitask_clip] [--device h100-80g]
    python -m benchmarks.pages.gallery --measured [--write] [--only multitask_clip]

Planned: the spec that the example's first lines name, on 8, 16 and 32 devices, one plan a cell: a step, how much
shorter it is than DDP with one all-reduce a step and than the best of what people would use instead
(`plan.alternatives`, each with the memory choice that is fastest for it), and the gap to the bound; beside it the same
with an eighth of each batch. A negative share: the step is longer. Measured: one profile, then the worker groups of the
plan and of the sequential one take turns of a few steps in processes of this machine; figures are medians over turns.

`--write` puts each part into its section of benchmarks/results/gallery.md (`## NAME, planned`; `## Measured`) and
leaves the other sections as they are; `python -m benchmarks.pages.figures` then makes the tables of the pages.
"""

import argparse
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import spindle
from spindle.errors import InfeasibleError
from spindle.files.clusterfile import parse_cluster
from spindle.planner.baselines.alternatives import COMPONENT_GROUPS, DDP, DDP_BY_TASK, FSDP, TASK_GROUPS, ZERO
from spindle.runtime.controller import Run, launched, prepare
from spindle.spec.file import read_workload
from spindle.verbs.planning import plan_source
from spindle.verbs.source import load_workload, spec_source

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
REPORT = ROOT / "benchmarks" / "results" / "gallery.md"
SPEC = re.compile(r"(?:benchmarks/workloads|docs/examples/\w+)/[\w-]+\.yaml")
NODES, DEVICES_PER_NODE, SMALLER = (1, 2, 4), 8, 8
DEVICES = ("a100-80g", "h100-80g")
SHORT = {
    DDP: "DDP",
    DDP_BY_TASK: "DDP, a task",
    ZERO: "ZeRO-1/2",
    FSDP: "FSDP2",
    TASK_GROUPS: "task groups",
    COMPONENT_GROUPS: "component groups",
}
HEADS = ("ms a step", "shorter than DDP", "than the best", "gap to bound")
DOES_NOT_FIT = "does not fit"
PLANNED, SUMMARY, MEASURED = ", planned", "Summary, planned", "Measured"
STEPS, TURNS = 5, 9
INTRODUCTION = """\
# The gallery's examples

Sections "planned" hold predictions, none is measured: one plan a cell, as `spindle plan` makes it of the spec that the
example names. "Shorter than DDP": than data parallelism with one all-reduce a step; "than the best": than the quickest
of DDP, ZeRO-1/2, FSDP2, task groups and component groups, named in brackets, each with the memory choice that is
fastest for it. A negative share: the plan's step is longer. Without `--time-limit`, a search has as much work as 2 s
(`planner/work.py`), whatever the load of the machine. What made each section:
"""


def examples() -> Iterator[tuple[str, Path]]:
    """Names of the examples in docs/examples that have a true size, and where their specs are."""
    for model in sorted(EXAMPLES.glob("*/model.py")):
        named = SPEC.search(model.read_text(encoding="utf-8"))
        if named:
            yield model.parent.name, ROOT / named[0]


def planned(
    spec: Path, num_nodes: int, device: str, batch_divisor: int, time_limit_s: float | None
) -> spindle.Plan | None:
    """The plan of a spec with each batch divided; None where none fits."""
    workload = read_workload(str(spec))
    tasks = tuple(replace(task, batch_size=max(1, task.batch_size // batch_divisor)) for task in workload.tasks)
    source = spec_source(replace(workload, tasks=tasks))
    try:
        return plan_source(
            source, parse_cluster(f"{num_nodes}x{DEVICES_PER_NODE}:{device}"), time_limit_s=time_limit_s
        )[0]
    except InfeasibleError:
        return None


def planned_cells(plan: spindle.Plan | None) -> Iterator[str]:
    """A step, how much shorter it is than DDP and than the best alternative, and what is left to the bound."""
    if plan is None or not plan.memory.fits:
        yield from (DOES_NOT_FIT, "", "", "")
        return
    step_s = plan.compared_s
    yield f"{1e3 * step_s:.1f}" if step_s < 0.1 else f"{1e3 * step_s:.0f}"
    steps = {other.name: other.step_s for other in plan.alternatives if other.fits}
    yield f"{1 - step_s / steps[DDP]:.1%}" if DDP in steps else DOES_NOT_FIT
    best = min(steps, key=steps.__getitem__, default=None)
    yield "none fits" if best is None else f"{1 - step_s / steps[best]:.1%} ({SHORT[best]})"
    yield f"{plan.gap:.1%}"


def planned_table(spec: Path, devices: Sequence[str], time_limit_s: float | None) -> str:
    """The planned part of an example as Markdown."""

    def rows() -> Iterator[list[str]]:
        for device in devices:
            for num_nodes in NODES:
                cells = [f"{num_nodes * DEVICES_PER_NODE} {device.partition('-')[0].upper()}"]
                for divisor in (1, SMALLER):
                    cells += planned_cells(planned(spec, num_nodes, device, divisor, time_limit_s))
                yield cells

    return table(("devices", *HEADS, *(f"batch/{SMALLER}: {head}" for head in HEADS)), rows())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def summary(sections: Mapping[str, str]) -> str:
    """The gain over the best alternative in each example's first three rows, and in the third with small batches."""

    def rows() -> Iterator[list[str]]:
        for name, _ in examples():
            if text := sections.get(name + PLANNED):
                found = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:5]]
                yield [name, *(row[3] or row[1] for row in found), found[-1][7] or found[-1][5]]

    first = DEVICES[0].partition("-")[0].upper()
    sizes = [num_nodes * DEVICES_PER_NODE for num_nodes in NODES]
    return table(("example", *(f"{n} {first}" for n in sizes), f"{sizes[-1]} {first}, batch/{SMALLER}"), rows())


def timed(run: Run) -> float:
    """Seconds of a step."""
    began = time.perf_counter()
    run.steps(STEPS, keep_spans=False)
    return (time.perf_counter() - began) / STEPS


def measured_row(name: str, num_ranks: int) -> str:
    """Waves and sequential in turns."""
    workload, module = load_workload(str(EXAMPLES / name / "model.py"))
    optimizer = getattr(module, "optimizer", torch.optim.AdamW)
    profile = spindle.make_profile(workload, num_devices=num_ranks, optimizer=optimizer)
    cluster = f"1x{num_ranks}:cpu"
    plans = [spindle.make_plan(workload, cluster, profile=profile, method=m) for m in ("auto", "sequential")]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(launched(prepare(workload, plan), optimizer=optimizer, launcher="processes"))
            for plan in plans
        ]
        for run in runs:
            timed(run)
        turns = [tuple(timed(run) for run in runs) for _ in range(TURNS)]
    waves_s, sequential_s = (statistics.median(column) for column in zip(*turns, strict=True))
    ratio = statistics.median(sequential / waves for waves, sequential in turns)
    predicted = plans[1].step_s / plans[0].step_s
    cells = (f"{1e3 * waves_s:.1f}", f"{1e3 * sequential_s:.1f}", f"**{ratio:.2f}**", f"{predicted:.2f}")
    return "| " + " | ".join([name, plans[0].method, *cells, f"{1e3 * plans[0].step_s:.1f}"]) + " |"


def measured_table(only: str | None, num_ranks: int) -> str:
    """The measured part as Markdown."""
    lines = ["| example | plan | ms a step | sequential ms | times faster | predicted | predicted ms |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    lines += [measured_row(name, num_ranks) for name, _ in examples() if only in (None, name)]
    return "\n".join(lines)


def read_report() -> tuple[dict[str, str], dict[str, str]]:
    """What made each section of the report as it is now, and the sections."""
    text = REPORT.read_text(encoding="utf-8") if REPORT.is_file() else ""
    head, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    made = dict(line[2:].split(": ", 1) for line in head.splitlines() if line.startswith("- "))
    sections = {title: body.strip() for title, body in (part.split("\n", 1) for part in parts)}
    return made, sections


def write_section(title: str, text: str, how: str) -> None:
    """Put a section into the report in place of the one of its name; the others stay."""
    made, sections = read_report()
    sections[title], made[title] = text, how
    sections[SUMMARY], made[SUMMARY] = summary(sections), "of the sections above"
    for ends in (SUMMARY, MEASURED):  # stand last
        if ends in sections:
            sections[ends] = sections.pop(ends)
    head = INTRODUCTION + "\n" + "\n".join(f"- {name}: {made[name]}" for name in sections)
    body = "\n\n".join(f"## {name}\n\n{part}" for name, part in sections.items())
    REPORT.write_text(f"{head}\n\n{body}\n", encoding="utf-8")


def report(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Sections: title, text, and what made it."""
    command = " ".join(["python -m benchmarks.pages.gallery", *sys.argv[1:]])
    how = f"{datetime.now(UTC):%Y-%m-%d}, `{command}`, Python {platform.python_version()}"
    for name, spec in examples() if options.planned else ():
        if options.only in (None, name):
            versions = f"highspy {version('highspy')}, numpy {version('numpy')}"
            yield name + PLANNED, planned_table(spec, options.device, options.time_limit), f"{how}, {versions}"
    if options.measured:
        load = os.getloadavg()[0]
        turns = f"{options.ranks} processes, {STEPS} steps a turn, {TURNS} turns a side"
        how += f", torch {torch.__version__}, {os.cpu_count()} cores, load before {load:.1f}; {turns}"
        yield MEASURED, measured_table(options.only, options.ranks), how


def main() -> None:
    """Print both parts, or the one asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planned", action="store_true")
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--only", metavar="NAME", choices=[name for name, _ in examples()])
    parser.add_argument("--device", nargs="+", default=DEVICES, help="kinds of devices; the first makes the summary")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds of search for each plan, by the clock")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/gallery.md")
    options = parser.parse_args()
    if not options.planned and not options.measured:
        options.planned = options.measured = True
    for title, text, how in report(options):
        print(f"## {title}\n\n{text}\n\n{how}\n", flush=True)
        if options.write:
            write_section(title, text, how)


if __name__ == "__main__":
    main()
