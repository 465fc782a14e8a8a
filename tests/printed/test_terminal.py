"""What is seen: lines of at most 100 columns; colors and bars on terminals only."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest

from spindle.cli.bars import busy, progress
from spindle.cli.terminal import WIDTH, folded, show_warning, warn
from spindle.errors import SpindleWarning
from tests.printed.conftest import Outcome, Spindle

ROOT = Path(__file__).parents[2]
LONG = "with-a-name-of-some-length"
MODEL = f"""\
import torch

import spindle

torch.manual_seed(0)
workload = spindle.Workload("many")
nets = [workload.component(f"component_{{i}}_{LONG.replace("-", "_")}", torch.nn.Linear(2, 2)) for i in range(2)]
for t in range(8):
    add = workload.task(f"task-{{t}}-{LONG}", batch_size=4, data=lambda: [{{"x": next(rows)}}])
    add(lambda batch, net=nets[t % 2]: net(batch["x"]).square().mean())
"""
DRIFTS = "import itertools\nimport torch\nrows = (torch.full((4, 2), float(n)) for n in itertools.count())\n" + MODEL
MODEL = "import itertools\nimport torch\nrows = itertools.repeat(torch.ones(4, 2))\n" + MODEL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A MetaGraph of many MetaOps with long names, and a model with long names."""
    metaops, flows = [], []
    for t in range(12):
        names = [f"task-{t}-{LONG}.component-{c}-{LONG}" for c in range(3)]
        flows += [[names[0], names[2]], [names[1], names[2]]]
        for c, name in enumerate(names):
            times = {str(n): (1 + c) * 0.01 / n + 1e-4 for n in (1, 2, 4, 8)}
            memory = {str(n): 1e10 / n for n in (1, 2, 4, 8)}
            task, component = name.split(".")
            metaops.append(
                {"name": name, "task": task, "component": component, "layers": 4 + t}
                | {"layer_time_s": times, "memory_bytes": memory, "layer_param_bytes": 1e6, "output_bytes": 1e6}
            )
    graph = {"format": "spindle.metagraph", "version": 1, "metaops": metaops, "flows": flows}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "drifts.py").write_text(DRIFTS)
    return tmp_path


def too_long(done: Outcome) -> list[str]:
    return [line for line in (*done.out.splitlines(), *done.err.splitlines()) if len(line) > WIDTH]


def test_lines_about_plans_fit(folder: Path, spindle_command: Spindle) -> None:
    """Charts, tables and sentences on a plan of 36 MetaOps on 64 devices, sound and broken."""
    done = spindle_command("plan", "graph.json", "-c", "8x8", "--method", "paper", "--table", "-o", "plan.json")
    assert (done.code, too_long(done)) == (0, [])
    assert spindle_command("plan", "graph.json", "-c", "8x8", "--method", "sequential", "-o", "other.json").code == 0
    for command in (["check", "plan.json"], ["explain", "plan.json"], ["show", "plan.json"]):
        done = spindle_command(*command)
        assert (done.code, too_long(done)) == (0, []), command
    done = spindle_command("diff", "plan.json", "other.json")
    assert (done.code, too_long(done)) == (0, [])
    plan = json.loads((folder / "plan.json").read_text())
    for wave in plan["waves"][1:]:
        wave["slices"][0]["start_s"] = 0.0
    (folder / "broken.json").write_text(json.dumps(plan))
    done = spindle_command("check", "broken.json")
    assert (done.code, too_long(done)) == (1, [])
    done = spindle_command("whatif", "graph.json", "-n", "8,16", "-c", "1x8", "--time-limit", "0.1")
    assert (done.code, too_long(done)) == (0, [])


def test_lines_about_models_fit(folder: Path, spindle_command: Spindle) -> None:
    """Losses of eight tasks, parity and its worst rows, a profile, what was exported."""
    threads = ("--launcher", "threads")
    for code, command in (
        (0, ["verify", "model.py", *threads]),
        (1, ["verify", "drifts.py", "--workers", "1", *threads]),
        (0, ["train", "model.py", "--steps", "2", *threads]),
        (0, ["profile", "model.py", "--devices", "1", "--validate", "-o", "profile.json"]),
        (0, ["export", "model.py", "-o", "out"]),
    ):
        done = spindle_command(*command)
        assert (done.code, too_long(done)) == (code, []), (command, done.err)


def test_long_lines_are_folded() -> None:
    """At spaces, with an indent; words longer than a line stay whole, since they are names and paths."""
    assert folded("short\nlines") == "short\nlines"
    words = " ".join(["word"] * 30)
    assert folded(words, indent=4).splitlines() == [" ".join(["word"] * 20), "    " + " ".join(["word"] * 10)]
    assert folded("x" * 120) == "x" * 120


# -- colors ----------------------------------------------------------------------------------------------------------


