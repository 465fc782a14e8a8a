"""Overlap: slices and a MetaGraph in; how long a step takes when gradients are reduced in buckets beside backward, as
PyTorch's DistributedDataParallel does, out.

- A layer's gradients are ready when the last slice that uses it has run its backward; inside a slice, layers follow
  each other from the last to the first. Ready gradients of the same devices are gathered into buckets of BUCKET_BYTES
  (PyTorch's default), and each bucket is one collective.
- Devices reduce one bucket after another. Each second beside backward takes `Device.overlap_cost` seconds from it;
  where that is 1 or more, buckets are charged after backward. These are the rules of our own plans (`reduction`), which
  reduce by slice.
- With sharded optimizer states a bucket is reduce-scattered, and the new parameters are gathered after the step.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spindle.cluster import Cluster, Collective
from spindle.cost.links import collective_s
from spindle.metagraph import MetaGraph
from spindle.plan import Slice
from spindle.planner.loading import waits_by_device
from spindle.planner.reduction import (
    Ports,
    Reduction,
    members_of,
    shares_of,
    update_by_device,
)
from spindle.planner.simulate import Run, run_of
from spindle.planner.traffic import Devices

BUCKET_BYTES = 25 * 2**20

Ready = tuple[float, Devices, float]
"""When the gradients of a layer are ready, from the end of backward; the devices that hold them; bytes."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A layer of a parameter set: the devices that hold it, its bytes, and when its gradients are ready."""

    devices: frozenset[int]
    num_bytes: float
    ready_s: float


def bucketed_step_s(slices: Sequence[Slice], metagraph: MetaGraph, cluster: Cluster) -> float:
    """Seconds of a step of which all losses are summed: one backward, and each gradient reduced once."""
    run = run_of(slices, metagraph, cluster)
    return _whole_s(slices, metagraph, cluster, [run], _buckets(cluster, metagraph, _layers(run, metagraph)))


def accumulated_step_s(groups: Sequence[Sequence[Slice]], metagraph: MetaGraph, cluster: Cluster) -> float:
    """Seconds of a step in which groups of tasks run one after another, and gradients add up (`no_sync`) until the
    backward of the last group reduces them all. Those that it does not change are ready when it begins.
    """
    runs = [run_of(group, metagraph, cluster) for group in groups]
    last = runs[-1]
    begins_s = min(t.start_s for t in last.backward) - last.both_s
    layers = _layers(last, metagraph)
    for run in runs[:-1]:
        for key, held in _layers(run, metagraph).items():
            own = layers.get(key)
            layers[key] = _Held(
                devices=held.devices | (own.devices if own else frozenset()),
                num_bytes=max(held.num_bytes, own.num_bytes if own else 0.0),
                ready_s=own.ready_s if own else begins_s,
            )
    slices = [s for group in groups for s in group]
    return _whole_s(slices, metagraph, cluster, runs, _buckets(cluster, metagraph, layers))


def repeated_step_s(groups: Sequence[Sequence[Slice]], metagraph: MetaGraph, cluster: Cluster) -> float:
    """Seconds of a step in which each group of tasks reduces its gradients in its own backward, and the next waits."""
    runs = [run_of(group, metagraph, cluster) for group in groups]
    seconds = 0.0
    for run in runs[:-1]:
        reduced = _reduced_by_device(cluster, _buckets(cluster, metagraph, _layers(run, metagraph)))
        seconds += max(reduced.values(), default=0.0)
    slices = [s for group in groups for s in group]
    return seconds + _whole_s(
        slices, metagraph, cluster, runs, _buckets(cluster, metagraph, _layers(runs[-1], metagraph))
    )


def _whole_s(
    slices: Sequence[Slice],
    metagraph: MetaGraph,
    cluster: Cluster,
    runs: Sequence[Run],
    reductions: Sequence[Reduction],
) -> float:
    """Forward and backward of all runs, what reductions of the last one add, loading, and the optimizer's step."""
    both_s = sum(run.both_s for run in runs)
    stepped_s = _reduced_by_device(cluster, reductions)
    for device, seconds in update_by_device(shares_of(metagraph, slices)).items():
        stepped_s[device] = stepped_s.get(device, 0.0) + seconds
    end_s = max(stepped_s.values(), default=0.0)
    if metagraph.shard_optimizer:
        end_s = max(end_s, _gathered_s(cluster, reductions, stepped_s))
    waits_s = waits_by_device(cluster, [load for run in runs for load in run.loads], both_s + end_s)
    return both_s + end_s + max(waits_s.values(), default=0.0)


