"""Fits the cost model's constants again, each on the rows that docs/cost-model.md names. Needs scipy."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from cost_report.layouts import predict, read_runs
from cost_report.sections import GPU_TYPES, mosaic_cluster, mosaic_rows, predict_mfu
from cost_report.tables import errors, halves, read_table
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from spindle.cost import layout, roofline
from spindle.files.clusterfile import parse_cluster
from spindle.values import execution


def _fit(residuals: Callable[[Sequence[float]], list[float]], start: Sequence[float]) -> tuple[float, ...]:
    """Least squares over the logarithms of positive constants; errors far beyond a tenth count less than squared."""
    found = least_squares(
        lambda logs: np.asarray(residuals(tuple(np.exp(logs)))),
        np.log(start),
        loss="soft_l1",
        f_scale=0.1,
        diff_step=1e-2,
    )
    return tuple(float(value) for value in np.exp(found.x))


def fit_device(gpu: str) -> tuple[float, ...]:
    """attention_efficiency, elementwise_traffic and overlap_cost of a GPU type, on even rows of MosaicML's table."""
    rows, _ = halves(mosaic_rows(gpu))
    base = parse_cluster(f"1x8:{GPU_TYPES[gpu]}").device

    def residuals(constants: Sequence[float]) -> list[float]:
        attention, traffic, overlap = constants
        device = replace(base, attention_efficiency=attention, elementwise_traffic=traffic, overlap_cost=overlap)
        return [
            float(np.log(predict_mfu(row, mosaic_cluster(row, device)) * 100 / float(row["mfu_pct"]))) for row in rows
        ]

    return _fit(residuals, (0.3, 5.0, 0.8))


LAYOUT_CONSTANTS = (
    (execution, "EAGER_TRAFFIC", 3.5),
    (execution, "FUSED_NORM_TRAFFIC", 0.5),
    (execution, "FLASH2_ATTENTION", 0.45),
    (roofline, "SCORE_PASSES", 14.0),
    (layout, "TENSOR_PARALLEL_COST", 1.9),
)
"""Where each constant of the layouts table stands in the product, and where its fit begins."""


def fit_layouts() -> tuple[float, ...]:
    """The constants of LAYOUT_CONSTANTS on even rows of Aleph Alpha's step times."""
    runs = [run for run in read_runs() if run.step_s][::2]
    shipped = [getattr(module, name) for module, name, _ in LAYOUT_CONSTANTS]

    def assign(values: Sequence[float]) -> None:
        for (module, name, _), value in zip(LAYOUT_CONSTANTS, values, strict=True):
            setattr(module, name, value)

    def residuals(constants: Sequence[float]) -> list[float]:
        assign(constants)
        return [float(np.log(predict(run).step_s / (run.step_s or 1.0))) for run in runs]

    try:
        return _fit(residuals, [start for _, _, start in LAYOUT_CONSTANTS])
    finally:
        assign(shipped)


STARTS = (
    (50.0, 2.0, 150.0, 80.0, 8.0, 250.0),
    (30.0, 1.0, 15.0, 10.0, 3.0, 100.0),
)  # the fit has several minima; the best of these is taken


Point = tuple[int, float, float]
"""Members, bytes and seconds of an all-reduce."""


def fit_protocols(points: Sequence[Point], *, hops: bool, in_network: bool) -> tuple[float, ...]:
    """(latency us, hop us, GB/s) of two protocols; without `hops` only one group size exists.

    The second protocol reduces in the network when `in_network`: each member sends its bytes once.
    """

    def residuals(constants: Sequence[float]) -> list[float]:
        ratios = protocol_ratios(points, constants, hops=hops, in_network=in_network)
        return [float(np.log(ratio)) for ratio in ratios]

    found = [_fit(residuals, start) for start in STARTS]
    return min(found, key=lambda constants: sum(value * value for value in residuals(constants)))


def protocol_ratios(
    points: Sequence[Point], constants: Sequence[float], *, hops: bool, in_network: bool
) -> list[float]:
    """Predicted over measured seconds of each point."""
    ratios = []
    for members, size, time in points:
        ring = 2 * (members - 1) / members
        ways = []
        for index in range(2):
            latency, hop, rate = constants[3 * index : 3 * index + 3]
            sent = 1.0 if in_network and index else ring
            ways.append((latency + (members - 1) * hop * hops) * 1e-6 + sent * size / (rate * 1e9))
        ratios.append(min(ways) / time)
    return ratios


def protocol_lines(name: str, points: Sequence[Point], *, hops: bool, in_network: bool) -> list[str]:
    """The fitted constants, and errors of one half of the points when the other half is fitted."""
    found = fit_protocols(points, hops=hops, in_network=in_network)
    lines = [f"{name}: latency us, hop us, GB/s of two protocols {[round(value, 1) for value in found]}"]
    for first in (0, 1):
        fitted = fit_protocols(points[first::2], hops=hops, in_network=in_network)
        held = protocol_ratios(points[1 - first :: 2], fitted, hops=hops, in_network=in_network)
        lines.append(f"    half {first} fitted, the other: {errors((ratio, 1.0) for ratio in held)}")
    return lines


def fit_report() -> str:
    """All constants that were fitted, as they ship (rounded) in devices.yaml and the modules."""
    lines = []
    for gpu, name in GPU_TYPES.items():
        attention, traffic, overlap = fit_device(gpu)
        lines.append(f"{name}: attention_efficiency {attention:.3f} elementwise_traffic {traffic:.2f} ")
        lines[-1] += f"overlap_cost {overlap:.2f}"
    names = [name for _, name, _ in LAYOUT_CONSTANTS]
    fitted = zip(names, fit_layouts(), strict=True)
    lines.append("Aleph Alpha: " + ", ".join(f"{name} {value:.2f}" for name, value in fitted))
    nvlink = [
        (int(row["ranks"]), float(row["size_mib"]) * 2**20, float(row["time_ms"]) * 1e-3)
        for row in read_table("galvatron_nvlink_collectives")
        if row["op"] == "allreduce"
    ]
    sweep = {
        ranks: [
            (int(row["ranks"]), float(row["bytes"]), float(row["time_us"]) * 1e-6)
            for row in read_table("nccl_allreduce_h200_stas00")
            if row["ranks"] == ranks
        ]
        for ranks in ("8", "32")
    }
    lines += protocol_lines("NVLink 3", nvlink, hops=True, in_network=False)
    lines += protocol_lines("H200", sweep["8"], hops=False, in_network=True)
    lines += protocol_lines("4 nodes (rates of 8 lanes)", sweep["32"], hops=True, in_network=False)
    return "\n".join(lines)
