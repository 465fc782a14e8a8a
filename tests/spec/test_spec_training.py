"""Workload specs on how they are trained: degrees, rates, types of weights, adapters, updates without backward."""

from math import prod

import pytest

from spindle.cost.metaops import with_costs
from spindle.errors import InfeasibleError, WorkloadError
from spindle.files.clusterfile import parse_cluster
from spindle.spec.file import parse_workload
from spindle.spec.graph import build_graph
from spindle.spec.values import WorkloadSpec
from spindle.values.contract import contract
from spindle.values.cost_options import memory_choices
from spindle.values.graph import Operator, TaskGraph
from spindle.values.metagraph import MetaGraph

TEXT = """
format: spindle.workload
version: 1
name: text
{workload}
components:
  llm: {{layers: 4, hidden: 64, heads: 8, tokens: 16, vocab: 100{component}}}
  head: {{kind: mlp, widths: [64, 8], tokens: 16{head}}}
tasks:
  t: {{batch_size: 8, flow: [llm, head]{task}}}
"""


def spec(*, workload: str = "", component: str = "", head: str = "", task: str = "") -> WorkloadSpec:
    more = {"component": component, "head": head, "task": task}
    return parse_workload(
        TEXT.format(workload=workload, **{key: f", {text}" if text else "" for key, text in more.items()})
    )


def graph(**more: str) -> TaskGraph:
    return build_graph(spec(**more))


def costed(found: WorkloadSpec, cluster: str = "2x8:a100-80g") -> MetaGraph:
    return with_costs(contract(build_graph(found)), parse_cluster(cluster), cost_options=found.cost_options)


def num_trained(operators: TaskGraph) -> int:
    trained = {p.name: prod(p.shape) for op in operators for p in op.parameters if p.trainable}
    return sum(trained.values())


# -- tensor parallelism -----------------------------------------------------------------------------------------------


def test_degrees_of_a_spec_allow_more_devices_than_samples() -> None:
    """Eight samples fill eight devices; spread over two of a node each, sixteen."""
    plain, spread = costed(spec()), costed(spec(workload="tensor_parallel: 2"))
    assert max(plain["t.llm"].times) == 8
    assert max(spread["t.llm"].times) == 16
    assert dict(spread["t.llm"].tensor_parallel)[16] == 2


@pytest.mark.parametrize(
    ("workload", "component", "degrees"),
    [
        ("tensor_parallel: 8", "", (1, 2, 4, 8)),
        ("tensor_parallel: 8", "tensor_parallel: 2", (1, 2)),
        ("", "tensor_parallel: 4, min_tensor_parallel: 4", (4,)),
        ("tensor_parallel: 8", "kv_heads: 2", (1, 2, 4, 8)),  # a key's head is held by several devices
        ("tensor_parallel: 8\nmin_tensor_parallel: 2", "", (2, 4, 8)),
    ],
)
def test_degrees_divide_the_heads(workload: str, component: str, degrees: tuple[int, ...]) -> None:
    found = spec(workload=workload, component=component).cost_options
    assert dict(found.degrees)["llm"] == degrees


def test_a_component_keeps_its_own_degrees() -> None:
    """What the language model may be spread over says nothing of the head."""
    found = costed(spec(component="tensor_parallel: 4"))
    assert max(found["t.head"].times) == 8
    assert max(found["t.llm"].times) == 16


def test_memory_falls_with_the_least_degree() -> None:
    """Choices of memory raise it in powers of two, and end at the largest."""
    found = spec(workload="tensor_parallel: 8")
    choices = memory_choices(found.cost_options)
    assert [choice.min_tensor_parallel for choice in choices] == [1, 1, 1, 1, 2, 2, 4, 4, 8, 8]
    metagraph = contract(build_graph(found))
    cluster = parse_cluster("2x8:a100-80g")
    memory = [
        with_costs(metagraph, cluster, cost_options=choice)["t.llm"].memory[8] for choice in choices if choice.recompute
    ]
    assert memory[-1] == min(memory)
    # at 16 devices of degree 8 a device holds an eighth of every layer
    states = [
        with_costs(metagraph, cluster, cost_options=c)["t.llm"].layer_state_bytes for c in (choices[0], choices[-2])
    ]
    assert states[1] < states[0]


def test_a_component_that_lacks_a_degree_has_its_largest() -> None:
    """Twenty heads are cut in four where eight are asked for, since five does not divide a node."""
    text = TEXT.format(workload="tensor_parallel: 8", component="", head="", task="").replace("heads: 8", "heads: 20")
    found = parse_workload(text.replace("hidden: 64", "hidden: 80").replace("[64, 8]", "[80, 8]"))
    last = memory_choices(found.cost_options)[-1]
    cut = with_costs(contract(build_graph(found)), parse_cluster("2x8:a100-80g"), cost_options=last)
    assert {degree for _, degree in cut["t.llm"].tensor_parallel} == {4}
    assert {degree for _, degree in cut["t.head"].tensor_parallel} == {8}


