"""LLaMA on A100 in many layouts: step times and out-of-memory runs of the published table against the product.

Each row is a spec whose `execution` names the kernels of the row, in a layout of `spindle.cost.parallel`. The product's
constants for eager layers, fused norms, plain attention and tensor parallelism were fitted on half of the step times.
"""

from dataclasses import dataclass

from cost_report.runs import cost, language_model, one_task
from cost_report.tables import Row, read_table

from spindle.cost.parallel import ParallelCost
from spindle.files.clusterfile import parse_cluster
from spindle.spec.values import WorkloadSpec
from spindle.values.execution import Attention, Execution, Parallel

VOCAB = 128_000
DIMENSIONS = {"13B": (40, 5120, 40, 13824), "30B": (60, 6656, 52, 17920), "65B": (80, 8192, 64, 22016)}


@dataclass(frozen=True, slots=True)
class Run:
    """One row: a layout and what came of it (None: out of memory)."""

    group: str
    spec: WorkloadSpec
    layout: Parallel
    devices: int
    step_s: float | None


def read_runs() -> list[Run]:
    """All rows but those whose kernel did not exist."""
    rows = read_table("alephalpha_llama_a100_layouts")
    return [_run(row) for row in rows if row["step_time_s"] != "Kernel not available"]


def _run(row: Row) -> Run:
    layers, hidden, heads, ffn = DIMENSIONS[row["model"]]
    tokens, devices = int(row["seq_len"]), int(row["gpus"])
    layout = Parallel(
        micro_batch=int(row["micro_batch"]),
        tensor=int(row["tp"]),
        pipeline=int(row["pp"]),
        sequence_parallel=row["sequence_parallel"] == "True",
        shard="optimizer",
    )
    attention, _, norms = row["kernel"].partition(" + ")
    model = language_model(layers=layers, hidden=hidden, heads=heads, ffn=ffn, tokens=tokens, vocab=VOCAB, gated=True)
    spec = one_task(
        [model],
        batch=2048 if tokens == 2048 else 512,
        execution=Execution(
            layers="eager", norms="fused" if norms == "RMS kernel" else "plain", attention=_attention(attention)
        ),
        recompute=row["activation_ckpt"] != "disabled",
    )
    measured = row["step_time_s"]
    return Run(row["file"], spec, layout, devices, float(measured) if measured[0].isdigit() else None)


def _attention(kernel: str) -> Attention:
    if kernel.startswith("flash_attention"):
        return "flash2" if kernel == "flash_attention2" else "fused"
    return "plain" if kernel == "torch" else "fused_softmax"


def predict(run: Run) -> ParallelCost:
    """Seconds of one step, and bytes of the fullest device."""
    return cost(run.spec, parse_cluster(f"{max(run.devices // 8, 1)}x8:a100-80g"), run.layout)


def fits(predicted: ParallelCost) -> bool:
    """Whether the product says that a run fits its devices."""
    return predicted.memory_bytes <= parse_cluster("1x8:a100-80g").device.memory_bytes


def best_is_among_first(runs: list[Run], predicted: list[ParallelCost], first: int = 5) -> tuple[int, int]:
    """(groups whose fastest run is among the model's first `first` that it says fit, groups)."""
    groups = sorted({run.group for run in runs})
    hits = 0
    for group in groups:
        members = [(run, found) for run, found in zip(runs, predicted, strict=True) if run.group == group]
        fastest = min((run for run, _ in members if run.step_s), key=lambda run: run.step_s or 0.0)
        ranked = sorted(((run, found) for run, found in members if fits(found)), key=lambda pair: pair[1].step_s)
        hits += any(run is fastest for run, _ in ranked[:first])
    return hits, len(groups)