def said_on_a_terminal(*arguments: str, **environment: str) -> str:
    """Stderr of `spindle ARGUMENTS` when it is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "spindle", *arguments]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "", "TERM": "xterm", **environment}
    try:
        subprocess.run(command, env=given, stdout=subprocess.DEVNULL, stderr=theirs, timeout=60, check=False)
        return os.read(ours, 10_000).decode()
    finally:
        os.close(theirs)
        os.close(ours)


def test_colors_on_terminals_only(folder: Path) -> None:
    """An error's name is red on a terminal, plain in a pipe, and plain where NO_COLOR asks for it."""
    assert said_on_a_terminal("check", "gone.json").startswith("\x1b[31mspindle:\x1b[0m gone.json: cannot be read")
    assert said_on_a_terminal("check", "gone.json", NO_COLOR="1").startswith("spindle: gone.json")
    piped = [sys.executable, "-m", "spindle", "check", "gone.json"]
    done = subprocess.run(piped, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.startswith("spindle: gone.json")


# -- bars -------------------------------------------------------------------------------------------------------------


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Stderr is a terminal; reads what is drawn there."""
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with os.fdopen(theirs, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        yield ours
    os.close(ours)


def drawn(terminal: int, word: str) -> str:
    """All that is drawn until `word` is, within ten seconds."""
    found = ""
    while word not in found:
        ready, _, _ = select.select([terminal], [], [], 10.0)
        assert ready, f"{word!r} was not drawn: {found!r}"
        found += os.read(terminal, 10_000).decode(errors="replace")
    return found


def test_a_bar_of_work_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells the seconds that are left."""
    monkeypatch.setattr("spindle.cli.bars.PATIENCE_S", 0.0)
    with terminal(monkeypatch) as reader, busy("planning", 30.0):
        text = drawn(reader, " s left")
    assert "planning" in text
    assert 15 < int(text.partition(" s left")[0].split()[-1]) <= 30


def test_a_bar_past_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells the seconds gone by, and no longer how much is done."""
    monkeypatch.setattr("spindle.cli.bars.PATIENCE_S", 0.0)
    with terminal(monkeypatch) as reader, busy("planning", 1e-6):
        text = drawn(reader, " s")
    assert "planning" in text
    assert "left" not in text


def test_a_bar_of_work_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spindle.cli.bars.PATIENCE_S", 0.0)
    with terminal(monkeypatch) as reader, busy("verifying"):
        assert "verifying" in drawn(reader, " s")


def test_a_bar_says_what_is_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spindle.cli.bars.PATIENCE_S", 0.0)
    with terminal(monkeypatch) as reader, busy("reading") as doing:
        drawn(reader, "reading")
        doing("planning", 30.0)
        assert "planning" in drawn(reader, " s left")


def test_what_is_said_meanwhile_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line of its own, folded; also while something else holds stderr for a moment. Then all is as it was."""
    monkeypatch.setattr("spindle.cli.bars.PATIENCE_S", 0.0)
    with terminal(monkeypatch) as reader:
        before = sys.stderr
        with redirect_stderr(io.StringIO()) as elsewhere, busy("planning"):
            pass
        assert (elsewhere.getvalue(), sys.stderr) == ("", before)
        with busy("planning"):
            with redirect_stderr(io.StringIO()):
                drawn(reader, "planning")
            show_warning("word " * 30, SpindleWarning)
            text = drawn(reader, "  word")
        assert sys.stderr is before
    assert re.search(r"[\r\n](\x1b\[2K)?(\x1b\[33m)?spindle: warning:", text), text


def test_a_bar_moves_no_generator(folder: Path) -> None:
    """Modules that it needs draw while they are imported; a trace that runs meanwhile would blame the model."""
    code = (
        "import random\nfrom spindle.cli import bars\nbars.PATIENCE_S = 0.0\n"
        "bar = bars.busy('planning')\nwith bar:\n    before = random.getstate()\n    bar.timer.join(30.0)\n"
        "    print(bar.shown and before == random.getstate())\n"
    )
    ours, theirs = pty.openpty()
    given = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=given, stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=False)
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.stdout == b"True\n"


def test_short_work_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as reader:
        with busy("planning", 30.0):
            pass
        assert not select.select([reader], [], [], 0.0)[0]


def test_a_bar_of_counted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as reader, progress("training") as update:
        update(3, 12, "loss 0.5")
        text = drawn(reader, "3/12")
    assert "training" in text


def test_no_bar_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of either is written where no one looks."""
    monkeypatch.setattr("spindle.cli.bars.PATIENCE_S", 0.0)
    with busy("planning", 30.0), progress("training") as update:
        update(3, 12, "loss 0.5")
    assert capsys.readouterr() == ("", "")


def test_lines_of_progress_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe a line every ten seconds, cut to the width."""
    bar: progress = progress("training")
    bar.printed_s -= 11
    with bar as update:
        update(3, 12, "a task with a long name 0.5  " * 9)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training 3/12  a task")
    assert len(line) == WIDTH


def test_rank_0_of_a_torchrun_job_does_the_talking(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        warn(f"of rank {rank}")
    assert capsys.readouterr().err == "spindle: warning: of rank 0\n"
