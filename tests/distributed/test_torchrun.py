"""torchrun: each rank makes plan, model and program of its own, so they are compared before the first step.

A profile is measured by all ranks as the first one says.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spindle.errors import RunError
from spindle.files.formats import read
from spindle.runtime.launch.torchrun import nodes_of_job
from spindle.runtime.profiling.profiler import MESSAGE_BYTES
from spindle.values.profile import Profile
from spindle.verbs.at_hand import devices_at_hand

pytestmark = pytest.mark.gloo

ROOT = Path(__file__).parents[2]

SCRIPT = """
import functools, os, sys
import torch

import spindle
from spindle.errors import RunError
from spindle.runtime.comms.host import usable_cores
from tests.faults.breaking import marked, workload_of
from tests.random_plans import random_plan, widest_plan

planted = sys.argv[1] if os.environ["RANK"] == "1" else ""  # what rank 1 has otherwise
workload = workload_of(marked)
metagraph = spindle.make_metagraph(workload)
plan = random_plan(metagraph, 2, seed=3) if planted == "plan" else widest_plan(metagraph, 2)
optimizer = functools.partial(torch.optim.SGD, lr=0.2 if planted == "code" else 0.1)
cores = usable_cores()
try:
    result = spindle.train(workload, plan, optimizer=optimizer, steps=2, seed=int(planted == "seed"), timeout_s=30)
    told = f"trained {len(result.losses)} steps"
    if usable_cores() != cores:
        told += f", then bound to cores {usable_cores()} of {cores}"
except RunError as error:
    told = str(error)
sys.stdout.write(f"TOLD {told}\\n")  # in one write, so that ranks cannot mix their lines
"""


APART = """
import os

os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")  # as if each rank had a machine of its own, of one core
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
from spindle.cli import main

main()
"""

SERVED = """
import os, sys
from pathlib import Path

from spindle.errors import ProfileError, RunError, SpindleError
from spindle.runtime.launch.torchrun import ServedWorkers

class Bench:
    def __init__(self, spec, transport):
        self.spec, self.rank, self.close = spec, transport.rank, transport.close

    def add(self, number, *, doubled):
        if number == self.spec["breaks at"] and self.rank == 1:
            raise RunError("too hot")
        return (number + self.rank) * (2 if doubled else 1)

def work():
    found = [workers.call("add", number, doubled=number > 0) for number in range(3)]
    if sys.argv[1] == "leader":
        raise ProfileError("profiles differ")
    return found

workers = ServedWorkers({"breaks at": 1 if sys.argv[1] == "worker" else None}, timeout_s=30.0, worker=Bench)
try:
    told = repr(workers.drive(work))
except SpindleError as error:
    told = f"{type(error).__name__} {error}"
except Exception as error:
    told = "a lost peer"
finally:
    workers.close()
sys.stdout.write(f"TOLD {told}\\n")
"""


STORED = """
import sys
import torch, torch.distributed as dist

import spindle
from tests.faults.breaking import marked, workload_of
from tests.random_plans import widest_plan

dist.init_process_group("gloo")
workload = workload_of(marked)
plan = widest_plan(spindle.make_metagraph(workload), 2)
for steps, folder in ((1, "here"), (2, "there")):
    result = spindle.train(
        workload, plan, optimizer=torch.optim.SGD, steps=steps, timeout_s=30, resume=True,
        checkpoints=f"{sys.argv[1]}/{folder}", upload=f"file://{sys.argv[1]}/bucket",
    )
together = torch.ones(1)
dist.all_reduce(together)
sys.stdout.write(f"TOLD {result.first_step} {together.item():g}\\n")
"""


def told(tmp_path: Path, planted: str, text: str = SCRIPT) -> list[str]:
    """What both ranks say at their end."""
    done = run_by_two(tmp_path, text, planted)
    lines = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(lines) == 2, done.stdout + done.stderr
    return lines


def run_by_two(tmp_path: Path, text: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Two ranks that run one script."""
    script = tmp_path / "run.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )


def test_ranks_that_agree_train(tmp_path: Path) -> None:
    assert told(tmp_path, "nothing") == ["trained 2 steps"] * 2


def test_a_run_goes_on_from_object_storage(tmp_path: Path) -> None:
    """Rank 0 uploads and fetches, into an empty folder; a process group that the script had before is there again."""
    assert told(tmp_path, str(tmp_path), STORED) == ["1 2"] * 2
    assert (tmp_path / "bucket" / "step-00000002" / "spindle.json").is_file()


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


def test_a_profile_by_ranks_of_two_machines(tmp_path: Path) -> None:
    """Messages between them are measured; one of them tells and writes."""
    output = tmp_path / "profile.json"
    source = f"{ROOT / 'docs' / 'examples' / 'quick' / 'model.py'}:workload"
    done = run_by_two(tmp_path, APART, "profile", source, "--output", str(output), "--json")
    assert done.returncode == 0, done.stderr
    found = read(output, Profile)
    assert json.loads(done.stdout)["new"] == found.size  # one object, so one rank
    assert found.link_keys == {
        (operation, "inter_node", 2, num_bytes)
        for operation in ("all_reduce", "reduce", "broadcast", "transfer")
        for num_bytes in MESSAGE_BYTES
    }
    assert dict(found.versions)["ranks"] == "1"
    assert {entry.num_devices for entry in found.entries} >= {1, 2}


def test_the_first_rank_drives_and_all_have_the_result(tmp_path: Path) -> None:
    assert told(tmp_path, "nothing", SERVED) == ["[[0, 1], [2, 4], [4, 6]]"] * 2


def test_what_the_first_rank_refuses_all_refuse(tmp_path: Path) -> None:
    assert told(tmp_path, "leader", SERVED) == ["ProfileError profiles differ"] * 2


def test_a_rank_that_fails_as_it_serves_ends_the_others(tmp_path: Path) -> None:
    """At once: they do not wait for it until their time is over, and name it with its own words."""
    assert sorted(told(tmp_path, "worker", SERVED)) == [
        "LostRankError rank 1 failed: too hot; rank 0 waited for it in add",
        "RunError too hot",
    ]


@pytest.mark.parametrize(("ranks", "here", "nodes"), [("8", "4", (2, 4)), ("2", "2", (1, 2)), ("3", "1", (3, 1))])
def test_machines_of_a_job(monkeypatch: pytest.MonkeyPatch, ranks: str, here: str, nodes: tuple[int, int]) -> None:
    spec = {"RANK": "0", "WORLD_SIZE": ranks, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": here}
    for name, value in (spec | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert nodes_of_job() == nodes
    assert devices_at_hand("auto").partition(":")[0] == f"{nodes[0]}x{nodes[1]}"
    assert devices_at_hand("processes").startswith("1x")


def test_machines_with_different_numbers_of_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"RANK": "0", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (spec | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="5 processes, 2 of them here; give all machines the same --nproc-per-node"):
        nodes_of_job()


@pytest.mark.parametrize("command", ["profile", "train"])
def test_a_command_that_torchrun_did_not_start(command: str, tmp_path: Path) -> None:
    source = f"{ROOT / 'docs' / 'examples' / 'quick' / 'model.py'}:workload"
    arguments = [command, source, "--launcher", "torchrun"]
    arguments += ["--output", str(tmp_path / "profile.json")] if command == "profile" else ["--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "spindle", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "it did not start this process" in " ".join(done.stderr.split())
