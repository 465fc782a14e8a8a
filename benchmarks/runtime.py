"""Spindle's runtime beside plain PyTorch, DistributedDataParallel and FSDP2: python benchmarks/runtime.py [-o FILE]

Both sides of a row are started, then take turns of a few steps; a figure is the median over turns, a ratio the median
of the ratios of neighboring turns. Same modules, batches, optimizer and threads; losses are compared. The side that is
not running waits on a pipe and takes no time. Ranks of both sides keep to their cores and, but for the plain loop, keep
the memory that they free, which Spindle's ranks do of themselves.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from race.models import WORKLOADS, one_task
from race.peers import Peer, adam

import spindle
from spindle.runtime.controller import Run, launched, merge_traces, prepare
from spindle.values.plan import Plan
from spindle.values.trace import Trace
from spindle.workload import Workload

STEPS, TURNS = 10, 9
SHARES = ("compute", "transfer", "reduction", "step")


@dataclass(frozen=True)
class Row:
    """One comparison; milliseconds a step."""

    workload: str
    peer: str
    num_ranks: int
    ours_ms: float
    theirs_ms: float
    ratio: float
    loss_error: float
    method: str
    predicted_ms: float
    shares: dict[str, float]
    instruction_ms: float
    peak_ratio: float | None = None


@contextmanager
def spindle_run(workload: Workload, plan: Plan) -> Iterator[Run]:
    """Spindle's side, in processes."""
    with launched(prepare(workload, plan), optimizer=adam, launcher="processes", timeout_s=60.0) as run:
        yield run


def timed(run: Run, count: int) -> tuple[float, dict[str, float]]:
    """Seconds of `count` steps, and the losses of the last."""
    began = time.perf_counter()
    losses, _ = run.steps(count, keep_spans=False)
    return time.perf_counter() - began, losses[-1]


def shares_of(trace: Trace) -> tuple[dict[str, float], float]:
    """Where the ranks' time went, as shares, and the mean milliseconds between two instructions."""
    spans = trace.spans
    whole = (max(s.end_s for s in spans) - min(s.start_s for s in spans)) * trace.num_ranks
    found = dict.fromkeys(SHARES, 0.0)
    named = {"forward": "compute", "backward": "compute", "load": "step", "reduce": "reduction"}
    for span in spans:
        kind = named.get(str(span.kind), str(span.kind))
        found[kind] = found.get(kind, 0.0) + span.end_s - span.start_s
    between = whole - sum(found.values())
    return {kind: value / whole for kind, value in found.items()} | {"between": between / whole}, 1e3 * between / len(
        spans
    )


def compare(name: str, peer: str, num_ranks: int) -> Row:
    """Run one row."""
    workload = (one_task if name == "one-task" else WORKLOADS[name])()
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    profile = spindle.make_profile(workload, num_devices=num_ranks)
    plan = spindle.make_plan(workload, f"1x{num_ranks}:cpu", profile=profile)
    other = Peer(peer, name, num_ranks, threads)
    with spindle_run(workload, plan) as run:
        ours, theirs = [], []
        mine, other_losses = timed(run, 1)[1], other.steps(1)[1]
        error = max(abs(mine[task] - loss) / abs(loss) for task, loss in other_losses.items())
        timed(run, STEPS), other.steps(STEPS)
        for _ in range(TURNS):
            ours.append(timed(run, STEPS)[0] / STEPS)
            theirs.append(other.steps(STEPS)[0] / STEPS)
        _, reports = run.steps(STEPS, keep_spans=True)
        shares, instruction_ms = shares_of(merge_traces(reports, num_ranks))
        theirs_pids = {child.pid for child in other.children}
        peaks = [_peak(c.pid) for c in psutil.Process().children(recursive=True) if c.pid not in theirs_pids]
    peak = other.close()
    return Row(
        workload=name,
        peer=peer,
        num_ranks=num_ranks,
        ours_ms=1e3 * statistics.median(ours),
        theirs_ms=1e3 * statistics.median(theirs),
        ratio=statistics.median(t / o for o, t in zip(ours, theirs, strict=True)),
        loss_error=error,
        method=plan.method,
        predicted_ms=1e3 * plan.makespan_s,
        shares=shares,
        instruction_ms=instruction_ms,
        peak_ratio=max(peaks) / peak if peaks and num_ranks == 1 else None,
    )


def _peak(pid: int) -> float:
    """Peak resident bytes of a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as Markdown."""
    heads = ["workload", "ranks", "plan", "Spindle ms", "beside", "ms", "times faster", *SHARES, "idle"]
    yield "| " + " | ".join([*heads, "ms between instructions", "loss error"]) + " |"
    yield "|---|--:|---|--:|---|--:|--:" + "|--:" * (len(SHARES) + 3) + "|"
    for row in rows:
        cells = [row.workload, str(row.num_ranks), row.method, f"{row.ours_ms:.1f}", row.peer, f"{row.theirs_ms:.1f}"]
        cells += [f"**{row.ratio:.2f}**", *(f"{row.shares[kind]:.0%}" for kind in (*SHARES, "between"))]
        yield "| " + " | ".join([*cells, f"{row.instruction_ms:.3f}", f"{row.loss_error:.0e}"]) + " |"


# no FSDP2 for the two with a language model: their tasks read its embeddings outside forward, where it holds shards
CASES = (
    ("one-task", "eager", 1),
    ("one-task", "eager, memory kept", 1),
    ("multitask-clip", "eager", 1),
    ("multitask-clip", "ddp", 2),
    ("multitask-clip", "ddp, tuned", 2),
    ("multitask-clip", "fsdp", 2),
    ("adaptor-encoder-decoder", "ddp", 2),
    ("adaptor-encoder-decoder", "ddp, tuned", 2),
    ("vla", "ddp", 2),
    ("vla", "ddp, tuned", 2),
)


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--only", help="workload, or workload:peer")
    options = parser.parse_args()
    rows = []
    for name, peer, num_ranks in CASES:
        if options.only and options.only not in (name, f"{name}:{peer}"):
            continue
        rows.append(compare(name, peer, num_ranks))
        print(*list(table(rows[-1:]))[2:], flush=True)
    peaks = [f"{row.workload} beside {row.peer}: {row.peak_ratio:.3f}" for row in rows if row.peak_ratio]
    command = " ".join(["python benchmarks/runtime.py", *sys.argv[1:]])
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        "# Runtime",
        "",
        f"`{command}`: {STEPS} steps a turn, {TURNS} turns a side.",
        f"{versions}, {os.cpu_count()} cores, {platform.machine()}.",
        "",
        *table(rows),
        "",
        "Peak memory of a rank beside the plain loop: " + ("; ".join(peaks) or "not measured") + ".",
    ]
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
