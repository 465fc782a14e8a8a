"""torchrun: each rank makes plan, model and program of its own, so they are compared before the first step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gloo

ROOT = Path(__file__).parents[2]

SCRIPT = """
import functools, os, sys
import torch

import spindle
from spindle.errors import RunError
from tests.faults.breaking import marked, workload_of
from tests.random_plans import random_plan, widest_plan

planted = sys.argv[1] if os.environ["RANK"] == "1" else ""  # what rank 1 has otherwise
workload = workload_of(marked)
metagraph = spindle.make_metagraph(workload)
plan = random_plan(metagraph, 2, seed=3) if planted == "plan" else widest_plan(metagraph, 2)
optimizer = functools.partial(torch.optim.SGD, lr=0.2 if planted == "code" else 0.1)
try:
    result = spindle.train(workload, plan, optimizer=optimizer, steps=2, seed=int(planted == "seed"), timeout_s=30)
    told = f"trained {len(result.losses)} steps"
except RunError as error:
    told = str(error)
sys.stdout.write(f"TOLD {told}\\n")  # in one write, so that ranks cannot mix their lines
"""


def told(tmp_path: Path, planted: str) -> list[str]:
    """What both ranks say at their end."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), planted],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        check=False,
    )
    lines = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(lines) == 2, done.stdout + done.stderr
    return lines


def test_ranks_that_agree_train(tmp_path: Path) -> None:
    assert told(tmp_path, "nothing") == ["trained 2 steps"] * 2


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ("plan", "another plan (give all the same file as --plan); program ("),
        ("code", "another code (run the same files) than rank 0"),
        ("seed", "another seed (give all the same seed=) than rank 0"),
    ],
)
def test_a_rank_that_differs_ends_the_run(tmp_path: Path, planted: str, said: str) -> None:
    """On all ranks, at once, with the same words: which rank, what, and what to do."""
    lines = told(tmp_path, planted)
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"rank 1 came with {said}")
    assert lines[0].endswith(", so that the run was not started")
