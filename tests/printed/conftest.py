"""The command line in this process: arguments in; exit code, stdout and stderr out."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from spindle.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a shell would see."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Stderr, as if its lines were not wrapped."""
        return " ".join(self.err.split())


Spindle = Callable[..., Outcome]


@pytest.fixture
def spindle_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Runs `spindle ARGUMENTS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["spindle", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        printed = capsys.readouterr()
        return Outcome(ended.value.code, printed.out, printed.err)

    return run
