"""Sections of the cost report on tables that nothing was fitted on: training runs by others, the paper's workloads."""

from dataclasses import dataclass, replace

from cost_layouts import Constants
from cost_llm import Layout, Model, block_work, pipelined_step_s
from cost_sections import Section, both
from cost_tables import Figure, Row, errors, held_rates, held_seconds, read_table

from spindle.cluster import Cluster, Device
from spindle.clusterfile import parse_cluster
from spindle.contract import contract
from spindle.cost.layout import overlapped_s, sharded_s, tensor_parallel_s, update_s
from spindle.cost.links import collective_s, spread_over_nodes
from spindle.cost.price import price
from spindle.cost.roofline import Work, time_operator
from spindle.pricing import Pricing
from spindle.spec.blocks import Transformer, transformer_block
from spindle.spec.file import read_workload
from spindle.spec.graph import build_graph


@dataclass(frozen=True, slots=True)
class Style:
    """How a training program runs its layers. Constants are those of the Aleph Alpha fit or of the device type.

    traffic        elementwise_traffic; None: the device type's
    gradients      bytes of a gradient when it is reduced
    overlap        whether reduction runs beside backward
    update         bytes moved per parameter by the optimiser
    """

    traffic: float | None
    score_passes: float
    gradients: int
    overlap: bool
    update: float


EAGER = Style(
    traffic=Constants().traffic, score_passes=Constants().score_passes, gradients=4, overlap=True, update=28.0
)
COMPILED = Style(traffic=None, score_passes=Constants().score_passes, gradients=4, overlap=False, update=40.0)
COMPILED_BF16 = replace(COMPILED, gradients=2)  # the T5 table says bf16, the ViT tables name no precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One stack of a model in a table, and the tokens that its cross-attention reads (0: none)."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    tokens: int
    gated: bool = False
    vocab: int = 0
    head_dim: int = 0
    context: int = 0


