"""Workload specs: counts of parameters and FLOPs, names, sharing, and the rules of backward."""

from math import prod

import pytest

from spindle.errors import FormatError, WorkloadError
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.values.contract import contract
from spindle.values.cost_options import length_spread
from spindle.values.graph import Operator, TaskGraph

HEADER = "format: spindle.workload\nversion: 1\nname: tiny\n"
TOWERS = (
    HEADER
    + """
components:
  image: {layers: 2, hidden: 8, heads: 2, tokens: 5, input_features: 12, output_tokens: 1, output_features: 4}
  text: {layers: 3, hidden: 8, heads: 2, tokens: 3, vocab: 10, output_tokens: 1, output_features: 4}
tasks:
  pair: {batch_size: 6, flow: [[image, text]], loss: contrastive}
"""
)
FROZEN = (
    HEADER
    + """
components:
  eye: {layers: 2, hidden: 8, heads: 2, tokens: 5, input_features: 12, trained: %s}
  bridge: {kind: mlp, widths: [8, 8], tokens: 5}
  mind: {layers: 2, hidden: 8, heads: 2, tokens: 5, trained: %s}
tasks:
  t: {batch_size: 4, flow: [eye, bridge, mind], %s}
"""
)


def graph_of(text: str) -> TaskGraph:
    return build_graph(parse_workload(text))


def operators(text: str) -> dict[str, Operator]:
    return graph_of(text).by_name


def num_parameters(graph: TaskGraph, component: str) -> int:
    shapes = {p.name: p.shape for op in graph for p in op.parameters if op.component == component}
    return sum(prod(shape) for shape in shapes.values())


def test_layer_counts_by_hand() -> None:
    """A plain layer of width h holds 12 h^2 + 13 h parameters and multiplies each token by 12 h^2 of them."""
    layer = operators(TOWERS)["pair.image.1"]
    first = operators(TOWERS)["pair.image.0"]
    inside = sum(prod(p.shape) for p in layer.parameters if p.name.startswith("image.1."))
    assert inside == 12 * 64 + 13 * 8
    attention = 4 * 5 * 5 * 8
    projection = 2 * 1 * 4 * 8  # one pooled token, from 8 to 4 features
    assert layer.forward_flops == 6 * (2 * 5 * 12 * 64 + attention + projection)
    assert first.forward_flops == 6 * (2 * 5 * 12 * 64 + attention + 2 * 5 * 12 * 8)


def test_stacks_contract_to_one_metaop_each() -> None:
    metagraph = contract(graph_of(TOWERS))
    assert {m.name: m.layers for m in metagraph} == {
        "pair.image": 2,
        "pair.text.embed": 1,
        "pair.text": 3,
        "pair.loss": 1,
    }
    assert {(f.source, f.target) for f in metagraph.flows} == {
        ("pair.image", "pair.loss"),
        ("pair.text.embed", "pair.text"),
        ("pair.text", "pair.loss"),
    }


def test_contrastive_loss_runs_whole() -> None:
    ops = operators(TOWERS)
    assert not ops["pair.loss"].splittable
    assert all(op.splittable for name, op in ops.items() if name != "pair.loss")
    assert ops["pair.loss"].forward_flops == 2 * 6 * 6 * 4


def test_tasks_share_a_component_by_parameter_name() -> None:
    graph = graph_of(TOWERS + "  again: {batch_size: 2, flow: [[image, text]], loss: contrastive}\n")
    names = {op.name: {p.name for p in op.parameters} for op in graph}
    assert names["pair.image.0"] == names["again.image.0"]
    metagraph = contract(graph)
    assert metagraph["pair.text"].parameters == metagraph["again.text"].parameters != ""


@pytest.mark.parametrize(
    ("eye", "mind", "more", "ratios"),
    [
        ("all", "all", "loss: mse", (2, 2, 2)),
        ("none", "all", "loss: mse", (0, 2, 2)),  # nothing trained before the eye: no backward
        ("none", "none", "loss: mse", (0, 2, 1)),  # the bridge is trained before the mind: input gradients
        ("all", "all", "forward_only: true", (0, 0, 0)),
    ],
)
def test_backward_rule_of_frozen_parts(eye: str, mind: str, more: str, ratios: tuple[int, ...]) -> None:
    """FLOPs of backward over those of forward, attention (always twice when any gradient passes) left out."""
    ops = operators(FROZEN % (eye, mind, more))
    found = []
    for name in ("t.eye.1", "t.bridge", "t.mind.1"):
        attention = 4.0 * 4 * 5 * 5 * 8 if name != "t.bridge" else 0.0
        op = ops[name]
        backward = op.backward_flops - (2 * attention if op.backward_flops else 0)
        found.append(backward / (op.forward_flops - attention))
    # the bridge's input needs no gradient when the eye is frozen, but a linear layer's own product does not know that
    assert tuple(found) == ratios