def test_degrees_that_nothing_has_are_refused() -> None:
    with pytest.raises(WorkloadError, match="no tensor_parallel degree from 3 to 3 divides its heads"):
        spec(component="tensor_parallel: 3, min_tensor_parallel: 3")
    with pytest.raises(InfeasibleError, match="none of its tensor_parallel degrees, from 8 up, divides the 4 devices"):
        costed(spec(workload="tensor_parallel: 8\nmin_tensor_parallel: 8"), "4x4:a100-80g")


# -- weights of fewer bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "size"), [("int4", 0.5), ("nf4", 0.5), ("int8", 1.0), ("fp8", 1.0), ("bfloat16", 2.0)]
)
def test_a_low_bit_base_is_stored_small_and_adapters_are_not(base: str, size: float) -> None:
    """Bytes are size * N + LoRA; what is reduced is LoRA alone (QLoRA)."""
    lora = f"trained: lora, lora_rank: 2, base_dtype: {base}"
    layers = [op for op in graph(component=lora) if op.name.startswith("t.llm.") and op.name[-1].isdigit()]
    frozen = sum(prod(p.shape) for op in layers for p in op.parameters if not p.trainable)
    adapters = sum(prod(p.shape) for op in layers for p in op.parameters if p.trainable)
    assert sum(op.parameter_bytes for op in layers) == size * frozen + 2 * adapters
    metaop = costed(spec(component=lora))["t.llm"]
    assert metaop.layers * metaop.layer_param_bytes == 2 * adapters


