"""Megatron's parallelisms by module: what plans have that form, and in which words the others are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spindle.errors import InputError, PlanError
from spindle.exchange.megatron import module_parallelisms
from spindle.files.clusterfile import parse_cluster
from spindle.files.formats import write
from spindle.planner.solve import solve
from spindle.values.cluster import Cluster
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points
from spindle.values.plan import Plan, Slice, make_waves
from tests.printed.conftest import Spindle, spindle_command

__all__ = ["spindle_command"]  # a fixture


def metaop(name: str, layers: int = 4, weights: float = 1e6) -> MetaOp:
    task, _, component = name.partition(".")
    times = points({n: 0.01 / n + 0.002 for n in (1, 2, 4, 8)})
    return MetaOp(
        name=name, task=task, component=component, layers=layers, layer_time_s=times, layer_param_bytes=weights
    )


GRAPH = MetaGraph(
    (metaop("t.vision"), metaop("t.llm", 8), metaop("t.loss", 1, 0.0)),
    (Flow("t.vision", "t.llm"), Flow("t.llm", "t.loss")),
)
CLUSTER: Cluster = parse_cluster("1x8")


def plan_of(*pieces: tuple[str, int, int, tuple[int, ...], int], method: str = "hand") -> Plan:
    """A plan of (MetaOp, first layer, layers, devices, tensor parallelism), one after another."""
    slices = [
        Slice(
            metaop=name,
            first_layer=first,
            num_layers=count,
            devices=devices,
            start_s=float(i),
            end_s=i + 1.0,
            tensor_parallel=degree,
        )
        for i, (name, first, count, devices, degree) in enumerate(pieces)
    ]
    waves = make_waves(slices)
    makespan_s = float(len(slices))
    return Plan(num_devices=8, devices_per_node=8, method=method, waves=waves, makespan_s=makespan_s, metagraph=GRAPH)


def along(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high))


LOSS = ("t.loss", 0, 1, (0,), 1)


def test_modules_on_ranks_of_their_own() -> None:
    """The encoder has ranks 0 to 3, the language model two copies over two ranks each; losses are no module."""
    plan = plan_of(("t.vision", 0, 4, along(0, 4), 1), ("t.llm", 0, 8, along(4, 8), 2), LOSS)
    assert module_parallelisms(plan, "llm") == {
        "language": {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 1,
            "data_parallel_size": 2,
            "rank_offset": 4,
        },
        "vision": {
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "data_parallel_size": 4,
            "rank_offset": 0,
        },
    }


def test_modules_on_the_same_ranks() -> None:
    """Several slices of one layout are one module."""
    plan = plan_of(
        ("t.vision", 0, 2, along(0, 8), 1), ("t.vision", 2, 2, along(0, 8), 1), ("t.llm", 0, 8, along(0, 8), 4), LOSS
    )
    found = module_parallelisms(plan, "llm")
    assert {name: p["rank_offset"] for name, p in found.items()} == {"language": 0, "vision": 0}
    assert {name: p["data_parallel_size"] for name, p in found.items()} == {"language": 2, "vision": 8}


def test_a_component_may_bear_the_name() -> None:
    names = tuple(replace(m, component="language" if m.component == "llm" else m.component) for m in GRAPH)
    plan = plan_of(("t.vision", 0, 4, along(0, 8), 1), ("t.llm", 0, 8, along(0, 8), 1))
    assert set(module_parallelisms(replace(plan, metagraph=MetaGraph(names, GRAPH.flows)))) == {"language", "vision"}


REFUSED: dict[str, tuple[Plan, str]] = {
    "devices change": (
        plan_of(
            ("t.vision", 0, 2, along(0, 4), 1), ("t.vision", 2, 2, along(0, 8), 1), ("t.llm", 0, 8, along(0, 8), 1)
        ),
        r"component 'vision' changes its layout: t\.vision\[0:2\] on devices 0-3, then t\.vision\[2:4\] on "
        "devices 0-7; the nearest that may be is a plan of --method component_split",
    ),
    "the cut changes": (
        plan_of(("t.llm", 0, 4, along(0, 8), 1), ("t.llm", 4, 4, along(0, 8), 2), ("t.vision", 0, 4, along(0, 8), 1)),
        r"component 'llm' changes its layout: .* on devices 0-7, then .* on devices 0-7, cut 2 ways",
    ),
    "no range": (
        plan_of(("t.vision", 0, 4, (0, 1, 4, 5), 1), ("t.llm", 0, 8, (2, 3), 1)),
        r"component 'vision' has no range of devices: t\.vision\[0:4\] on devices 0-1, 4-5",
    ),
    "some devices shared": (
        plan_of(("t.vision", 0, 4, along(0, 4), 1), ("t.llm", 0, 8, along(0, 8), 2)),
        "modules share some devices: 'language' is on devices 0-7, 'vision' on 0-3",
    ),
    "a cut of three": (
        plan_of(("t.vision", 0, 4, along(0, 3), 3), ("t.llm", 0, 8, along(3, 4), 1)),
        "component 'vision' is cut 3 ways; Megatron cuts in powers of two",
    ),
    "copies that do not divide": (
        plan_of(("t.vision", 0, 4, along(0, 3), 1), ("t.llm", 0, 8, along(3, 5), 1)),
        "'language' and 'vision' have 2 and 3 copies; one must divide the other",
    ),
    "an encoder of fewer copies": (
        plan_of(("t.vision", 0, 4, along(0, 2), 1), ("t.llm", 0, 8, along(4, 8), 1)),
        "module 'vision' has 2 copies, fewer than the 4 of the language module",
    ),
    "one component": (plan_of(("t.llm", 0, 8, along(0, 8), 1), LOSS), "no component beside 'llm'"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(case: tuple[Plan, str]) -> None:
    plan, words = case
    with pytest.raises(PlanError, match=words):
        module_parallelisms(plan, "llm")


def test_input_that_will_not_do(spindle_command: Spindle) -> None:
    """A language module that is no component, or a name taken twice, is bad input, with the names there are."""
    plan = plan_of(("t.vision", 0, 4, along(0, 8), 1), ("t.llm", 0, 8, along(0, 8), 1))
    with pytest.raises(InputError, match="no component is called 'language'; say which is the language module: llm, v"):
        module_parallelisms(plan, "language")
    names = tuple(replace(m, component="language" if m.component == "vision" else m.component) for m in GRAPH)
    with pytest.raises(InputError, match="another component is called 'language'; rename it"):
        module_parallelisms(replace(plan, metagraph=MetaGraph(names, GRAPH.flows)), "llm")
    with pytest.raises(InputError, match="carries no MetaGraph"):
        module_parallelisms(replace(plan, metagraph=None), "llm")
    done = spindle_command("export-plan", "gone.json", "--format", "megatron", "-o", "m.json")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    done = spindle_command("export-plan", "plan.json", "--format", "megatron", "-o", "no/m.json")
    assert (done.code, "its directory does not exist" in done.err) == (2, True)


def test_no_advice_to_do_what_was_done() -> None:
    """A plan of component_split that has no such form is not told to be one."""
    plan = plan_of(("t.vision", 0, 4, along(0, 4), 1), ("t.llm", 0, 8, along(0, 8), 1), method="component_split")
    with pytest.raises(PlanError, match=r"share some devices: [^;]*; Megatron wants all on the same, or none shared$"):
        module_parallelisms(plan, "llm")


def test_a_plan_of_the_nearest_method(tmp_path: Path, spindle_command: Spindle) -> None:
    """What the planner makes by component_split has the form; the file holds the arguments, and the table fits."""
    write(GRAPH, tmp_path / "graph.json")
    assert (
        spindle_command("plan", "graph.json", "-c", "1x8", "--method", "component_split", "-o", "plan.json").code == 0
    )
    command = ("export-plan", "plan.json", "--format", "megatron", "--language", "llm", "-o", "megatron.json")
    done = spindle_command(*command)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[1].split()[:2] == ["language", "0-7"]
    found = json.loads((tmp_path / "megatron.json").read_text())
    assert {name: p["data_parallel_size"] for name, p in found["module_parallelisms"].items()} == {
        "language": 8,
        "vision": 8,
    }
    assert json.loads(spindle_command(*command, "--json").out) == found


def test_waves_have_no_such_form(tmp_path: Path, spindle_command: Spindle) -> None:
    """A plan whose tasks share a component on different devices is refused with exit 1; nothing is written."""
    graph = MetaGraph((metaop("a.vision", 16), metaop("b.vision", 16), metaop("a.llm", 4), metaop("b.llm", 9)))
    plan = solve(graph, CLUSTER, method="task_split")
    write(plan, tmp_path / "plan.json")
    done = spindle_command("export-plan", "plan.json", "--format", "megatron", "--language", "llm", "-o", "m.json")
    assert (done.code, done.out) == (1, "")
    assert "component 'llm' changes its layout" in done.err
    assert len(done.err.splitlines()) <= 3
    assert not (tmp_path / "m.json").exists()
