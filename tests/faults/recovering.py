"""What tests of recovery share: a run with a fault beside the calm one, and runs in processes of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spindle.failures import Failures
from spindle.runtime.controller import Launcher
from tests.faults.injected import Fault, trained, undisturbed

ROOT = Path(__file__).parents[2]
PATIENCE_S = {"stopped": 2.0, "hangs": 2.0}  # what ranks wait for each other; others are found at once
FOUND_S = 10.0  # until processes are gone, on a busy machine

SAID = {
    "killed": r"rank 1 died \(exit code -9\) in .*: killed, as a machine out of memory does\. The run ended",
    "stopped": r"rank 1 gives no sign of life for \d+\.\d s \(stopped, or in native code\), the last one in ",
    "exits": r"rank 1 died \(exit code 7\) in ",
    "raises": r"rank 1, .* raised ValueError: too hot",
    "out of memory": r"rank 1, .* raised RuntimeError: .*allocate",
    "hangs": r"rank 1 hangs in step 4, .*, for \d+\.\d s now",
    "asked to end": r"SIGTERM ended the run after step \d; start it again with resume=True",
}


def recovered(fault: Fault, folder: Path, launcher: Launcher) -> list[str]:
    """Train with the fault and without: the weights are equal bit for bit. What was said of each failure; on a busy
    machine ranks may lose each other more often than once.
    """
    result, weights = trained(
        fault.armed(),
        launcher=launcher,
        timeout_s=PATIENCE_S.get(fault.kind, 30.0),
        checkpoints=folder / "c",
        failures=Failures(max_failures=4, backoff_s=0.01),
    )
    expected = undisturbed(fault)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(result.losses) == 8
    return list(result.recovered)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def begun(folder: Path, *arguments: str, prefix: tuple[str, ...] = ("-m", "spindle")) -> "subprocess.Popen[str]":
    """A run of which the first steps are done."""
    process = subprocess.Popen(
        [sys.executable, *prefix, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: (folder / "m.jsonl").exists() and len((folder / "m.jsonl").read_text().splitlines()) > 2, process)
    return process


def until(holds: Callable[[], bool], process: "subprocess.Popen[str] | None" = None, seconds: float = 60.0) -> None:
    """Look until something holds, while a process is alive."""
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s
        try:
            process and process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        assert process is None, process.communicate()
