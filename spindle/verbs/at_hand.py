"""At hand: the devices that a run can have, and plans like its first one for others."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from spindle.errors import PlanError
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.plan import Plan, with_fixed

if TYPE_CHECKING:
    from spindle.runtime.controller import Launcher
    from spindle.runtime.updates.optimizers import OptimizerFactory
    from spindle.verbs.source import Source
    from spindle.workload import Workload


class PlanSource(Protocol):
    """`spindle.verbs.planning.plan_source`, as far as it is used here."""

    def __call__(
        self, source: "Source", cluster: Cluster, *, start: Plan | None, is_as_run: bool
    ) -> tuple[Plan, CostOptions]:
        """The plan of a source on a cluster."""


@dataclass(frozen=True)
class Anew:
    """What plans a workload anew for other devices. `planner`: the user's own function, which then makes all plans."""

    workload: "Workload"
    optimizer: "OptimizerFactory"
    plan_source: PlanSource
    planner: Callable[[str], Plan] | None = None

    def __call__(self, former: Plan, shape: tuple[int, int]) -> Plan:
        """A plan like a former one for another number of devices of the same kind: `shape` is (nodes, devices of each).

        Its memory limit, its links and what a calibration says of both are taken over, and the search begins from it,
        in a quarter of the time. Raises InfeasibleError when nothing fits.
        """
        import torch

        from spindle.files.clusterfile import parse_cluster
        from spindle.runtime.updates.optimizers import described, make_optimizer, stand_in
        from spindle.verbs.source import source_of

        nodes, devices_per_node = shape
        if self.planner is not None:
            return self.asked(f"{nodes}x{devices_per_node}")
        every = described(self.workload.named_parameters())
        made = make_optimizer(self.optimizer, {p.name: stand_in(p, torch.device("cpu")) for p in every}, {}).optimizer
        source = source_of(self.workload, lambda _: made)  # its class tells how large its states are
        known = former.cluster or parse_cluster(devices_at_hand())
        where = replace(known, nodes=nodes, devices_per_node=devices_per_node)
        plan, _ = self.plan_source(source, where, start=former, is_as_run=former.cluster is not None)
        return with_fixed(plan, former.fixed_s) if former.fixed_s else plan

    def asked(self, devices: str) -> Plan:
        """What the user's function plans. Raises PlanError where that is no plan for the devices."""
        assert self.planner is not None
        found = self.planner(devices)
        nodes, _, each = devices.partition("x")
        if not isinstance(found, Plan) or found.num_devices != int(nodes) * int(each):
            got = f"one for {found.num_devices}" if isinstance(found, Plan) else f"a {type(found).__name__}"
            raise PlanError(f"plan= was asked for a plan for {devices} devices and gave {got}; return one for these")
        return found


def devices_at_hand(launcher: "Launcher" = "processes") -> str:
    """This machine as a cluster: its GPUs, or its cores. Under torchrun a device for each rank that it has started; for
    Ray, where RAY_ADDRESS names a cluster, that one.
    """
    import torch

    from spindle.runtime.comms.host import usable_cores
    from spindle.runtime.launch.torchrun import nodes_of_job, under_torchrun

    gpus = torch.cuda.device_count()
    if launcher in ("auto", "torchrun") and under_torchrun():
        nodes, ranks = nodes_of_job()
        return f"{nodes}x{ranks}" if ranks <= gpus else f"{nodes}x{ranks}:cpu"
    if launcher in ("auto", "ray") and os.environ.get("RAY_ADDRESS"):
        from spindle.runtime.launch.ray_workers import devices_of_cluster

        return devices_of_cluster()
    return f"1x{gpus}" if gpus else f"1x{len(usable_cores())}:cpu"