def replicated_step_s(
    stacks: list[Stack], cluster: Cluster, batch: int, style: Style, *, tensor: int = 1, recompute: bool = False
) -> float:
    """A data-parallel step; `batch` samples a device, so batch * tensor for each tensor-parallel group."""
    device = cluster.device
    device = replace(
        device,
        elementwise_traffic=style.traffic or device.elementwise_traffic,
        attention_efficiency=device.matmul_efficiency / 2,  # plain products, score matrices written out
    )
    forward = backward = parameters = 0.0
    for stack in stacks:
        f, b, p = _stack_time(stack, cluster, device, batch * tensor, style, tensor, recompute)
        forward, backward, parameters = forward + f, backward + b, parameters + p
    data = cluster.num_devices // tensor
    lanes = min(cluster.devices_per_node // tensor, data)
    per_node = (lanes,) * (data // lanes)
    reduced = collective_s("all_reduce", style.gradients * parameters / tensor, cluster, per_node)
    backward = overlapped_s(backward, reduced, cluster) if style.overlap else backward + reduced
    return forward + backward + style.update * parameters / tensor / device.memory_bytes_per_s


def _stack_time(
    stack: Stack, cluster: Cluster, device: Device, samples: int, style: Style, tensor: int, recompute: bool
) -> tuple[float, float, float]:
    """Forward and backward seconds, and parameters."""
    component = Transformer(
        name="stack",
        layers=stack.layers,
        hidden=stack.hidden,
        heads=stack.heads,
        kv_heads=stack.heads,
        head_dim=stack.head_dim or stack.hidden // stack.heads,
        ffn=stack.ffn,
        gated=stack.gated,
        tokens=stack.tokens,
        cross_attention="separate" if stack.context else "none",
    )
    block = transformer_block(component, context_tokens=stack.context)
    scores = samples * stack.heads * stack.tokens * (stack.tokens + stack.context)
    work = block_work(
        block,
        samples,
        causal=False,
        recompute=recompute,
        moved_bytes=style.score_passes * 2 * scores / tensor,
    )
    time = time_operator(work, device, data_parallel=1, tensor_parallel=tensor, sequence_parallel=False)
    traffic = tensor_parallel_s(2.0 * samples * stack.tokens * stack.hidden, cluster, tensor)
    parameters = stack.layers * sum(w.shape[0] * w.shape[1] for w in block.weights if len(w.shape) == 2)
    forward, backward = (stack.layers * (part + traffic) for part in (time.forward_s, time.backward_s))
    if stack.vocab:
        head = Work(matmuls=((float(samples * stack.tokens), stack.vocab // tensor, stack.hidden),))
        found = time_operator(head, device, data_parallel=1)
        forward, backward = forward + found.forward_s, backward + found.backward_s
        parameters += stack.vocab * stack.hidden
    return forward, backward, float(parameters)


CLIP = {
    "ViT-B-32": [(12, 768, 12, 50), (12, 512, 8, 77)],
    "ViT-B-16": [(12, 768, 12, 197), (12, 512, 8, 77)],
    "ViT-B-16-plus-240": [(12, 896, 14, 226), (12, 640, 10, 77)],
    "ViT-L-14": [(24, 1024, 16, 257), (12, 768, 12, 77)],
}
VIT = {
    "B/16": Stack(layers=12, hidden=768, heads=12, ffn=3072, tokens=197),
    "G/14": Stack(layers=48, hidden=1664, heads=16, ffn=8192, tokens=257),
}
T5 = {
    "small": (8, 512, 6, 1024),
    "large": (24, 1024, 16, 2816),
    "xl": (24, 2048, 32, 5120),
    "xxl": (24, 4096, 64, 10240),
}


def openclip() -> Section:
    """OpenCLIP on LAION-400M: PyTorch's mixed precision of 2021, nothing fused."""
    pairs, lines = [], []
    for row in read_table("openclip_laion400m_a100"):
        cluster = parse_cluster(f"{int(row['gpus']) // 8}x8:a100-40g")
        stacks = [Stack(layers=n, hidden=h, heads=a, ffn=4 * h, tokens=t) for n, h, a, t in CLIP[row["model"]]]
        batch = int(row["batch_per_gpu"])
        step = replicated_step_s(stacks, cluster, batch, EAGER, recompute=row["grad_ckpt"] == "yes")
        pairs.append((batch / step, float(row["samples_per_s_per_gpu"])))
        lines.append(_line(row["model"], *pairs[-1]))
    return _unfitted("OpenCLIP", "OpenCLIP LAION-400M (A100), samples/s a GPU", lines, pairs)


def vit() -> Section:
    """ViT in JAX: compiled, attention not fused, reduction after backward."""
    pairs, lines = [], []
    for row in read_table("vit_a100_h100"):
        kind = "a100-80g" if row["gpu"].startswith("A100") else "h100-80g"
        cluster = parse_cluster(f"{int(row['gpus']) // 8}x8:{kind}")
        batch = int(row["batch_per_gpu"])
        step = replicated_step_s([VIT[row["model"]]], cluster, batch, COMPILED)
        pairs.append((batch * int(row["gpus"]) / step, float(row["samples_per_s_total"])))
        lines.append(_line(f"{row['model']} on {row['gpus']} {row['gpu']}", *pairs[-1]))
    return _unfitted("ViT", "ViT in JAX (A100, H100), samples/s", lines, pairs)


def t5() -> Section:
    """T5 in JAX: the same style as ViT; 512 input and 114 target tokens (t5x's defaults, not printed in the table)."""
    pairs, lines = [], []
    for row in read_table("t5_a100"):
        layers, hidden, heads, ffn = T5[row["model"].rpartition("-")[2]]
        encoder = Stack(layers=layers, hidden=hidden, heads=heads, ffn=ffn, tokens=512, gated=True, head_dim=64)
        decoder = replace(encoder, tokens=114, context=512, vocab=32128)
        cluster, tensor = parse_cluster(f"{int(row['gpus']) // 8}x8:a100-80g"), int(row["tp"])
        batch = int(row["batch_per_gpu"])
        step = replicated_step_s([encoder, decoder], cluster, batch, COMPILED_BF16, tensor=tensor)
        pairs.append((batch / step, float(row["seq_per_s_per_gpu"])))
        lines.append(_line(f"{row['model']} on {row['gpus']}", *pairs[-1]))
    return _unfitted("T5", "T5 v1.1 in JAX (A100), sequences/s a GPU", lines, pairs)


def _line(name: str, predicted: float, measured: float) -> str:
    return f"{name:<28} predicted {predicted:9.1f}  measured {measured:9.1f}  {predicted / measured - 1:+7.1%}"


def _unfitted(name: str, title: str, lines: list[str], pairs: list[tuple[float, float]]) -> Section:
    figures = both(name, errors(pairs), None, 0.30, "nothing here")
    return Section(title, tuple(lines), figures, held_rates(name, map(_name, lines), pairs))


def _name(line: str) -> str:
    return line.partition("predicted")[0].strip()


# Frozen parts --------------------------------------------------------------------------------------------------------

CAPTION_TOKENS, CONVERSATION_TOKENS = 40, 400
"""Text of a sample with its padding: assumed, the table states none. Captions are one short sentence; conversations
have a system prompt of 35 tokens and several turns."""


def llava() -> Section:
    """LLaVA-1.5: the projector alone is trained (input gradients through the language model), or both."""
    speed = {row["run"]: float(row["samples_per_s_total"]) for row in read_table("llava15_a100_frozen_parts")}
    lines, pairs = [], []
    for size, layers, hidden, heads, ffn in (("7B", 32, 4096, 32, 11008), ("13B", 40, 5120, 40, 13824)):
        measured = speed[f"LLaVA-1.5-{size} pretrain"] / speed[f"LLaVA-1.5-{size} finetune"]
        predicted = _llava_ratio(layers, hidden, heads, ffn, CONVERSATION_TOKENS)
        spread = [_llava_ratio(layers, hidden, heads, ffn, tokens) for tokens in (300, 500)]
        pairs.append((predicted, measured))
        lines.append(
            f"{size}: pretrain / finetune samples/s predicted {predicted:.2f} (conversations of 300 to 500 tokens: "
            f"{spread[0]:.2f} to {spread[1]:.2f}), measured {measured:.2f}"
        )
    same = _llava_ratio(32, 4096, 32, 11008, CAPTION_TOKENS)
    lines.append(
        f"the rule alone, at equal lengths: {same:.2f} (backward runs products once, not twice, plus recompute)"
    )
    figures = tuple(
        Figure(
            f"LLaVA {size}, ratio of the two freezing patterns: error", abs(p / m - 1), 0.30, "nothing; lengths assumed"
        )
        for size, (p, m) in zip(("7B", "13B"), pairs, strict=True)
    )
    return Section("LLaVA-1.5: frozen parts (8 A100)", tuple(lines), figures)


def _llava_ratio(layers: int, hidden: int, heads: int, ffn: int, conversation: int) -> float:
    """Time of a sample in finetuning over that in pretraining."""
    finetune = Model(
        layers=layers, hidden=hidden, heads=heads, ffn=ffn, tokens=576 + conversation, gated=True, vocab=32000
    )
    pretrain = replace(finetune, tokens=576 + CAPTION_TOKENS)
    return _llava_step_s(finetune, 16, trained=True) / 16 / (_llava_step_s(pretrain, 32, trained=False) / 32)


def _llava_step_s(model: Model, samples: int, *, trained: bool) -> float:
    """One step of a device: frozen vision encoder (forward only), language model with recompute.

    Frozen behind the trained projector, the language model's backward has input gradients only. Finetuning shards its
    parameters (ZeRO stage 3).
    """
    cluster = parse_cluster("1x8:a100-80g")
    device = cluster.device
    passes = 2.0 if trained else 1.0
    layer = time_operator(
        block_work(model.block, samples, causal=True, passes=passes, recompute=True), device, data_parallel=1
    )
    head = Work(matmuls=((float(samples * model.tokens), model.vocab, model.hidden),), passes=passes)
    eye = Model(layers=23, hidden=1024, heads=16, ffn=4096, tokens=577, causal=False)  # features of the last but one
    look = time_operator(block_work(eye.block, samples, causal=False, passes=0.0), device, data_parallel=1)
    step = eye.layers * look.forward_s + time_operator(head, device, data_parallel=1).total_s
    if trained:
        layer = sharded_s(layer, 2 * model.layer_parameters, cluster, 8)
        step += update_s(model.layers * model.layer_parameters / 8, device)
    return step + model.layers * layer.total_s


# Megatron and the paper's workloads ----------------------------------------------------------------------------------


def megatron() -> Section:
    """GPT in tensor and pipeline parallel layouts; only stated."""
    lines = []
    found: dict[str, list[tuple[float, float]]] = {"A100": [], "H100": []}
    for kind, table, tokens, vocab in (
        ("A100", "megatron_lm_a100_weak_scaling", 2048, 51200),
        ("H100", "megatron_core_h100_weak_scaling", 4096, 131072),
    ):
        for row in read_table(table):
            pair = _megatron_row(row, kind, tokens, vocab)
            found[kind].append(pair)
            lines.append(_line(f"{kind} {row['size_b']}B on {row['gpus']}", *pair))
    figures = (
        *both("Megatron-LM on A100, TFLOP/s", errors(found["A100"]), None, None, "nothing here"),
        *both("Megatron-Core on H100, TFLOP/s", errors(found["H100"]), None, None, "nothing here"),
    )
    held = held_rates("Megatron", map(_name, lines), [*found["A100"], *found["H100"]])
    return Section("Megatron weak scaling, TFLOP/s a GPU", tuple(lines), figures, held)


def _megatron_row(row: Row, kind: str, tokens: int, vocab: int) -> tuple[float, float]:
    a100 = kind == "A100"
    hidden, gpus = int(row["hidden"]), int(row["gpus"])
    model = Model(
        layers=int(row["layers"]), hidden=hidden, heads=int(row["heads"]), ffn=4 * hidden, tokens=tokens, vocab=vocab
    )
    tensor, pipeline = int(row["tp"]), int(row["pp"])
    data = max(gpus // (tensor * pipeline), 1)
    micro_batch = 1 if pipeline > 1 else min(4, int(row["global_batch_seqs"]) // data)  # not printed
    layout = Layout(
        micro_batch=micro_batch,
        micro_batches=max(int(row["global_batch_seqs"]) // (data * micro_batch), 1),
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        sequence_parallel=not a100,
        recompute=a100,
    )
    cluster = parse_cluster(f"{gpus // 8}x8:{'a100-80g' if a100 else 'h100-80g'}")
    scores = Constants().score_passes / 2 * 2 * model.heads * tokens**2 / tensor if a100 else 0.0  # fused softmax
    step = pipelined_step_s(model, cluster, layout, moved_bytes=scores)
    forward = (
        24 * model.layers * tokens * hidden**2 * (1 + tokens / (6 * hidden) + vocab / (12 * model.layers * hidden))
    )
    flops = (4 if a100 else 3) * forward * int(row["global_batch_seqs"])
    return flops / step / gpus / 1e12, float(row["tflops_per_gpu"])


PAPER_S = {
    ("multitask_clip", 8): {4: 0.855, 7: 1.268, 10: 1.551},
    ("ofasys", 8): {4: 1.612, 7: 3.110},
    ("qwen_val_9b", 32): {3: 2.520},
}


def paper_workloads(folder: str) -> Section:
    """Sequential step of the paper's workloads: MetaOps one after another on all devices, then gradients reduced."""
    lines, pairs = [], []
    for (name, devices), times in PAPER_S.items():
        spec = read_workload(f"{folder}/{name}.yaml")
        cluster = parse_cluster(f"{devices // 8}x8:a800-80g")
        for count, measured in times.items():
            chosen = spec.only(task.name for task in spec.tasks[:count])
            priced = price(contract(build_graph(chosen)), cluster, pricing=Pricing(tensor_parallel=8))
            layers = sum(m.layers * min(m.times.values()) for m in priced)
            shared = {m.parameters or m.name: m.layers * m.layer_param_bytes for m in priced}
            reduced = collective_s("all_reduce", sum(shared.values()), cluster, spread_over_nodes(devices, cluster))
            pairs.append((layers + reduced, measured))
            line = _line(f"{name}, {count} tasks, {devices}", 1e3 * pairs[-1][0], 1e3 * measured)
            lines.append(f"{line}  (ms; calibration factor {measured / pairs[-1][0]:.3f})")
    figures = both(
        "Paper's workloads, sequential", errors(pairs), None, None, "nothing; batches assumed to fit 45 % MFU"
    )
    held = held_seconds("Spindle paper", map(_name, lines), pairs)
    return Section("The paper's workloads, run sequentially", tuple(lines), figures, held)
