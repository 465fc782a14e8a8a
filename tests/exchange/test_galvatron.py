"""Galvatron's profiles: what a MetaGraph of them says, and what is refused. The sample files are made up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spindle.errors import FormatError
from spindle.exchange.galvatron import read_galvatron
from spindle.files.formats import read
from spindle.values.metagraph import Flow, MetaGraph
from spindle.values.plan import Plan
from tests.printed.conftest import Spindle, spindle_command

__all__ = ["spindle_command"]  # a fixture

SAMPLE = Path(__file__).parent / "galvatron"
TIMES, MEMORY, MAPPING = (
    "computation_profiling_bf16_tower_all.json",
    "memory_profiling_bf16_tower_all.json",
    "galvatron.yaml",
)
MIB = 2.0**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SAMPLE, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_chains_and_what_is_no_layer() -> None:
    """Of each component in each task a chain; what is no layer before or after it; flows stage by stage."""
    graph = read_galvatron(SAMPLE / MAPPING)
    assert [(m.name, m.component, m.layers) for m in graph] == [
        ("caption.tower.other", "tower", 1),
        ("caption.tower", "tower", 6),
        ("caption.decoder", "decoder", 2),
        ("caption.decoder.other", "decoder", 1),
        ("classify.tower.other", "tower", 1),
        ("classify.tower", "tower", 6),
    ]
    assert set(graph.flows) == {
        Flow("caption.tower.other", "caption.tower"),
        Flow("caption.tower", "caption.decoder"),
        Flow("caption.decoder", "caption.decoder.other"),
        Flow("classify.tower.other", "classify.tower"),
    }
    assert graph["caption.tower"].parameters == graph["classify.tower"].parameters != ""


def test_times() -> None:
    """A layer's forward takes 2 ms for one sample and 4 ms for four; backward twice that. The batch is eight."""
    tower = read_galvatron(SAMPLE / MAPPING)["caption.tower"]
    forward_ms = {n: seconds * 1e3 / 3 for n, seconds in tower.layer_time_s}
    assert forward_ms == pytest.approx({1: 8.0, 2: 4.0, 4: 2 + 2 / 3, 8: 2.0})
    assert tower.forward_fraction == pytest.approx(1 / 3)
    other = read_galvatron(SAMPLE / MAPPING)["caption.tower.other"]
    assert other.times[2] == pytest.approx(3 * 4 * 1.5e-3)


def test_memory() -> None:
    """Six layers of 32 MiB of states and 4 MiB a sample; of 2**21 parameters gradients of two bytes are reduced."""
    graph = read_galvatron(SAMPLE / MAPPING)
    tower, other = graph["caption.tower"], graph["caption.tower.other"]
    assert tower.memory == pytest.approx({n: 6 * (32 + 4 * (8 / n)) * MIB for n in (1, 2, 4, 8)})
    assert other.memory[1] == pytest.approx((40 + 4 * 8) * MIB)
    assert (tower.layer_param_bytes, tower.layer_state_bytes) == (2 * 2**21, 32 * MIB)
    assert tower.output_bytes == 8 * 16 * 32 * 2
    assert graph["caption.decoder"].memory_bytes == ()
    assert graph["caption.decoder"].output_bytes == 0.0


def test_other_shares_and_sizes(folder: Path) -> None:
    """`backward_over_forward`, `value_bytes` and `other: none` are what they say."""
    text = (folder / MAPPING).read_text().replace("other: before", "other: none")
    (folder / MAPPING).write_text(f"backward_over_forward: 1.0\nvalue_bytes: 4\n{text}")
    graph = read_galvatron(folder / MAPPING)
    assert "caption.tower.other" not in graph.by_name
    tower = graph["caption.tower"]
    assert (tower.times[2], tower.forward_fraction) == pytest.approx((8e-3, 0.5))
    assert tower.layer_param_bytes == 4 * 2**21


def test_imported_then_planned(folder: Path, spindle_command: Spindle) -> None:
    """The file holds the MetaGraph, and a plan of it is made and checked."""
    done = spindle_command("import-galvatron", MAPPING, "-o", "graph.json")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[2].split() == ["caption.tower", "6", "144.000", "0.38"]
    assert max(map(len, done.out.splitlines())) <= 100
    assert read(folder / "graph.json", MetaGraph) == read_galvatron(folder / MAPPING)
    told = spindle_command("import-galvatron", MAPPING, "-o", "graph.json", "--json")
    assert json.loads(told.out) == json.loads((folder / "graph.json").read_text())
    assert spindle_command("plan", "graph.json", "-c", "1x4", "-o", "plan.json").code == 0
    assert spindle_command("check", "plan.json").code == 0
    assert {s.metaop for s in read(folder / "plan.json", Plan)} == set(read_galvatron(folder / MAPPING).by_name)


