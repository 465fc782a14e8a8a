"""A run's folder: one run at a time, nothing of another's lost, and damaged checkpoints passed over aloud."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import spindle
from spindle.errors import CheckpointError, SpindleWarning
from spindle.runtime.checkpoints import checkpoint
from spindle.runtime.checkpoints.run_folder import opened
from tests.checkpoints.test_resume import left_in, towers, trained, weights
from tests.random_plans import widest_plan

STEPS = ["step-00000002", "step-00000004", "step-00000006"]


def run(folder: Path, steps: int = 6, **options: Any) -> tuple[spindle.Workload, Any]:
    """Train on two ranks with a checkpoint every second step."""
    workload = towers()
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    return workload, trained(workload, plan, steps, checkpoints=folder, checkpoint_every=2, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps, for tests to copy."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(file: Path, place: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


def test_a_run_that_begins_afresh_spoils_nothing(folder: Path) -> None:
    """It is refused before its first step, and told what to do."""
    with pytest.raises(CheckpointError, match=r"holds checkpoints already \(the newest after 6 steps\).*resume it"):
        run(folder)
    assert left_in(folder) == STEPS


def test_a_folder_in_use_is_refused(folder: Path) -> None:
    """Whoever is at work in it is named, and it is free afterwards, also when the first run failed."""
    options = checkpoint.Checkpoints(directory=folder, every=2)

    def beside() -> None:
        with opened(towers(), options, True):
            run(folder, resume=True)

    with pytest.raises(CheckpointError, match=rf"in use by another run \(process {os.getpid()} on .*, since 2"):
        beside()
    assert run(folder, 8, resume=True)[1].first_step == 6
    assert left_in(folder) == [*STEPS, "step-00000008"]


HOLDS = """
import sys
from pathlib import Path
from spindle.runtime.checkpoints.checkpoint import Checkpoints
from spindle.runtime.checkpoints.run_folder import opened
from spindle import Workload
with opened(Workload("other"), Checkpoints(directory=Path(sys.argv[1]), every=1), False):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process at work in a folder."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "run")], **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_folder_of_a_dead_run_is_free(other: subprocess.Popen[str], tmp_path: Path) -> None:
    """A process that is killed cannot say that it has ended; one that lives keeps its folder."""
    options = checkpoint.Checkpoints(directory=tmp_path / "run", every=1)
    with pytest.raises(CheckpointError, match=f"process {other.pid} on"), opened(towers(), options, False):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait(timeout=30)
    with opened(towers(), options, False) as start:
        assert start.before is None


@pytest.mark.parametrize("damaged", ["shard-00001.safetensors", "progress.pt", "spindle.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(folder: Path, damaged: str) -> None:
    """The one before is taken, and the run ends as if it had never stopped; the damaged one is set aside."""
    flip(folder / "step-00000006" / damaged)
    with pytest.warns(SpindleWarning, match=rf"step-00000006/{damaged} .*aside/step-00000006.*step-00000004"):
        found, result = run(folder, 8, resume=True)
    assert result.first_step == 4
    assert left_in(folder) == ["aside", *STEPS, "step-00000008"]
    expected = weights(run(folder.parent / "undisturbed", 8)[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(found).items())


def test_a_checkpoint_that_lost_its_list_is_no_secret(folder: Path) -> None:
    """A folder without `spindle.json` was whole once: writing gives it its name last."""
    (folder / "step-00000006" / "spindle.json").unlink()
    with pytest.warns(SpindleWarning, match=r"step-00000006 is no checkpoint"):
        assert run(folder, 8, resume=True)[1].first_step == 4


def test_nothing_begins_afresh_because_all_is_damaged(folder: Path) -> None:
    """The last one is left where it is."""
    for name in STEPS:
        flip(folder / name / "progress.pt")
    with pytest.warns(SpindleWarning), pytest.raises(CheckpointError, match=r"step-00000002/progress\.pt"):
        run(folder, 8, resume=True)
    assert left_in(folder) == ["aside", "step-00000002"]


def test_one_of_several_drivers_leaves_the_choice_to_the_next_start(folder: Path) -> None:
    """The others may have checked other files, and found the same checkpoint whole."""
    flip(folder / "step-00000006" / "shard-00001.safetensors")
    files = sorted(json.loads((folder / "step-00000006" / "spindle.json").read_text())["files"])
    share = (files.index("shard-00001.safetensors"), len(files))
    options = checkpoint.Checkpoints(directory=folder, every=2)
    said = r"the next start goes on from step-00000004"
    with pytest.raises(CheckpointError, match=said), opened(towers(), options, True, share):
        pass
    assert run(folder, 8, resume=True)[1].first_step == 4


def test_going_back_leaves_later_checkpoints_aside(folder: Path) -> None:
    """So that the newest one is of the run that goes on."""
    with pytest.warns(SpindleWarning, match=r"goes on from step 2; later .*aside/step-00000004.*-00000006"):
        assert run(folder, 3, resume=2)[1].first_step == 2
    assert left_in(folder) == ["aside", "step-00000002", "step-00000003"]
    with pytest.warns(SpindleWarning, match="aside/step-00000003"):
        run(folder, 4, resume=2)
    assert run(folder, 6, resume=True)[1].first_step == 4
    assert sorted(path.name for path in (folder / "aside").iterdir()) == ["step-00000003", "step-00000004", STEPS[2]]
    with pytest.raises(CheckpointError, match="has no checkpoint after 3 steps; it has 2, 4, 6"):
        run(folder, 8, resume=3)


def test_another_runs_checkpoint_needs_another_folder(folder: Path, tmp_path: Path) -> None:
    """A run that goes on from elsewhere would mix two runs in one folder."""
    with pytest.raises(CheckpointError, match="holds checkpoints of another run"):
        run(folder, 8, resume=shutil.copytree(folder / "step-00000002", tmp_path / "step-00000002"))
    assert left_in(folder) == STEPS
    assert run(tmp_path / "new", 8, resume=folder / "step-00000006")[1].first_step == 6


def test_a_run_drops_only_its_own(folder: Path, tmp_path: Path) -> None:
    """A checkpoint of another run that was copied in is not counted, and stays."""
    run(tmp_path / "other", 1)
    shutil.copytree(tmp_path / "other" / "step-00000001", folder / "step-00000001")
    run(folder, 10, resume=True, keep_checkpoints=2)
    assert left_in(folder) == ["step-00000001", "step-00000008", "step-00000010"]


def test_a_step_is_replaced_only_by_a_whole_one(folder: Path) -> None:
    """A run killed between taking one away and putting its successor there finds the old one again."""
    (folder / STEPS[2]).rename(folder / f".{STEPS[2]}.old")
    (folder / f".{STEPS[2]}.part").mkdir()
    assert run(folder, 8, resume=True)[1].first_step == 6
    (folder / f".{STEPS[2]}.old").mkdir()
    run(folder, 9, resume=True)
    assert left_in(folder) == [*STEPS, "step-00000008", "step-00000009"]


def test_files_that_are_not_listed_are_not_read(folder: Path) -> None:
    """Weights that somebody put beside those that were written."""
    plain = towers()
    spindle.load_checkpoint(plain, folder / STEPS[2])
    strangers = {name: torch.full_like(value, 9.0) for name, value in weights(plain).items()}
    save_file(strangers, folder / STEPS[2] / "zz.safetensors")
    again = towers()
    spindle.load_checkpoint(again, folder / STEPS[2])
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(again).items())


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    """Before a rank starts."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run cannot be written \(Not a directory\)"):
        run(tmp_path / "file" / "run")
