"""Site: where a profile is measured: on this machine, on the nodes of a Ray cluster, by the ranks of a torchrun job."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from spindle.cluster import Cluster
from spindle.errors import ProfileError
from spindle.runtime.host import threads_of_rank
from spindle.runtime.launch.crew import Crew
from spindle.runtime.launch.processes import ProcessCrew
from spindle.runtime.launch.torchrun import ServedCrew, nodes_of_job
from spindle.runtime.profiling.hardware import Hardware, hardware_here
from spindle.runtime.profiling.measure import Bench, BenchJob

TIMEOUT_S = 120.0

SiteLauncher = Literal["processes", "ray", "torchrun"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Site:
    """Nodes, and ranks of each. Processes are all on this machine."""

    nodes: int = 1
    ranks_per_node: int = 1
    launcher: SiteLauncher = "processes"

    @property
    def num_ranks(self) -> int:
        """All that measure at once."""
        return self.nodes * self.ranks_per_node

    def measured(self, job: BenchJob, work: Callable[[Hardware, Callable[[], Crew]], T]) -> T:
        """What `work` makes of the hardware and of a function that starts the ranks, where they are not there yet.

        Under torchrun one rank works, and the others do as it says; all have the result. Raises ProfileError when ranks
        compute on devices that differ.
        """
        with contextlib.ExitStack() as stack:

            def started() -> Crew:
                return stack.enter_context(contextlib.closing(self._crew(job)))

            if self.launcher == "processes":
                return work(hardware_here(self.num_ranks, threads_of_rank(self.num_ranks)), started)
            crew = started()  # ranks alone know what they compute on

            def driven() -> T:
                return work(_alike(crew.call("hardware")), lambda: crew)

            return crew.drive(driven) if isinstance(crew, ServedCrew) else driven()

    def _crew(self, job: BenchJob) -> Crew:
        """Start all ranks, those of each node on a node of its own."""
        if self.launcher == "torchrun":
            return ServedCrew(job, timeout_s=TIMEOUT_S, worker=Bench)
        jobs = [job] * self.num_ranks
        if self.launcher == "processes":
            return ProcessCrew(jobs, timeout_s=TIMEOUT_S, worker=Bench)
        from spindle.runtime.launch.ray_crew import RayCrew

        return RayCrew(jobs, devices_per_node=self.ranks_per_node, apart=True, timeout_s=TIMEOUT_S, worker=Bench)


def site_for(cluster: Cluster, num_devices: int, launcher: SiteLauncher) -> Site:
    """As many ranks as a run on so many devices of the cluster would have on this machine, or in the Ray cluster; under
    torchrun those that it has started.
    """
    if launcher == "torchrun":
        return Site(*nodes_of_job(), launcher)
    sizes: list[int] = []
    if launcher == "ray":
        from spindle.runtime.launch.ray_crew import node_sizes

        sizes = node_sizes()
    if not sizes:
        return Site(1, min(num_devices, torch.cuda.device_count() or num_devices), launcher)
    per_node = min(cluster.devices_per_node, num_devices, sizes[0])
    return Site(max(1, min(cluster.nodes, num_devices // per_node, len(sizes))), per_node, launcher)


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
