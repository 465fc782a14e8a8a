"""The examples of docs/gallery: what waves gain, planned at true size and measured at small size.

    python -m benchmarks.gallery --planned [--only multitask_clip] [--device h100-80g]
    python -m benchmarks.gallery --measured [--only multitask_clip]

Planned: the spec that the example's first lines name, on 8, 16 and 32 devices: a whole step, and how much shorter it is
than all tasks in sequence and than the best usual way (sequential, devices split by task, tasks split by component),
each with the memory choices it needs; beside it the same with an eighth of each batch. Measured: one profile, then the
crews of the plan and of the sequential one take turns of a few steps in processes of this machine; a figure is the
median over turns.
"""

import argparse
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import torch

import spindle
from spindle.api import plan_source
from spindle.clusterfile import parse_cluster
from spindle.contract import contract
from spindle.errors import InfeasibleError
from spindle.runtime.controller import Run, launched, prepare
from spindle.source import Source, load_workload
from spindle.spec.file import read_workload
from spindle.spec.graph import build_graph

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
SPEC = re.compile(r"(?:benchmarks/workloads|docs/examples/\w+)/[\w-]+\.yaml")
NODES, DEVICES_PER_NODE, SMALLER = (1, 2, 4), 8, 8
USUAL = ("sequential", "task_split", "component_split")
STEPS, TURNS = 5, 9


def examples() -> Iterator[tuple[str, Path]]:
    """Names of the examples in docs/examples that have a true size, and where their specs are."""
    for model in sorted(EXAMPLES.glob("*/model.py")):
        named = SPEC.search(model.read_text(encoding="utf-8"))
        if named:
            yield model.parent.name, ROOT / named[0]


def planned(
    spec: Path, num_nodes: int, device: str, batch_divisor: int, time_limit_s: float
) -> dict[str, spindle.Plan]:
    """Plans of a spec with each batch divided: the best, and each usual way that fits, with the memory it wants."""
    workload = read_workload(str(spec))
    tasks = tuple(replace(task, batch_size=max(1, task.batch_size // batch_divisor)) for task in workload.tasks)
    smaller = replace(workload, tasks=tasks)
    cluster = parse_cluster(f"{num_nodes}x{DEVICES_PER_NODE}:{device}")
    source = Source(contract(build_graph(smaller)), smaller.pricing)
    found = {}
    for method in ("auto", *USUAL):
        with suppress(InfeasibleError):
            found[method] = plan_source(source, cluster, method=method, time_limit_s=time_limit_s)[0]
    return found


def planned_cells(plans: dict[str, spindle.Plan]) -> Iterator[str]:
    """A step, how much shorter it is than in sequence and than the best usual way, and what is left to the bound."""
    if "auto" not in plans:
        yield from ("does not fit", "", "", "")
        return
    steps = {method: plan.step_s for method, plan in plans.items()}
    usual_s = min((steps[method] for method in USUAL if method in steps), default=None)
    yield f"{1e3 * steps['auto']:.1f}" if steps["auto"] < 0.1 else f"{1e3 * steps['auto']:.0f}"
    for other_s in (steps.get("sequential"), usual_s):
        yield "does not fit" if other_s is None else f"{1 - steps['auto'] / other_s:.1%}"
    yield f"{plans['auto'].gap:.1%}"


def planned_table(only: str | None, device: str, time_limit_s: float) -> Iterator[str]:
    """The planned part as Markdown."""
    heads = ("ms a step", "shorter than sequence", "than best usual", "gap to bound")
    yield "| " + " | ".join(["example", "devices", *heads, *(f"batch/{SMALLER}: {head}" for head in heads)]) + " |"
    yield "|---" + "|--:" * 9 + "|"
    for name, spec in examples():
        for num_nodes in NODES if only in (None, name) else ():
            cells = [name, str(num_nodes * DEVICES_PER_NODE)]
            for divisor in (1, SMALLER):
                cells += planned_cells(planned(spec, num_nodes, device, divisor, time_limit_s))
            yield "| " + " | ".join(cells) + " |"


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


def measured_table(only: str | None, num_ranks: int) -> Iterator[str]:
    """The measured part as Markdown, row by row."""
    yield "| example | plan | ms a step | sequential ms | times faster | predicted | predicted ms |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for name, _ in examples():
        if only in (None, name):
            yield measured_row(name, num_ranks)


def report(options: argparse.Namespace) -> Iterator[str]:
    """All lines."""
    command = " ".join(["python -m benchmarks.gallery", *sys.argv[1:]])
    yield from (f"`{command}`", "")
    if options.planned:
        yield from (f"Planned for {options.device}, {options.time_limit:g} s of search a plan.", "")
        yield from planned_table(options.only, options.device, options.time_limit)
        yield ""
    if options.measured:
        versions = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
        yield f"Measured: {options.ranks} processes, {STEPS} steps a turn, {TURNS} turns a side; {versions}, "
        yield from (f"load before {os.getloadavg()[0]:.1f}.", "")
        yield from measured_table(options.only, options.ranks)


def main() -> None:
    """Print both parts, or the one asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planned", action="store_true")
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--only", metavar="NAME", choices=[name for name, _ in examples()])
    parser.add_argument("--device", default="a100-80g")
    parser.add_argument("--time-limit", type=float, default=2.0, help="seconds of search for each plan")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if not options.planned and not options.measured:
        options.planned = options.measured = True
    lines = []
    for line in report(options):
        print(line, flush=True)
        lines.append(line)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
