"""Sections of the cost report on tables that nothing was fitted on: training runs by others, the paper's workloads."""

from dataclasses import replace
from pathlib import Path

from cost_report.runs import cost, language_model, one_task
from cost_report.sections import Section, both
from cost_report.tables import Figure, Row, errors, held_rates, held_seconds, read_table

from spindle.files.clusterfile import parse_cluster
from spindle.planner.baselines.alternatives import DDP, ZERO
from spindle.spec.blocks import Mlp, Transformer
from spindle.spec.file import read_workload
from spindle.spec.values import WorkloadSpec
from spindle.values.execution import Execution, Parallel
from spindle.values.plan import Plan
from spindle.verbs.planning import plan_source
from spindle.verbs.source import spec_source

EAGER = Execution(layers="eager", attention="plain", gradients="float32")
"""PyTorch's mixed precision of 2021."""
COMPILED = Execution(layers="compiled", attention="plain", gradients="float32", overlap=False)
COMPILED_BF16 = replace(COMPILED, gradients="parameters")  # the T5 table says bf16, the ViT tables name no precision

CLIP = {
    "ViT-B-32": [(12, 768, 12, 50), (12, 512, 8, 77)],
    "ViT-B-16": [(12, 768, 12, 197), (12, 512, 8, 77)],
    "ViT-B-16-plus-240": [(12, 896, 14, 226), (12, 640, 10, 77)],
    "ViT-L-14": [(24, 1024, 16, 257), (12, 768, 12, 77)],
}
VIT = {"B/16": (12, 768, 12, 3072, 197), "G/14": (48, 1664, 16, 8192, 257)}
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
        gpus, batch = int(row["gpus"]), int(row["batch_per_gpu"])
        towers = [_encoder(name, *sizes) for name, sizes in zip(("image", "text"), CLIP[row["model"]], strict=True)]
        towers = [replace(tower, output_tokens=1, output_features=512) for tower in towers]
        spec = one_task(
            towers, batch=batch * gpus, execution=EAGER, recompute=row["grad_ckpt"] == "yes", loss="contrastive"
        )
        step = cost(spec, parse_cluster(f"{gpus // 8}x8:a100-40g"), Parallel()).step_s
        pairs.append((batch / step, float(row["samples_per_s_per_gpu"])))
        lines.append(_line(row["model"], *pairs[-1]))
    return _unfitted("OpenCLIP", "OpenCLIP LAION-400M (A100), samples/s a GPU", lines, pairs)


def _encoder(name: str, layers: int, hidden: int, heads: int, tokens: int) -> Transformer:
    return language_model(
        name=name, layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, tokens=tokens, causal=False
    )


def vit() -> Section:
    """ViT in JAX: compiled, attention not fused, reduction after backward."""
    pairs, lines = [], []
    for row in read_table("vit_a100_h100"):
        kind = "a100-80g" if row["gpu"].startswith("A100") else "h100-80g"
        gpus, batch = int(row["gpus"]), int(row["batch_per_gpu"])
        layers, hidden, heads, ffn, tokens = VIT[row["model"]]
        model = language_model(layers=layers, hidden=hidden, heads=heads, ffn=ffn, tokens=tokens, causal=False)
        spec = one_task([model], batch=batch * gpus, execution=COMPILED)
        step = cost(spec, parse_cluster(f"{gpus // 8}x8:{kind}"), Parallel()).step_s
        pairs.append((batch * gpus / step, float(row["samples_per_s_total"])))
        lines.append(_line(f"{row['model']} on {row['gpus']} {row['gpu']}", *pairs[-1]))
    return _unfitted("ViT", "ViT in JAX (A100, H100), samples/s", lines, pairs)


def t5() -> Section:
    """T5 in JAX: the same style as ViT; 512 input and 114 target tokens (t5x's defaults, not printed in the table)."""
    pairs, lines = [], []
    for row in read_table("t5_a100"):
        layers, hidden, heads, ffn = T5[row["model"].rpartition("-")[2]]
        encoder = Transformer(
            name="encoder",
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=64,
            ffn=ffn,
            gated=True,
            tokens=512,
        )
        decoder = replace(
            encoder, name="decoder", tokens=114, vocab=32128, logits=True, tied=False, cross_attention="separate"
        )
        gpus, tensor, batch = int(row["gpus"]), int(row["tp"]), int(row["batch_per_gpu"])
        spec = one_task([encoder], [decoder], batch=batch * gpus, execution=COMPILED_BF16)
        step = cost(spec, parse_cluster(f"{gpus // 8}x8:a100-80g"), Parallel(tensor=tensor)).step_s
        pairs.append((batch / step, float(row["seq_per_s_per_gpu"])))
        lines.append(_line(f"{row['model']} on {row['gpus']}", *pairs[-1]))
    return _unfitted("T5", "T5 v1.1 in JAX (A100), sequences/s a GPU", lines, pairs)


