"""Reduction: slices and a cluster in; which gradients each set of devices reduces, and when each device has stepped and
has its new parameters.

- Layers of one parameter set that the same slices run are a Share (the paper's parameter device group pool, section
  3.6; costs: `spindle.cost.links`).
- The runtime reduces gradients in buckets, while backward goes on; `spindle.planner.costing.buckets` tells when,
  bucket by bucket, and `schedule` about when. Each second beside backward takes `Device.overlap_cost` seconds from it;
  where that is 1 or more nothing is gained, and reductions are charged after backward.
- Each reduction waits for all its devices. Where the devices of a node share its network ports, these carry the
  messages of different groups one after another.
- With sharded optimizer states a part of the gradients is reduced to each of the devices, which alone steps it and then
  sends the new parameters to the others: two messages a part, the second after the step.

Times count from the end of backward; what happens beside it is negative.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

from spindle.cost.links import collective_s, port_s
from spindle.planner.costing.traffic import Devices
from spindle.values.cluster import Cluster, Collective
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import BUCKET_BYTES, Slice

T = TypeVar("T")
Interval = tuple[int, int, T]
"""(first layer, layer behind the last one, what runs them)."""


@dataclass(frozen=True, slots=True)
class Share:
    """Layers of one parameter set that the same slices run.

    devices     all that hold them, rising
    num_bytes   of their gradients, and as many of their parameters
    update_s    of the optimizer's step on each device, divided by their number where states are sharded
    slices      numbers of the slices that run them
    """

    devices: Devices
    num_bytes: float
    update_s: float
    slices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Gradients that a set of devices reduces: when the first of them and when the last are ready."""

    devices: Devices
    num_bytes: float
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class Reduction:
    """One set of devices' gradients reduced, or new parameters handed out; times from the end of backward."""

    devices: Devices
    num_bytes: float
    start_s: float
    end_s: float


def shares_of(metagraph: MetaGraph, slices: Sequence[Slice]) -> tuple[Share, ...]:
    """The shares of all parameters that are trained. MetaOps with the same `parameters` hold the same layers."""
    by_key: dict[str, list[Interval[int]]] = defaultdict(list)
    for i, s in enumerate(slices):
        metaop = metagraph[s.metaop]
        if metaop.layer_param_bytes or metaop.layer_update_s:
            key = metaop.parameters or f"{metaop.name} (alone)"
            by_key[key].append((s.first_layer, s.first_layer + s.num_layers, i))
    found = []
    for intervals in by_key.values():
        for low, high, held in stretches(intervals):
            metaops = [metagraph[slices[i].metaop] for i in held]
            devices = tuple(sorted({d for i in held for d in slices[i].devices}))
            owners = len(devices) if metagraph.shard_optimizer or metaops[0].is_sharded else 1
            found.append(
                Share(
                    devices=devices,
                    num_bytes=(high - low) * max(m.layer_param_bytes for m in metaops),
                    update_s=(high - low) * max(m.layer_update_s for m in metaops) / owners,
                    slices=tuple(held),
                )
            )
    return tuple(found)


def stretches(intervals: Sequence[Interval[T]]) -> Iterator[tuple[int, int, list[T]]]:
    """Layers that the same intervals cover: the first, the one behind the last, and the intervals."""
    for low, high in pairwise(sorted({edge for begin, end, _ in intervals for edge in (begin, end)})):
        covering = [value for begin, end, value in intervals if begin <= low and high <= end]
        if covering:
            yield low, high, covering


def reduce_s(cluster: Cluster, num_bytes: float, devices: Devices, *, sharded: bool = False) -> float:
    """Seconds in which `num_bytes` are summed over `devices`, with the fastest protocol of the links: in one
    all-reduce, or, with `sharded` states, a part to each of them.
    """
    if not num_bytes or len(devices) < 2:
        return 0.0
    parts = len(devices) if sharded else 1
    members = members_of(cluster.devices_per_node, devices)
    return parts * collective_s(_summing(sharded), num_bytes / parts, cluster, members)


def hand_out_s(cluster: Cluster, num_bytes: float, devices: Devices) -> float:
    """Seconds in which each of `devices` sends its part of `num_bytes` of new parameters to the others."""
    members = members_of(cluster.devices_per_node, devices)
    return len(devices) * collective_s("broadcast", num_bytes / len(devices), cluster, members)


def _summing(sharded: bool) -> Collective:
    return "reduce" if sharded else "all_reduce"


