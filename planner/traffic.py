"""Traffic: device sets and bytes in, seconds out. What plans are charged for moving activations and reducing gradients.

- A slice holds its devices while it receives its input; the sender is free. Forward carries an activation, backward its
  gradient: both directions together cost twice one transfer.
- Each of the smaller set's devices sends or takes its share at the same time: latency + bytes / (min(n, n') * rate), at
  the rate inside a node when both sets stand in one, else at the rate between nodes (alpha-beta: Hockney 1994).
  Nothing moves when the sets are equal. Rows that stay on their device are charged all the same: an upper estimate.
- Gradients are reduced after backward (paper, section 3.6): layers held by the same devices together, each group as one
  all-reduce (`spindle.cost.links`). The optimiser's step follows on each device.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from spindle.cluster import Cluster
from spindle.cost.links import collective_s
from spindle.metagraph import MetaGraph
from spindle.plan import Slice

Devices = tuple[int, ...]


def transfer_s(cluster: Cluster, num_bytes: float, source: Devices, target: Devices) -> float:
    """Seconds to move `num_bytes` in one direction between two device sets."""
    if not num_bytes or source == target:
        return 0.0
    nodes = {cluster.node_of(device) for device in (*source, *target)}
    link = cluster.intra_node if len(nodes) == 1 else cluster.inter_node
    return link.transfer_s(num_bytes / min(len(source), len(target)))


def reduce_s(cluster: Cluster, num_bytes: float, devices: Devices) -> float:
    """Seconds of one all-reduce of `num_bytes` over `devices`, with the fastest protocol of the links."""
    if not num_bytes or len(devices) < 2:
        return 0.0
    return collective_s("all_reduce", num_bytes, cluster, _members(cluster.devices_per_node, devices))


@lru_cache(maxsize=65536)
def _members(devices_per_node: int, devices: Devices) -> tuple[int, ...]:
    """How many of `devices` each node has."""
    return tuple(Counter(device // devices_per_node for device in devices).values())


def reduction_groups(metagraph: MetaGraph, slices: Iterable[Slice]) -> dict[Devices, float]:
    """Bytes of gradients that each device set reduces together (the paper's parameter device group pool)."""
    holders: dict[tuple[str, int], set[int]] = defaultdict(set)
    bytes_by_layer: dict[tuple[str, int], float] = {}
    for s in slices:
        metaop = metagraph[s.metaop]
        key = metaop.parameters or f"{metaop.name} (alone)"
        for layer in range(s.first_layer, s.first_layer + s.num_layers):
            holders[key, layer].update(s.devices)
            bytes_by_layer[key, layer] = max(metaop.layer_param_bytes, bytes_by_layer.get((key, layer), 0.0))
    groups: dict[Devices, float] = defaultdict(float)
    for layer_key, devices in holders.items():
        if len(devices) > 1 and bytes_by_layer[layer_key]:
            groups[tuple(sorted(devices))] += bytes_by_layer[layer_key]
    return dict(sorted(groups.items()))


def schedule_reductions(cluster: Cluster, groups: Mapping[Devices, float]) -> tuple[tuple[Devices, float, float], ...]:
    """(devices, start_s, end_s) of each reduction, longest first; each waits for all its devices to be free.

    Times count from the end of backward. All devices meet the reductions in this one order.
    """
    seconds = {devices: reduce_s(cluster, num_bytes, devices) for devices, num_bytes in groups.items()}
    free_s: dict[int, float] = defaultdict(float)
    done: list[tuple[Devices, float, float]] = []
    for devices in sorted(groups, key=lambda d: (-seconds[d], d)):
        start = max(free_s[d] for d in devices)
        end = start + seconds[devices]
        for device in devices:
            free_s[device] = end
        done.append((devices, start, end))
    return tuple(done)


def update_by_device(metagraph: MetaGraph, slices: Iterable[Slice]) -> dict[int, float]:
    """Seconds of the optimiser's step on each device: over every layer that it holds, shared ones once."""
    held: dict[int, dict[tuple[str, int], float]] = defaultdict(dict)
    for s in slices:
        metaop = metagraph[s.metaop]
        key = metaop.parameters or f"{metaop.name} (alone)"
        for device in s.devices if metaop.layer_update_s else ():
            for layer in range(s.first_layer, s.first_layer + s.num_layers):
                held[device][key, layer] = max(metaop.layer_update_s, held[device].get((key, layer), 0.0))
    return {device: sum(layers.values()) for device, layers in sorted(held.items())}


def updated_s(cluster: Cluster, metagraph: MetaGraph, slices: Sequence[Slice]) -> float:
    """Seconds from the end of backward until the last device has made its step; each begins after its reductions."""
    scheduled = schedule_reductions(cluster, reduction_groups(metagraph, slices))
    free_s = reduced_by_device(scheduled)
    ends = [free_s.get(device, 0.0) + seconds for device, seconds in update_by_device(metagraph, slices).items()]
    return max([*ends, *free_s.values()], default=0.0)


def reduced_by_device(scheduled: Iterable[tuple[Devices, float, float]]) -> dict[int, float]:
    """When each device's last reduction ends."""
    free_s: dict[int, float] = {}
    for devices, _, end_s in scheduled:
        for device in devices:
            free_s[device] = max(end_s, free_s.get(device, 0.0))
    return free_s


def reduction_s(cluster: Cluster, metagraph: MetaGraph, slices: Iterable[Slice]) -> float:
    """Seconds of all gradient reductions of a plan after backward."""
    scheduled = schedule_reductions(cluster, reduction_groups(metagraph, slices))
    return max((end for _, _, end in scheduled), default=0.0)