# -- refusals ---------------------------------------------------------------------------------------------------------


def lines(old: str, new: str) -> Callable[[Path], None]:
    """A change of the mapping."""

    def change(folder: Path) -> None:
        text = (folder / MAPPING).read_text()
        assert old in text
        (folder / MAPPING).write_text(text.replace(old, new, 1))

    return change


def values(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of a profile."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        edit(data)
        (folder / name).write_text(json.dumps(data))

    return change


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


LAYER, OTHER = "layertype_0_bsz1_seq16", "layertype_other_bsz1_seq16"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "an unknown field": (lines("layers: 6", "layers: 6\n    width: 3"), "components.tower.width is not a known field"),
    "an unknown version": (lines("version: 1", "version: 2"), "version is '2'"),
    "another format": (lines("spindle.galvatron", "spindle.workload"), "format is 'spindle.workload'"),
    "no layers": (lines("layers: 6", "layers: 0"), "components.tower.layers is '0'"),
    "no samples": (lines("batch_size: 8", "batch_size: 0"), "tasks.caption.batch_size is '0'"),
    "no flow": (lines("flow: [[tower]]", "flow: []"), "tasks.classify.flow"),
    "an unknown component": (lines("[decoder]", "[speaker]"), "names 'speaker'; the components are tower, decoder"),
    "a component twice": (
        lines("[decoder]", "[tower]"),
        "tasks.caption.flow names 'tower' twice; a component stands once in a task",
    ),
    "an unknown place": (lines("other: before", "other: around"), "components.tower.other is 'around'"),
    "a file that is not there": (lines(TIMES, "gone.json"), "gone.json: cannot be read"),
    "another length": (lines("seq: 16", "seq: 32"), "no key layertype_0_bsz*_seq32; it has seq 16; give one of these"),
    "another layer type": (lines("seq: 16", "seq: 16\n    layertype: 1"), "no key layertype_1_bsz*_seq16"),
    "raw measurements only": (
        values(TIMES, lambda data: [data.pop(key) for key in list(data) if key.startswith("layertype")]),
        "let Galvatron process its measurements",
    ),
    "no rest": (
        values(TIMES, lambda data: [data.pop(key) for key in list(data) if "other" in key]),
        "no key layertype_other_bsz*_seq16; let Galvatron process its measurements, or the component other: none",
    ),
    "no time": (values(TIMES, lambda data: data.update({LAYER: 0.0})), f"{LAYER} is 0.0; measure"),
    "no time of the rest": (values(TIMES, lambda data: data.update({OTHER: 0})), "or give the component other: none"),
    "a negative time": (values(TIMES, lambda data: data.update({LAYER: -1.0})), f"{LAYER} is -1.0; it must be"),
    "a time in words": (values(TIMES, lambda data: data.update({LAYER: "2 ms"})), f"{LAYER} is '2 ms'; it must be"),
    "a time that is no number": (values(TIMES, lambda data: data.update({LAYER: float("nan")})), f"{LAYER} is nan"),
    "a list": (text(TIMES, "[]"), "is a list, not an object of measurements"),
    "no JSON": (text(TIMES, "{"), "not JSON"),
    "a key twice": (text(TIMES, f'{{"{LAYER}": 1.0, "{LAYER}": 2.0}}'), "stands twice in one object"),
    "no memory of layers": (
        values(MEMORY, lambda data: data.pop("layertype_0_sp")),
        f"{MEMORY}: no key layertype_0; check layertype and seq",
    ),
    "memory of another length": (
        values(MEMORY, lambda data: data.update(layertype_0_sp={"64": {}})),
        "no key layertype_0.16; it has 64",
    ),
    "memory of tensor parallelism only": (
        values(MEMORY, lambda data: data["layertype_0_sp"]["16"]["tp_activation_per_bsz_dict"].pop("1")),
        "no key layertype_0.16.tp_activation_per_bsz_dict.1; it has 2, checkpoint",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_is_refused(folder: Path, spindle_command: Spindle, case: tuple[Callable[[Path], object], str]) -> None:
    """By name, in one to three lines, and nothing is written."""
    change, words = case
    change(folder)
    done = spindle_command("import-galvatron", MAPPING, "-o", "graph.json")
    assert (done.code, words in done.said, done.out) == (2, True, ""), done.err
    assert 1 <= len(done.err.splitlines()) <= 3
    assert not (folder / "graph.json").exists()


def test_a_mapping_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gone\.yaml: cannot be read"):
        read_galvatron(tmp_path / "gone.yaml")
