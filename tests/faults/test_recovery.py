"""Recovery: a rank fails in some way at some place; the run finds it, goes on, and ends with the calm one's weights.

After each run nothing is left of it: no process, no part of a checkpoint, nothing in shared memory.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import spindle
from spindle.errors import (
    CheckpointError,
    InputError,
    LostRankError,
    PreemptedError,
    RunError,
    SpindleWarning,
    WorkloadError,
)
from spindle.failures import Failures
from spindle.runtime.faults.preemption import Notice
from spindle.runtime.faults.recovery import Attempts
from spindle.runtime.training import Steps
from tests.checkpoints.test_resume import left_in
from tests.faults.injected import (
    KINDS,
    PHASES,
    RELEASE,
    Fault,
    Optimizer,
    own_rank,
    plan_of,
    trained,
    undisturbed,
    workload_of,
)
from tests.faults.recovering import SAID, begun, recovered
from tests.random_plans import widest_plan

TABLE = [
    *(("killed", phase) for phase in PHASES),
    ("stopped", "transfer"),
    ("stopped", "checkpoint"),
    ("exits", "start"),
    ("raises", "load"),
    ("raises", "transfer"),
    ("out of memory", "optimizer"),
    ("hangs", "reduction"),
    ("asked to end", "forward"),
]
"""Kinds of fault, and where they happen: each kind and each phase at least once."""


def left_in_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.", "plasma"))}


def part_folders(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name not in (".gitignore", ".lock")]


def ranks_of(parent: psutil.Process) -> list[psutil.Process]:
    """Processes of ranks below another one."""
    found = parent.children(recursive=True)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and p.ppid() != parent.pid]


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """What a run leaves behind is checked whatever became of it."""
    RELEASE.clear()
    before = left_in_memory()
    yield
    RELEASE.set()
    assert ranks_of(psutil.Process()) == []
    assert left_in_memory() <= before
    assert part_folders(tmp_path) == []


def test_the_table_has_all_kinds_and_phases() -> None:
    assert {kind for kind, _ in TABLE} == set(KINDS)
    assert {phase for _, phase in TABLE} == set(PHASES)


@pytest.mark.gloo
@pytest.mark.parametrize(("kind", "phase"), TABLE)
def test_a_fault_in_a_process(kind: str, phase: str, tmp_path: Path) -> None:
    """At most one interval of two steps is lost, none when the rank was asked to end: the run saves first."""
    told = recovered(Fault(kind, phase, tmp_path / "faults"), tmp_path, "processes")
    words = SAID[kind].replace("rank 1", r"rank \d") if phase == "load" else SAID[kind]
    if (kind, phase) == ("raises", "load"):
        words = r"rank \d, LOAD t: task 't': its loader raised ValueError: too hot"
    place = "the beginning" if phase == "start" else "step 4" if kind == "asked to end" else "step 2"
    assert [text for text in told if re.match(f"{words}.*went on from {place}$", text)], told


@pytest.mark.parametrize(("kind", "phase"), [("raises", "forward"), ("hangs", "optimizer")])
def test_a_fault_in_a_thread(kind: str, phase: str, tmp_path: Path) -> None:
    told = recovered(Fault(kind, phase, tmp_path / "faults"), tmp_path, "threads")
    assert [text for text in told if re.match(SAID[kind], text)], told


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """Of a run that may fail twice."""
    return {"checkpoints": folder / "c", "failures": Failures(max_failures=2, backoff_s=0.01)} | more


def test_the_first_cause_is_raised_after_the_last_try(tmp_path: Path) -> None:
    """Three failures where two are allowed; another checkpoint was written between each two."""
    fault = Fault("raises", "forward", tmp_path / "faults").armed(3)
    with pytest.raises(RunError, match="too hot") as caught:
        trained(fault, launcher="threads", **options(tmp_path))
    first, *_, last = str(caught.value).splitlines()
    assert re.match(r"rank 1, wave 0, FORWARD s0 \(t\.first\.0\) raised ValueError: too hot", first)
    assert last == "(the first of 3 failures; the run was started again 2 times)"
    assert "in act" in caught.value.__notes__[0]


def test_a_failure_that_was_survived_holds_no_frames() -> None:
    """They would keep the worker group of each attempt: its store, its handles, what it was prepared with."""
    attempts = Attempts(Failures(max_failures=2, backoff_s=0.0), lambda path: pytest.fail(f"reads {path}"))
    tries: list[object] = []

    def attempt(start: object) -> None:
        tries.append(start)
        if len(tries) < 3:
            try:
                raise EOFError
            except EOFError as error:
                raise LostRankError.at(1, f"rank 1 died the {len(tries)}. time") from error

    with pytest.warns(SpindleWarning, match="going on from the beginning"):
        attempts.run(attempt, Steps(), Notice(grace_s=1.0, saves=False))
    assert [str(error) for error in attempts.failed] == ["rank 1 died the 1. time", "rank 1 died the 2. time"]
    for error in attempts.failed:
        assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_an_error_that_comes_again_at_once_ends_the_run(tmp_path: Path) -> None:
    """The user's own error came twice without a checkpoint in between: a third try would change nothing."""
    fault = Fault("raises", "forward", tmp_path / "faults", call=1).armed(9)
    with pytest.raises(RunError, match="too hot") as caught:
        trained(fault, launcher="threads", **options(tmp_path, failures=Failures(max_failures=8, backoff_s=0.01)))
    assert str(caught.value).splitlines()[-1] == "(which came again; the run was started again 1 times)"
    assert len(list(fault.folder.glob("[0-9]"))) == 7