def _line(name: str, predicted: float, measured: float) -> str:
    return f"{name:<28} predicted {predicted:9.1f}  measured {measured:9.1f}  {predicted / measured - 1:+7.1%}"


def _unfitted(name: str, title: str, lines: list[str], pairs: list[tuple[float, float]]) -> Section:
    figures = both(name, errors(pairs), None, 0.35, "nothing here")
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
    finetune = language_model(
        name="llm",
        layers=layers,
        hidden=hidden,
        heads=heads,
        ffn=ffn,
        tokens=576 + conversation,
        gated=True,
        vocab=32000,
    )
    pretrain = replace(finetune, tokens=576 + CAPTION_TOKENS, trained="none")
    finetune_s = _llava_step_s(finetune, 16, Parallel(shard="parameters"))
    return finetune_s / 16 / (_llava_step_s(pretrain, 32, Parallel(shard="gradients")) / 32)


def _llava_step_s(model: Transformer, samples: int, layout: Parallel) -> float:
    """A step of eight devices: frozen vision encoder, trained projector, language model with recompute."""
    eye = replace(_encoder("vision", 23, 1024, 16, 577), trained="none", output_tokens=576)  # all layers but the last
    projector = Mlp(name="projector", widths=(1024, model.hidden, model.hidden), tokens=576)
    spec = one_task([eye], [projector], [model], batch=8 * samples, recompute=True)
    return cost(spec, parse_cluster("1x8:a100-80g"), layout).step_s


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
    hidden, gpus, layers, batch = (int(row[name]) for name in ("hidden", "gpus", "layers", "global_batch_seqs"))
    tensor, pipeline = int(row["tp"]), int(row["pp"])
    data = max(gpus // (tensor * pipeline), 1)
    layout = Parallel(
        micro_batch=1 if pipeline > 1 else min(4, batch // data),  # not printed
        tensor=tensor,
        pipeline=pipeline,
        sequence_parallel=not a100,
        shard="optimizer",
    )
    model = language_model(
        layers=layers, hidden=hidden, heads=int(row["heads"]), ffn=4 * hidden, tokens=tokens, vocab=vocab
    )
    spec = one_task(
        [model],
        batch=batch,
        execution=Execution(attention="fused_softmax" if a100 else "fused"),
        recompute=a100,
    )
    step = cost(spec, parse_cluster(f"{gpus // 8}x8:{'a100-80g' if a100 else 'h100-80g'}"), layout).step_s
    forward = 24 * layers * tokens * hidden**2 * (1 + tokens / (6 * hidden) + vocab / (12 * layers * hidden))
    flops = (4 if a100 else 3) * forward * batch
    return flops / step / gpus / 1e12, float(row["tflops_per_gpu"])


def paper_workloads(folder: Path) -> Section:
    """Sequential step of the paper's workloads on its cluster: data parallelism over all devices, tasks in turn."""
    lines, pairs = [], []
    for row in read_table("spindle_paper_sequential"):
        gpus, measured = int(row["gpus"]), float(row["milliseconds"])
        spec = read_workload(folder / "workloads" / f"{row['workload']}.yaml")
        step = sequential_s(spec.only(task.name for task in spec.tasks[: int(row["tasks"])]), folder, gpus)
        pairs.append((1e3 * step, measured))
        lines.append(_line(f"{row['workload']}, {row['tasks']} tasks, {gpus}", *pairs[-1]) + " ms")
    figures = both(
        "Paper's workloads, sequential", errors(pairs), 0.15, 0.25, "nothing; batches assumed to fit 45 % MFU on 8"
    )
    held = held_seconds("Spindle paper", map(_name, lines), pairs)
    return Section("The paper's workloads, run sequentially", tuple(lines), figures, held)


def sequential_s(spec: WorkloadSpec, folder: Path, gpus: int) -> float:
    """A step of the tasks in turn on so many of the paper's devices, as `spindle plan` prints it: data parallelism with
    one reduction a step, of states that are sharded where that is shorter, as DeepSpeed may.
    """
    cluster = replace(parse_cluster(str(folder / "clusters" / "spindle-paper.yaml")), nodes=gpus // 8)
    return in_sequence_s(plan_source(spec_source(spec), cluster, method="sequential")[0])


def in_sequence_s(plan: Plan) -> float:
    """What a plan says of its tasks in turn on all devices."""
    return min(other.step_s for other in plan.alternatives if other.name in (DDP, ZERO) and other.fits)
