"""Specs of models that no device holds: they fit where layers are spread over devices, or states go to the host."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from spindle.cli import cli
from spindle.cost.metaops import with_costs
from spindle.errors import InfeasibleError
from spindle.files.clusterfile import parse_cluster
from spindle.planner.choose import _leaves_room
from spindle.planner.report.render import summary
from spindle.planner.solve import solve
from spindle.spec.file import parse_workload, read_workload
from spindle.spec.graph import build_graph
from spindle.spec.values import WorkloadSpec
from spindle.values.contract import contract
from spindle.values.cost_options import CostOptions, memory_choices
from spindle.verbs.source import load_source

FOLDER = Path(__file__).parents[2] / "benchmarks"
CLUSTER = parse_cluster("32x8:a800-80g")


def fits(spec: WorkloadSpec, cost_options: CostOptions) -> bool:
    """Whether all devices may run one MetaOp after another."""
    graph = with_costs(contract(build_graph(spec)), CLUSTER, cost_options=cost_options)
    try:
        return solve(graph, CLUSTER, method="sequential", time_limit_s=0).memory.fits
    except InfeasibleError:
        return False


@pytest.mark.parametrize("name", ["qwen_val_30b.yaml", "qwen_val_70b.yaml"])
def test_large_language_models_fit_256_devices(name: str) -> None:
    """With layers on up to eight devices each; the largest not on one each, whatever else is chosen."""
    spec = read_workload(FOLDER / "workloads" / name)
    assert any(fits(spec, choice) for choice in memory_choices(spec.cost_options)[::-1])
    whole = replace(spec, tensor_parallel=1)
    assert name == "qwen_val_30b.yaml" or not fits(whole, memory_choices(whole.cost_options)[-1])


def test_choices_that_leave_no_room_are_not_planned() -> None:
    """What all layers hold is told from the costed graph, without a plan."""
    source = load_source(str(FOLDER / "workloads" / "qwen_val_70b.yaml"))
    roomy = [
        (choice.min_tensor_parallel, choice.shard_optimizer)
        for choice in memory_choices(source.cost_options)
        if _leaves_room(with_costs(source.metagraph, CLUSTER, cost_options=choice), CLUSTER)
    ]
    assert set(roomy) == {(8, True)}


def test_the_search_sees_no_layers() -> None:
    """Twice the layers make as many MetaOps, so planning takes as long."""
    text = (FOLDER / "workloads" / "qwen_val_70b.yaml").read_text(encoding="utf-8")
    graphs = [
        contract(build_graph(parse_workload(text.replace("layers: 80", f"layers: {layers}")))) for layers in (48, 96)
    ]
    assert [metaop.name for metaop in graphs[0]] == [metaop.name for metaop in graphs[1]]
    assert graphs[0].flows == graphs[1].flows


def test_degrees_are_printed() -> None:
    """Which MetaOps' layers are spread, and over how many devices."""
    text = (FOLDER / "workloads" / "rows" / "long_video.yaml").read_text(encoding="utf-8")
    spec = parse_workload(text.replace("batch_size: 8", "batch_size: 1")).only(["video"])
    cluster = parse_cluster("1x8:h200-141g")
    cost_options = memory_choices(spec.cost_options)[-1]
    made = solve(
        with_costs(contract(build_graph(spec)), cluster, cost_options=cost_options), cluster, method="sequential"
    )
    assert "\ntensor     parallel, number of devices that share each layer: video.vision 8" in summary(made)
    plain = load_source(str(FOLDER / "workloads" / "pi0.yaml"))
    made = solve(with_costs(plain.metagraph, cluster, cost_options=plain.cost_options), cluster, method="sequential")
    assert "\ntensor " not in summary(made)


def plan(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["plan", *arguments, "--time-limit", "0.1"], catch_exceptions=False)
    return done.output


def test_states_go_to_the_host_where_nothing_else_fits(tmp_path: Path) -> None:
    """The line on what makes it fit says so; without leave there is no plan."""
    cluster = str(FOLDER / "clusters" / "small-24g.yaml")
    spec = FOLDER / "workloads" / "rows" / "offload.yaml"
    assert "optimizer states in the memory of the host" in plan(str(spec), "-c", cluster)
    forbidden = tmp_path / "spec.yaml"
    forbidden.write_text(spec.read_text(encoding="utf-8").replace("may_offload: true\n", ""))
    with pytest.raises(InfeasibleError, match=r"text\.llm"):
        plan(str(forbidden), "-c", cluster)
