"""Sections of the cost report on tables that constants were fitted on: rows that were held out, unless it says all."""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

from cost_report.layouts import best_is_among_first, fits, predict, read_runs
from cost_report.runs import cost, language_model, on_peak, one_task
from cost_report.tables import Errors, Figure, Held, Row, errors, halves, held_rates, held_seconds, read_table

from spindle.cost.links import collective_s
from spindle.cost.measured.segments import fit_segments, held_out_error
from spindle.cost.metaops import with_costs
from spindle.files.clusterfile import parse_cluster
from spindle.spec.graph import build_graph
from spindle.values.cluster import Cluster, Device
from spindle.values.contract import contract
from spindle.values.execution import Parallel

ALEPH_ALPHA = "Aleph Alpha"
GPU_TYPES = {"h100_80gb": "h100-80g", "a100_80gb": "a100-80g", "a100_40gb": "a100-40g"}
PEAKS = {"h100_80gb": 989e12, "a100_80gb": 312e12, "a100_40gb": 312e12}


@dataclass(frozen=True)
class Section:
    """A heading, lines that explain, judged figures, and rows that nothing was fitted on."""

    title: str
    lines: tuple[str, ...]
    figures: tuple[Figure, ...]
    held: tuple[Held, ...] = ()


def both(name: str, found: Errors, mean: float | None, largest: float | None, fitted_on: str) -> tuple[Figure, Figure]:
    return (
        Figure(f"{name}: mean error", found.mean, mean, fitted_on),
        Figure(f"{name}: largest error", found.largest, largest, fitted_on),
    )


# Collectives -------------------------------------------------------------------------------------------------------


def collectives() -> Section:
    """All-reduce by the shipped protocols, all-to-all by fitted segments, sub-groups with in-network reduction."""
    h200, a100 = parse_cluster("1x8:h200-141g"), parse_cluster("4x8:a100-80g")
    sweep = read_table("nccl_allreduce_h200_stas00")
    one_node = [(_all_reduce(h200, row, (8,)), _seconds(row)) for row in sweep if row["ranks"] == "8"]
    four_nodes = [(_all_reduce(a100, row, (8,) * 4), _seconds(row)) for row in sweep if row["ranks"] == "32"]
    nvlink = read_table("galvatron_nvlink_collectives")
    reduce_rows = [row for row in nvlink if row["op"] == "allreduce"]
    reduces = [
        (collective_s("all_reduce", _bytes(row), a100, (int(row["ranks"]),)), _milliseconds(row)) for row in reduce_rows
    ]
    exchange, held, segments = _all_to_all(nvlink)
    groups = [
        (busbw, float(row["busbw_gbps"]))
        for row in read_table("nccl_nvls_ranks_h200_b200")
        if row["op"] == "allreduce" and (busbw := _bus_bandwidth(row))
    ]
    figures = (
        *both("H200 sweep, all-reduce", errors(one_node), 0.05, 0.15, "4 constants, all rows given"),
        *both("NVLink, all-reduce of 2, 4, 8", errors(reduces), 0.05, 0.15, "6 constants for all three, all rows"),
        *both("NVLink, all-to-all of 2, 4, 8", exchange, 0.05, 0.15, f"{segments} segments, all rows"),
        *both("4 nodes x 8, all-reduce", errors(four_nodes), None, None, "6 constants, all rows given"),
        *both("H200 and B200, groups of 4 to 8", errors(groups), None, None, "only the groups of 8 and rings"),
    )
    lines = (
        "all-reduce: the fastest of the device type's protocols, alpha + hops + bytes / rate each (devices.yaml)",
        f"all-to-all: fewest alpha-beta segments within 8 %; held-out points of every curve: mean {held.mean:.1%}, "
        f"largest {held.largest:.1%}",
    )
    return Section("Collectives", lines, figures)


def _bytes(row: Row) -> float:
    return float(row["size_mib"]) * 2**20


def _seconds(row: Row) -> float:
    return float(row["time_us"]) * 1e-6


def _milliseconds(row: Row) -> float:
    return float(row["time_ms"]) * 1e-3


