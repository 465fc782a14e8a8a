"""Elastic: the plan of a run whose devices come and go; a failure in, a plan for the devices that are left out.

- What is there: what `Failures.devices` says, else what the launcher knows: the ranks that torchrun has started, the
  free devices of a Ray cluster, the GPUs of this machine.
- Ray waits for room first, so a node that comes back within `timeout_s` changes nothing. The first plan comes back
  with its devices.
- On one machine nobody says that a device is lost. It counts as lost when its rank was lost twice in a row, with no
  checkpoint written in between.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spindle.errors import InfeasibleError, LostRankError, NoRoomError, RunError, SpindleError
from spindle.failures import Failures
from spindle.files.clusterfile import parse_cluster
from spindle.runtime.controller import Launcher, chosen
from spindle.runtime.launch.torchrun import nodes_of_job
from spindle.values.plan import Plan

Shape = tuple[int, int]
"""Nodes, and devices of each."""


@dataclass
class Elastic:
    """The plan of a run, and what it was planned anew for. `replan` makes a plan like the first one for other devices.

    `lost_gpus`: numbers of this machine's GPUs that ranks leave out. `waits`: the run waits for nodes that are to come.
    """

    failures: Failures
    launcher: Launcher
    plan: Plan
    replan: Callable[[Plan, Shape], Plan]
    lost_gpus: frozenset[int] = frozenset()
    waits: bool = False
    first: Plan = field(init=False)
    _lost: int | None = None  # the rank that was lost last

    def __post_init__(self) -> None:
        self.first = self.plan

    def begin(self) -> str:
        """Before the first step: plan for what is there. A sentence where that changes the plan, else "".

        Raises RunError for fewer devices than `min_devices`, InfeasibleError where no plan for these fits.
        """
        found = self._there()
        if found is None or (chosen(self.launcher) == "ray" and (self.waits or _count(found) < self.plan.num_devices)):
            return ""  # Ray waits for room first
        return self._change(found, None)

    def after(self, error: SpindleError, *, stuck: bool) -> str:
        """After a failure: the same. `stuck`: no checkpoint was written since the failure before."""
        if isinstance(error, NoRoomError):
            return self._change(shape_of(error.free), error)
        if self.failures.devices is not None:
            return self._change(self._there(), error)
        if chosen(self.launcher) == "ray":
            found = self._there()
            is_back = found is not None and _count(found) >= self.first.num_devices > self.plan.num_devices
            return self._back() if is_back else ""
        rank = error.rank if isinstance(error, LostRankError) else None
        is_gone = stuck and rank is not None and rank == self._lost
        self._lost = None if is_gone else rank
        return self._without(rank, error) if is_gone and rank is not None else ""

    def _without(self, rank: int, error: SpindleError) -> str:
        """Plan for the devices of this machine but that of one rank."""
        gpus, before = _gpus(self.lost_gpus), self.plan.num_devices
        sentence = self._change((1, before - 1), error)
        if before <= len(gpus):  # else ranks compute on CPUs
            self.lost_gpus |= {gpus[rank]}
        return sentence

    def _there(self) -> Shape | None:
        """What is there; None where a run can have as many devices as it likes."""
        if self.failures.devices is not None:
            try:
                said = self.failures.devices()
            except Exception as error:
                raise RunError.of(error, "devices= of Failures") from error
            found = parse_cluster(str(said))
            return found.nodes, found.devices_per_node
        if chosen(self.launcher) == "torchrun":
            return nodes_of_job()
        if chosen(self.launcher) == "ray":
            from spindle.runtime.launch.ray_workers import free_devices

            return shape_of(free_devices())
        gpus = _gpus(self.lost_gpus) if chosen(self.launcher) == "processes" else []
        return (1, len(gpus)) if gpus else None

    def _change(self, found: Shape | None, error: SpindleError | None) -> str:
        """Plan for the devices that were found, unless the plan is for as many."""
        count, before = _count(found) if found else 0, self.plan
        if found and self._is_for(before, found):
            return ""
        why = f"{str(error).splitlines()[0]}; " if error else ""
        if count < self.failures.min_devices or not found:
            raise _ended(
                f"{why}{count} devices are there, and min_devices is {self.failures.min_devices}: the run ends; start "
                "it again with resume=True (--resume) when there are more",
                error,
            )
        if self._is_for(self.first, found):
            return self._back()
        began_s = time.perf_counter()
        try:
            self.plan = self._fitting(found)
        except InfeasibleError as cause:
            raise InfeasibleError(
                f"{why}planned anew for {_named(found)}, not {before.num_devices}, and found no plan: {cause}"
            ) from cause
        return _sentence(before, self.plan, found, time.perf_counter() - began_s)

    def _is_for(self, plan: Plan, found: Shape) -> bool:
        """Whether a plan is for as many devices as were found; Ray wants those of a plan's node on one of its own."""
        fits = chosen(self.launcher) != "ray" or found[1] >= min(plan.devices_per_node, plan.num_devices)
        return fits and _count(found) == plan.num_devices

    def _back(self) -> str:
        before, self.plan = self.plan, self.first
        return f"back to the first plan, for {self.first.num_devices} devices, from one for {before.num_devices}"

    def _fitting(self, found: Shape) -> Plan:
        """Raises InfeasibleError where a plan does not fit into the memory that the first one fits into."""
        plan = self.replan(self.first, found)
        if self.first.memory.fits and not plan.memory.fits:
            peak = max(plan.memory.peak_bytes_per_device, default=0.0) / 2**30
            room = f" of {plan.cluster.device.memory_bytes / 2**30:.3g} GiB" if plan.cluster else ""
            raise InfeasibleError(
                f"the best one takes {peak:.3g} GiB{room} a device, though activations recomputed, optimizer states "
                "sharded and parameters sharded were tried"
            )
        return plan


def shape_of(free: Sequence[int]) -> Shape | None:
    """The most devices of equal nodes, given the free devices of each node; None without any.

    >>> shape_of([8, 8, 7]), shape_of([8, 8, 1]), shape_of([])
    ((3, 7), (2, 8), None)
    """
    shapes = [(sum(other >= count for other in free), count) for count in set(free) if count > 0]
    return max(shapes, key=lambda shape: (_count(shape), shape[1]), default=None)


def _count(shape: Shape) -> int:
    return shape[0] * shape[1]


def _named(shape: Shape) -> str:
    return f"{_count(shape)} {'device' if _count(shape) == 1 else 'devices'} ({shape[0]}x{shape[1]})"


def _sentence(before: Plan, now: Plan, shape: Shape, took_s: float) -> str:
    predicted = (
        f"a step is predicted to take {now.expected_s:.3g} s, not {before.expected_s:.3g} s; "
        if now.expected_s and before.expected_s
        else ""
    )
    was_measured = before.outlook is not None and "profiled" in before.outlook.source and now.outlook is None
    more = "; with predicted times, not those of a profile, which a function in place of the plan can give"
    return (
        f"planned anew for {_named(shape)}, not {before.num_devices}: {predicted}planning took {took_s:.2g} s"
        f"{more if was_measured else ''}"
    )


def _ended(text: str, error: SpindleError | None) -> RunError:
    ended = RunError(text)
    ended.__cause__ = error
    return ended


def _gpus(lost: frozenset[int]) -> list[int]:
    """GPUs of this machine that are not lost."""
    from spindle.runtime.devices import gpu_count

    return [number for number in range(gpu_count()) if number not in lost]
