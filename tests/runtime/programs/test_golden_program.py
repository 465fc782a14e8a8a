"""Golden program: what lowering makes of two real towers on two ranks, whole, as text.

Run with UPDATE_GOLDEN=1 to write it anew, then read the difference.
"""

import os
from pathlib import Path

import torch

import spindle
from spindle.runtime.controller import prepare
from spindle.runtime.programs import text
from tests.random_plans import widest_plan
from tests.tiny_workloads import two_towers

GOLDEN = Path(__file__).parents[2] / "golden"


def test_two_towers_on_two_ranks() -> None:
    """Every instruction, transfer, bucket and name; the file reads back as the same program."""
    workload = two_towers(torch.float32)
    program = prepare(workload, widest_plan(spindle.make_metagraph(workload), 2)).program
    written = text.dumps(program)
    path = GOLDEN / "two-towers.program.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(written)
    assert written == path.read_text()
    assert text.loads(path.read_text()) == program