def _all_reduce(cluster: Cluster, row: Row, per_node: tuple[int, ...]) -> float:
    return collective_s("all_reduce", float(row["bytes"]), cluster, per_node)


def _all_to_all(rows: list[Row]) -> tuple[Errors, Errors, int]:
    """Errors of segments fitted on all points, errors of held-out points, and the number of segments."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["op"] == "all2all":
            curves[row["ranks"]].append((_bytes(row), _milliseconds(row)))
    fitted = {ranks: fit_segments(points) for ranks, points in curves.items()}
    inside = errors((fitted[ranks].time_s(size), time) for ranks, points in curves.items() for size, time in points)
    held = [held_out_error(points) for points in curves.values()]
    outside = Errors(sum(mean for mean, _ in held) / len(held), max(largest for _, largest in held), 5 * len(held))
    return inside, outside, sum(len(found.segments) for found in fitted.values())


def _bus_bandwidth(row: Row) -> float:
    """GB/s of an all-reduce of 8 GiB."""
    cluster = parse_cluster("1x8:h200-141g" if row["node"] == "H200" else "1x8:b200-192g")
    members, size = int(row["gpus"]), 8 * 2**30
    return 2 * (members - 1) / members * size / collective_s("all_reduce", size, cluster, (members,)) / 1e9


# Layers and steps of language models -------------------------------------------------------------------------------


def llama_layers() -> Section:
    """One LLaMA layer by micro-batch: segments through three of the points, and the roofline without any."""
    rows = {(row["quantity"], row["layers"], int(row["micro_batch"])): float(row["ms"]) * 1e-3 for row in _layer_rows()}
    layer = {b: (rows["forward_total_ms", "4", b] - rows["forward_total_ms", "2", b]) / 2 for b in range(1, 13)}
    known = [1, 4, 12]
    predicted: dict[int, float] = {}
    for low, high in pairwise(known):
        line = fit_segments([(low, layer[low]), (high, layer[high])])
        predicted |= {b: line.time_s(b) for b in range(low, high + 1)}
    held = errors((predicted[b], layer[b]) for b in layer if b not in known)
    roofline = errors((_layer_s(b), layer[b]) for b in layer)
    figures = (
        Figure(
            "LLaMA layer times, held-out micro-batches: largest error", held.largest, 0.05, "micro-batches 1, 4, 12"
        ),
        *both("LLaMA layer times, roofline", roofline, None, None, "nothing here"),
    )
    return Section("LLaMA-2 7B layers (A100)", (), figures)


def _layer_rows() -> list[Row]:
    return [row for row in read_table("galvatron_llama2_7b_layer_times") if row["quantity"] == "forward_total_ms"]


def _layer_s(samples: int) -> float:
    """Forward of one layer of LLaMA-2 7B."""
    model = language_model(layers=1, hidden=4096, heads=32, ffn=11008, tokens=2048, gated=True)
    metagraph = with_costs(contract(build_graph(one_task([model], batch=samples))), parse_cluster("1x1:a100-80g"))
    layer = metagraph.metaops[0]
    return layer.times[1] * layer.forward_fraction


def predict_mfu(row: Row, cluster: Cluster) -> float:
    """Model FLOP utilization of a MosaicML row, by the table's own formula."""
    dims = {r["model"]: r for r in read_table("mosaicml_mpt_model_dims")}[row["model"]]
    hidden, tokens = int(dims["d_model"]), int(row["seq_len"])
    model = language_model(
        layers=int(dims["n_layers"]),
        hidden=hidden,
        heads=int(dims["n_heads"]),
        ffn=4 * hidden,
        tokens=tokens,
        vocab=int(dims["vocab_size"]),
        tied=True,
    )
    micro_batch, micro_batches = int(row["micro_batch"]), int(row["grad_accum"])
    spec = one_task(
        [model], batch=micro_batch * micro_batches * cluster.num_devices, recompute=row["act_ckpt"] == "True"
    )
    layout = Parallel(micro_batch=micro_batch, shard="parameters", keeps_gathered=row["sharding"] != "FULL_SHARD")
    per_sample = 6 * float(row["num_params"]) * tokens + 12 * model.layers * hidden * tokens**2
    peak = PEAKS[row["gpu"]] * (2 if row["precision"] == "amp_fp8" else 1)
    return per_sample * micro_batch * micro_batches / cost(spec, cluster, layout).step_s / peak


