"""Bench target: where a profile is measured: on this machine, on the nodes of a Ray cluster, by the ranks of
a torchrun job.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from spindle.errors import ProfileError
from spindle.runtime.comms.host import threads_of_rank
from spindle.runtime.devices import gpu_count
from spindle.runtime.launch.processes import ProcessWorkers
from spindle.runtime.launch.torchrun import ServedWorkers, nodes_of_job
from spindle.runtime.launch.worker_group import WorkerGroup
from spindle.runtime.profiling.hardware import Hardware, hardware_here
from spindle.runtime.profiling.measure import Bench, BenchSpec
from spindle.values.cluster import Cluster

TIMEOUT_S = 120.0

BenchLauncher = Literal["processes", "ray", "torchrun"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """Nodes, and ranks of each. Processes are all on this machine."""

    nodes: int = 1
    ranks_per_node: int = 1
    launcher: BenchLauncher = "processes"

    @property
    def num_ranks(self) -> int:
        """All that measure at once."""
        return self.nodes * self.ranks_per_node

    def measured(self, spec: BenchSpec, work: Callable[[Hardware, Callable[[], WorkerGroup]], T]) -> T:
        """What `work` makes of the hardware and of a function that starts the ranks, where they are not there yet.

        Under torchrun one rank works, and the others do as it says; all have the result. Raises ProfileError when ranks
        compute on devices that differ.
        """
        with contextlib.ExitStack() as stack:

            def started() -> WorkerGroup:
                return stack.enter_context(contextlib.closing(self._started(spec)))

            if self.launcher == "processes":
                return work(hardware_here(self.num_ranks, threads_of_rank(self.num_ranks)), started)
            workers = started()  # ranks alone know what they compute on

            def driven() -> T:
                return work(_alike(workers.call("hardware")), lambda: workers)

            return workers.drive(driven) if isinstance(workers, ServedWorkers) else driven()

    def _started(self, spec: BenchSpec) -> WorkerGroup:
        """Start all ranks, those of each node on a node of its own."""
        if self.launcher == "torchrun":
            return ServedWorkers(spec, timeout_s=TIMEOUT_S, worker=Bench)
        specs = [spec] * self.num_ranks
        if self.launcher == "processes":
            return ProcessWorkers(specs, timeout_s=TIMEOUT_S, worker=Bench)
        from spindle.runtime.launch.ray_workers import RayWorkers

        return RayWorkers(specs, devices_per_node=self.ranks_per_node, apart=True, timeout_s=TIMEOUT_S, worker=Bench)


def bench_target_for(cluster: Cluster, num_devices: int, launcher: BenchLauncher) -> BenchTarget:
    """As many ranks as a run on `num_devices` devices of the cluster would have on this machine, or in the Ray
    cluster; under torchrun the ranks that it has started.
    """
    if launcher == "torchrun":
        return BenchTarget(*nodes_of_job(), launcher)
    sizes: list[int] = []
    if launcher == "ray":
        from spindle.runtime.launch.ray_workers import node_sizes

        sizes = node_sizes()
    if not sizes:
        return BenchTarget(1, min(num_devices, gpu_count() or num_devices), launcher)
    per_node = min(cluster.devices_per_node, num_devices, sizes[0])
    return BenchTarget(max(1, min(cluster.nodes, num_devices // per_node, len(sizes))), per_node, launcher)


def _alike(found: Sequence[Hardware]) -> Hardware:
    """What all ranks compute on, with the room of the smallest."""
    least = min(hardware.room_bytes for hardware in found)
    kinds = {replace(hardware, room_bytes=least) for hardware in found}
    if len(kinds) > 1:
        sorts = sorted({f"{h.device} ({h.ranks} ranks, torch {h.torch}, Python {h.python})" for h in kinds})
        raise ProfileError(
            f"the ranks that would measure are not alike: {'; '.join(sorts)}. Times of one do not hold for the other: "
            "measure on nodes of one sort"
        )
    return kinds.pop()
