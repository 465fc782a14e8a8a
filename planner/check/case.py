"""Case: what the rules look at, and the figures that more than one of them needs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Plan, Slice

RELATIVE = 1e-9  # of the makespan: what sums of floats may be off by


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule: a sentence, and the waves' indices it is about."""

    text: str
    waves: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Case:
    """A plan, what times may be off by, and its slices."""

    plan: Plan
    slack_s: float
    slices: tuple[tuple[int, Slice], ...]  # (wave index, slice) in order of start


@dataclass(frozen=True)
class CostedCase(Case):
    """The same with what the slices cost."""

    metagraph: MetaGraph
    cluster: Cluster | None


class BadCertificate(Exception):
    """A certificate that speaks of MetaOps that do not exist or do not depend on each other."""


def by_metaop(case: CostedCase) -> dict[str, list[tuple[int, Slice]]]:
    """(wave index, slice) of each MetaOp in order of start."""
    found: dict[str, list[tuple[int, Slice]]] = defaultdict(list)
    for wave, s in case.slices:
        found[s.metaop].append((wave, s))
    return found


def usable(case: CostedCase, metaop: MetaOp) -> list[tuple[int, float]]:
    """Counts that the cluster has, on which at least one layer fits a device; all that the cluster has when none do."""
    capacity = case.cluster.device.memory_bytes if case.cluster else float("inf")
    there = [(n, t) for n, t in metaop.layer_time_s if n <= case.plan.num_devices]
    return [(n, t) for n, t in there if layer_bytes(metaop, n) <= capacity] or there


def layer_bytes(metaop: MetaOp, count: int) -> float:
    """Memory of one layer on each of `count` devices: by the largest count given that is no larger."""
    given = [b for n, b in metaop.memory_bytes if n <= count] or [b for _, b in metaop.memory_bytes[:1]] or [0.0]
    return given[-1] / metaop.layers


def received_s(case: CostedCase) -> list[float]:
    """Seconds, both directions, in which each slice receives its input when the cluster is known.

    Between different device sets: latency + bytes / (smaller set * rate), over the slower link if they span nodes.
    """
    if case.cluster is None:
        return [0.0] * len(case.slices)
    cluster, size = case.cluster, case.cluster.devices_per_node
    sources: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for flow in case.metagraph.flows:
        sources[flow.target].append((flow.source, case.metagraph.flow_bytes(flow)))
    at: dict[str, tuple[int, ...]] = {}
    seconds = []
    for _, s in case.slices:
        own = [(s.metaop, case.metagraph[s.metaop].output_bytes)] if s.first_layer else sources[s.metaop]
        total_s = 0.0
        for name, num_bytes in own:
            there = at.get(name, s.devices)
            if num_bytes and set(there) != set(s.devices):
                inside = len({device // size for device in there + s.devices}) == 1
                link = cluster.intra_node if inside else cluster.inter_node
                width = min(len(there), len(s.devices))
                total_s += 2 * link.transfer_s(num_bytes / width, senders=min(width, size))
        seconds.append(total_s)
        at[s.metaop] = s.devices
    return seconds


def named(s: Slice) -> str:
    """The slice as findings call it."""
    return f"{s.metaop}[{s.first_layer}:{s.last_layer + 1}]"


def ranges(devices: Sequence[int]) -> str:
    """Devices in few words."""
    first, last = min(devices), max(devices)
    if last - first + 1 == len(devices):
        return f"{first}-{last}" if last > first else str(first)
    return ",".join(map(str, devices[:6])) + (f",... ({len(devices)})" if len(devices) > 6 else "")
