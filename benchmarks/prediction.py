"""Predicted beside measured: steps and peak memory of `make demo`'s workload under its plan and under the baselines.

    python -m benchmarks.prediction [-o benchmarks/results/prediction.md]

One profile, then all plans' worker groups take turns of a few steps, so that what else the machine does falls on all
alike. A step is the median over turns, the first of each turn left out, since it finds the caches as another worker
group left them; the quickest turn stands beside it. Memory is counted, not sampled: tensors that live between steps,
and the most that torch's allocator holds beside them at one time in a step.
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch.profiler import ProfilerActivity

import spindle
from spindle.files.clusterfile import parse_cluster
from spindle.planner.simulate import simulate
from spindle.runtime.controller import Run, merge_traces, prepare
from spindle.runtime.launch.processes import ProcessWorkers
from spindle.runtime.rank_spec import make_rank_specs
from spindle.runtime.worker import Worker
from spindle.values.cost_options import CostOptions
from spindle.values.trace import SpanKind, Trace
from spindle.verbs.planning import plan_source
from spindle.verbs.source import Source

SOURCE = Path(__file__).parents[1] / "docs" / "examples" / "digits" / "workload.py"
METHODS = ("auto", "sequential", "task_split", "component_split", "paper")
CHOICES = {  # memory for time, under one plan
    "sequential, sharded states": CostOptions(shard_optimizer=True),
    "sequential, recomputed": CostOptions(recompute=True),
    "sequential, both": CostOptions(shard_optimizer=True, recompute=True),
}
STEPS, TURNS, LIMIT = 6, 9, 0.15


class Counted(Worker):
    """A worker that tells how many bytes it holds."""

    def peak_bytes(self) -> tuple[int, int]:
        """Bytes of tensors that live between steps, and the most that one step allocates beside them."""
        state = self.optimizer.state if self.optimizer else {}
        held = [*self.store.parameters.values(), *self.store.bucket.values(), *self.store.buffers.values()]
        held += [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
        fixed = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.run(1, keep_spans=False)
        results = profiler.profiler.kineto_results
        moves = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
        now = most = 0
        for _, num_bytes in moves:
            now += num_bytes
            most = max(most, now)
        return fixed, most


@dataclass(frozen=True)
class Row:
    """One plan: milliseconds of a step, and mebibytes of the fullest rank."""

    method: str
    predicted_ms: float
    median_ms: float
    quickest_ms: float
    predicted_mib: float
    measured_mib: float
    predicted_kinds: dict[str, float]
    measured_kinds: dict[str, float]

    @property
    def step_error(self) -> float:
        """Of the prediction, relative to the median."""
        return self.predicted_ms / self.median_ms - 1

    @property
    def memory_error(self) -> float:
        """Of the prediction, relative to what was counted."""
        return self.predicted_mib / self.measured_mib - 1


def load(path: Path) -> ModuleType:
    """The user's file as a module."""
    spec = importlib.util.spec_from_file_location("workload", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["workload"] = module
    spec.loader.exec_module(module)
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)
    return module


@contextlib.contextmanager
def started(module: ModuleType, plan: spindle.Plan) -> Iterator[Run]:
    """A worker group of counted workers."""
    prepared = prepare(module.workload, plan)
    specs = make_rank_specs(
        prepared.program,
        prepared.captured,
        module.workload,
        optimizer=module.optimizer,
    )
    workers = ProcessWorkers(specs, worker=Counted)
    try:
        yield Run(prepared, workers)
    finally:
        workers.close()


def planned(module: ModuleType, profile: spindle.Profile, cluster: str) -> Iterator[tuple[str, spindle.Plan]]:
    """All plans, by the name of their row."""
    for method in METHODS:
        yield method, spindle.make_plan(module.workload, cluster, profile=profile, method=method)
    metagraph = spindle.make_metagraph(module.workload)
    for name, cost_options in CHOICES.items():
        source = Source(metagraph, cost_options, executable=True)
        yield name, plan_source(source, parse_cluster(cluster), profile, method="sequential")[0]