def test_what_is_wrong_before_ranks_start_is_not_tried_again(tmp_path: Path) -> None:
    """No failure of a rank: it is raised as it is, without a warning."""
    fault = Fault("raises", "forward", tmp_path / "faults")
    workload = workload_of(fault)

    def lbfgs(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters)

    with pytest.raises(WorkloadError, match="LBFGS"):
        spindle.train(workload, plan_of(workload, split=False), optimizer=lbfgs, steps=2, **options(tmp_path))


def test_without_a_checkpoint_a_run_begins_anew(tmp_path: Path) -> None:
    """Its losses and weights are those of the calm run, each step once."""
    fault = Fault("raises", "optimizer", tmp_path / "faults").armed()
    result, weights = trained(fault, launcher="threads", failures=Failures(max_failures=1, backoff_s=0.0))
    expected = undisturbed(fault)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(result.losses) == 8
    assert result.recovered[0].endswith("went on from the beginning")


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """The run goes on from the one before; what it says of the damaged one is a warning."""
    fault = Fault("raises", "optimizer", tmp_path / "faults", call=5).armed()
    shard = tmp_path / "c" / "step-00000004" / "shard-00001.safetensors"

    class Damaging(Optimizer):
        def step(self, closure: Any = None) -> Any:
            if shard.exists() and fault.is_armed():
                shard.write_bytes(shard.read_bytes()[:-1])
            return super().step(closure)

    workload = workload_of(fault)
    with pytest.warns(spindle.errors.SpindleWarning, match="is not the file that was written"):
        result = spindle.train(
            workload,
            plan_of(workload, split=False),
            optimizer=lambda parameters: Damaging(parameters).arm(fault),
            steps=8,
            checkpoint_every=2,
            launcher="threads",
            **options(tmp_path),
        )
    expected = undisturbed(fault)
    assert all(torch.equal(value, expected[name]) for name, value in workload.named_parameters())
    assert result.recovered[0].endswith("went on from step 2")


def test_a_directory_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file")
    steps: list[int] = []
    fault = Fault("raises", "forward", tmp_path / "faults")
    with pytest.raises(CheckpointError, match="c cannot be written"):
        trained(fault, launcher="threads", on_step=lambda step, losses: steps.append(step), **options(tmp_path))
    assert steps == []


class Full(torch.optim.SGD):
    """Once it has stepped, its process can write no large file, as on a full disk."""

    def step(self, closure: Any = None) -> Any:
        import resource

        super().step()
        if own_rank() is not None:  # the driver steps once too, to see what kind of optimizer it is
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


