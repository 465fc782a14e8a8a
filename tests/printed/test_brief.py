"""Errors are one to three lines of fewer than 100 columns, which keep the beginning of the text and its remedy."""

import contextlib
import io
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.cli import cli, entry
from spindle.cli.brief import COLUMNS, brief
from spindle.errors import SpindleError
from spindle.words.harmless import harmless

WORDS = st.one_of(
    st.text(max_size=12), st.text(min_size=80, max_size=300), st.sampled_from(["a;", "\n", "; ", "/a" * 99])
)
TEXTS = st.one_of(st.text(), st.lists(WORDS, max_size=80).map(" ".join))


@given(text=TEXTS, rows=st.integers(1, 3))
def test_every_text_fits(text: str, rows: int) -> None:
    lines = brief(harmless(text), rows=rows)
    assert 1 <= len(lines) <= rows
    assert all(line.strip() and len(line) <= COLUMNS for line in lines)


@given(words=st.lists(st.text("abc.;", min_size=1, max_size=20), min_size=1, max_size=14))
def test_a_text_that_fits_stays_whole(words: list[str]) -> None:
    """Nothing but spaces and line breaks changes."""
    assert " ".join(" ".join(brief(" ".join(words))).split()) == " ".join(words)


@given(words=st.lists(st.text("abc", min_size=1, max_size=200), min_size=1, max_size=99), rows=st.integers(1, 3))
def test_the_remedy_survives(words: list[str], rows: int) -> None:
    """Also when the text before it is long."""
    text = " ".join(" ".join(brief(f"spindle: {' '.join(words)}; lower the batch size", rows=rows)).split())
    assert text.startswith("spindle:")
    assert text.endswith("lower the batch size")


def test_long_texts_word_by_word() -> None:
    """A path that is wider than a line, a list that is longer than three, and four lines."""
    assert brief(f"x.json: {'/folder' * 20}/plan.json: not JSON; mend it") == [
        "x.json:",
        "  /folder/folder/folder/folder/folder/folder/fold...r/folder/folder/folder/folder/folder/plan.json:",
        "  not JSON; mend it",
    ]
    names = ", ".join(f"task-{number}" for number in range(60))
    assert brief(f"tasks {names} have no data; give each of them data=") == [
        "tasks task-0, task-1, task-2, task-3, task-4, task-5, task-6, task-7, task-8, task-9, task-10,",
        "  task-11, task-12, task-13, task-14, task-15, task-16, task-17, task-18, task-19, task-20,",
        "  task-21, task-22, task-23, task-24, task-25, task-26, task-27, ... give each of them data=",
    ]
    assert brief("first\n\nsecond\nthird\nlast") == ["first ...", "third", "last"]


@given(text=TEXTS, flight=st.none() | st.just("runs/h") | TEXTS)
def test_the_command_line_keeps_the_rules(text: str, flight: str | None) -> None:
    """Whatever is raised: three lines at most, no control characters, and the hint that belongs to it."""
    for error, code in ((SpindleError(text), 2), (RuntimeError(text), entry.BUG), (click.UsageError(text), 2)):
        if isinstance(error, SpindleError):
            error.flight = Path(flight.replace("\0", "")) if flight is not None else None
            error.add_note("Traceback of a worker")
        ended, err = _ended_by(error)
        lines = err.splitlines()
        assert (ended, lines[0].startswith("spindle:")) == (code, True), err
        assert 1 <= len(lines) <= 3, err
        assert all(len(line) <= COLUMNS for line in lines), err
        assert harmless(err) == err
        assert isinstance(error, click.UsageError) or "SPINDLE_DEBUG=1" in err


def _ended_by(error: Exception) -> tuple[int, str]:
    """Exit code and stderr of a command line in which this error is raised."""

    def raises(**_: object) -> None:
        raise error

    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(cli, "main", raises)
        patch.setattr("warnings.showwarning", lambda *_: None)
        patch.delenv("SPINDLE_DEBUG", raising=False)
        with pytest.raises(SystemExit) as end:
            entry.main()
    assert isinstance(end.value.code, int)
    return end.value.code, err.getvalue()


def test_debugging_shows_the_whole_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the traceback of a worker below it."""
    error = SpindleError("word " * 100 + "end")
    error.add_note("Traceback of a worker")

    def raises(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "main", raises)
    monkeypatch.setattr(sys.modules["warnings"], "showwarning", lambda *_: None)
    monkeypatch.setenv("SPINDLE_DEBUG", "1")
    with pytest.raises(SystemExit):
        entry.main()
    assert capsys.readouterr().err == f"spindle: {error}\nTraceback of a worker\n"
