"""Reliability: each fault at each place under each launcher, as the table of docs/reliability.md.

    python -m benchmarks.reliability                       prints the table; some minutes
    python -m benchmarks.reliability --only ray            one launcher
    python -m benchmarks.reliability --write               writes it into the page

The workload is that of the tests: two ranks, eight steps of some milliseconds, a checkpoint every second step, ranks
wait two seconds for each other. Rank 1 does to itself what the row says, in the fourth step. Every run must end with
the weights of the run without a fault, bit for bit; otherwise the command ends with an error.

A rank that is gone for good is killed again as soon as it computes. An elastic run does without its device; its
weights are those of a run that had one device from the checkpoint on.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from spindle.failures import Failures
from spindle.verbs.training import TrainResult
from tests.faults.injected import KINDS, PHASES, Fault, trained, undisturbed

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: python -m benchmarks.reliability --write -->", "<!-- end of the table -->"
TIMEOUT_S = 2.0
Launcher = Literal["processes", "ray", "torchrun"]
GONE = "gone for good"

CASES: dict[Launcher, list[tuple[str, str]]] = {
    "processes": [
        *(("killed", phase) for phase in PHASES),
        *(("stopped", phase) for phase in PHASES),
        *((kind, "forward") for kind in KINDS if kind not in ("killed", "stopped")),
        ("raises", "load"),
        ("out of memory", "optimizer"),
        ("hangs", "reduction"),
        ("exits", "checkpoint"),
        (GONE, "forward"),
    ],
    "ray": [
        ("killed", "start"),
        *((kind, "forward") for kind in KINDS),
        ("killed", "transfer"),
        ("killed", "checkpoint"),
    ],
    "torchrun": [(kind, "forward") for kind in ("killed", "raises", "hangs", "asked to end")],
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one fault led to. Seconds from the fault; None where they were not measured."""

    launcher: Launcher
    kind: str
    phase: str
    found_s: float | None
    again_s: float
    lost: int
    named: str
    left: str

    def __str__(self) -> str:
        found = "" if self.found_s is None else f"{self.found_s:.1f}"
        cells = (
            self.launcher,
            self.kind,
            self.phase,
            found,
            f"{self.again_s:.1f}",
            str(self.lost),
            self.named,
            self.left,
        )
        return f"| {' | '.join(cells)} |"


def names_in_memory() -> set[str]:
    """Names in shared memory, without those of Ray's store and of semaphores, which others on the machine make."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("plasma", "sem."))}


def left_behind(folder: Path, memory: set[str]) -> str:
    """Processes of ranks, parts of checkpoints, and names in shared memory that are there after a run."""
    me = psutil.Process()
    family = [p for p in me.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    ranks = [p for p in family if "spindle-rank" in " ".join(p.cmdline()) or "_Rank" in " ".join(p.cmdline())]
    _, ranks = psutil.wait_procs(ranks, timeout=5.0)
    servers = {p.pid for p in family if "forkserver" in " ".join(p.cmdline())}
    ranks += [p for p in family if p.ppid() in servers and p.is_running() and p not in ranks]
    ranks += [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or ())]  # of torchrun
    counts = {
        "process": len(ranks),
        "part folder": len(list(folder.rglob(".*.part"))),
        "name in /dev/shm": len(names_in_memory() - memory),
    }
    return ", ".join(f"{count} x {what}" for what, count in counts.items() if count) or "nothing"


def named(text: str) -> str:
    """The start of the sentence, as far as it tells who and where."""
    text = text.partition("; rank ")[0].partition(". The run")[0].partition(". See what")[0]
    text = re.sub(r"on node \S+ \(\w+\) ", "", text).partition(": The actor died")[0]
    text = re.sub(r"; (start it again|went on from).*", "", text).partition(" [enforce")[0]
    return text.replace("|", "/")


def steps_lost(fault: Fault, text: str) -> int:
    """Steps that were done at the fault, and are done again."""
    done = {"start": 0, "checkpoint": 4}.get(fault.phase, fault.call - 1)
    start = re.search(r"went on from step (\d+)", text)
    return max(0, done - int(start[1])) if start else 0


@dataclass(slots=True)
class Watched:
    """A run with a fault: when it happened first, when sentences about it were told, and when steps were done after the
    last of these.
    """

    result: TrainResult
    weights: dict[str, torch.Tensor]
    at_s: float
    told_s: list[float]
    stepped_s: list[float]


def watched(fault: Fault, launcher: Launcher, folder: Path, *, elastic: bool = False) -> Watched:
    """Train with a fault that is armed; an elastic run arms one that happens twice, from the fourth step on."""
    at_s: list[float] = []
    told_s: list[float] = []
    stepped_s: list[float] = []

    def on_step(step: int, losses: dict[str, float]) -> None:
        stepped_s.append(time.monotonic())
        if elastic and step == 3 and not fault.folder.exists():
            fault.armed(2)

    def show(message: Any, *more: Any) -> None:
        if any(words in str(message) for words in ("going on from", "planned anew")):
            told_s.append(time.monotonic())
            at_s.append(float((fault.folder / "at").read_text()))  # the next fault writes its own time there
            stepped_s.clear()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        result, weights = trained(
            fault,
            launcher=launcher,
            timeout_s=TIMEOUT_S,
            checkpoints=folder / "c",
            failures=Failures(max_failures=3, backoff_s=0.0, elastic=elastic),
            on_step=on_step,
        )
    return Watched(result, weights, at_s[0], told_s, stepped_s)


def row_of(launcher: Launcher, kind: str, phase: str, folder: Path) -> Row:
    """Train with a fault, and look at what became of it."""
    if kind == GONE:
        return row_of_gone(launcher, phase, folder)
    fault = Fault(kind, phase, folder / "faults")
    expected = undisturbed(fault)
    memory = names_in_memory()
    fault.armed()
    if launcher == "torchrun":
        return by_torchrun(fault, folder, expected, memory)
    run = watched(fault, launcher, folder)
    check_equal(run.weights, expected, fault)
    text = run.result.recovered[0]
    found_s, again_s = run.told_s[0] - run.at_s, run.stepped_s[0] - run.at_s
    lost = steps_lost(fault, text)
    return Row(launcher, kind, phase, found_s, again_s, lost, named(text), left_behind(folder, memory))


def row_of_gone(launcher: Launcher, phase: str, folder: Path) -> Row:
    """Lose a rank at each start, and look at the run that plans anew for the device that is left."""
    fault = Fault("killed", phase, folder / "faults", call=1)
    memory = names_in_memory()
    run = watched(fault, launcher, folder, elastic=True)
    text, *_, anew = run.result.recovered
    at = int(text.rpartition("went on from step ")[2])
    calm = replace(fault, folder=folder / "none")
    given: dict[str, Any] = {"launcher": "threads", "timeout_s": 30.0, "checkpoints": folder / "calm"}
    trained(calm, steps=at, **given)
    _, expected = trained(calm, plan=run.result.plan, resume=True, **given)
    check_equal(run.weights, expected, fault)
    found_s, again_s = run.told_s[-1] - run.at_s, run.stepped_s[0] - run.at_s
    in_step = re.search(r"in step (\d+)", text)
    lost = int(in_step[1]) - 1 - at if in_step else 0
    said = f"{named(text)}; {anew.partition(':')[0]}"
    return Row(launcher, GONE, phase, found_s, again_s, lost, said, left_behind(folder, memory))


SCRIPT = """
import os, sys, time
from pathlib import Path

