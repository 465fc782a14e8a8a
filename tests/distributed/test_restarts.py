"""Recovery under torchrun and Ray: each by its own means. The table of faults is in tests/faults."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from spindle.errors import PreemptedError, RunError
from spindle.runtime.comms.flight import FLIGHT
from spindle.runtime.faults.flight_report import first_stopped, read_flight, sentences
from tests.checkpoints.test_resume import left_in
from tests.faults.injected import Fault, trained, undisturbed
from tests.faults.recovering import FOUND_S, ROOT, SAID, begun, environment, recovered

SCRIPT = """
import os, sys
from pathlib import Path

import torch

import spindle
from spindle.metrics import JsonLines
from spindle.errors import PreemptedError
from tests.faults.injected import Fault, optimizer_of, plan_of, workload_of

folder, kind, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
fault = Fault(kind, "forward", folder / "faults")
workload = workload_of(fault)
result = spindle.train(
    workload, plan_of(workload, split=False), optimizer=optimizer_of(fault), steps=steps, timeout_s=30.0,
    checkpoints=folder / "c", checkpoint_every=2, keep_checkpoints=2, save_async=kind == "told",
    callbacks=[JsonLines(folder / "m.jsonl")],
)
if os.environ["RANK"] == "0":
    torch.save({name: value for name, value in workload.named_parameters()}, folder / "weights.pt")
    print("FIRST", result.first_step)
"""


def by_torchrun(folder: Path, kind: str, steps: int) -> "tuple[str, ...]":
    """What starts the script on two ranks, which torchrun starts again."""
    (folder / "run.py").write_text(SCRIPT)
    given = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "3", str(folder / "run.py"))
    return ("-m", "torch.distributed.run", *given, str(folder), kind, str(steps))


def run_by_torchrun(folder: Path, kind: str) -> "subprocess.CompletedProcess[str]":
    """Eight steps of the script."""
    return subprocess.run(
        [sys.executable, *by_torchrun(folder, kind, 8)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110.0,
        check=False,
    )


@pytest.mark.gloo
def test_ranks_that_torchrun_starts_again_resume(tmp_path: Path) -> None:
    """Without resume=, from what this very rank spec has written."""
    fault = Fault("killed", "forward", tmp_path / "faults").armed()
    done = run_by_torchrun(tmp_path, "killed")
    assert "FIRST 2" in done.stdout, done.stdout + done.stderr
    weights, expected = torch.load(tmp_path / "weights.pt", weights_only=True), undisturbed(fault)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    record = read_flight(tmp_path / "c")  # torchrun ended rank 0 too; the next attempt kept what both had left
    rank, _ = first_stopped(record)
    assert record.folder == tmp_path / "c" / FLIGHT / "1"
    assert (rank.rank, rank.place and rank.place.text) == (1, "wave 0, FORWARD s0 (t.first.0)")


@pytest.mark.gloo
def test_ranks_of_torchrun_write_beside_their_steps(tmp_path: Path) -> None:
    """All of them drive, and agree when a checkpoint is whole."""
    done = run_by_torchrun(tmp_path, "told")
    assert done.returncode == 0, done.stdout + done.stderr
    assert left_in(tmp_path / "c") == ["step-00000006", "step-00000008"]
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    expected = undisturbed(Fault("told", "forward", tmp_path / "none"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.gloo
def test_ranks_of_a_dead_torchrun_do_not_train_on(tmp_path: Path) -> None:
    process = begun(tmp_path, prefix=by_torchrun(tmp_path, "killed", 100_000))
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=30.0)
    assert psutil.wait_procs(family, timeout=FOUND_S)[1] == []


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(180)
def test_an_actor_that_is_stopped(tmp_path: Path) -> None:
    """Actors are made anew in a placement group of their own; a stopped one, which hears nothing, is gone."""
    told = recovered(Fault("stopped", "transfer", tmp_path / "faults"), tmp_path, "ray")
    assert [text for text in told if re.match(f"{SAID['stopped']}.*went on from step 2$", text)], told


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(180)
def test_an_actor_that_is_killed_leaves_a_record(tmp_path: Path) -> None:
    """Its last place stays, and the driver says which one it was."""
    fault = Fault("killed", "forward", tmp_path / "faults").armed()
    with pytest.raises(RunError, match="rank 1 on node"):
        trained(fault, launcher="ray", timeout_s=30.0, checkpoints=tmp_path / "c")
    told = sentences(read_flight(tmp_path / "c"))
    words = r"stopped first: so the driver found\. It was in step 4, wave 0, FORWARD s0 \(t\.first\.0\), for \d"
    assert re.search(rf"^Rank 1 \(.*\) {words}", told[1]), told


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(180)
def test_sigterm_under_ray_saves(tmp_path: Path) -> None:
    """Ray's own handler would end the driver as if the workload's code had called sys.exit."""

    def on_step(step: int, losses: dict[str, float]) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    fault = Fault("raises", "forward", tmp_path / "none")
    with pytest.raises(PreemptedError, match=r"SIGTERM ended the run after step \d+") as caught:
        trained(fault, launcher="ray", steps=10**6, checkpoints=tmp_path / "c", on_step=on_step, timeout_s=30.0)
    assert caught.value.exit_code == 75
    assert [name[:5] for name in left_in(tmp_path / "c")] == ["step-"]
