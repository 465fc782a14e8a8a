"""Help texts and flags are frozen in docs/cli.md: a new command or option shows there as a difference, to be read in
review. `python docs/reference.py` writes the page anew.
"""

from pathlib import Path

import pytest
from click.testing import CliRunner

from spindle.cli import cli

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def help_of(*command: str) -> str:
    done = CliRunner().invoke(cli, [*command, "--help"], prog_name="spindle", terminal_width=100)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", ["", *cli.commands])
def test_help(command: str) -> None:
    """What a command takes stands in docs/cli.md; no line is wider than 100 columns."""
    text = help_of(*command.split())
    assert f"```text\n{text.rstrip()}\n```" in PAGE.read_text(encoding="utf-8"), "run python docs/reference.py"
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("command", cli.commands)
def test_every_command_shows_an_example(command: str) -> None:
    """The help of each command has a line that one can type."""
    lines = [line.strip() for line in help_of(command).splitlines()]
    assert [line for line in lines if line.startswith((f"spindle {command} ", "torchrun"))]


WITHOUT_JSON = {"completion"}  # it prints lines for a shell


@pytest.mark.parametrize("command", sorted(set(cli.commands) - WITHOUT_JSON))
def test_every_command_speaks_json(command: str) -> None:
    assert "--json" in help_of(command)


def test_commands_stand_in_the_order_of_use() -> None:
    """Not in that of the alphabet."""
    listed = help_of().partition("Commands:")[2].split("\n")
    names = [line.split()[0] for line in listed if line.startswith("  ") and not line.startswith("   ")]
    assert names == list(cli.commands)
    assert names.index("plan") < names.index("check") < names.index("train")
