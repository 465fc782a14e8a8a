"""Bad input: one to three lines on stderr that name the value and say what to do; an exit code; never a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.printed.conftest import Spindle
from tests.printed.samples import MODEL, SPEC, metagraph_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything that the cases below name."""
    metagraph_file(tmp_path / "ok.json")
    (tmp_path / "small.yaml").write_text(SPEC)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "syntax.py").write_text("def f(:\n    pass\n")
    (tmp_path / "imports.py").write_text("x = 1\nimport no_such_module\n")
    (tmp_path / "quits.py").write_text("raise SystemExit(0)\n")
    for suffix in ("json", "yaml", "py"):
        (tmp_path / f"folder.{suffix}").mkdir()
        (tmp_path / f"noise.{suffix}").write_bytes(bytes(range(256)))
        (tmp_path / f"empty.{suffix}").write_text("")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.yaml").write_text("[" * 5_000)
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.system ['touch owned']\n")
    return tmp_path


def check(spindle: Spindle, code: int, words: str, *arguments: str) -> None:
    done = spindle(*arguments)
    assert (done.code, words in done.said) == (code, True), (done.code, done.err)
    lines = done.err.splitlines()
    assert 1 <= len(lines) <= 3, done.err
    assert max(map(len, lines)) < 100, done.err
    assert lines[0].startswith("spindle: ")
    assert "Traceback" not in done.err
    assert "bug of Spindle" not in done.err
    assert done.out == ""


# -- MetaGraphs -------------------------------------------------------------------------------------------------------


def of_tower(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["metaops"][0].update(fields)


def of_graph(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update(fields)


METAGRAPHS: dict[str, tuple[Callable[[dict[str, Any]], object], int, str]] = {
    "an unknown field": (of_graph(color="red"), 2, "color is not a known field; remove it"),
    "an unknown field of a MetaOp": (of_tower(width=3), 2, "metaops.0.width is not a known field; remove it"),
    "an unknown version": (of_graph(version=2), 2, "spindle.metagraph version 2; this Spindle reads version 1"),
    "an unknown format": (of_graph(format="spindle.mesh"), 2, "format is 'spindle.mesh'; this Spindle reads"),
    "a circle": (
        of_graph(flows=[["t.tower", "t.loss"], ["t.loss", "t.tower"]]),
        2,
        "t.tower -> t.loss -> t.tower depend on each other in a circle; remove one",
    ),
    "a flow to a missing MetaOp": (
        of_graph(flows=[["t.tower", "t.head"]]),
        2,
        "names MetaOp 't.head', which does not exist; the MetaOps are t.loss, t.tower",
    ),
    "no layers": (of_tower(layers=0), 2, "MetaOp 't.tower': layers is 0; it must be at least one"),
    "fewer than no layers": (of_tower(layers=-3), 2, "layers is -3; it must be at least one"),
    "half a layer": (of_tower(layers=1.5), 2, "metaops.0.layers is '1.5'"),
    "a time that is no number": (of_tower(layer_time_s={"1": float("nan")}), 2, "layer_time_s.1 is 'nan'"),
    "an endless time": (of_tower(layer_time_s={"1": float("inf")}), 2, "layer_time_s.1 is 'inf'"),
    "no time at all": (of_tower(layer_time_s={"1": 0.0}), 2, "layer_time_s on 1 devices is 0.0; it must be a positive"),
    "a negative time": (of_tower(layer_time_s={"1": -0.1}), 2, "layer_time_s on 1 devices is -0.1; it must be"),
    "no times": (of_tower(layer_time_s={}), 2, "layer_time_s is empty; give a time for at least one device count"),
    "a time for no devices": (of_tower(layer_time_s={"0": 0.1}), 2, "names 0 devices; counts start at 1"),
    "an empty workload": (of_graph(metaops=[], flows=[]), 2, "has no MetaOps; an empty workload cannot be planned"),
    "a name twice": (
        lambda data: data["metaops"].append(data["metaops"][0]),
        2,
        "MetaOp 't.tower' stands twice",
    ),
    "a model that cannot fit": (
        of_tower(memory_bytes={"1": 1e15, "2": 1e15}),
        3,
        "but 'a100-80g' has 76.3 GiB for tensors; recompute activations",
    ),
    "more devices than there are": (
        of_tower(layer_time_s={"4": 0.1}, memory_bytes={}),
        3,
        "MetaOp 't.tower' runs on 4 devices but the cluster has 2; use a larger cluster",
    ),
}


@pytest.mark.parametrize("case", METAGRAPHS.values(), ids=METAGRAPHS)
def test_a_metagraph_that_breaks_a_rule(
    folder: Path, spindle_command: Spindle, case: tuple[Callable[[dict[str, Any]], object], int, str]
) -> None:
    change, code, words = case
    name = metagraph_file(folder / "graph.json", change)
    check(spindle_command, code, words, "plan", name, "--cluster", "1x2")


# -- specs ------------------------------------------------------------------------------------------------------------

SPECS: dict[str, tuple[str, str, int, str]] = {
    "an unknown field": ("hidden: 64", "hiden: 64", 2, "components.eye"),
    "an unknown component": ("[[eye, ear]]", "[[eye, nose]]", 2, "nose"),
    "a task without samples": ("batch_size: 8", "batch_size: 0", 2, "batch_size"),
    "no layers": ("layers: 2, hidden: 64", "layers: 0, hidden: 64", 2, "layers"),
    "a key twice": ("version: 1", "version: 1\nversion: 1", 2, "key 'version' stands twice"),
    "an unknown version": ("version: 1", "version: 7", 2, "version"),
    "no tasks": (
        "tasks:\n  match: {batch_size: 8, flow: [[eye, ear]], loss: contrastive}",
        "tasks: {}",
        2,
        "tasks",
    ),
    "no YAML": ("components:", "components: [", 2, "not YAML"),
}


@pytest.mark.parametrize("case", SPECS.values(), ids=SPECS)
def test_a_spec_that_breaks_a_rule(folder: Path, spindle_command: Spindle, case: tuple[str, str, int, str]) -> None:
    old, new, code, words = case
    assert SPEC.count(old) == 1
    (folder / "spec.yaml").write_text(SPEC.replace(old, new))
    check(spindle_command, code, words, "plan", "spec.yaml", "--cluster", "1x2")


def test_a_batch_that_no_device_count_divides(folder: Path, spindle_command: Spindle) -> None:
    """Seven samples on two devices, in a MetaGraph whose only times are for three and five."""
    name = metagraph_file(folder / "graph.json", of_tower(layer_time_s={"3": 0.1, "5": 0.1}, memory_bytes={}))
    check(spindle_command, 3, "runs on 3, 5 devices but the cluster has 2", "plan", name, "--cluster", "1x2")


# -- files ------------------------------------------------------------------------------------------------------------

TRAIN = ("train", "model.py", "--steps", "1")
PLAN = ("plan", "ok.json", "-c", "1x2")

FILES: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "a missing MetaGraph": (2, "gone.json: cannot be read (No such file", ("plan", "gone.json", "-c", "1x2")),
    "a missing spec": (2, "gone.yaml: cannot be read (No such file", ("plan", "gone.yaml", "-c", "1x2")),
    "a missing model": (2, "gone.py: cannot be read (no such file)", ("plan", "gone.py:w", "-c", "1x2:cpu")),
    "a missing plan": (2, "gone.json: cannot be read", ("check", "gone.json")),
    "a missing plan to show": (2, "gone.json: cannot be read", ("show", "gone.json")),
    "a missing plan to train": (
        2,
        "gone.json: cannot be read",
        (*TRAIN, "--plan", "gone.json"),
    ),
    "a missing plan to verify": (2, "gone.json: cannot be read", ("verify", "model.py", "--plan", "gone.json")),
    "a missing profile": (2, "gone.json: cannot be read", (*PLAN, "--profile", "gone.json")),
    "a missing cluster": (2, "gone.yaml: cannot be read", ("plan", "ok.json", "-c", "gone.yaml")),
    "a folder as MetaGraph": (2, "folder.json: cannot be read (Is a directory)", ("plan", "folder.json", "-c", "1x2")),
    "a folder as spec": (2, "folder.yaml: cannot be read (Is a directory)", ("plan", "folder.yaml", "-c", "1x2")),
    "a folder as model": (2, "folder.py: cannot be read (a folder)", ("plan", "folder.py", "-c", "1x2:cpu")),
    "a folder as plan": (2, "folder.json: cannot be read (Is a directory)", ("check", "folder.json")),
    "noise as MetaGraph": (2, "noise.json: cannot be read (not text)", ("plan", "noise.json", "-c", "1x2")),
    "noise as spec": (2, "noise.yaml: cannot be read (not text)", ("plan", "noise.yaml", "-c", "1x2")),
    "noise as model": (2, "noise.py raised SyntaxError", ("plan", "noise.py", "-c", "1x2:cpu")),
    "noise as plan": (2, "noise.json: cannot be read (not text)", ("show", "noise.json")),
    "nothing as MetaGraph": (2, "empty.json: not JSON", ("plan", "empty.json", "-c", "1x2")),
    "nothing as spec": (2, "empty.yaml", ("plan", "empty.yaml", "-c", "1x2")),
    "nothing as model": (2, "empty.py has no 'workload'", ("plan", "empty.py", "-c", "1x2:cpu")),
    "a hundred thousand brackets": (2, "deep.json: not JSON", ("plan", "deep.json", "-c", "1x2")),
    "thousands of brackets": (2, "deep.yaml: not YAML", ("plan", "deep.yaml", "-c", "1x2")),
    "YAML that would run": (2, "code.yaml: not YAML", ("plan", "code.yaml", "-c", "1x2")),
    "a source of no kind": (
        2,
        "'model.txt' is not a workload; give file.py:workload",
        ("plan", "model.txt", "-c", "1x2"),
    ),
    "a MetaGraph as plan": (2, "ok.json: is a spindle.metagraph file; here a Plan is needed", ("check", "ok.json")),
    "a MetaGraph to train": (2, "'ok.json' is not a workload", ("train", "ok.json", "--steps", "1")),
    "a MetaGraph to verify": (2, "'ok.json' is not a workload", ("verify", "ok.json")),
    "a MetaGraph to profile": (2, "'ok.json' is not a workload", ("profile", "ok.json", "-o", "profile.json")),
    "an output in no folder": (
        2,
        "no/plan.json: its directory does not exist; make it first",
        (*PLAN, "-o", "no/plan.json"),
    ),
    "an output that is a folder": (
        2,
        "folder.json: cannot be written",
        (*PLAN, "-o", "folder.json"),
    ),
    "a syntax error": (2, "syntax.py, line 1 raised SyntaxError", ("plan", "syntax.py", "-c", "1x2:cpu")),
    "an import that fails": (
        2,
        "imports.py, line 2 raised ModuleNot",
        ("plan", "imports.py", "-c", "1x2:cpu"),
    ),
    "a file that exits": (2, "quits.py, line 1 raised SystemExit", ("plan", "quits.py", "-c", "1x2:cpu")),
    "a name that is missing": (2, "model.py has no 'absent'; it defines", ("plan", "model.py:absent", "-c", "1x2:cpu")),
    "a name that is a number": (2, "model.py:number is a int; let it be", ("verify", "model.py:number")),
    "a function that raises": (
        2,
        "raised ValueError: no model today",
        ("verify", "model.py:broken_factory"),
    ),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES)
def test_a_file_that_will_not_do(
    folder: Path, spindle_command: Spindle, case: tuple[int, str, tuple[str, ...]]
) -> None:
    code, words, arguments = case
    check(spindle_command, code, words, *arguments)
    assert not (folder / "owned").exists()


# -- models -----------------------------------------------------------------------------------------------------------

MODELS = {
    "nothing": "workload 'nothing' has no tasks; add one with @workload.task(...)",
    "raising": "task 't' raised RuntimeError while it ",
    "misshapen": "task 't' raised RuntimeError while it ",
    "no_scalar": "task 't' returned a float32 tensor of 2 dimensions; return the loss",
    "no_data": "task 't': its data holds no batch; give at least one",
    "burning": "task 't': its loader raised OSError: disk on fire; mend the loader",
    "quitting": "the workload's own code ended the process (SystemExit 0); mend it",
    "packed": "batch['pixels'] has 7 rows for 4 samples; where it is packed, give rows=",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_planned(folder: Path, spindle_command: Spindle, name: str) -> None:
    check(spindle_command, 2, MODELS[name], "plan", f"model.py:{name}", "--cluster", "1x2:cpu")


@pytest.mark.parametrize("command", [("profile", "-o", "p.json"), ("verify",), ("train", "--steps", "1")])
def test_every_command_says_so(folder: Path, spindle_command: Spindle, command: tuple[str, ...]) -> None:
    """A task function that raises, under the commands that would run it."""
    verb, *options = command
    check(spindle_command, 2, "line 24 of model.py: too wet to run", verb, "model.py:raising", *options)


# -- clusters, options ------------------------------------------------------------------------------------------------

CLUSTERS = {
    "0x8": "nodes is 0; a cluster needs at least one",
    "4x0": "devices_per_node is 0; a cluster needs at least one",
    "0": "devices_per_node is 0; a cluster needs at least one",
    "1x-2": "devices_per_node is -2; a cluster needs at least one",
    "many": "cluster 'many' is not NODESxDEVICES; write 4x8",
    "1x2:abacus": "device type 'abacus' is not known; the types are",
}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_cluster_that_is_none(folder: Path, spindle_command: Spindle, cluster: str) -> None:
    check(spindle_command, 2, CLUSTERS[cluster], "plan", "ok.json", "--cluster", cluster)


USAGE: dict[str, tuple[str, tuple[str, ...]]] = {
    "a source of no kind": ("source 'model' is not a workload; give file.py:workload", ("plan", "model")),
    "no checkpoints": ("--resume needs --checkpoints DIR", ("train", "model.py", "--steps", "2", "--resume")),
    "no cluster": ("no cluster is given for ok.json; add --cluster", ("plan", "ok.json")),
    "no source": ("Missing argument 'SOURCE'", ("plan",)),
    "no such command": ("No such command 'plot'", ("plot",)),
    "no such option": ("No such option '--fast'", ("plan", "ok.json", "--fast")),
    "no such method": (
        "'genius' is not one of auto, lp, paper",
        (*PLAN, "--method", "genius"),
    ),
    "no such launcher": ("'slurm' is not one of", ("verify", "model.py", "--launcher", "slurm")),
    "no steps": ("Missing option '--steps'", ("train", "model.py")),
    "zero steps": ("0 is not in the range", ("train", "model.py", "--steps", "0")),
    "zero workers": ("0 is not in the range", ("verify", "model.py", "--workers", "0")),
    "zero devices": ("0 is not in the range", ("profile", "model.py", "-o", "p.json", "--devices", "0")),
    "a time limit of nothing": ("0.0 is not a positive number", (*PLAN, "--time-limit", "0")),
    "a time limit that is none": ("nan is not a positive", (*PLAN, "--time-limit", "nan")),
    "a tolerance that is none": ("nan is not a number from 0 up", ("verify", "model.py", "--rtol", "nan")),
    "a negative tolerance": ("-1.0 is not a number from 0 up", ("verify", "model.py", "--atol", "-1")),
    "a rate that is none": ("nan is not a number", (*TRAIN, "--lr", "nan")),
}


@pytest.mark.parametrize("case", USAGE.values(), ids=USAGE)
def test_wrong_usage(folder: Path, spindle_command: Spindle, case: tuple[str, tuple[str, ...]]) -> None:
    """Exit 2, and where to read on."""
    words, arguments = case
    check(spindle_command, 2, words, *arguments)


# -- plans that were changed ------------------------------------------------------------------------------------------


@pytest.fixture
def plan(folder: Path, spindle_command: Spindle) -> dict[str, Any]:
    assert spindle_command("plan", "ok.json", "--cluster", "1x2", "-o", "plan.json").code == 0
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return found


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("command", [("check",), ("show",), ("show", "--html", "page.html")])
def test_a_truncated_plan(
    folder: Path, spindle_command: Spindle, plan: dict[str, Any], command: tuple[str, ...], share: float
) -> None:
    text = (folder / "plan.json").read_text()
    (folder / "cut.json").write_text(text[: int(len(text) * share)])
    verb, *options = command
    check(spindle_command, 2, "cut.json: not JSON", verb, "cut.json", *options)
    assert not (folder / "page.html").exists()


def in_first_slice(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda plan: plan["waves"][0]["slices"][0].update(fields)


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a layer less": (in_first_slice(num_layers=1), "'t.tower' has 2 layers but the plan runs 1 of them"),
    "a shorter span": (in_first_slice(end_s=0.01), "t.tower"),
    "another MetaOp": (in_first_slice(metaop="t.head"), "t.head"),
    "a device that is not there": (in_first_slice(devices=[0, 5]), "5"),
    "a shorter makespan": (lambda plan: plan.update(makespan_s=0.1), "makespan"),
    "a bound above it": (lambda plan: plan.update(lower_bound_s=9.0), "bound"),
    "another memory": (lambda plan: plan["memory"].update(peak_bytes_per_device=[1.0, 1.0]), "device 0 needs"),
}


@pytest.mark.parametrize("case", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_plan_is_found_out(
    folder: Path,
    spindle_command: Spindle,
    plan: dict[str, Any],
    case: tuple[Callable[[dict[str, Any]], object], str],
) -> None:
    """`check` exits 1 and says which rule is broken."""
    change, words = case
    change(plan)
    (folder / "plan.json").write_text(json.dumps(plan))
    done = spindle_command("check", "plan.json")
    assert done.code == 1
    assert words in done.out + done.err
    assert "Traceback" not in done.err


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown field": (lambda plan: plan.update(color="red"), "color is not a known field; remove it"),
    "a field that is gone": (lambda plan: plan.pop("makespan_s"), "makespan_s is missing; add it"),
    "another version": (lambda plan: plan.update(version=2), "spindle.plan version 2; this Spindle reads version 1"),
    "a number as text": (lambda plan: plan.update(num_devices="2"), "num_devices is '2'"),
    "a time that is none": (in_first_slice(end_s=float("nan")), "end_s is 'nan'"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_plan_that_cannot_be_read(
    folder: Path,
    spindle_command: Spindle,
    plan: dict[str, Any],
    case: tuple[Callable[[dict[str, Any]], object], str],
) -> None:
    change, words = case
    change(plan)
    (folder / "plan.json").write_text(json.dumps(plan))
    for command in (("check", "plan.json"), ("show", "plan.json"), ("verify", "model.py", "--plan", "plan.json")):
        check(spindle_command, 2, words, *command)


@pytest.mark.parametrize("command", [("explain",), ("show",), ("show", "--html", "page.html"), ("diff", "plan.json")])
def test_a_plan_on_devices_that_are_not_there(
    folder: Path, spindle_command: Spindle, plan: dict[str, Any], command: tuple[str, ...]
) -> None:
    in_first_slice(devices=[0, 5])(plan)
    (folder / "changed.json").write_text(json.dumps(plan))
    words = "changed.json: t.tower[0:2] runs on device 5 but the plan has 2 devices"
    verb, *options = command
    check(spindle_command, 1, words, verb, "changed.json", *options)


def test_an_alternative_that_takes_no_time(folder: Path, spindle_command: Spindle, plan: dict[str, Any]) -> None:
    """Its gain would be a division by zero."""
    other = next(each for each in plan["alternatives"] if each["fits"])
    other["step_s"] = 0.0
    (folder / "plan.json").write_text(json.dumps(plan))
    for verb in ("show", "check"):
        check(spindle_command, 1, "fits and its step takes 0.0 s; give the seconds of its step", verb, "plan.json")


def test_a_plan_without_a_makespan(folder: Path, spindle_command: Spindle, plan: dict[str, Any]) -> None:
    """Its shares would be divisions by zero."""
    plan["makespan_s"] = 0.0
    (folder / "plan.json").write_text(json.dumps(plan))
    for command in (("show", "plan.json"), ("explain", "plan.json"), ("train", "model.py", "--plan", "plan.json")):
        steps = ("--steps", "1") if command[0] == "train" else ()
        check(spindle_command, 1, "`spindle check plan.json` lists all that is wrong", *command, *steps)


def test_a_plan_of_another_workload(folder: Path, spindle_command: Spindle, plan: dict[str, Any]) -> None:
    """It is refused before anything starts."""
    words = "the plan runs MetaOp 't.tower', which this workload does not have; plan it again"
    for command in (("verify",), ("train", "--steps", "1")):
        verb, *options = command
        check(spindle_command, 1, words, verb, "model.py", "--plan", "plan.json", "--launcher", "threads", *options)


def test_a_trace_that_is_no_trace(folder: Path, spindle_command: Spindle, plan: dict[str, Any]) -> None:
    shutil.copy(folder / "plan.json", folder / "other.json")
    words = "other.json: is a spindle.plan file; here a Trace is needed"
    check(spindle_command, 2, words, "show", "plan.json", "--trace", "other.json")
