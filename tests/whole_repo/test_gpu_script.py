"""The script for one GPU runs on a CPU too, and gives up a part that takes too long."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parents[2]


def test_it_runs_on_a_cpu() -> None:
    """Every part has a result, and all agree."""
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _, *lines = map(json.loads, done.stdout.splitlines())
    assert all(line.get("ok", True) for line in lines)
    assert [line["part"] for line in lines] == [part for part in gpu.LIMIT_S for _ in range(2)]


def test_a_part_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.LIMIT_S, "parity", 0.01)
    options = argparse.Namespace(device="cpu", small=True, ranks=[1])
    (ended,) = gpu.run_part("parity", options)
    assert not ended["ok"]
    assert ended["ended"] == "not done in 0.01 s"
