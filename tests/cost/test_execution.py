"""Execution: what each way to run layers changes of a device's constants and of a MetaOp's cost."""

from dataclasses import replace

import pytest

from spindle.cost.metaops import with_costs
from spindle.cost.style import style_of
from spindle.errors import FormatError
from spindle.files.clusterfile import parse_cluster
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.values.contract import contract
from spindle.values.cost_options import CostOptions
from spindle.values.execution import USUAL, Execution, LayerStyle, as_run, norm_copies
from spindle.values.metagraph import MetaOp
from spindle.values.profile import Profile, ProfileEntry

SPEC = """
format: spindle.workload
version: 1
name: small
{execution}
dtype: {dtype}
components:
  tower: {{layers: 4, hidden: 1024, heads: 16, tokens: 64, gated: true}}
tasks:
  t: {{batch_size: 8, flow: [tower]}}
"""
CLUSTER = parse_cluster("1x1:a100-80g")


def costed(execution: str = "", dtype: str = "bfloat16") -> MetaOp:
    spec = parse_workload(SPEC.format(execution=execution and f"execution: {execution}", dtype=dtype))
    cost_options = spec.cost_options
    metagraph = with_costs(
        contract(build_graph(spec)), as_run(CLUSTER, cost_options.execution), cost_options=cost_options
    )
    return metagraph.metaops[0]


def test_nothing_said_changes_nothing() -> None:
    assert as_run(CLUSTER, USUAL) == CLUSTER
    assert costed() == costed("{layers: fused, attention: fused, tf32: true, overlap: true}")


@pytest.mark.parametrize(
    ("slower", "quicker"),
    [
        ("{layers: eager}", ""),
        ("", "{layers: compiled}"),
        ("{layers: eager}", "{layers: eager, norms: fused}"),
        ("{attention: plain}", "{attention: fused_softmax}"),
        ("{attention: fused_softmax}", "{attention: fused}"),
        ("{attention: fused}", "{attention: flash2}"),
    ],
)
def test_layers_are_slower(slower: str, quicker: str) -> None:
    assert costed(slower).times[1] > costed(quicker).times[1]


def test_kernels_add_their_start() -> None:
    """Once in forward and twice in backward, whatever the batch."""
    device = replace(CLUSTER.device, launch_s=0.0)
    spec = parse_workload(SPEC.format(execution="", dtype="bfloat16"))
    graph = contract(build_graph(spec))
    work_s = with_costs(graph, replace(CLUSTER, device=device)).metaops[0].times[1]
    kernels = 1 + 3.5 * 4
    assert costed().times[1] == pytest.approx(work_s + 3 * kernels * CLUSTER.device.launch_s)


def test_float32_without_tf32() -> None:
    """Products run at an eighth of TF32's rate on an A100."""
    assert costed("{tf32: false}", "float32").times[1] > 4 * costed("", "float32").times[1]
    assert costed("{tf32: false}").times[1] == costed().times[1]


def test_what_is_reduced_stepped_and_kept() -> None:
    assert costed("{gradients: float32}").layer_param_bytes == 2 * costed().layer_param_bytes
    assert costed("{gradients: float32}", "float32").layer_param_bytes == costed("", "float32").layer_param_bytes
    assert costed("{optimizer: plain}").layer_update_s == pytest.approx(2.9 * costed().layer_update_s)
    scores = 8 * 16 * 64 * 64 * 4  # samples, heads, pairs of tokens, layers
    assert costed("{attention: plain}").memory[1] == pytest.approx(costed().memory[1] + 5 * scores, rel=1e-6)
    assert norm_copies(Execution(layers="eager")) > norm_copies(USUAL)
    assert costed("{layers: eager}").memory[1] > costed().memory[1]


def test_reductions_that_do_not_overlap() -> None:
    assert as_run(CLUSTER, Execution(overlap=False)).device.overlap_cost == 1.0
    assert as_run(CLUSTER, Execution()).device.overlap_cost < 1.0


@pytest.mark.parametrize("wrong", ["{layers: lazy}", "{attention: none}", "{speed: 2}", "eager"])
def test_unknown_ways_are_refused(wrong: str) -> None:
    with pytest.raises(FormatError, match="execution"):
        parse_workload(SPEC.format(execution=f"execution: {wrong}", dtype="bfloat16"))


TWO = """
format: spindle.workload
version: 1
name: two
components:
  a: {layers: 4, hidden: 1024, heads: 16, tokens: 64, output_tokens: 1, output_features: 64}
  b: {layers: 2, hidden: 512, heads: 8, tokens: 32, output_tokens: 1, output_features: 64}
tasks:
  t: {batch_size: 8, flow: [[a, b]], loss: contrastive}
"""


@pytest.mark.parametrize("style", ["fused", "eager", "compiled"])
def test_a_profile_of_some_layers_tells_the_style_of_the_others(style: LayerStyle) -> None:
    """Where one per cent of noise lies on what was measured; none is told where nothing or everything was."""
    spec = parse_workload(TWO)
    graph = contract(build_graph(spec))
    execution = Execution(layers=style, tf32=False)
    told = with_costs(graph, as_run(CLUSTER, execution), cost_options=CostOptions(execution=execution))
    entries = [
        ProfileEntry(kind=m.operators[0].kind, num_devices=1, forward_s=0.34 * m.times[1], backward_s=0.67 * m.times[1])
        for m in told
    ]
    given = CostOptions(execution=Execution(tf32=False))
    assert style_of(graph, CLUSTER, Profile("a100-80g", entries=tuple(entries[:1])), given) == execution
    assert style_of(graph, CLUSTER, Profile("a100-80g"), given) == given.execution
    assert style_of(graph, CLUSTER, Profile("a100-80g", entries=tuple(entries)), given) == given.execution
