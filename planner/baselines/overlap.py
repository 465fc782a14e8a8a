"""Overlap: slices and a MetaGraph in; how long a step takes that PyTorch's DistributedDataParallel would run, out.

- Gradients are reduced in buckets beside backward, by the rules of our own plans (`spindle.planner.costing.buckets`).
- Tasks may run one after another, with one reduction in the last one's backward (`no_sync`) or one in each.
- With sharded optimizer states a bucket is reduce-scattered, and the new parameters are gathered after the step.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from spindle.cost.links import collective_s
from spindle.planner.costing.buckets import Key, Layer, bucketed, layers_of, sizes_to_try
from spindle.planner.costing.loading import waits_by_device
from spindle.planner.costing.reduction import Reduction, members_of, reduced_by_device, shares_of, update_by_device
from spindle.planner.costing.traffic import Devices
from spindle.planner.simulate import Run, run_of
from spindle.values.cluster import Cluster, Collective
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Slice


def bucketed_step_s(slices: Sequence[Slice], metagraph: MetaGraph, cluster: Cluster) -> float:
    """Seconds of a step of which all losses are summed: one backward, and each gradient reduced once."""
    run = run_of(slices, metagraph, cluster)
    return _whole_s(
        slices, metagraph, cluster, [run], _reductions(cluster, metagraph, _layers(metagraph, run).values())
    )


def accumulated_step_s(groups: Sequence[Sequence[Slice]], metagraph: MetaGraph, cluster: Cluster) -> float:
    """Seconds of a step in which groups of tasks run one after another, and gradients add up (`no_sync`) until the
    backward of the last group reduces them all. Gradients that it does not change are ready when it begins.
    """
    runs = [run_of(group, metagraph, cluster) for group in groups]
    last = runs[-1]
    begins_s = min(t.start_s for t in last.backward) - last.both_s
    layers = _layers(metagraph, last)
    for run in runs[:-1]:
        for key, held in _layers(metagraph, run).items():
            own = layers.get(key)
            layers[key] = Layer(
                devices=held.devices | (own.devices if own else frozenset()),
                num_bytes=max(held.num_bytes, own.num_bytes if own else 0.0),
                ready_s=own.ready_s if own else begins_s,
            )
    slices = [s for group in groups for s in group]
    return _whole_s(slices, metagraph, cluster, runs, _reductions(cluster, metagraph, layers.values()))


def repeated_step_s(groups: Sequence[Sequence[Slice]], metagraph: MetaGraph, cluster: Cluster) -> float:
    """Seconds of a step in which each group of tasks reduces its gradients in its own backward, and the next waits."""
    runs = [run_of(group, metagraph, cluster) for group in groups]
    reductions = [_reductions(cluster, metagraph, _layers(metagraph, run).values()) for run in runs]
    seconds = sum(max(reduced_by_device(cluster, found).values(), default=0.0) for found in reductions[:-1])
    slices = [s for group in groups for s in group]
    return seconds + _whole_s(slices, metagraph, cluster, runs, reductions[-1])


def _layers(metagraph: MetaGraph, run: Run) -> dict[Key, Layer]:
    return layers_of(metagraph, run.slices, run.computed)


def _reductions(cluster: Cluster, metagraph: MetaGraph, layers: Collection[Layer]) -> tuple[Reduction, ...]:
    """In buckets of the size that is best."""
    operation: Collective = "reduce_scatter" if metagraph.shard_optimizer else "all_reduce"
    tried = (bucketed(cluster, layers, operation, bucket_bytes=size) for size in sizes_to_try(layers))
    return min(tried, key=lambda found: max(reduced_by_device(cluster, found).values(), default=0.0))


def _whole_s(
    slices: Sequence[Slice],
    metagraph: MetaGraph,
    cluster: Cluster,
    runs: Sequence[Run],
    reductions: Sequence[Reduction],
) -> float:
    """Forward and backward of all runs, what reductions of the last one add, loading, and the optimizer's step."""
    both_s = sum(run.both_s for run in runs)
    stepped_s = reduced_by_device(cluster, reductions)
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
