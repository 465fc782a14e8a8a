"""The page on workloads: every workload and every row is there; its commands are well-formed, and quick ones run."""

import re
import runpy
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from spindle.cli import cli
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import loads
from spindle.values.plan import Plan

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "pages" / "workload_page.py"))  # scripts are no package
TEXT: str = SCRIPT["PAGE"].read_text(encoding="utf-8")
COMMANDS: list[str] = SCRIPT["commands"](TEXT)
SPECS = sorted((ROOT / "benchmarks" / "workloads").rglob("*.yaml"))
QUICK_DEVICES = 8


def options_of(command: str) -> dict[str, object]:
    """What click reads from a command, without running it."""
    plan = cli.commands["plan"]
    with plan.make_context("plan", command.split()[2:]) as context:
        return dict(context.params)


def is_quick(command: str) -> bool:
    options = options_of(command)
    return bool(options["time_limit_s"]) and parse_cluster(str(options["cluster"])).num_devices <= QUICK_DEVICES


def test_every_row_is_on_the_page() -> None:
    """Rows 1 to 46 and A to D, once each: a command, another page or test, or the reason why not."""
    rows = re.findall(r"^\| (\d+|[A-D]) \| ([^|]*) \| ([^|]*) \|", TEXT, re.MULTILINE)
    assert [row for row, _, _ in rows] == [*map(str, range(1, 47)), *"ABCD"]
    starts = ("`spindle plan ", "not offered", "no spec: ", "partly")
    assert [row for row, _, what in rows if not what.startswith(starts)] == []
    reasons = [what.partition(":")[2] for _, _, what in rows if what.startswith("not offered")]
    assert all(len(reason) > 20 for reason in reasons)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_is_planned_on_the_page(path: Path) -> None:
    """Also those of single rows."""
    assert any(str(path.relative_to(ROOT)) in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_well_formed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are known; the spec and the cluster are there."""
    monkeypatch.chdir(ROOT)
    options = options_of(command)
    assert Path(str(options["source"])).is_file()
    assert parse_cluster(str(options["cluster"])).num_devices >= 1


def test_commands_have_results() -> None:
    """What `python -m benchmarks.pages.workload_page` wrote; none failed."""
    cells = {m[1]: m[2] for m in re.finditer(r"\| `(spindle plan benchmarks/[^`]+)` \| ([^|]*)\|", TEXT)}
    assert set(cells) == set(COMMANDS)
    assert [command for command, cell in cells.items() if not re.match(r"[\d.e+-]+ s; ", cell)] == []


@pytest.mark.parametrize("command", [command for command in COMMANDS if is_quick(command)])
def test_quick_commands_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives a plan that fits, with little time to search."""
    monkeypatch.chdir(ROOT)
    words = command.split()[1:]
    words[words.index("--time-limit") + 1] = "0.05"
    done = CliRunner().invoke(cli, [*words, "--json"], prog_name="spindle", catch_exceptions=False)
    assert done.exit_code == 0, done.output
    plan = loads(done.stdout, Plan)
    assert plan.memory.fits
    assert SCRIPT["result_of"](plan).startswith(f"{plan.step_s:.3g} s; ")


def test_results_go_into_the_cell_behind_their_command() -> None:
    text = "# a\n\n| 1 | `spindle plan benchmarks/a.yaml -c 1x1` | old | more |\n| 2 | not offered: b | | |\n"
    with_results = SCRIPT["with_results"]
    again = with_results(text, {"spindle plan benchmarks/a.yaml -c 1x1": "1 s; as fast"})
    assert again == text.replace("old", "1 s; as fast")
    assert with_results(again, {}) == again


def test_a_command_that_click_does_not_know_is_found() -> None:
    with pytest.raises(click.UsageError):
        options_of("spindle plan benchmarks/workloads/pi0.yaml --no-such-option")