def mosaic_cluster(row: Row, device: Device | None = None) -> Cluster:
    """The cluster of a MosaicML row; FP8 doubles the peak of products, not of attention."""
    cluster = parse_cluster(f"{int(row['gpus']) // 8}x8:{GPU_TYPES[row['gpu']]}")
    cluster = replace(cluster, device=device or cluster.device)
    return on_peak(cluster, peak=2, efficiency=_fp8_efficiency()) if row["precision"] == "amp_fp8" else cluster


def _fp8_efficiency() -> float:
    """Best published FP8 matrix product of an H100 over its peak."""
    rows = read_table("mamf_matmul_peaks")
    row = next(row for row in rows if row["dtype"] == "fp8" and row["accelerator"] == "NVIDIA H100 SXM")
    return float(row["mamf_tflops"]) / float(row["theory_tflops"])


def mosaic_rows(gpu: str) -> list[Row]:
    """Rows of one GPU type in 16-bit precision."""
    rows = read_table("mosaicml_llmfoundry_mfu")
    return [row for row in rows if row["gpu"] == gpu and row["precision"] != "amp_fp8"]


def mosaicml() -> Section:
    """FSDP training of MPT models: three constants per GPU type, fitted on even rows."""
    figures: list[Figure] = []
    lines: list[str] = []
    rows_held: list[Held] = []
    for gpu, name in GPU_TYPES.items():
        halved = halves(mosaic_rows(gpu))
        fitted, held = (
            [(predict_mfu(row, mosaic_cluster(row)), float(row["mfu_pct"]) / 100) for row in half] for half in halved
        )
        lines.append(f"{name}: fitted rows {errors(fitted)}")
        figures += both(f"MosaicML MFU, {name}, held-out rows", errors(held), 0.10, 0.25, "3 constants, even rows")
        rows_held += held_rates(f"MosaicML {name}", map(_mosaic_name, halved[1]), held)
    rows = [row for row in read_table("mosaicml_llmfoundry_mfu") if row["precision"] == "amp_fp8"]
    eight_bit = errors((predict_mfu(row, mosaic_cluster(row)), float(row["mfu_pct"]) / 100) for row in rows)
    figures += both("MosaicML MFU, H100 FP8", eight_bit, 0.10, 0.25, "nothing (bf16's constants)")
    title = "MosaicML: FSDP of MPT 125M to 70B, 8 to 512 GPUs"
    return Section(title, tuple(lines), tuple(figures), tuple(rows_held))


def _mosaic_name(row: Row) -> str:
    return f"{row['model']}, {row['seq_len']} tokens, {row['gpus']} GPUs, micro-batch {row['micro_batch']}"


def layouts() -> Section:
    """LLaMA 13B to 65B in tensor, pipeline and data parallel layouts."""
    runs = read_runs()
    predicted = [predict(run) for run in runs]
    right = [fits(found) == (run.step_s is not None) for run, found in zip(runs, predicted, strict=True)]
    timed = [(found.step_s, run.step_s) for run, found in zip(runs, predicted, strict=True) if run.step_s]
    held = errors(timed[1::2])
    hits, groups = best_is_among_first(runs, predicted)
    figures = (
        Figure(
            "Aleph Alpha, out of memory against fits: right", sum(right) / len(right), -0.93, "2 constants, all rows"
        ),
        Figure("Aleph Alpha, step time, held-out rows: mean error", held.mean, 0.08, "5 constants, even rows"),
        Figure("Aleph Alpha, step time, held-out rows: largest error", held.largest, None, "5 constants, even rows"),
        Figure("Aleph Alpha, best layout among the first five", hits / groups, -1.0, f"{hits} of {groups} sweeps"),
    )
    names = [run.group for run in runs if run.step_s]
    rows = held_seconds(ALEPH_ALPHA, names[1::2], timed[1::2])
    return Section("Aleph Alpha: LLaMA layouts on A100", (), figures, rows)
