"""Sources: a Python file, a spec or a MetaGraph by name; everything that can be wrong with them."""

from pathlib import Path

import pytest

from spindle.cost.metaops import with_costs
from spindle.errors import FormatError, SpindleError, WorkloadError
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import write
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.verbs.source import is_python, load_source, load_workload

WORKLOAD = """
import torch
import spindle

workload = spindle.Workload("file")
net = workload.component("net", torch.nn.Linear(2, 2))

@workload.task("t", batch_size=2, data=[{"x": torch.ones(2, 2)}])
def t(batch):
    return net(batch["x"]).sum()

def make():
    return workload

def fails():
    raise RuntimeError("not today")

number = 3
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(WORKLOAD)
    return path


@pytest.mark.parametrize(
    ("source", "python"),
    [("a.py", True), ("a.py:b", True), ("dir/a.py:b", True), ("a.yaml", False), ("a.json", False), ("a:b", False)],
)
def test_which_sources_are_python(source: str, python: bool) -> None:
    assert is_python(source) is python


@pytest.mark.parametrize("name", ["", ":workload", ":make"])
def test_a_workload_by_name(model: Path, name: str) -> None:
    """`workload` is the default; a function that returns one will do."""
    workload, module = load_workload(f"{model}{name}")
    assert workload.name == "file"
    assert module.number == 3
    assert load_source(f"{model}{name}").executable


def test_a_metagraph_file(tmp_path: Path) -> None:
    graph = MetaGraph((MetaOp(name="a", task="a", component="a", layers=1, layer_time_s=((1, 1.0),)),))
    write(graph, tmp_path / "graph.json")
    loaded = load_source(str(tmp_path / "graph.json"))
    assert (loaded.metagraph, loaded.executable) == (graph, False)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (":other", WorkloadError, "has no 'other'; it defines the workloads workload"),
        (":number", WorkloadError, "is a int; let it be a spindle.Workload or return one"),
        (":spindle", WorkloadError, "is a module; let it be a spindle.Workload"),
    ],
)
def test_names_that_are_no_workload(model: Path, name: str, error: type[SpindleError], words: str) -> None:
    with pytest.raises(error, match=words):
        load_workload(f"{model}{name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ny = 1 / 0\n", r"model.py, line 2 raised ZeroDivisionError: division by zero; mend the file"),
        ("x = (\n", r"model.py, line 1 raised SyntaxError"),
        ("import nowhere_to_be_found\n", r"line 1 raised ModuleNotFoundError: No module named 'nowhere"),
        ("import sys\nsys.exit(3)\n", r"line 2 raised SystemExit: 3"),
        ("", r"has no 'workload'; it defines the workloads \(none\)"),
        ("workload = lambda: 1 / 0\n", r"model.py, line 1 raised ZeroDivisionError"),
    ],
)
def test_files_that_are_broken(model: Path, text: str, words: str) -> None:
    """The line of the user's file is named."""
    model.write_text(text)
    with pytest.raises(WorkloadError, match=words) as caught:
        load_workload(f"{model}:workload")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["model", "model:workload", "nowhere.py", "nowhere.py:workload", "."])
def test_files_that_are_not_there(source: str) -> None:
    with pytest.raises(FormatError, match=r"is not a workload; give file.py|cannot be read \(no such file\)"):
        load_workload(source)


TASKS = """
format: spindle.workload
version: 1
name: three
components:
  m: {kind: mlp, widths: [2, 2]}
tasks:
  a: {batch_size: 1, flow: [m], rate: 2}
  b: {batch_size: 1, flow: [m], every: 3}
  c: {batch_size: 1, flow: [m]}
"""


@pytest.mark.parametrize(
    ("tasks", "names"), [(None, "abc"), ("1", "a"), ("2", "ab"), ("c,a", "ac"), ("b", "b"), ("3", "abc")]
)
def test_some_tasks_of_any_source(tmp_path: Path, tasks: str | None, names: str) -> None:
    """The first k or those named, in the source's order; a task that runs twice comes with both runs."""
    (tmp_path / "spec.yaml").write_text(TASKS)
    spec = load_source(str(tmp_path / "spec.yaml"), tasks=tasks)
    assert {metaop.task for metaop in spec.metagraph} == {*names, *(["a#1"] if "a" in names else [])}
    assert [presence.task for presence in spec.presences] == list(names)
    whole = with_costs(load_source(str(tmp_path / "spec.yaml")).metagraph, parse_cluster("1x1"))
    write(whole, tmp_path / "graph.json")
    assert len(load_source(str(tmp_path / "graph.json"), tasks=tasks).metagraph) == len(spec.metagraph)


def test_some_tasks_of_a_model(model: Path) -> None:
    """The model's file is the same; the tasks that are left out are not captured."""
    model.write_text(WORKLOAD + "workload.task('u', batch_size=2, data=[{'x': torch.ones(2, 2)}], every=2)(t)\n")
    found = load_source(f"{model}", tasks="u")
    assert {metaop.task for metaop in found.metagraph} == {"u"}
    assert [(presence.task, presence.every) for presence in found.presences] == [("u", 2)]
    assert {metaop.task for metaop in load_source(f"{model}").metagraph} == {"t", "u"}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("0", "--tasks is 0, and there are 3 tasks; give a number from 1 to that"),
        ("4", "--tasks is 4, and there are 3 tasks"),
        ("a,d", "--tasks names 'd', which is no task; the tasks are a, b, c"),
        ("", "--tasks names '', which is no task"),
    ],
)
def test_tasks_that_are_not_there(tmp_path: Path, tasks: str, message: str) -> None:
    (tmp_path / "spec.yaml").write_text(TASKS)
    with pytest.raises(FormatError, match=message):
        load_source(str(tmp_path / "spec.yaml"), tasks=tasks)


def test_optimizers_by_their_class(tmp_path: Path) -> None:
    """Also one that takes nothing but matrices; given vectors, as it would be in the run, its error is shown."""
    path = tmp_path / "model.py"
    path.write_text(WORKLOAD + "def optimizer(ps):\n    return torch.optim.Muon([p for p in ps if p.ndim == 2])\n")
    assert load_source(str(path)).cost_options.optimizer == "muon"
    path.write_text(WORKLOAD + "def optimizer(parameters):\n    return torch.optim.Muon(parameters)\n")
    with pytest.raises(WorkloadError, match="optimizer raised ValueError: Muon only supports 2D parameters"):
        load_source(str(path))
