"""Buckets: slices and when each runs backward in; when each bucket of gradients is reduced, out.

- A layer's gradients are ready when the last slice that uses it has computed its backward; inside a slice, layers
  follow each other from the last to the first, but tensor parallel ones are ready when the slice ends. Ready gradients
  of the same devices fill a bucket, and a full bucket is one collective, which starts at once. So PyTorch's
  DistributedDataParallel does it, and so do our own plans (`spindle.runtime.steps.reductions`).
- Devices reduce one bucket after another. Each second beside backward takes `Device.overlap_cost` seconds from it;
  where that is 1 or more nothing is gained by overlap, and buckets are charged after backward.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from spindle.cost.links import collective_s
from spindle.planner.costing.reduction import Ports, Reduction, members_of
from spindle.planner.costing.traffic import Devices
from spindle.values.cluster import Cluster, Collective
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import BUCKET_BYTES, Slice

BUCKET_SIZES = (BUCKET_BYTES, 4 * BUCKET_BYTES, 16 * BUCKET_BYTES)  # tried for each schedule
ALIKE_DIGITS = 12  # of seconds, to which two moments are compared

Computed = tuple[float, float]
"""When the backward of a slice starts and ends to compute, from the end of all backward."""
Key = tuple[str, int]
"""A set of parameters, and the number of a layer of it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A trained layer: the devices that hold it, bytes of its gradients, and when these are ready."""

    devices: frozenset[int]
    num_bytes: float
    ready_s: float


def layers_of(metagraph: MetaGraph, slices: Sequence[Slice], computed: Sequence[Computed]) -> dict[Key, Layer]:
    """Trained layers, those of MetaOps with the same parameters together."""
    found: dict[Key, Layer] = {}
    for s, (start_s, end_s) in zip(slices, computed, strict=True):
        metaop = metagraph[s.metaop]
        if not (metaop.layer_param_bytes or metaop.layer_update_s):  # as `reduction.shares_of`
            continue
        is_cut = metaop.degree_on(len(s.devices)) > 1
        layer_s = 0.0 if is_cut else (end_s - start_s) / s.num_layers
        devices = frozenset(s.devices)
        for layer in range(s.first_layer, s.first_layer + s.num_layers):
            key = metaop.parameters or f"{metaop.name} (alone)", layer
            own = Layer(devices, metaop.layer_param_bytes, end_s - (layer - s.first_layer) * layer_s)
            found[key] = joined(found.get(key, own), own)
    return found


def joined(one: Layer, two: Layer) -> Layer:
    """A layer that two slices run."""
    return Layer(
        devices=one.devices if one.devices == two.devices else one.devices | two.devices,
        num_bytes=max(one.num_bytes, two.num_bytes),
        ready_s=max(one.ready_s, two.ready_s),
    )


def bucketed(
    cluster: Cluster,
    layers: Iterable[Layer],
    operation: Collective,
    *,
    divided: bool = False,
    bucket_bytes: float = BUCKET_BYTES,
) -> tuple[Reduction, ...]:
    """When each bucket is reduced, from the end of backward. `divided`: the devices of a set share its buckets among
    them, each the end of some, so that there are at least as many buckets as devices.
    """
    beside = cluster.device.overlap_cost < 1
    shared = [layer for layer in layers if len(layer.devices) > 1 and layer.num_bytes]
    ordered = {layer.devices: tuple(sorted(layer.devices)) for layer in shared}
    most: dict[Devices, float] = dict.fromkeys(ordered.values(), float(bucket_bytes))
    if divided:
        total: dict[Devices, float] = defaultdict(float)
        for layer in shared:
            total[ordered[layer.devices]] += layer.num_bytes
        most = {devices: min(bucket_bytes, size / len(devices)) for devices, size in total.items()}
    filling: dict[Devices, float] = defaultdict(float)
    full: list[tuple[float, Devices, float]] = []
    rows = sorted((round(x.ready_s, ALIKE_DIGITS) if beside else 0.0, ordered[x.devices], x.num_bytes) for x in shared)
    last_s: dict[Devices, float] = {}
    for ready_s, devices, num_bytes in rows:
        filling[devices] += num_bytes
        last_s[devices] = ready_s
        while filling[devices] >= most[devices]:
            size = most[devices] if divided else filling[devices]
            full.append((ready_s, devices, size))
            filling[devices] -= size
    least = 1e-9 if divided else 0.0  # of a bucket; what is less is left over by rounding
    full += [(last_s[devices], devices, size) for devices, size in filling.items() if size > least * most[devices]]
    return tuple(_one_after_another(cluster, sorted(full), operation))


def sizes_to_try(layers: Iterable[Layer]) -> tuple[int, ...]:
    """Bucket sizes to compare; a size is left out where the next smaller one already holds all gradients of a set."""
    total: dict[frozenset[int], float] = defaultdict(float)
    for layer in layers:
        total[layer.devices] += layer.num_bytes if len(layer.devices) > 1 else 0.0
    most = max(total.values(), default=0.0)
    return (BUCKET_SIZES[0], *(two for one, two in pairwise(BUCKET_SIZES) if most > one))


def _one_after_another(
    cluster: Cluster, buckets: Sequence[tuple[float, Devices, float]], operation: Collective
) -> list[Reduction]:
    """Each waits for the last one on any of its devices. There are few sets of devices, so sets are compared once."""
    sets = {devices: frozenset(devices) for _, devices, _ in buckets}
    meets = {one: [two for two in sets if not sets[one].isdisjoint(sets[two])] for one in sets}
    free_s: dict[Devices, float] = {}
    ports = Ports(cluster)
    done: list[Reduction] = []
    for ready_s, devices, num_bytes in buckets:
        start_s = max(ready_s, max(free_s.get(other, ready_s) for other in meets[devices]))
        members = members_of(cluster.devices_per_node, devices)
        alone_s = collective_s(operation, num_bytes, cluster, members)
        end_s = ports.end_s(operation, num_bytes, devices, start_s, alone_s)
        free_s[devices] = end_s
        done.append(Reduction(devices, num_bytes, start_s, end_s))
    return done


def without_gaps(reductions: Sequence[Reduction]) -> tuple[Reduction, ...]:
    """The same with buckets of the same devices that follow each other at once as one: fewer to draw."""
    by_devices: dict[Devices, list[Reduction]] = defaultdict(list)
    for r in reductions:
        by_devices[r.devices].append(r)
    found: list[Reduction] = []
    for rows in by_devices.values():
        first = rows[0]
        for one, two in pairwise(rows):
            if two.start_s > one.end_s:
                found.append(first)
                first = two
            else:
                first = replace(first, num_bytes=first.num_bytes + two.num_bytes, end_s=two.end_s)
        found.append(first)
    return tuple(sorted(found, key=lambda r: (r.start_s, r.end_s, r.devices)))