def test_frozen_parts_keep_less() -> None:
    trained = operators(FROZEN % ("all", "all", "loss: mse"))
    frozen = operators(FROZEN % ("none", "none", "loss: mse"))
    assert frozen["t.eye.1"].activation_bytes == 0
    assert 0 < frozen["t.mind.1"].activation_bytes < trained["t.mind.1"].activation_bytes
    assert not any(tensor.needs_grad for tensor in frozen["t.eye.1"].outputs)
    assert all(tensor.needs_grad for tensor in frozen["t.bridge"].outputs)


def test_trained_ends_send_gradients_through_frozen_layers() -> None:
    """A trained stem before frozen layers (AnchorVLA's spatial encoder): input gradients all the way."""
    layer = operators(FROZEN % ("ends", "all", "loss: mse"))["t.eye.1"]
    assert layer.backward_flops > 0
    assert not any(p.trainable for p in layer.parameters)


def test_lora_trains_adapters_only() -> None:
    layer = operators(FROZEN % ("all", "lora, lora_rank: 2", "loss: mse"))["t.mind.1"]
    trainable = {p.name: p.shape for p in layer.parameters if p.trainable}
    assert set(trainable) == {f"mind.1.{w}.lora_{ab}" for w in ("qkv", "out", "up", "down") for ab in "ab"}
    assert trainable["mind.1.up.lora_a"] == (2, 8)
    assert trainable["mind.1.up.lora_b"] == (32, 2)


def test_task_overrides_tokens_and_context() -> None:
    text = (
        HEADER
        + """
components:
  encoder: {layers: 1, hidden: 8, heads: 2, tokens: 4, input_features: 8}
  decoder: {layers: 2, hidden: 8, heads: 2, tokens: 3, cross_attention: separate, causal: true}
tasks:
  short: {batch_size: 2, flow: [encoder, decoder], tokens: {encoder: 2}}
  long: {batch_size: 2, flow: [encoder, decoder]}
"""
    )
    graph = graph_of(text)
    short, long = graph.by_name["short.decoder.1"], graph.by_name["long.decoder.1"]
    # keys and values of the context, and its pairs: two matrices of 8 x 8 and 4 h FLOPs a pair
    assert long.forward_flops - short.forward_flops == 2 * (2 * 2 * 2 * 64 + 4 * 8 * 3 * 2)
    assert "long.encoder" in long.inputs  # every layer reads the context
    assert {m.name for m in contract(graph)} == {f"{t}.{c}" for t in ("short", "long") for c in ("encoder", "decoder")}


def test_payload_of_an_edge() -> None:
    text = (
        HEADER
        + """
components:
  llm: {layers: 3, hidden: 8, heads: 4, kv_heads: 2, tokens: 4, vocab: 10, payload: per_layer_kv}
  expert: {layers: 3, hidden: 8, heads: 4, kv_heads: 2, tokens: 2, cross_attention: joint}
  head: {kind: mlp, widths: [8, 2], tokens: 2}
tasks:
  act:
    batch_size: 5
    edges: [[llm, expert], {source: expert, target: head, payload_kib_per_sample: 1.5}]
"""
    )
    flows = {(f.source, f.target): f.num_bytes for f in contract(graph_of(text)).flows}
    assert flows["act.llm", "act.expert"] == 5 * 4 * (2 * 2 * 2) * 3 * 2  # k and v of 2 heads x 2, 3 layers, two bytes
    assert flows["act.expert", "act.head"] == 5 * 1536


def test_heads() -> None:
    """Logits that a loss reads have a backward; those that nothing reads only run forward."""
    llm = "  llm: {layers: 2, hidden: 8, heads: 2, tokens: 4, vocab: 10, logits: true}\n"
    tail = "  head: {kind: mlp, widths: [8, 2], tokens: 4}\n"
    text = HEADER + "components:\n" + llm + tail + "tasks:\n"
    ops = operators(
        text
        + "  say: {batch_size: 2, flow: [llm], loss: cross_entropy}\n"
        + "  act: {batch_size: 2, flow: [llm, head], loss: l1}\n"
    )
    assert ops["say.llm.head"].backward_flops == 2 * ops["say.llm.head"].forward_flops == 2 * 2 * 2 * 4 * 10 * 8
    assert ops["act.llm.head"].backward_flops == 0
    assert ops["say.llm.head"].parameters[0].name == ops["say.llm.embed"].parameters[0].name  # tied


def test_other_component_divides_its_totals() -> None:
    text = (
        HEADER
        + """
components:
  conv: {kind: other, layers: 4, hidden: 16, tokens: 5, parameters_millions: 0.04, forward_gflops_per_sample: 0.002}
tasks:
  t: {batch_size: 3, flow: [conv]}
"""
    )
    graph = graph_of(text)
    assert num_parameters(graph, "conv") == pytest.approx(40_000, rel=1e-3)
    assert sum(op.forward_flops for op in graph) == pytest.approx(3 * 0.002e9)
    assert [m.layers for m in contract(graph)] == [4]


