"""Checkpoints that are written beside the steps: the same files, one at a time, and no error is lost."""

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import spindle
from spindle.errors import CheckpointError, PreemptedError
from spindle.failures import Failures
from spindle.runtime import worker
from spindle.runtime.checkpoints import checkpoint, later
from spindle.runtime.checkpoints.checkpoint import Checkpoints, begin, checkpoints_in, finish, put_progress
from spindle.runtime.checkpoints.checkpoint_report import differences
from spindle.runtime.checkpoints.tensor_files import ABOUT, Entry, write_tensors
from spindle.runtime.checkpoints.writing import Writing
from tests.checkpoints.test_resume import left_in, towers, trained, weights
from tests.faults.injected import Fault, undisturbed
from tests.faults.injected import trained as injected
from tests.faults.test_recovery import ended, part_folders
from tests.random_plans import random_plan

WAIT_S = 60.0


@pytest.mark.parametrize("launcher", ["threads", pytest.param("processes", marks=pytest.mark.gloo)])
def test_they_are_those_of_a_run_that_waits(tmp_path: Path, launcher: str) -> None:
    """Bit for bit, under the same names, though the steps go on while they are written; and a run resumes from one."""
    plan = random_plan(spindle.make_metagraph(towers()), 2, 3)
    for folder, options in (("now", {}), ("later", {"save_async": True})):
        trained(towers(), plan, 6, launcher, checkpoints=tmp_path / folder, checkpoint_every=2, **options)
    names = ["step-00000002", "step-00000004", "step-00000006"]
    assert left_in(tmp_path / "now") == left_in(tmp_path / "later") == names
    for name in names:
        assert list(differences(tmp_path / "now" / name, tmp_path / "later" / name)) == []
        ours, theirs = (checkpoint.progress_in(tmp_path / folder / name) for folder in ("now", "later"))
        assert str(ours) == str(theirs)
    whole, again = towers(), towers()
    trained(whole, plan, 9, launcher)
    trained(again, plan, 9, launcher, checkpoints=tmp_path / "later", resume=True, save_async=True)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_steps_go_on_while_one_is_written_and_the_next_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write ends only once a step after it is done; never are two at work on the folder of one rank."""
    stepped, at_work, most = threading.Event(), dict[str, int](), list[int]()

    def slowly(path: Path, entries: Mapping[str, Entry], metadata: Any = None) -> None:
        at_work[path.name] = at_work.get(path.name, 0) + 1
        most.append(at_work[path.name])
        assert stepped.wait(WAIT_S)
        write_tensors(path, entries)
        at_work[path.name] -= 1

    monkeypatch.setattr(worker, "write_tensors", slowly)
    plan = random_plan(spindle.make_metagraph(towers()), 2, 3)

    def on_step(step: int, losses: dict[str, float]) -> None:
        if step == 3:  # the checkpoint after two steps is being written
            assert checkpoints_in(tmp_path) == []
            stepped.set()

    options: dict[str, Any] = {"checkpoints": tmp_path, "checkpoint_every": 2, "save_async": True}
    trained(towers(), plan, 6, "threads", on_step=on_step, **options)
    assert set(most) == {1}
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000002", "step-00000004", "step-00000006"]


@pytest.mark.parametrize("place", ["rank", "driver"])
def test_an_error_comes_up_in_the_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its cause; the checkpoint before stays, and nothing of this one."""
    if place == "rank":

        def write(path: Path, entries: Mapping[str, Entry], metadata: Any = None) -> None:
            if "00000004" in path.parent.name:
                raise OSError(28, "No space left on device")
            write_tensors(path, entries)

        monkeypatch.setattr(worker, "write_tensors", write)
    else:

        def end(unfinished: Path, checkpoints: Checkpoints, *, step: int, seed: int) -> None:
            if step == 4:
                raise OSError(28, "No space left on device")
            finish(unfinished, checkpoints, step=step, seed=seed)

        monkeypatch.setattr(later, "finish", end)
    plan = random_plan(spindle.make_metagraph(towers()), 2, 3)
    with pytest.raises(CheckpointError, match=r"step-00000004.*cannot be written \(.*No space left on device\)"):
        trained(towers(), plan, 9, "threads", checkpoints=tmp_path, checkpoint_every=2, save_async=True)
    assert left_in(tmp_path) == ["step-00000002"]
    assert part_folders(tmp_path) == []