@pytest.mark.gloo
def test_a_full_disk_is_no_lost_rank(tmp_path: Path) -> None:
    """What cannot be written is named, nothing of it stays, and no other try is made."""
    workload = spindle.Workload("full")
    net = workload.component("net", torch.nn.Linear(4, 4))

    @workload.task("t", batch_size=4, data=[{"x": torch.ones(4, 4)}])  # a list, which is passed through no file
    def task(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return net(batch["x"]).square().mean()  # type: ignore[no-any-return]

    with pytest.raises(CheckpointError) as caught:
        spindle.train(
            workload,
            widest_plan(spindle.make_metagraph(workload), 2),
            optimizer=lambda parameters: Full(parameters, lr=0.1, momentum=0.9),
            steps=4,
            launcher="processes",
            **options(tmp_path),
        )
    words = r"rank \d: .*shard-0000\d\.safetensors cannot be written \(File too large\); make room there"
    assert re.match(words, str(caught.value))
    assert left_in(tmp_path / "c") == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_failures": -1}, "max_failures is -1; give a number of failures, from 0 up"),
        ({"max_failures": 1.5}, "max_failures is 1.5; give"),
        ({"backoff_s": float("nan")}, "backoff_s is nan; give seconds, from 0 up"),
        ({"grace_s": -1.0}, "grace_s is -1.0; give seconds, from 0 up"),
    ],
)
def test_what_failures_refuse(values: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        Failures(**values)  # type: ignore[arg-type]


# -- asked to end ---------------------------------------------------------------------------------------------------

MODEL = """
import os, signal
from pathlib import Path
from tests.faults.injected import Fault, optimizer_of, workload_of

fault = Fault("raises", "forward", Path("none"))
workload = workload_of(fault)
optimizer = optimizer_of(fault)
"""


def command(folder: Path, *more: str, launcher: str = "processes") -> list[str]:
    """A long run on the command line, with a line of JSON for each step."""
    (folder / "model.py").write_text(MODEL)
    where = ["--checkpoints", str(folder / "c"), "--metrics", str(folder / "m.jsonl"), "--every", "1000"]
    given = ["train", str(folder / "model.py:workload"), "--steps", "100000", "--launcher", launcher, *where]
    return [*given, *more]


@pytest.mark.gloo
def test_sigterm_saves_and_a_later_run_goes_on(tmp_path: Path) -> None:
    """To all processes of the run, as Slurm sends it: the steps under way are finished, and exit code 75 says so."""
    process = begun(tmp_path, *command(tmp_path))
    family = psutil.Process(process.pid).children(recursive=True)
    for member in (psutil.Process(process.pid), *(p for p in family if "spindle-rank" in " ".join(p.cmdline()))):
        member.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30.0)
    assert process.returncode == 75, said
    (saved,) = (tmp_path / "c").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert re.search(rf"SIGTERM ended the run after step {step}; start it again with resume=True \(--resume\)", said)
    assert psutil.wait_procs(family, timeout=10.0)[1] == []
    more = spindle.load_checkpoint(workload_of(Fault("raises", "forward", tmp_path / "none")), saved)
    assert more == step


def ended(folder: Path, times: int, **more: Any) -> PreemptedError:
    """How a run ends whose driver gets SIGTERM after its third step, or so often before the next one."""

    def on_step(step: int, losses: dict[str, float]) -> None:
        if step == 3:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)

    fault = Fault("raises", "forward", folder / "faults")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError) as caught:
        trained(fault, launcher="threads", on_step=on_step, steps=100, checkpoint_every=1000, **more)
    assert signal.getsignal(signal.SIGTERM) is before
    return caught.value


def test_once_told_a_run_saves_its_last_step(tmp_path: Path) -> None:
    """Exit code 75; a run that resumes gives the weights of the calm one. No other try is made, though one might."""
    error = ended(tmp_path, 1, **options(tmp_path))
    assert error.exit_code == 75
    (saved,) = (tmp_path / "c").glob("step-*")
    assert str(error).endswith(f"to go on from {saved}")
    fault = Fault("raises", "forward", tmp_path / "faults")
    result, weights = trained(fault, launcher="threads", resume=True, **options(tmp_path))
    assert result.first_step == int(saved.name.removeprefix("step-")) > 2
    expected = undisturbed(fault)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_told_twice_a_run_ends_at_once(tmp_path: Path) -> None:
    error = ended(tmp_path, 2, **options(tmp_path))
    assert error.exit_code == 143
    assert str(error).startswith("SIGTERM came twice, or its time was over")
    assert left_in(tmp_path / "c") == []


def test_at_its_deadline_a_run_ends_at_once(tmp_path: Path) -> None:
    """It sends itself the second signal, here while a rank hangs in what would be its last step."""
    fault = Fault("hangs", "optimizer", tmp_path / "faults").armed()

    class Told(Optimizer):
        def step(self, closure: Any = None) -> Any:
            if own_rank() == fault.rank and self.on_step.calls == fault.call - 1:
                os.kill(os.getpid(), signal.SIGTERM)  # of this process, which is the driver too
            return super().step(closure)

    workload = workload_of(fault)
    with pytest.raises(PreemptedError, match="SIGTERM came twice, or its time was over") as caught:
        spindle.train(
            workload,
            plan_of(workload, split=False),
            optimizer=lambda parameters: Told(parameters).arm(fault),
            steps=100,
            launcher="threads",
            checkpoints=tmp_path / "c",
            failures=Failures(grace_s=0.2),
        )
    assert not fault.is_armed()
    assert caught.value.exit_code == 143


def test_a_run_without_checkpoints_ends_at_once(tmp_path: Path) -> None:
    """It has nothing to save, and says so."""
    error = ended(tmp_path, 1)
    assert error.exit_code == 143
    assert "the run writes no checkpoints, so nothing is saved" in str(error)


def test_a_handler_of_the_user_s_own_is_left_alone(tmp_path: Path) -> None:
    """It hears the signal, and the run goes on."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        fault = Fault("raises", "forward", tmp_path / "faults")
        result, _ = trained(
            fault, launcher="threads", on_step=lambda step, losses: os.kill(os.getpid(), signal.SIGTERM)
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(heard) == len(result.losses) == 8