@dataclass(frozen=True)
class Ports:
    """Until when the network ports that the devices of a node share are taken, by node."""

    cluster: Cluster
    free_s: dict[int, float] = field(default_factory=dict)

    def end_s(self, operation: Collective, num_bytes: float, devices: Devices, start_s: float, alone_s: float) -> float:
        """When a message that takes `alone_s` by itself has gone through, beside earlier messages."""
        members = members_of(self.cluster.devices_per_node, devices)
        taken_s = port_s(operation, num_bytes, self.cluster, members)
        end_s = start_s + alone_s
        for node in {self.cluster.node_of(device) for device in devices} if taken_s else ():
            self.free_s[node] = max(self.free_s.get(node, start_s), start_s) + taken_s
            end_s = max(end_s, self.free_s[node])
        return end_s


@lru_cache(maxsize=65536)
def members_of(devices_per_node: int, devices: Devices) -> tuple[int, ...]:
    """How many of `devices` each node has."""
    return tuple(Counter(device // devices_per_node for device in devices).values())


def schedule(cluster: Cluster, wanted: Iterable[Wanted], *, sharded: bool = False) -> tuple[Reduction, ...]:
    """About when each of `wanted` is reduced, without a look at each bucket: a search asks this of every schedule.

    What is wanted goes as one message that begins when the first bucket could, and ends no sooner than the last can.
    """
    beside = cluster.device.overlap_cost < 1
    rows = [w if beside else replace(w, first_s=0.0, last_s=0.0) for w in wanted if w.num_bytes and len(w.devices) > 1]
    total: dict[Devices, float] = defaultdict(float)
    for row in rows:
        total[row.devices] += row.num_bytes
    seconds = {devices: reduce_s(cluster, size, devices, sharded=sharded) for devices, size in total.items()}
    free_s: dict[int, float] = {}
    ports = Ports(cluster)
    done: list[Reduction] = []
    for row in sorted(rows, key=lambda row: (row.first_s, -seconds[row.devices], row.devices)):
        devices = row.devices
        start_s = max(row.first_s, max(free_s.get(d, row.first_s) for d in devices))
        alone_s = seconds[devices] * (row.num_bytes / total[devices])
        end_s = ports.end_s(_summing(sharded), row.num_bytes, devices, start_s, alone_s)
        end_s = max(end_s, row.last_s + alone_s * min(1.0, BUCKET_BYTES / row.num_bytes))
        free_s.update(dict.fromkeys(devices, end_s))
        done.append(Reduction(devices, row.num_bytes, max(start_s, end_s - alone_s), end_s))
    return tuple(done)


def slowed_by_device(cluster: Cluster, reductions: Iterable[Reduction]) -> dict[int, float]:
    """Seconds that reductions beside backward take from it, on the devices that have any."""
    beside_s: dict[Devices, float] = defaultdict(float)
    for r in reductions:
        beside_s[r.devices] += max(0.0, min(r.end_s, 0.0) - r.start_s)
    slowed_s: dict[int, float] = defaultdict(float)
    for devices, seconds in beside_s.items():  # there are many buckets, and few sets of devices
        for device in devices if seconds else ():
            slowed_s[device] += cluster.device.overlap_cost * seconds
    return dict(slowed_s)


def reduced_by_device(cluster: Cluster, reductions: Sequence[Reduction]) -> dict[int, float]:
    """Seconds from the end of backward until each device's reductions are done, and what they took is made up for."""
    slowed_s = slowed_by_device(cluster, reductions)
    last_s: dict[Devices, float] = {}
    for r in reductions:
        last_s[r.devices] = max(r.end_s, last_s.get(r.devices, 0.0))
    done_s: dict[int, float] = {}
    for devices, seconds in last_s.items():
        for device in devices:
            done_s[device] = max(seconds, done_s.get(device, 0.0))
    return {device: seconds + slowed_s.get(device, 0.0) for device, seconds in done_s.items()}


def update_by_device(shares: Iterable[Share]) -> dict[int, float]:
    """Seconds of the optimizer's step on each device: over every layer that it holds, shared ones once."""
    seconds: dict[int, float] = defaultdict(float)
    for share in shares:
        for device in share.devices if share.update_s else ():
            seconds[device] += share.update_s
    return dict(sorted(seconds.items()))


def handed_out(cluster: Cluster, reduced: Iterable[Reduction], stepped_s: Mapping[int, float]) -> tuple[Reduction, ...]:
    """When devices hand out what they have updated: after the steps of all that reduced it, in the order of that."""
    total: dict[Devices, float] = defaultdict(float)
    for r in reduced:
        total[r.devices] += r.num_bytes
    free_s = dict(stepped_s)
    ports = Ports(cluster)
    done: list[Reduction] = []
    for devices, num_bytes in total.items():
        start_s = max(free_s[device] for device in devices)
        end_s = ports.end_s("broadcast", num_bytes, devices, start_s, hand_out_s(cluster, num_bytes, devices))
        free_s.update(dict.fromkeys(devices, end_s))
        done.append(Reduction(devices, num_bytes, start_s, end_s))
    return tuple(done)
