"""Elastic runs under torchrun, which starts all ranks again when machines come or go."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spindle
from spindle.files.formats import write
from tests.faults.injected import Fault, optimizer_of, workload_of
from tests.faults.recovering import ROOT, environment

MODEL = """
from pathlib import Path
from tests.faults.injected import Fault, optimizer_of, workload_of

fault = Fault("raises", "forward", Path("none"))
workload = workload_of(fault)
optimizer = optimizer_of(fault)
"""


def by_torchrun(folder: Path, num_ranks: int, *more: str) -> "subprocess.CompletedProcess[str]":
    """Train the model of the folder, under the plan that lies there."""
    given = ("--plan", str(folder / "plan.json"), "--checkpoints", str(folder / "c"), "--resume")
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", "spindle", "train")
    return subprocess.run(
        [sys.executable, "-m", *command, str(folder / "model.py:workload"), *given, *more],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110.0,
        check=False,
    )


@pytest.mark.gloo
def test_another_number_of_ranks(tmp_path: Path) -> None:
    """Each of the ranks that are there plans anew, and all come to one plan; the losses are those of one process."""
    (tmp_path / "model.py").write_text(MODEL)
    fault = Fault("raises", "forward", tmp_path / "none")
    workload = workload_of(fault)
    plan = spindle.make_plan(workload, "1x1:cpu")
    write(plan, tmp_path / "plan.json")
    given: dict[str, Any] = {"optimizer": optimizer_of(fault), "launcher": "threads", "timeout_s": 30.0}
    first = spindle.train(workload, plan, steps=4, checkpoints=tmp_path / "c", checkpoint_every=4, **given)
    found = by_torchrun(tmp_path, 2, "--steps", "8", "--elastic", "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["recovered"][0].startswith("planned anew for 2 devices (1x2), not 1: ")
    expected = spindle.train(workload_of(fault), plan, steps=8, **given)
    losses = [*first.losses, *told["losses"]]
    torch.testing.assert_close(
        torch.tensor([step["t"] for step in losses]), torch.tensor([step["t"] for step in expected.losses])
    )
