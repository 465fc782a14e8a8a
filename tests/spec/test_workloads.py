"""The benchmark workloads: each spec builds, contracts and is costed; its counts agree with the published ones."""

import csv
from dataclasses import replace
from math import isfinite, prod
from pathlib import Path

import pytest

from spindle.cost.metaops import with_costs
from spindle.files.clusterfile import parse_cluster
from spindle.spec.file import read_workload
from spindle.spec.graph import build_graph
from spindle.spec.values import Task
from spindle.values.contract import contract

FOLDER = Path(__file__).parents[2] / "benchmarks" / "workloads"
SPECS = sorted(FOLDER.glob("*.yaml"))


def _rows() -> list[dict[str, str]]:
    text = Path(__file__).with_name("workload_counts.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


ROWS = _rows()


def test_all_workloads_have_a_spec() -> None:
    assert {path.stem for path in SPECS} == {row["workload"] for row in ROWS}
    assert len(SPECS) == 12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['workload']}-{row['component']}")
def test_counts_agree_with_the_table(row: dict[str, str]) -> None:
    """Parameters and forward FLOPs of every component within 1 % (or the table's last digit)."""
    spec = read_workload(FOLDER / f"{row['workload']}.yaml")
    flops = float(row["fwd_matmul_gflop"]) + float(row["fwd_attn_gflop"])
    if row["component"] == "lm-head":  # vla_cotrain's row for the vocabulary projection of the question task
        head = next(op for op in build_graph(spec) if op.name == "questions.llm.head")
        assert head.forward_flops / head.batch_size / 1e9 == pytest.approx(flops, rel=0.01)
        return
    name = row["component"]
    task = Task(name="t", batch_size=1, components=(name,), context_tokens=((name, int(row["context_tokens"])),))
    graph = build_graph(replace(spec, tasks=(task,)))
    parameters = {p.name: prod(p.shape) for op in graph for p in op.parameters}
    assert sum(parameters.values()) / 1e6 == pytest.approx(float(row["params_m"]), rel=0.01, abs=0.005)
    assert sum(op.forward_flops for op in graph) / 1e9 == pytest.approx(flops, rel=0.01, abs=0.0005)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_specs_build_contract_and_are_costed(path: Path) -> None:
    spec = read_workload(path)
    metagraph = contract(build_graph(spec))
    names = {metaop.name for metaop in metagraph}
    stacks = {f"{task.name}.{name}" for task in spec.tasks for name in task.components}
    assert stacks <= names
    assert {name.rpartition(".")[2] for name in names - stacks} <= {"embed", "head", "loss"}
    for metaop in with_costs(metagraph, parse_cluster("4x8:h100-80g")):
        assert metaop.layer_time_s
        assert all(isfinite(value) for _, value in metaop.memory_bytes)
        assert metaop.layers == len(metaop.operators)