def test_low_bit_weights_are_multiplied_in_sixteen_bits() -> None:
    """They save memory, not time."""
    times = {
        base: costed(spec(component=f"trained: lora, lora_rank: 2{base}"))["t.llm"].times[1]
        for base in ("", ", base_dtype: int4", ", base_dtype: int8")
    }
    assert len(set(times.values())) == 1


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("base_dtype: nf4", "all of these are trained; write trained: lora"),
        ("base_dtype: int3, trained: none", "base_dtype 'int3' is not one of int4, nf4, int8, fp8"),
        ("dtype: int8", "for frozen weights of fewer bits write base_dtype"),
        ("dtype: nf4", "for frozen weights of fewer bits write base_dtype"),
        ("dtype: bool", "dtype 'bool' is not one of float64"),
    ],
)
def test_types_that_cannot_be_trained_are_refused(component: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        spec(component=component)


# -- linear attention -------------------------------------------------------------------------------------------------


def test_linear_attention_grows_with_tokens_alone() -> None:
    """Twice the tokens cost twice the FLOPs and twice the time; softmax attention more."""

    def layer(kind: str, tokens: int) -> Operator:
        return next(
            op for op in graph(component=f"kind: {kind}", task=f"tokens: {{llm: {tokens}}}") if "llm.1" in op.name
        )

    linear = [layer("linear_attention", n) for n in (4096, 8192)]
    softmax = [layer("transformer", n) for n in (4096, 8192)]
    assert linear[1].forward_flops == 2 * linear[0].forward_flops
    assert softmax[1].forward_flops > 3 * softmax[0].forward_flops
    assert linear[0].forward_flops == 8 * 4096 * (2 * 12 * 64 * 64 + 4 * 64 * 8)
    times = [
        costed(spec(component="kind: linear_attention", task=f"tokens: {{llm: {n}}}"))["t.llm"].times[1]
        for n in (4096, 8192)
    ]
    assert times[1] / times[0] == pytest.approx(2.0, rel=0.1)


def test_linear_attention_has_no_context() -> None:
    with pytest.raises(WorkloadError, match="leave cross_attention out"):
        spec(component="kind: linear_attention, cross_attention: joint")


# -- rates ------------------------------------------------------------------------------------------------------------


def test_a_rate_runs_a_task_several_times() -> None:
    """Each run has operators of its own and the task's parameters."""
    once, thrice = graph(), graph(task="rate: 3")
    assert len(thrice) == 3 * len(once)
    assert {op.task for op in thrice} == {"t", "t#1", "t#2"}
    assert sum(op.forward_flops for op in thrice) == 3 * sum(op.forward_flops for op in once)
    assert num_trained(thrice) == num_trained(once)


def test_lengths_of_every_run_differ() -> None:
    found = spec(component="tokens_p99: 32", task="rate: 2").cost_options
    assert found.spread_of("t", "llm") == found.spread_of("t#1", "llm") > 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("rate: 0", "rate is 0; it must be at least one"),
        ("every: 0", "every is 0"),
        ("every: 2, probability: 0.5", "every is 2, probability 0.5; give a step count"),
    ],
)
def test_rates_that_make_no_sense_are_refused(task: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        spec(task=task)


# -- adapters of tasks, skipped layers --------------------------------------------------------------------------------


def test_adapters_of_a_task_stay_in_it() -> None:
    """Rank r beside a matrix of m x n has r * (m + n) elements; tasks share the rest, and its adapters, by name."""
    text = (
        TEXT.format(workload="", component=", trained: lora, lora_rank: 2", head="", task=", lora_rank: {llm: 3}")
        + "  u: {batch_size: 8, flow: [llm, head], lora_rank: {llm: 1}}\n"
    )
    operators = build_graph(parse_workload(text))
    sides = (3 * 64 + 64) + (64 + 64) + (256 + 64) + (64 + 256)
    counts = {rank: 4 * rank * sides for rank in (1, 2, 3)}
    own = {op.task: sum(prod(p.shape) for p in op.parameters) for op in operators if op.name.endswith(".adapters")}
    assert own == {"t": counts[3], "u": counts[1]}
    assert num_trained(operators) == counts[1] + counts[2] + counts[3] + 64 * 8 + 8
    metagraph = contract(operators)
    assert metagraph["t.llm"].parameters == metagraph["u.llm"].parameters
    assert metagraph["t.llm.adapters"].parameters != metagraph["u.llm.adapters"].parameters


def test_adapters_of_a_task_send_gradients_through_frozen_layers() -> None:
    """A frozen layer with nothing trained has no backward; with a task's adapters in it the input gradient."""
    frozen = {op.name: op for op in graph(component="trained: none")}
    adapted = {op.name: op for op in graph(component="trained: none", task="lora_rank: {llm: 2}")}
    assert frozen["t.llm.2"].backward_flops == 0
    attention = 2 * 4.0 * 8 * 16 * 16 * 64
    assert adapted["t.llm.2"].backward_flops == adapted["t.llm.2"].forward_flops - attention / 2 + attention
    assert adapted["t.llm.adapters"].backward_flops == 2 * adapted["t.llm.adapters"].forward_flops


def test_adapters_of_a_task_need_a_transformer() -> None:
    with pytest.raises(WorkloadError, match="lora_rank of 'head' is 2; adapters of a task need a positive rank and a"):
        spec(task="lora_rank: {head: 2}")
    with pytest.raises(WorkloadError, match="lora_rank names 'nose'"):
        spec(task="lora_rank: {nose: 2}")


def test_a_skipped_layer_costs_its_adapter_only() -> None:
    operators = {op.name: op for op in graph(component="trained: lora, lora_rank: 2, skipped_layers: [1, 3]")}
    skipped = operators["t.llm.1"]
    assert skipped.forward_flops == 8 * 16 * 2 * (2 * 2 * 64)
    assert [p.shape for p in skipped.parameters] == [(2, 64), (64, 2)]
    without = graph(component="trained: none, skipped_layers: [1]")
    assert {op.name for op in without} == {f"t.{n}" for n in ("llm.embed", "llm.0", "llm.2", "llm.3", "head")}


def test_a_layer_that_stands_last_may_be_skipped() -> None:
    """What the last layer carries, the output's projection, stays."""
    names = {p.name for op in graph(component="output_features: 64, skipped_layers: [3]") for p in op.parameters}
    assert "llm.projection" in names
    assert not any(name.startswith("llm.3.") for name in names)


@pytest.mark.parametrize(
    ("layers", "message"), [("[4]", "names layer 4; its layers are 0 to 3"), ("[0, 1, 2, 3]", "names all layers")]
)
def test_layers_that_cannot_be_skipped(layers: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        spec(component=f"skipped_layers: {layers}")


# -- updates without backward -----------------------------------------------------------------------------------------

ZEROTH = "update: zeroth_order"


def test_zeroth_order_is_two_forwards() -> None:
    """No backward, no activations, no gradients to reduce, no states."""
    plain, zeroth = graph(), graph(component=ZEROTH, head=ZEROTH)
    assert sum(op.forward_flops for op in zeroth) == 2 * sum(op.forward_flops for op in plain)
    assert not any(op.backward_flops or op.activation_bytes for op in zeroth)
    for metaop in costed(spec(component=ZEROTH, head=ZEROTH)):
        assert metaop.layer_param_bytes == metaop.layer_update_s == 0
        assert metaop.forward_fraction == 1


def test_zeroth_order_stands_behind_frozen_parts_alone() -> None:
    assert num_trained(graph(component="trained: none", head=ZEROTH)) == 0
    with pytest.raises(WorkloadError, match="'head' has update: zeroth_order, so no gradient comes back from it"):
        graph(head=ZEROTH)
    with pytest.raises(WorkloadError, match="'head' behind it runs once; give 'head' update: zeroth_order too"):
        graph(component=ZEROTH)


def test_a_stem_without_positions_has_its_matrix_only() -> None:
    eye = "input_features: 6, trained: ends"
    assert num_trained(graph(component=eye)) - num_trained(graph(component=f"{eye}, positions: false")) == 16 * 64