import torch

import spindle
from tests.faults.injected import Fault, trained

folder, kind, phase = Path(sys.argv[1]), *sys.argv[2:]
fault = Fault(kind, phase, folder / "faults")

def on_step(step, losses):
    if os.environ["RANK"] == "0" and (fault.folder / "at").exists() and not (folder / "again").exists():
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            (folder / "again").write_text(str(time.monotonic()))

try:
    result, weights = trained(fault, launcher="torchrun", timeout_s=5.0, checkpoints=folder / "c", on_step=on_step)
except spindle.SpindleError as error:
    (folder / f"said{os.environ['RANK']}").write_text(str(error))
    raise
if os.environ["RANK"] == "0":
    torch.save(weights, folder / "weights.pt")
    (folder / "first").write_text(str(result.first_step))
"""


def by_torchrun(fault: Fault, folder: Path, expected: dict[str, torch.Tensor], memory: set[str]) -> Row:
    """The same with torchrun's own restarts."""
    (folder / "run.py").write_text(SCRIPT)
    given = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3", str(folder / "run.py"), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *given, fault.kind, fault.phase],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300.0,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"torchrun, {fault.kind} in {fault.phase}:\n{done.stderr[-3000:]}")
    check_equal(torch.load(folder / "weights.pt", weights_only=True), expected, fault)
    at_s, again_s = (float(file.read_text()) for file in (fault.folder / "at", folder / "again"))
    said = [file.read_text().splitlines()[0] for file in sorted(folder.glob("said*"), reverse=True)]
    text = f"went on from step {(folder / 'first').read_text()}"
    who = named(said[0]) if said else "torchrun names the process"
    return Row(
        "torchrun",
        fault.kind,
        fault.phase,
        None,
        again_s - at_s,
        steps_lost(fault, text),
        who,
        left_behind(folder, memory),
    )


def check_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], fault: Fault) -> None:
    """Raises where a weight is not that of the run without a fault."""
    other = [name for name in expected if not torch.equal(weights[name], expected[name])]
    if other:
        raise SystemExit(f"{fault.kind} in {fault.phase}: {other[0]} is not that of the undisturbed run")


def rows(launchers: Sequence[Launcher]) -> Iterator[Row]:
    """All cases of some launchers."""
    for launcher in launchers:
        if launcher == "ray":
            from spindle.runtime.launch.ray_workers import start_local_ray

            start_local_ray(4)
        for kind, phase in CASES[launcher]:
            with tempfile.TemporaryDirectory() as folder:
                row = row_of(launcher, kind, phase, Path(folder))
            print(row, file=sys.stderr, flush=True)
            yield row


def table_of(found: Sequence[Row]) -> str:
    """As the page has it."""
    head = "| launcher | fault | in | found after s | trains again after s | steps lost | named | left behind |"
    where = f"Measured on {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, ranks on CPU."
    return "\n".join((where, "", head, "|---|---|---|--:|--:|--:|---|---|", *map(str, found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=list(CASES), action="append")
    arguments = parser.parse_args()
    table = table_of(list(rows(arguments.only or list(CASES))))
    print(table)
    if arguments.write:
        text = PAGE.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    main()