def test_a_spec_says_how_it_is_trained() -> None:
    text = TOWERS.replace("name: tiny", "name: tiny\noptimizer: sgd\nrecompute: true\nshard_optimizer: true")
    cost_options = parse_workload(text.replace("tokens: 3", "tokens: 3, tokens_p99: 6")).cost_options
    assert (cost_options.optimizer, cost_options.recompute, cost_options.shard_optimizer) == ("sgd", True, True)
    assert cost_options.spread_of("pair", "text") == pytest.approx(length_spread(3, 6))
    assert cost_options.spread_of("pair", "image") == 0.0


def test_task_sets_of_occasional_tasks() -> None:
    """Two tasks of probability 1/2 and 1/4 beside one that always runs: four sets, likeliest first, summing to one."""
    more = "".join(
        f"  {name}: {{batch_size: 2, flow: [[image, text]], loss: contrastive, probability: {p}}}\n"
        for name, p in (("rare", 0.25), ("half", 0.5))
    )
    sets = parse_workload(TOWERS + more).task_sets()
    found = [(p, [task.name for task in spec.tasks]) for p, spec in sets]
    assert found[:2] == [(0.375, ["pair", "half"]), (0.375, ["pair"])]
    assert sum(p for p, _ in found) == 1.0
    assert all("pair" in names for _, names in found)
    with pytest.raises(WorkloadError, match="4 sets"):
        parse_workload(TOWERS + more).task_sets(at_most=2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (("version: 1", "version: 2"), FormatError, "version 2"),
        (("format: spindle.workload", "format: other"), FormatError, "'other'"),
        (
            ("hidden: 8", "hiden: 8"),
            FormatError,
            "image.hiden is not a known field (did you mean 'hidden'?)",
        ),
        (
            ("batch_size: 6", "batchsize: 6"),
            FormatError,
            "field (did you mean 'batch_size'?)",
        ),
        (("hidden: 8", "hidden: 9"), FormatError, "give head_dim"),
        (("layers: 2", "layers: 0"), WorkloadError, "at least one"),
        (("layers: 2", "layers: two"), FormatError, "layers"),
        (("heads: 2, tokens: 5", "heads: 2, kv_heads: 3, head_dim: 4, tokens: 5"), WorkloadError, "must divide heads"),
        (("batch_size: 6", "batch_size: 0"), WorkloadError, "batch_size is 0"),
        (("[[image, text]]", "[[image, txt]]"), WorkloadError, "'txt', which is not given (did you mean 'text'?)"),
        (("[[image, text]]", "[image, text]"), WorkloadError, "at least two components"),
        (("[[image, text]]", "[[image, image]]"), WorkloadError, "twice"),
        (("loss: contrastive", "loss: contrast"), FormatError, "loss"),
        (("loss: contrastive", "tokens: {llm: 3}"), WorkloadError, "not in its flow"),
        (("loss: contrastive", "probability: 0.0"), WorkloadError, "probability is 0.0"),
        (("loss: contrastive", "weight: .nan"), FormatError, "weight is 'nan'"),
        (("flow: [[image, text]]", "edges: [[image, text], [text, image]]"), WorkloadError, "at least two"),
        (
            ("flow: [[image, text]], loss: contrastive", "edges: [[image, text], [text, image]]"),
            WorkloadError,
            "in a circle",
        ),
        (("vocab: 10", "vocab: 10, vocab: 11"), FormatError, "'vocab' stands twice"),
        (("image:", "im.age:"), WorkloadError, "letters"),
        (("image: {layers", "image: {kind: cnn, layers"), FormatError, "cnn"),
        (("heads: 2, tokens: 5", "heads: 2, lora_rank: 4, tokens: 5"), WorkloadError, "trained: lora"),
        (("layers: 2", "layers: 1000000"), WorkloadError, "layers a step; each is costed by itself, give at most"),
        (("loss: contrastive", "loss: contrastive, rate: 1000000"), WorkloadError, "layers a step; each is costed"),
        (("name: tiny", "name: tiny\ntensor_parallel: 0"), WorkloadError, "tensor_parallel is 0 and min_tensor"),
        (("name: tiny", "name: tiny\nmin_tensor_parallel: -1"), WorkloadError, "and min_tensor_parallel -1; give"),
        (("name: tiny", "name: tiny\nmin_tensor_parallel: 4"), WorkloadError, "is 1 and min_tensor_parallel 4; give"),
        (("name: tiny", "name: tiny\ndtype: int3"), WorkloadError, "int3"),
        (("text: {layers", "loss: {layers"), WorkloadError, "choose another name"),
    ],
)
def test_bad_specs_are_refused_by_name(change: tuple[str, str], error: type[Exception], words: str) -> None:
    assert change[0] in TOWERS
    with pytest.raises(error) as caught:
        graph_of(TOWERS.replace(*change, 1))
    assert words in str(caught.value)


def test_text_that_is_no_yaml() -> None:
    with pytest.raises(FormatError, match="not YAML"):
        parse_workload("format: [")


def test_only_some_tasks() -> None:
    spec = parse_workload(TOWERS + "  again: {batch_size: 2, flow: [[image, text]], loss: contrastive}\n")
    assert [task.name for task in spec.only(["again"]).tasks] == ["again"]
    with pytest.raises(WorkloadError, match="'more'"):
        spec.only(["more"])