def by_kind(trace: Trace) -> dict[str, float]:
    """Milliseconds of a rank and step in each kind of work, and in none. Measured waits for messages and sums are in
    theirs, predicted ones in none.
    """
    steps = {span.step for span in trace}
    found = {str(kind): 1e3 * trace.busy_s(kind) / len(steps) / trace.num_ranks for kind in SpanKind}
    whole = 1e3 * sum(map(trace.step_s, steps)) / len(steps)
    return found | {"rest": whole - sum(found.values())}


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """The median of each kind over turns."""
    return {kind: statistics.median(turn[kind] for turn in found) for kind in found[0]}


def measure(num_ranks: int) -> tuple[list[Row], str]:
    """All rows, and what the profile says of itself."""
    module = load(SOURCE)
    profile = spindle.make_profile(module.workload, num_devices=num_ranks, optimizer=module.optimizer)
    plans = dict(planned(module, profile, f"1x{num_ranks}:cpu"))
    turns: dict[str, list[float]] = {method: [] for method in plans}
    kinds: dict[str, list[dict[str, float]]] = {method: [] for method in plans}
    with contextlib.ExitStack() as stack:
        runs = {method: stack.enter_context(started(module, plan)) for method, plan in plans.items()}
        for run in runs.values():
            run.steps(STEPS, keep_spans=False)
        for _ in range(TURNS):
            for method, run in runs.items():
                run.steps(1, keep_spans=False)
                began = time.perf_counter()
                run.steps(STEPS, keep_spans=False)
                turns[method].append((time.perf_counter() - began) / STEPS)
                kinds[method].append(by_kind(merge_traces(run.steps(2)[1], num_ranks)))
        peaks = {method: [sum(p) for p in run.workers.call("peak_bytes")] for method, run in runs.items()}
    return [
        Row(
            method=f"{method} ({plan.method})" if method == "auto" else method,
            predicted_ms=1e3 * plan.step_s,
            median_ms=1e3 * statistics.median(turns[method]),
            quickest_ms=1e3 * min(turns[method]),
            predicted_mib=max(plan.memory.peak_bytes_per_device) / 2**20,
            measured_mib=max(peaks[method]) / 2**20,
            predicted_kinds=by_kind(simulate(plan)),
            measured_kinds=medians(kinds[method]),
        )
        for method, plan in plans.items()
    ], profile.describe()


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "| plan | predicted ms | measured ms | error | quickest ms | predicted MiB | counted MiB | error |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        yield (
            f"| {row.method} | {row.predicted_ms:.1f} | {row.median_ms:.1f} | {row.step_error:+.1%} | "
            f"{row.quickest_ms:.1f} | {row.predicted_mib:.1f} | {row.measured_mib:.1f} | {row.memory_error:+.1%} |"
        )


def table_by_kind(rows: list[Row]) -> Iterator[str]:
    """Where a rank's time goes, predicted and measured, as Markdown."""
    kinds = list(rows[0].measured_kinds)
    yield "| ms of a rank, predicted / measured | " + " | ".join(kinds) + " |"
    yield "|---" + "|--:" * len(kinds) + "|"
    for row in rows:
        cells = [f"{row.predicted_kinds[kind]:.1f} / {row.measured_kinds[kind]:.1f}" for kind in kinds]
        yield f"| {row.method} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the report, and write it where asked; exit 1 when an error is beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the ranks' profilers tell when they start and stop
    before = os.getloadavg()[0]
    rows, profiled = measure(options.ranks)
    worst = max(abs(error) for row in rows for error in (row.step_error, row.memory_error))
    lines = [
        "# Predicted beside measured",
        "",
        f"`python -m benchmarks.prediction`: {options.ranks} ranks, {STEPS} steps a turn, {TURNS} turns a plan.",
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores; load before "
        f"{before:.1f}, after {os.getloadavg()[0]:.1f} (the ranks' own makes about {options.ranks}).",
        f"Profile: {profiled}.",
        "",
        *table(rows),
        "",
        *table_by_kind(rows),
        "",
        f"Largest error {worst:.1%}: {'within' if worst <= LIMIT else 'BEYOND'} {LIMIT:.0%}.",
    ]
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    if worst > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