def _gathered_s(cluster: Cluster, reductions: Sequence[Reduction], stepped_s: Mapping[int, float]) -> float:
    """When new parameters are gathered, after the steps of all that have a part of them."""
    total: dict[Devices, float] = defaultdict(float)
    for r in reductions:
        total[r.devices] += r.num_bytes
    free_s = dict(stepped_s)
    for devices, num_bytes in total.items():
        members = members_of(cluster.devices_per_node, devices)
        end_s = max(free_s[d] for d in devices) + collective_s("all_gather", num_bytes, cluster, members)
        free_s.update(dict.fromkeys(devices, end_s))
    return max(free_s.values(), default=0.0)


def _layers(run: Run, metagraph: MetaGraph) -> dict[tuple[str, int], _Held]:
    """Trained layers by parameter set and number, as `reduction.shares_of` finds them."""
    found: dict[tuple[str, int], _Held] = {}
    for s, timed in zip(run.slices, run.backward, strict=True):
        metaop = metagraph[s.metaop]
        if not metaop.layer_param_bytes:
            continue
        computed_s = timed.end_s - timed.transfer_s - run.both_s
        layer_s = (timed.end_s - timed.transfer_s - timed.start_s) / s.num_layers
        devices = frozenset(s.devices)
        for layer in range(s.first_layer, s.first_layer + s.num_layers):
            key = metaop.parameters or f"{metaop.name} (alone)", layer
            own = _Held(
                devices=devices,
                num_bytes=metaop.layer_param_bytes,
                ready_s=computed_s - (layer - s.first_layer) * layer_s,
            )
            other = found.get(key, own)
            found[key] = replace(
                own,
                devices=own.devices if own.devices == other.devices else own.devices | other.devices,
                num_bytes=max(own.num_bytes, other.num_bytes),
                ready_s=max(own.ready_s, other.ready_s),
            )
    return found


def _buckets(cluster: Cluster, metagraph: MetaGraph, layers: dict[tuple[str, int], _Held]) -> tuple[Reduction, ...]:
    """When each bucket is reduced; times from the end of backward."""
    beside = cluster.device.overlap_cost < 1
    filling: dict[Devices, float] = defaultdict(float)
    latest_s: dict[Devices, float] = {}
    ordered: dict[frozenset[int], Devices] = {}
    full: list[Ready] = []
    for held in sorted(layers.values(), key=lambda held: held.ready_s):
        if len(held.devices) < 2:
            continue
        if held.devices not in ordered:
            ordered[held.devices] = tuple(sorted(held.devices))
        devices = ordered[held.devices]
        filling[devices] += held.num_bytes
        latest_s[devices] = held.ready_s if beside else 0.0
        if filling[devices] >= BUCKET_BYTES:
            full.append((latest_s[devices], devices, filling.pop(devices)))
    full += [(latest_s[devices], devices, num_bytes) for devices, num_bytes in filling.items()]
    operation: Collective = "reduce_scatter" if metagraph.shard_optimizer else "all_reduce"
    return tuple(_one_after_another(cluster, sorted(full), operation))


def _one_after_another(cluster: Cluster, buckets: Sequence[Ready], operation: Collective) -> list[Reduction]:
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


def _reduced_by_device(cluster: Cluster, reductions: Sequence[Reduction]) -> dict[int, float]:
    """As `reduction.reduced_by_device`: all that one set of devices reduces is added up before it goes to each."""
    beside_s: dict[Devices, float] = defaultdict(float)
    last_s: dict[Devices, float] = {}
    for r in reductions:
        beside_s[r.devices] += max(0.0, min(r.end_s, 0.0) - r.start_s)
        last_s[r.devices] = max(r.end_s, last_s.get(r.devices, 0.0))
    slowed_s: dict[int, float] = defaultdict(float)
    ended_s: dict[int, float] = defaultdict(float)
    for devices, seconds in last_s.items():
        lost_s = cluster.device.overlap_cost * beside_s[devices]
        for device in devices:
            slowed_s[device] += lost_s
            ended_s[device] = max(ended_s[device], seconds)
    return {device: seconds + slowed_s[device] for device, seconds in ended_s.items()}
