"""The command line as a process of its own: what it imports, how it is called, how it ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.printed.samples import SPEC, metagraph_file

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "pandas", "matplotlib")

IMPORTS = """
import json, sys
from spindle.cli import main
sys.argv = ["spindle", *sys.argv[1:]]
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def run(*command: str, cwd: Path, stdin: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    metagraph_file(tmp_path / "graph.json")
    (tmp_path / "small.yaml").write_text(SPEC)
    return tmp_path


@pytest.mark.parametrize("source", ["small.yaml", "graph.json"])
def test_planning_a_file_imports_neither_torch_nor_ray(folder: Path, source: str) -> None:
    """A dry run needs no framework, on a laptop or in CI."""
    done = run("-c", IMPORTS, "plan", source, "--cluster", "1x2", "-o", "plan.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stderr.splitlines()[-1]))
    assert "spindle.planner.solve" in modules
    assert modules.isdisjoint(HEAVY)


def test_looking_at_a_plan_needs_no_solver_either(folder: Path) -> None:
    """`check` and `show` import neither torch, ray nor a solver."""
    assert run("-m", "spindle", "plan", "graph.json", "-c", "1x2", "-o", "plan.json", cwd=folder).returncode == 0
    for command in (("check", "plan.json"), ("show", "plan.json", "--html", "page.html")):
        done = run("-c", IMPORTS, *command, cwd=folder)
        assert done.returncode == 0, done.stderr
        modules = set(json.loads(done.stderr.splitlines()[-1]))
        assert modules.isdisjoint((*HEAVY, "pulp", "highspy"))


def test_help_is_instant(folder: Path) -> None:
    """`spindle --help` imports nothing of ours but the command line and the errors."""
    done = run("-c", IMPORTS, "--help", cwd=folder)
    modules = set(json.loads(done.stderr.splitlines()[-1]))
    ours = {name for name in modules if name.startswith("spindle")}
    assert {name for name in ours if not name.startswith("spindle.cli")} == {"spindle", "spindle.errors"}
    assert modules.isdisjoint((*HEAVY, "pulp", "networkx", "pydantic", "numpy", "yaml", "rich"))


def test_exit_codes_reach_the_shell(folder: Path) -> None:
    """0 fine, 1 checked and found wrong, 2 bad input, 3 infeasible."""

    def code(*arguments: str) -> int:
        return run("-m", "spindle", *arguments, cwd=folder).returncode

    metagraph_file(folder / "big.json", lambda data: data["metaops"][0].update(memory_bytes={"1": 1e15}))
    assert code("plan", "graph.json", "-c", "1x2", "-o", "plan.json") == 0
    broken = (folder / "plan.json").read_text().replace('"num_layers": 2', '"num_layers": 1')
    (folder / "broken.json").write_text(broken)
    assert code("check", "broken.json") == 1
    assert code("check", "graph.json") == 2
    assert code("plan", "big.json", "-c", "1x1") == 3


def test_a_reader_that_leaves_early_sees_no_error(folder: Path) -> None:
    """`spindle plan --table | head -1` ends quietly."""
    script = f"{sys.executable} -m spindle plan graph.json -c 1x2 --json | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    assert "bug of Spindle" not in done.stderr


def test_a_bug_of_ours_is_told_apart(folder: Path) -> None:
    """What nobody foresaw is no traceback, but says how to get one; exit 70."""
    broken = "import spindle.planner.check as c\nc.check_plan = lambda *_: 1 / 0\nfrom spindle.cli import main\nmain()"
    assert run("-m", "spindle", "plan", "graph.json", "-c", "1x2", "-o", "plan.json", cwd=folder).returncode == 0
    done = run("-c", f"import sys; sys.argv = ['spindle', 'check', 'plan.json']\n{broken}", cwd=folder)
    assert done.returncode == 70
    assert done.stderr.splitlines() == [
        "spindle: a bug of Spindle: ZeroDivisionError: division by zero",
        "Set SPINDLE_DEBUG=1 to see where, and please report it.",
    ]


BREAKS = """
from pathlib import Path
import torch
from torch import nn
import spindle

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if Path("hot").exists():
            raise ValueError("too hot\\nand more of it")
        return x + self.down(torch.tanh(self.up(self.norm(x))))

def data():
    for index in range(5):
        if index == 3:
            Path("hot").touch()
        yield {"x": torch.zeros(4, 4)}

workload = spindle.Workload("w")
net = workload.component("net", nn.Sequential(Layer(), Layer()))

@workload.task("t", batch_size=4, data=data)
def task(batch):
    return net(batch["x"]).square().mean()
"""


def test_what_a_worker_raises_is_three_lines(folder: Path) -> None:
    """What failed and where, the user's own line, how to see the rest; with SPINDLE_DEBUG the rest."""
    (folder / "breaks.py").write_text(BREAKS)
    command = ("-m", "spindle", "train", "breaks.py:workload", "--steps", "9", "--launcher", "threads")
    done = run(*command, cwd=folder)
    assert done.returncode == 1
    first, second, third = [line for line in done.stderr.splitlines() if not line.startswith("training")]
    assert first.startswith("spindle: rank ")
    # batches are read ahead, so either layer may be the first to find it hot
    assert re.fullmatch(r"spindle: rank 0, wave \d, FORWARD s\d \(t\.net\.\d\) raised ValueError: too hot", first)
    assert second.startswith("/")  # of a long path the middle is left out
    assert second.endswith('/breaks.py:14 in forward: raise ValueError("too hot\\nand more of it")')
    assert third == "Set SPINDLE_DEBUG=1 to see the traceback."
    (folder / "hot").unlink()
    done = run(*command, cwd=folder, SPINDLE_DEBUG="1")
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.splitlines()[-2:] == ["ValueError: too hot", "and more of it"]


def test_a_users_file_does_not_shadow_ours(folder: Path) -> None:
    """A model beside a file `runtime.py` or `planner.py` of the user's own still plans."""
    (folder / "planner.py").write_text("raise SystemExit('shadowed')\n")
    (folder / "runtime.py").write_text("raise SystemExit('shadowed')\n")
    done = run("-m", "spindle", "plan", "graph.json", "-c", "1x2", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    """`spindle plan ... | head -1` says nothing of it."""
    command = f"{sys.executable} -m spindle plan graph.json -c 1x2 | exec true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