def test_an_error_of_the_last_one_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step comes after it: the end of the run waits."""

    def end(unfinished: Path, checkpoints: Checkpoints, *, step: int, seed: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(later, "finish", end)
    plan = random_plan(spindle.make_metagraph(towers()), 2, 3)
    with pytest.raises(CheckpointError, match="No space left on device"):
        trained(towers(), plan, 2, "threads", checkpoints=tmp_path, save_async=True)


@pytest.mark.gloo
@pytest.mark.parametrize(("kind", "phase"), [("killed", "forward"), ("killed", "checkpoint"), ("raises", "optimizer")])
def test_a_run_recovers_from_the_last_that_is_whole(kind: str, phase: str, tmp_path: Path) -> None:
    """Whatever was being written when a rank failed; the weights are those of the calm run."""
    fault = Fault(kind, phase, tmp_path / "faults").armed()
    failures = Failures(max_failures=4, backoff_s=0.01)
    options: dict[str, Any] = {"checkpoints": tmp_path / "c", "save_async": True, "failures": failures}
    result, found = injected(fault, launcher="processes", timeout_s=30.0, **options)
    assert len(result.recovered) >= 1
    assert all(re.search(r"went on from (the beginning|step [246])$", told) for told in result.recovered)
    expected = undisturbed(fault)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [name for name in left_in(tmp_path / "c") if name != "step-00000002"] == [
        "step-00000004", "step-00000006", "step-00000008"
    ]  # fmt: skip
    assert part_folders(tmp_path) == []


def test_sigterm_waits_for_the_last_one(tmp_path: Path) -> None:
    """The run ends once its checkpoint is whole, and says where it is."""
    error: PreemptedError = ended(tmp_path, 1, checkpoints=tmp_path / "c", save_async=True)
    assert error.exit_code == 75
    (saved,) = checkpoints_in(tmp_path / "c")
    checkpoint.read(saved)
    assert str(error).endswith(f"to go on from {saved}")


def test_work_in_a_thread_tells_its_error_once() -> None:
    writing, gate, done = Writing(), threading.Event(), list[int]()
    assert writing.check()

    def first() -> None:
        assert gate.wait(WAIT_S)
        done.append(1)
        raise OSError("full")

    writing.start(first)
    assert not writing.check()
    gate.set()
    with pytest.raises(OSError, match="full"):  # the second does not begin before that is said
        writing.start(lambda: done.append(2))
    writing.start(lambda: done.append(3))
    writing.wait()
    assert writing.check()
    assert done == [1, 3]


# -- how many stay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "keep", "every_h", "stay"),
    [
        ([0, 1, 2, 3, 4, 5], 2, None, [4, 5]),
        ([0, 1, 2, 3, 4, 5], 2, 2, [0, 2, 4, 5]),
        ([0, 1, 2, 3, 4, 5], 2, 100, [0, 4, 5]),
        ([0, 1, 2, 3, 4, 5], 2, 0.5, [0, 1, 2, 3, 4, 5]),
        ([0, 5, 6, 7, 12, 13], 1, 6, [0, 6, 12, 13]),
        ([0, 1], 3, 6, [0, 1]),
    ],
)
def test_of_older_ones_one_each_so_often_stays(
    hours: list[int], keep: int, every_h: float | None, stay: list[int], tmp_path: Path
) -> None:
    """One is written each of these hours; what stays does not depend on when it is looked at."""
    kept = Checkpoints(tmp_path, 1, keep, "run", keep_every_s=every_h and every_h * 3600)
    for step, hour in enumerate(hours):
        unfinished = begin(checkpoint.path_of(tmp_path, step))
        put_progress(unfinished, {})
        finish(unfinished, kept, step=step, seed=0)
        os.utime(checkpoint.path_of(tmp_path, step) / ABOUT, (hour * 3600, hour * 3600))
    assert [hours[checkpoint.step_of(path)] for path in checkpoints_in(tmp_path)] == stay


@pytest.mark.parametrize(("keep", "every_s"), [(None, 60.0), (2, 0.0), (2, float("nan")), (2, float("inf"))])
def test_what_is_refused(keep: int | None, every_s: float, tmp_path: Path) -> None:
    said = rf"keep_checkpoints_every_s is {every_s}, keep_checkpoints {keep}; give both, above 0: beside the newest"
    with pytest.raises(CheckpointError, match=said):
        Checkpoints(tmp_path, 1, keep, keep_every_s=every_s)
