"""Completion: what a shell is offered for half-typed words, and the lines that ask for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from spindle.cli import cli
from spindle.cli.shell import _Bash
from spindle.files.clusterfile import device_types
from spindle.planner.solve import METHODS
from tests.printed.conftest import Spindle


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("plan.json", "model.py", "clip.yaml", "notes.txt", ".hidden.json"):
        (tmp_path / name).touch()
    (tmp_path / "runs" / "deep").mkdir(parents=True)
    (tmp_path / "runs" / "trace.json").touch()
    return tmp_path


def offered(*words: str) -> list[tuple[str, str]]:
    """(kind, value) of what completes the last word."""
    *before, last = words
    found = ShellComplete(cli, {}, "spindle", "_SPINDLE_COMPLETE").get_completions(before, last)
    return [(item.type, item.value) for item in found]


def plain(*words: str) -> list[str]:
    return [value for kind, value in offered(*words) if kind == "plain"]


def test_commands(folder: Path) -> None:
    assert plain("ex") == [name for name in cli.commands if name.startswith("ex")]


def test_options_and_choices(folder: Path) -> None:
    assert plain("plan", "x.yaml", "--clu") == ["--cluster"]
    assert plain("train", "model.py", "--launcher", "t") == ["threads", "torchrun"]


@pytest.mark.parametrize("command", ["plan", "whatif", "graph", "curves", "verify", "train", "profile"])
def test_a_source_is_a_file_of_its_kinds(folder: Path, command: str) -> None:
    """Specs, MetaGraphs and Python files; no notes, nothing hidden; folders on the way."""
    assert plain(command, "") == ["clip.yaml", "model.py", "plan.json", "runs/"]


def test_names_in_a_python_file(folder: Path) -> None:
    """What it assigns and defines, without running it; nothing where it cannot be read."""
    text = "raise SystemExit\nworkload = 1\n_hidden = 2\n\n\ndef make():\n    inner = 3\n\n\nworkload = 4\n"
    (folder / "model.py").write_text(text)
    assert plain("plan", "model.py:") == ["model.py:workload", "model.py:make"]
    assert plain("train", "model.py:w") == ["model.py:workload"]
    (folder / "model.py").write_text("def f(:")
    assert plain("plan", "model.py:") == plain("plan", "gone.py:") == []


@pytest.mark.parametrize(
    "words",
    [("check",), ("explain",), ("show",), ("diff", "plan.json"), ("train", "m.py", "--plan"), ("plan", "m.py", "-p")],
)
def test_plans_and_profiles_are_json(folder: Path, words: tuple[str, ...]) -> None:
    assert plain(*words, "p") == ["plan.json"]
    assert plain(*words, "runs/") == ["runs/trace.json", "runs/deep/"]
    assert plain(*words, "./.h") == ["./.hidden.json"]


def test_the_shell_walks_where_nothing_fits(folder: Path) -> None:
    """Its own completion of folders and files puts the slash and no space."""
    assert offered("check", "ru") == [("dir", "ru")]
    assert offered("plan", "m.py", "--output", "x") == [("file", "x")]
    assert offered("train", "m.py", "--checkpoints", "ru") == [("dir", "ru")]
    assert offered("check", "gone/") == []


def test_clusters(folder: Path) -> None:
    """Built-in device types behind the shape that was typed; YAML files otherwise."""
    assert plain("plan", "m.py", "--cluster", "") == [f"1x8:{name}" for name in device_types()]
    assert plain("plan", "m.py", "-c", "4x8:a100") == [f"4x8:{n}" for n in device_types() if n.startswith("a100")]
    assert plain("plan", "m.py", "-c", "cl") == ["clip.yaml"]
    assert len(plain("plan", "m.py", "-c", "4x8")) == len(device_types()) > 3


def test_methods(folder: Path) -> None:
    assert plain("plan", "m.py", "--method", "") == list(METHODS)
    assert plain("plan", "m.py", "--method", "pap") == ["paper"]


def test_bash_splits_at_colons(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are put together again, and it gets what follows the last colon."""
    monkeypatch.setenv("COMP_WORDS", "spindle\nplan\nmodel.py\n:\nworkload\n--cluster\n4x8\n:\na100-80")
    monkeypatch.setenv("COMP_CWORD", "8")
    bash = _Bash(cli, {}, "spindle", "_SPINDLE_COMPLETE")
    assert bash.get_completion_args() == (["plan", "model.py:workload", "--cluster"], "4x8:a100-80")
    assert bash.complete() == "plain,a100-80g"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_lines_of_each_shell(spindle_command: Spindle, shell: str) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")  # click asks it for its version
    done = spindle_command("completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"_SPINDLE_COMPLETE={shell}_complete" in done.out


def test_another_shell_is_refused(spindle_command: Spindle) -> None:
    done = spindle_command("completion", "tcsh")
    assert done.code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in done.err


def test_in_bash(folder: Path) -> None:
    """A real bash reads the lines, asks `spindle`, and gets the device types."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    program = folder / "bin" / "spindle"
    program.parent.mkdir()
    code = "import sys; sys.argv[0] = 'spindle'; from spindle.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')  # its path may hold spaces
    program.chmod(0o755)
    script = (
        'eval "$(spindle completion bash)"; COMP_WORDS=(spindle plan m.py --cluster 4x8 : a100-80); COMP_CWORD=6; '
        '_spindle_completion spindle; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(root)}
    command = [bash, "--norc", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "a100-80g\n", done.stderr
