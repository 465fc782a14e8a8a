"""Files that are spoiled, or meant to do harm: every command that reads them ends in time, and says why."""

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spindle.errors import FormatError
from spindle.files.clusterfile import parse_yaml
from tests import spoiled
from tests.edits import Edit, edited, edited_bytes
from tests.spoiled import Case
from tests.spoiled_samples import COMMANDS, SLOW

HOSTILE = Path(__file__).with_name("hostile")
CORPUS = Path(__file__).with_name("corpus.jsonl")
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
    kind, name = KINDS[file.stem.split("-")[1]], f"spoiled{file.suffix}"
    Path(name).write_bytes(file.read_bytes())
    for command in COMMANDS[kind] + SLOW.get(kind, []):
        code, out, err = spoiled.run(*(name if part == "FILE" else part for part in command))
        assert spoiled.wrong(code, out, err) == "", command
        assert code in (1, 2), command
        assert SAID[file.stem[:3]] in " ".join((out + err).split()), command


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_changes(first: int) -> None:
    """Twenty seeds each; benchmarks/fuzz/input_fuzz.py runs as many as one likes."""
    for seed in range(first, first + 20):
        case = spoiled.case(random.Random(seed))
        _, broken = case.verdict()
        assert not broken, (seed, case.text)


@pytest.mark.parametrize("part", range(4))
def test_the_corpus(part: int) -> None:
    """Cases that reached new branches when the fuzzer was guided by them, and cases that broke a rule once."""
    for line in CORPUS.read_text().splitlines()[part::4]:
        _, broken = Case.of(line).verdict()
        assert not broken, line


def test_edits() -> None:
    """Changes that are data: of the structure in their order, where their place is there; then of bytes."""
    value = {"a": [1, 2], "b": "x"}
    rows: tuple[tuple[list[Edit], Any], ...] = (
        ([["set", ["a", 0], None], ["drop", ["b"]]], {"a": [None, 2]}),
        ([["copy", ["a", 1], ["b"]], ["times", ["b"], 2.5]], {"a": [1, 2], "b": 5.0}),
        ([["double", ["a", 0], 2], ["name", ["b"], "c"]], {"a": [1, 2, 1], "c": "x"}),
        ([["long", ["b"], 3], ["many", ["a", 0], 2], ["nest", ["a", 1], 2]], {"a": [[1, 1], [[2]]], "b": "xxx"}),
        ([["drop", ["gone"]], ["set", ["b", "c", 0], 1], ["cut", 0, 1]], value),
    )
    for edits, expected in rows:
        assert edited(value, edits) == expected
    assert edited_bytes(b"abcd", [["cut", 0, 1], ["put", 1, "x"], ["flip", 0, 1], ["repeat", 0, 2]]) == b"cxcxcd"


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


LONG_WAYS = {
    "unfolds": (
        "\n".join(["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
                  + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]),
        "holds more than 100000 values",
    ),
    "merges": (
        "\n".join(["a0: &a0 {k: 1}"]
                  + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]),
        "'<<' stands in the mapping that begins at line 2; write out",
    ),
    "is deep": ("a: " + "[" * 100_000, "nested deeper than 100"),
    "is deep in many places": (f"a: [{', '.join(['[' * 60 + ']' * 60] * 5000)}]", "holds more than 100000 values"),
    "has many keys": ("\n".join(f"k{n}: 1" for n in range(60_000)), "holds more than 100000 values"),
    "has one long number": ("a: 1" + ":1" * 1_000_000, "has more than 10000 characters"),
}  # fmt: skip
"""YAML of a few lines or megabytes that would take minutes, or all memory: each is told within a second or so."""


@pytest.mark.parametrize("name", LONG_WAYS)
def test_yaml_that_would_take_long(name: str) -> None:
    text, words = LONG_WAYS[name]
    Path("long.yaml").write_text(text)
    code, _, err = spoiled.run("plan", "long.yaml", "-c", "1x2")
    assert (code, words in " ".join(err.split())) == (2, True), err


def test_many_keys_are_read() -> None:
    """As many as a file may have; the last one is there twice."""
    text = "\n".join(f"k{n}: 1" for n in range(9_000))
    assert len(parse_yaml(text)) == 9_000
    with pytest.raises(FormatError, match="key 'k8999' stands twice"):
        parse_yaml(f"{text}\nk8999: 2")
