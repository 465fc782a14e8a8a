"""What `graph`, `curves` and `whatif -o` write and print, and what they refuse."""

import json
from pathlib import Path

import pytest

from tests.printed.conftest import Spindle
from tests.printed.samples import SPEC, metagraph_file

ON = ("small.yaml", "--cluster", "1x2:a100-80g")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    metagraph_file(tmp_path / "graph.json")
    (tmp_path / "small.yaml").write_text(SPEC)
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "broken.yaml").write_text(SPEC.replace("layers: 2", "layers: none"))
    return tmp_path


@pytest.mark.parametrize("command", ["graph", "curves"])
def test_pictures_by_suffix(folder: Path, spindle_command: Spindle, command: str) -> None:
    """SVG without a word; else what the name says."""
    done = spindle_command(command, *ON)
    assert (done.code, done.out, done.err) == (0, f"written to {command}.svg\n", "")
    text = (folder / f"{command}.svg").read_text()
    assert text.startswith("<svg ")
    assert ">small.yaml</text>" in text
    assert "On 1x2:a100-80g; costs: 3 predicted." in text
    assert spindle_command(command, *ON, "-o", "p.png").code == 0
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


def test_mermaid(folder: Path, spindle_command: Spindle) -> None:
    """On stdout it is what is written to a file; nothing else is written."""
    printed = spindle_command("graph", *ON, "--mermaid")
    assert printed.out.startswith("flowchart LR\n")
    assert not (folder / "graph.svg").exists()
    assert spindle_command("graph", *ON, "-o", "g.mmd").out == "written to g.mmd\n"
    assert (folder / "g.mmd").read_text() == printed.out


def test_json(folder: Path, spindle_command: Spindle) -> None:
    """The values of the picture, and the file where one is asked for."""
    found = json.loads(spindle_command("graph", *ON, "--json", "-o", "g.svg").out)
    assert [node["name"] for node in found["nodes"]] == ["match.eye", "match.ear", "match.loss"]
    assert [edge["target"] for edge in found["edges"]] == ["match.loss", "match.loss"]
    assert found["written"] == ["g.svg"]
    found = json.loads(spindle_command("curves", "graph.json", "-c", "1x2", "--json").out)
    assert [panel["name"] for panel in found["panels"]] == ["tower", "loss"]
    assert found["panels"][0]["curves"][0]["points"] == [[1, 0.2], [2, 0.1]]
    assert found["written"] == []
    assert not (folder / "curves.svg").exists()


def test_whatif_draws_what_it_prints(folder: Path, spindle_command: Spindle) -> None:
    plain = ("whatif", "graph.json", "--devices", "1,2", "--cluster", "1x2", "--time-limit", "0.1")
    done = spindle_command(*plain, "-o", "sizes.svg")
    assert done.code == 0
    assert done.out.endswith("\nwritten to sizes.svg\n")
    text = (folder / "sizes.svg").read_text()
    assert "100.0 %" in text
    assert ">efficiency</text>" in text


REFUSED = {
    "no such kind": (2, "'p.gif' says no kind of picture; let it end in .svg, .png or .mmd", ("graph", "-o", "p.gif")),
    "no Mermaid of curves": (
        2,
        "'p.mmd' says no kind of picture; let it end in .svg or .png",
        ("curves", "-o", "p.mmd"),
    ),
    "no folder": (2, "no/p.svg: its directory does not exist; make it first", ("graph", "-o", "no/p.svg")),
    "a folder": (2, "folder.svg: cannot be written", ("curves", "-o", "folder.svg")),
    "twice stdout": (2, "--mermaid and --json both print on stdout; give one", ("graph", "--mermaid", "--json")),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_drawn(folder: Path, spindle_command: Spindle, case: tuple[int, str, tuple[str, ...]]) -> None:
    code, words, (command, *options) = case
    done = spindle_command(command, *ON, *options)
    assert (done.code, done.out) == (code, "")
    assert words in done.said
    assert len(done.err.splitlines()) <= 3
    assert sorted(path.name for path in folder.iterdir() if path.suffix in (".svg", ".mmd")) == ["folder.svg"]


@pytest.mark.parametrize("command", ["graph", "curves"])
def test_sources_that_are_broken(folder: Path, spindle_command: Spindle, command: str) -> None:
    """As of `plan`: exit 2, or 3 where the cluster is too small for a MetaOp."""
    done = spindle_command(command, "broken.yaml", "-c", "1x2:a100-80g")
    assert (done.code, "components.eye" in done.err) == (2, True)
    assert "add --cluster" in spindle_command(command, "graph.json").err
    metagraph_file(folder / "wide.json", lambda data: data["metaops"][0].update(layer_time_s={"4": 0.1}))
    assert spindle_command(command, "wide.json", "-c", "1x2").code == (3 if command == "curves" else 0)
