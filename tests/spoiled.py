"""Spoiled files: valid ones of every format, changed by their structure (a value of another kind or size, a key less or
twice, parts put elsewhere) and by their bytes; commands that read them, and the rules that each end keeps.

Each ends within its time with exit code 0 to 3; refusals are one to three lines of fewer than 100 columns, and nothing
that is printed holds a control character.
"""

import contextlib
import functools
import io
import json
import random
import shutil
import signal
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from spindle.cli import main as spindle
from spindle.words.harmless import harmless
from tests import spoiled_samples
from tests.edits import Edit, edited, edited_bytes, random_bytes_edit, random_edit
from tests.spoiled_samples import COMMANDS, SLOW, bytes_of, sign, value_of

LIMIT_S = 30  # of the processor, since other work must not make a test fail
SLOW_SHARE = 0.01
MOST_EDITS = 6


class Hang(BaseException):
    """A command did not end in time."""


def _late(_: int, __: FrameType | None) -> None:
    raise Hang


def run(*arguments: str) -> tuple[int, str, str]:
    """A command in this process: its exit code, what it printed, and what it said."""
    out, err = io.StringIO(), io.StringIO()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.alarm(10 * LIMIT_S)
    sys.argv = ["spindle", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            spindle()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 99
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return code, out.getvalue(), err.getvalue()


def wrong(code: int, out: str, err: str) -> str:
    """Which rule an end breaks, or ""."""
    if code not in (0, 1, 2, 3):
        return f"exit code {code}"
    said = [line for line in err.splitlines() if not line.startswith("spindle: warning:")]
    if code in (2, 3) and not 1 <= len(said) <= 3:
        return f"{len(said)} lines"
    if any(len(line) > 99 for line in said):
        return "a line of 100 columns or more"
    if code in (2, 3) and (len(err) > 2000 or "Traceback" in err):
        return f"{len(err)} characters"
    if harmless(out + err) != out + err:
        return "control characters"
    return ""


# -- cases ------------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Valid files of every format, in this folder."""
    spoiled_samples.prepare(run)
    _sample.cache_clear()
    _value.cache_clear()


@functools.cache
def _sample(name: str) -> bytes:
    return Path(name).read_bytes()


@functools.cache
def _value(name: str) -> Any:
    return value_of(name, _sample(name))


@dataclass(frozen=True)
class Case:
    """A sample, what is changed in it, and the command that reads it: `FILE` is the file, or the folder it is in."""

    name: str
    command: tuple[str, ...]
    edits: tuple[Edit, ...] = ()

    @property
    def text(self) -> str:
        """The case as a line of JSON."""
        return json.dumps([self.name, self.command, self.edits])

    @classmethod
    def of(cls, text: str | bytes) -> "Case":
        """The case of such a line; raises ValueError for another text."""
        name, command, edits = json.loads(text)
        return cls(name, tuple(command), tuple(edits))

    @property
    def data(self) -> bytes:
        """The spoiled file."""
        sample = _sample(self.name)
        limit = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)  # numbers of thousands of digits may be written
        try:
            value = edited(_value(self.name), self.edits)
            with contextlib.suppress(RecursionError):
                sample = bytes_of(self.name, value, sample)
        finally:
            sys.set_int_max_str_digits(limit)
        return edited_bytes(sample, self.edits)

    def words(self) -> list[str]:
        """The command's words, when what it reads is in place."""
        if self.name == "words":
            return [str(word).replace("\0", "") for word in self._given()] or ["plan"]
        path = Path(self.name)
        root, *inner = path.parts
        spoiled = Path("spoiled", *inner) if inner else Path(f"spoiled{path.suffix}")
        if inner:
            shutil.rmtree("spoiled", ignore_errors=True)
            shutil.copytree(root, "spoiled")
        spoiled.write_bytes(self.data)
        if root == "runs":
            sign(spoiled.parent, files=spoiled.suffix != ".json")
        return [part.replace("FILE", "spoiled" if inner else str(spoiled)) for part in self.command]

    def _given(self) -> list[Any]:
        try:
            lines = json.loads(self.data)
        except (ValueError, RecursionError):
            return []
        given = lines[len(self.edits) % len(lines)] if isinstance(lines, list) and lines else lines
        return given if isinstance(given, list) else [given]

    def verdict(self) -> tuple[int, str]:
        """Run the command, in the folder of the samples: its exit code, and which rule it breaks, or ""."""
        words = self.words()
        try:
            code, out, err = run(*words)
        except Hang:
            return -1, f"not through in {LIMIT_S} s"
        broken = wrong(code, out, err)
        return code, f"{broken}: {err.strip().splitlines()[0][:160] if err.strip() else ''}" if broken else ""


def case(draw: random.Random) -> Case:
    """A random case: a few edits of a sample."""
    slow = draw.random() < SLOW_SHARE
    commands = SLOW if slow else COMMANDS
    name = draw.choice(list(commands))
    found = Case(name, draw.choice(commands[name]))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = varied(found, draw)
    return found


def varied(old: Case, draw: random.Random) -> Case:
    """The case with one edit more, one less, or another command that reads the same file; mostly a quick one."""
    kind = draw.random()
    if old.edits and (kind < 0.15 or len(old.edits) >= MOST_EDITS):
        gone = draw.randrange(len(old.edits))
        return replace(old, edits=old.edits[:gone] + old.edits[gone + 1 :])
    if kind < 0.25:
        return replace(old, command=draw.choice(COMMANDS.get(old.name) or SLOW[old.name]))
    sample = _sample(old.name)
    if kind < 0.35 or old.name.endswith(".pt"):
        return replace(old, edits=(*old.edits, random_bytes_edit(len(sample), draw)))
    return replace(old, edits=(*old.edits, random_edit(edited(_value(old.name), old.edits), draw)))


def quick(old: Case, draw: random.Random) -> Case:
    """The case with a quick command that reads the same file, or another case; slow ones now and then."""
    if old.command in COMMANDS.get(old.name, ()) or draw.random() < SLOW_SHARE:
        return old
    commands = COMMANDS.get(old.name)
    return replace(old, command=draw.choice(commands)) if commands else case(draw)
