"""Calibration: a cluster and a few factors, fitted on steps that a user has measured, in; the corrected cluster out.

- `compute`, `host` and `network` are factors on seconds: of what devices compute and move in their own memory, of what
  the host takes to start that, and of collectives and transfers. `step_s` is a fixed part of each step (data, logging,
  hooks), which no cluster explains; it is added to a plan's steps (`Plan.fixed_s`).
- Times that a profile has measured are no matter of the cluster's rates, so only `network` and `step_s` change them.
"""

from dataclasses import dataclass, replace
from typing import Literal

from spindle.errors import ProfileError
from spindle.values.cluster import Cluster, Device, Link

Constant = Literal["compute", "host", "network", "step_s"]
CONSTANTS: tuple[Constant, ...] = ("compute", "host", "network", "step_s")
FACTORS: tuple[Constant, ...] = ("compute", "host", "network")
MOST_FACTOR = 1000.0  # what is fitted stays within 50; a file may say anything
MOST_STEP_S = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One row of a user's logs: seconds of a step on `gpus` devices with `per_gpu_batch` samples on each.

    predicted_s    what the calibrated cost model says of it (0: not calibrated yet)
    """

    gpus: int
    per_gpu_batch: int
    seconds: float
    predicted_s: float = 0.0

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_gpu_batch < 1:
            raise ProfileError(
                f"measured step: {self.gpus} GPUs with a batch of {self.per_gpu_batch} each; both are at least one"
            )
        if not 0 < self.seconds < float("inf"):
            raise ProfileError(
                f"measured step on {self.gpus} GPUs: {self.seconds!r} s; give a positive number of seconds"
            )
        if not 0 <= self.predicted_s < float("inf"):
            raise ProfileError(
                f"measured step on {self.gpus} GPUs: predicted_s is {self.predicted_s!r}; give seconds, zero or more"
            )

    @property
    def error(self) -> float:
        """Relative error of the prediction; above zero where it is too long."""
        return self.predicted_s / self.seconds - 1

    def __str__(self) -> str:
        return f"{self.gpus} GPUs, batch {self.per_gpu_batch} each"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Factors for one device type.

    source, method   what was run in the measured steps, and how: a workload, and a method of the planner
    rows             the measured steps, each with what the calibrated model says of it
    undetermined     constants that the rows say nothing about: they stay where they were
    inseparable      pairs of constants that the rows cannot tell apart: each alone may be wrong, both together are not
    """

    device: str
    compute: float = 1.0
    host: float = 1.0
    network: float = 1.0
    step_s: float = 0.0
    source: str = ""
    method: str = ""
    rows: tuple[MeasuredStep, ...] = ()
    undetermined: tuple[Constant, ...] = ()
    inseparable: tuple[tuple[Constant, Constant], ...] = ()

    def __post_init__(self) -> None:
        for name in FACTORS:
            if not 0 < getattr(self, name) < float("inf"):
                raise ProfileError(f"calibration: {name} is {getattr(self, name)!r}; a factor is a positive number")
        if not 0 <= self.step_s < float("inf"):
            raise ProfileError(f"calibration: step_s is {self.step_s!r}; give seconds, zero or more")


def calibrated(cluster: Cluster, calibration: Calibration) -> Cluster:
    """The cluster with all three factors applied; raises ProfileError for a calibration of another device type.

    >>> from spindle.files.clusterfile import parse_cluster
    >>> cluster = parse_cluster("1x8:a100-80g")
    >>> slower = calibrated(cluster, Calibration(device="a100-80g", compute=2.0))
    >>> slower.device.peak_flops / cluster.device.peak_flops
    0.5
    """
    if calibration.device != cluster.device.name:
        raise ProfileError(
            f"the calibration is of {calibration.device!r} and the cluster has {cluster.device.name!r}; calibrate on "
            "steps that were measured on this device type (spindle calibrate), or plan without it"
        )
    for name in FACTORS:
        if not 1 / MOST_FACTOR <= getattr(calibration, name) <= MOST_FACTOR:
            raise ProfileError(
                f"calibration: {name} is {getattr(calibration, name):g}; no step is that far off: factors "
                f"lie within {1 / MOST_FACTOR:g} and {MOST_FACTOR:g}, fit them again (spindle calibrate)"
            )
    if calibration.step_s > MOST_STEP_S:
        raise ProfileError(
            f"calibration: step_s is {calibration.step_s:g} s; a fixed part of a step is less than {MOST_STEP_S:g} s, "
            "fit it again (spindle calibrate)"
        )
    return replace(
        cluster,
        device=_device(cluster.device, calibration),
        intra_node=_link(cluster.intra_node, calibration.network),
        inter_node=_link(cluster.inter_node, calibration.network),
    )


def _device(device: Device, calibration: Calibration) -> Device:
    return replace(
        device,
        peak_flops=device.peak_flops / calibration.compute,
        memory_bytes_per_s=device.memory_bytes_per_s / calibration.compute,
        launch_s=device.launch_s * calibration.host,
    )


def _link(link: Link, factor: float) -> Link:
    """All seconds that the link takes, its latencies too, times a factor."""
    protocols = tuple(
        replace(p, latency_s=p.latency_s * factor, hop_s=p.hop_s * factor, bytes_per_s=p.bytes_per_s / factor)
        for p in link.protocols
    )
    return replace(
        link,
        bytes_per_s=link.bytes_per_s / factor,
        latency_s=link.latency_s * factor,
        protocols=protocols,
        node_bytes_per_s=link.node_bytes_per_s / factor if link.node_bytes_per_s else None,
    )
