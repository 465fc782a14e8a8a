"""`spindle submit` before anything is sent: what it refuses, in one to three lines, without a cluster."""

from pathlib import Path

import pytest

from tests.printed.conftest import Spindle
from tests.printed.samples import MODEL

PLACE = ("--address", "http://127.0.0.1:1")
TRAIN = ("--", "model.py:workload", "--steps", "1")

CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing to do": ((), "Give either `-- SOURCE ARGS OF train`, or --follow ID, or --stop ID."),
    "two things to do": (("--stop", "a", *TRAIN), "Give either"),
    "options of train without --": (("model.py", "--steps", "1"), "No such option '--steps'"),
    "no steps": (("--", "model.py:workload"), "Missing option '--steps'"),
    "an option that train does not have": ((*TRAIN, "--stepps", "2"), "No such option '--stepps'"),
    "a value that train does not take": (("--", "model.py", "--steps", "0"), "0 is not in the range x>=1"),
    "a source of another kind": (("--", "model.yaml", "--steps", "1"), "source 'model.yaml' is not a workload"),
    "a source that is not there": (("--", "nothing.py", "--steps", "1"), "nothing.py: cannot be read (no such file)"),
    "a source that is no Python": (("--", "syntax.py", "--steps", "1"), "syntax.py, line 1 raised SyntaxError"),
    "a source outside": (
        ("--working-dir", "inner", "--", "../model.py", "--steps", "1"),
        "lies outside the working directory",
    ),
    "a plan that is not there": ((*TRAIN, "--plan", "plan.json"), "plan.json"),
    "a plan that is none": ((*TRAIN, "--plan", "model.py"), "model.py"),
    "a launcher that is not Ray": ((*TRAIN, "--launcher", "threads"), "launcher 'threads' does not run in a Ray job"),
    "checkpoints in the copy": (
        (*TRAIN, "--checkpoints", "runs/a"),
        "--checkpoints runs/a would lie in the job's copy",
    ),
    "a trace in the copy": ((*TRAIN, "--trace", "t.json"), "--trace t.json would lie in the job's copy"),
    "no folder": (("--working-dir", "nowhere", *TRAIN), "nowhere: cannot be sent (not a folder)"),
    "a variable without a value": (("--env", "ONLY", *TRAIN), "--env ONLY: cannot be read (No such file or directory)"),
    "a variable without a name": (("--env", "=3", *TRAIN), "--env '=3' is not KEY=VAL"),
    "packages from nowhere": (("--pip", "no.txt", *TRAIN), "--pip no.txt: cannot be read"),
    "a cluster that is not there": (
        (*PLACE, *TRAIN),
        "no Ray dashboard answers at http://127.0.0.1:1 (ConnectionError)",
    ),
    "the same, to follow": ((*PLACE, "--follow", "a"), "no Ray dashboard answers at http://127.0.0.1:1"),
    "the same, to stop": ((*PLACE, "--stop", "a"), "give --address http://HOST:8265"),
    "a port of Ray's that is another": (("--address", "ray://head:10001", *TRAIN), "is not that of a Ray dashboard"),
    "no address at all": (("--address", "http://", *TRAIN), "is not that of a Ray dashboard"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "syntax.py").write_text("def f(:\n    pass\n")
    (tmp_path / "inner").mkdir()
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(folder: Path, spindle_command: Spindle, case: tuple[tuple[str, ...], str]) -> None:
    arguments, words = case
    done = spindle_command("submit", *arguments)
    assert (done.code, words in done.said) == (2, True), done.err
    lines = done.err.splitlines()
    assert 1 <= len(lines) <= 3, done.err
    assert lines[0].startswith("spindle: ")
    assert "bug of Spindle" not in done.err
    assert done.out == ""


def test_the_sources_code_does_not_run_here(folder: Path, spindle_command: Spindle) -> None:
    """This machine may have neither its data nor its packages."""
    (folder / "model.py").write_text("raise SystemExit('ran')\n")
    assert "no Ray dashboard answers" in spindle_command("submit", *PLACE, *TRAIN).err


def test_the_address_given_wins(folder: Path, spindle_command: Spindle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over those of the environment, which Ray's own client prefers; then come Ray's variables, in its order."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    assert "answers at http://127.0.0.1:2 " in spindle_command("submit", *TRAIN).err
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:3")
    assert "answers at http://127.0.0.1:3 " in spindle_command("submit", *TRAIN).err
    assert "answers at http://127.0.0.1:1 " in spindle_command("submit", *PLACE, *TRAIN).err


def test_too_large_a_folder_is_refused_before_anything_is_sent(
    folder: Path, spindle_command: Spindle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is largest, and what to do."""
    from spindle.runtime.launch.package import pack

    assert pack.__kwdefaults__ is not None
    monkeypatch.setitem(pack.__kwdefaults__, "limit_bytes", 1000)
    (folder / "data.bin").write_bytes(bytes(range(256)) * 8)
    done = spindle_command("submit", *PLACE, *TRAIN)
    assert done.code == 2
    assert "the most that Ray sends to a job (largest:" in done.err
    assert "(--exclude " in done.err
