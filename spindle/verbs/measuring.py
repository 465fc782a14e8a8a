"""Measuring: a workload in; a profile of its operators, its optimizer and messages out."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from spindle.values.cluster import Cluster
from spindle.values.profile import Profile
from spindle.verbs.at_hand import devices_at_hand

if TYPE_CHECKING:
    from spindle.runtime.profiling.bench_target import BenchLauncher
    from spindle.runtime.updates.optimizers import OptimizerFactory
    from spindle.workload import Workload


VALIDATED = 8
"""Devices up to which `validate` adds counts: one, two, four and eight give two inner points to leave out."""


def make_profile(
    workload: "Workload",
    *,
    num_devices: int | None = None,
    cluster: Cluster | str | None = None,
    known: Profile | None = None,
    optimizer: "OptimizerFactory | None" = None,
    launcher: Literal["auto", "ray", "processes", "torchrun"] = "auto",
    validate: bool = False,
    progress: Callable[[int, int], None] | None = None,
    keep: Callable[[Profile], None] | None = None,
) -> Profile:
    """Time the workload's operators, its optimizer and messages, for up to `num_devices` devices.

    `cluster`: what to measure for instead, of the kind of device at hand; without both, what is at hand. As many ranks
    measure at once as a run would have: on this machine; with `launcher` ray on the nodes of a Ray cluster; under
    torchrun all that it has started. Of several nodes messages between them are measured too. auto: torchrun's ranks,
    or the cluster that RAY_ADDRESS names, or this machine. `known` is not measured again; `keep(profile)` is called
    every few seconds, under torchrun on rank 0, with what is known by then. `validate` adds counts, for
    `spindle.cost.measured.heldout` to leave out.
    """
    from spindle.capture import capture
    from spindle.files.clusterfile import parse_cluster
    from spindle.runtime.launch.torchrun import under_torchrun
    from spindle.runtime.profiling.bench_target import bench_target_for
    from spindle.runtime.profiling.profiler import measure_profile

    usual: BenchLauncher = "torchrun" if under_torchrun() else "ray" if os.environ.get("RAY_ADDRESS") else "processes"
    chosen = usual if launcher == "auto" else launcher
    where = parse_cluster(cluster or devices_at_hand(chosen)) if not isinstance(cluster, Cluster) else cluster
    num_devices = num_devices or where.num_devices
    return measure_profile(
        workload,
        capture(workload),
        num_devices=num_devices,
        target=bench_target_for(where, num_devices, chosen),
        cluster=where if cluster is not None else None,
        most_devices=max(num_devices, VALIDATED) if validate else None,
        known=known,
        optimizer=optimizer,
        progress=progress,
        keep=keep,
    )
