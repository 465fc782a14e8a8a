"""LLaMA on A100 in many layouts: step times and out-of-memory runs of the published table against the model.

Three constants are fitted on half of the step times (`fit`): `traffic` of unfused LLaMA layers (eager norms, rotary
embedding), the passes over score matrices of unfused attention, and the cost of tensor parallelism that ships with the
product. Memory has two: `RESERVE` and the product's RMS_NORM_COPIES. All else is the product's.
"""

from dataclasses import dataclass, replace

from cost_llm import Layout, Model, pipelined_step_s
from cost_tables import Row, read_table

from spindle.cluster import Cluster
from spindle.clusterfile import parse_cluster
from spindle.spec.blocks import RMS_NORM_COPIES, Transformer, transformer_block

VOCAB = 128_000
DIMENSIONS = {"13B": (40, 5120, 40, 13824), "30B": (60, 6656, 52, 17920), "65B": (80, 8192, 64, 22016)}
RESERVE = 4e9  # bytes: CUDA context, communication buffers, fragmentation
CAPACITY = 80 * 2**30
LOGIT_BYTES = 12.0  # bf16 logits, float32 copy and gradient, and bf16 gradient; gathered on every device
SCORE_BYTES = (
    5.0  # kept by unfused attention for each score: softmax, dropout mask and result (Korthikanti et al. 2022)
)
RMS_KERNEL_COPIES = 2.0  # elements per hidden unit that fused norms keep
RMS_KERNEL_TRAFFIC = 0.5  # of `traffic`: what fused norms leave
ATTENTION_2 = 0.45  # share of the peak that FlashAttention 2 reaches (its authors: 0.5 to 0.6 forward); version 1: ours


@dataclass(frozen=True, slots=True)
class Constants:
    """Fitted: see the module."""

    traffic: float = 17.5
    score_passes: float = 14.0


@dataclass(frozen=True, slots=True)
class Run:
    """One row: a layout and what came of it (None: out of memory)."""

    group: str
    model: Model
    layout: Layout
    kernel: str
    devices: int
    step_s: float | None

    @property
    def fused_norms(self) -> bool:
        """Whether norms ran as one kernel."""
        return self.kernel.endswith("RMS kernel")

    @property
    def eager_attention(self) -> bool:
        """Whether score matrices were written out."""
        return self.kernel in ("torch", "fused")


def read_runs() -> list[Run]:
    """All rows but those whose kernel did not exist."""
    rows = read_table("alephalpha_llama_a100_layouts")
    return [_run(row) for row in rows if row["step_time_s"] != "Kernel not available"]


def _run(row: Row) -> Run:
    layers, hidden, heads, ffn = DIMENSIONS[row["model"]]
    tokens, devices, micro_batch = int(row["seq_len"]), int(row["gpus"]), int(row["micro_batch"])
    tensor, pipeline = int(row["tp"]), int(row["pp"])
    data = devices // (tensor * pipeline)
    layout = Layout(
        micro_batch=micro_batch,
        micro_batches=(2048 if tokens == 2048 else 512) // (data * micro_batch),
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        sequence_parallel=row["sequence_parallel"] == "True",
        recompute=row["activation_ckpt"] != "disabled",
    )
    model = Model(layers=layers, hidden=hidden, heads=heads, ffn=ffn, tokens=tokens, vocab=VOCAB, gated=True)
    measured = row["step_time_s"]
    return Run(row["file"], model, layout, row["kernel"], devices, float(measured) if measured[0].isdigit() else None)


def predict_step_s(run: Run, constants: Constants) -> float:
    """Seconds of one step."""
    cluster = _cluster(run, constants)
    moved = 0.0
    if run.eager_attention:
        half = 1.0 if run.kernel == "torch" else 0.5  # a fused softmax saves half of the passes
        scores = run.layout.micro_batch * run.model.heads * run.model.tokens**2 / run.layout.tensor
        moved = constants.score_passes * half * 2 * scores
    return pipelined_step_s(run.model, cluster, run.layout, moved_bytes=moved)


def _cluster(run: Run, constants: Constants) -> Cluster:
    cluster = parse_cluster(f"{max(run.devices // 8, 1)}x8:a100-80g")
    attention = cluster.device.attention_efficiency
    if run.kernel.startswith("flash_attention2"):
        attention = ATTENTION_2
    if run.eager_attention:  # two plain matrix products, nothing skipped under the mask
        attention = cluster.device.matmul_efficiency / 2
    traffic = constants.traffic * (RMS_KERNEL_TRAFFIC if run.fused_norms else 1.0)
    return replace(cluster, device=replace(cluster.device, attention_efficiency=attention, elementwise_traffic=traffic))


def predict_bytes(run: Run) -> float:
    """Peak bytes of the fullest device: the pipeline's first stage keeps most micro-batches, its last the logits."""
    m, at = run.model, run.layout
    stage_parameters = (m.layers / at.pipeline * m.layer_parameters + m.vocab * m.hidden) / at.tensor
    if at.pipeline == 1:
        stage_parameters += m.vocab * m.hidden / at.tensor
    state = stage_parameters * (2 + 2 + 12 / at.data)  # optimiser states are sharded over replicas (ZeRO stage 1)
    layer = _kept_bytes(run)
    boundary = 2.0 * at.micro_batch * m.tokens * m.hidden / (at.tensor if at.sequence_parallel else 1)
    held = boundary if at.recompute else layer
    peaks = []
    for stage in {0, at.pipeline - 1}:
        in_flight = min(at.micro_batches, at.pipeline - stage)
        peak = state + in_flight * m.layers / at.pipeline * held + (layer if at.recompute else 0.0)
        if stage == at.pipeline - 1:
            peak += LOGIT_BYTES * at.micro_batch * m.tokens * m.vocab
        peaks.append(peak)
    return max(peaks) + RESERVE


def _kept_bytes(run: Run) -> float:
    m, at = run.model, run.layout
    component = Transformer(
        name="llama",
        layers=m.layers,
        hidden=m.hidden,
        heads=m.heads,
        kv_heads=m.heads,
        head_dim=m.hidden // m.heads,
        ffn=m.ffn,
        gated=True,
        tokens=m.tokens,
    )
    copies = RMS_KERNEL_COPIES if run.fused_norms else RMS_NORM_COPIES
    block = transformer_block(component, norm_copies=copies)
    boundary = block.kept_boundary / (at.tensor if at.sequence_parallel else 1)
    kept = 2 * at.micro_batch * (boundary + (block.kept_trained - block.kept_boundary) / at.tensor)
    if run.eager_attention:
        share = 1.0 if run.kernel == "torch" else 0.6  # the fused softmax keeps its result only
        kept += share * SCORE_BYTES * m.heads * at.micro_batch * m.tokens**2 / at.tensor
    return kept


def best_is_among_first(runs: list[Run], constants: Constants, first: int = 5) -> tuple[int, int]:
    """(groups whose fastest run is among the model's first `first` that it says fit, groups)."""
    groups = sorted({run.group for run in runs})
    hits = 0
    for group in groups:
        members = [run for run in runs if run.group == group]
        fastest = min((run for run in members if run.step_s), key=lambda run: run.step_s or 0.0)
        ranked = sorted(
            (r for r in members if predict_bytes(r) <= CAPACITY), key=lambda r: predict_step_s(r, constants)
        )
        hits += fastest in ranked[:first]
    return hits, len(groups)
