"""Files that are spoiled, or meant to do harm: every command that reads them ends in time, and says why."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import spoiled
from tests.spoiled import Case

HOSTILE = Path(__file__).with_name("hostile")
KINDS = {
    "plan": "plan.json",
    "trace": "trace.json",
    "graph": "graph.json",
    "cluster": "cluster.yaml",
    "spec": "spec.yaml",
}
SAID = {
    "f01": "the MetaGraph has no MetaOp 'nobody'",
    "f02": "runs on device 10000000 but the plan has 4 devices",
    "f03": "num_layers is '9007199254740992': input should be less",
    "f04": "runs on 4 devices; valid counts are 1",
    "f05": "ranks, from 0",
    "f06": "start_s is '-1e+308': input should be greater",
    "f07": "it holds a control character",
    "f08": "layer_time_s.2 is '1e+18': input should be less",
    "f09": "layers is '18446744073709551616': input should be less",
    "f10": "devices_per_node is '1000000000000000000000000000000': input should be less",
    "f11": "not YAML (Exceeds the limit",
    "f12": "tokens_p99.llm is '1000",
    "f13": "layers is '18446744073709551616': input should be less",
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Valid files of every format."""
    argv, shown = sys.argv, warnings.showwarning
    with contextlib.chdir(tmp_path_factory.mktemp("spoiled")):
        spoiled.prepare()
        yield
    sys.argv, warnings.showwarning = argv, shown


@pytest.mark.parametrize("file", sorted(HOSTILE.iterdir()), ids=lambda file: file.stem)
def test_hostile_files(file: Path) -> None:
    """Files that once crashed a command, or kept it busy for ever: all commands of their kind say what is wrong."""
    kind = KINDS[file.stem.split("-")[1]]
    for command in spoiled.COMMANDS[kind]:
        case = Case(kind, file.read_bytes(), command)
        code, broken = case.verdict()
        assert not broken, command
        _, out, err = spoiled.run(*(f"spoiled{file.suffix}" if part == "FILE" else part for part in command))
        assert code in (1, 2), command
        assert SAID[file.stem[:3]] in " ".join((out + err).split()), command


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_changes(first: int) -> None:
    """Twenty seeds each; benchmarks/input_fuzz.py runs as many as one likes."""
    for seed in range(first, first + 20):
        case = spoiled.case(seed)
        _, broken = case.verdict()
        assert not broken, (seed, case.command)


def test_rules_are_rules() -> None:
    """Negative control: ends that break them."""
    assert spoiled.wrong(70, "", "spindle: a bug") == "exit code 70"
    assert spoiled.wrong(2, "", "") == "0 lines"
    assert spoiled.wrong(2, "", "a\nb\nc\nd\n") == "4 lines"
    assert spoiled.wrong(2, "", "x" * 100) == "a line of 100 columns or more"
    assert spoiled.wrong(2, "", f"spindle: warning: {'x' * 3000}\na") == "3020 characters"
    assert spoiled.wrong(0, "\x1b[31mred", "") == "control characters"
    assert spoiled.wrong(1, "found", "") == ""


def test_what_has_no_end_is_not_read() -> None:
    """A device that gives zeros for ever, and a pipe that nobody writes to."""
    import os

    Path("endless.json").symlink_to("/dev/zero")
    os.mkfifo("pipe.json")
    for name, said in (("endless.json", "more than 256 MiB"), ("pipe.json", "is a pipe")):
        code, _, err = spoiled.run("explain", name)
        assert (code, said in err) == (2, True), err


def test_a_value_that_unfolds_is_not_gone_through() -> None:
    """Eight lines of YAML that stand for a hundred million values."""
    lines = ["format: spindle.workload", "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]
    Path("unfolds.yaml").write_text("\n".join(lines))
    code, _, err = spoiled.run("plan", "unfolds.yaml", "-c", "1x2")
    assert (code, "holds more than 100000 values" in err) == (2, True), err
