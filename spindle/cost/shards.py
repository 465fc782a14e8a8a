"""Sharded parameters (FSDP2, ZeRO-3): a MetaOp with costs in; the same with a part of its layers on each device, out.

- Each device keeps a part of every layer's parameters, gradients and optimizer states. A layer is gathered before its
  forward and again before its backward, and its gradients are scattered after that, beside the computation of the layer
  before; so two layers are whole at a time.
- Nothing is left to reduce after backward, and each device steps its part.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from spindle.cost.layout import sharded_s
from spindle.cost.roofline import OperatorTime
from spindle.errors import InfeasibleError
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.graph import Operator
from spindle.values.metagraph import MetaGraph, MetaOp, points

ELEMENTWISE = ("adamw", "adam", "lion", "sgd", "sgd_momentum")
"""Optimizers that update each number by itself, so that a device can step a part of a matrix."""
LEAST_SHARE = 0.05  # of all parameters, of a component that is worth to be sharded


def with_shards(metaop: MetaOp, cluster: Cluster) -> MetaOp:
    """A MetaOp with costs with parameters sharded over all devices; one without parameters is as it was.

    Example:
        >>> from spindle.files.clusterfile import parse_cluster
        >>> op = MetaOp(name="a", task="t", component="a", layers=2, layer_time_s=((8, 1e-3),),
        ...     memory_bytes=((8, 1e9),), layer_param_bytes=1e8, layer_state_bytes=4e8)
        >>> found = with_shards(op, parse_cluster("1x8:a100-80g"))
        >>> found.times[8] > 1e-3, found.memory[8], found.layer_state_bytes, found.gathered_bytes
        (True, 300000000.0, 50000000.0, 400000000.0)
    """
    held, devices = parameter_bytes(metaop), cluster.num_devices
    if not held or devices < 2:
        return metaop
    times: dict[int, float] = {}
    share = metaop.forward_fraction
    for n, time_s in metaop.layer_time_s:
        whole = OperatorTime(time_s * metaop.forward_fraction, time_s * (1 - metaop.forward_fraction))
        cut = sharded_s(whole, held, cluster, devices, gradient_bytes=metaop.layer_param_bytes)
        times[n] = cut.total_s if whole.backward_s else cut.forward_s
        share = cut.forward_s / times[n]  # that of the largest count, on which it runs
    elsewhere = metaop.layers * metaop.layer_state_bytes * (1 - 1 / devices)
    return replace(
        metaop,
        layer_time_s=points(times),
        memory_bytes=points({n: max(0.0, num_bytes - elsewhere) for n, num_bytes in metaop.memory_bytes}),
        forward_fraction=share,
        layer_param_bytes=0.0,
        layer_state_bytes=metaop.layer_state_bytes / devices,
        gathered_bytes=2 * (held + metaop.layer_param_bytes),
    )


def all_sharded(metagraph: MetaGraph, cluster: Cluster) -> MetaGraph:
    """The MetaGraph with all parameters sharded over all devices."""
    return replace(metagraph, metaops=tuple(with_shards(metaop, cluster) for metaop in metagraph))


def parameter_bytes(metaop: MetaOp) -> float:
    """Bytes of one layer's parameters, frozen ones included where they are known."""
    held = sum(operator.parameter_bytes for operator in metaop.operators) / metaop.layers
    return max(held, metaop.layer_param_bytes)


def shards(metaop: MetaOp, cluster: Cluster, cost_options: CostOptions) -> bool:
    """Whether the parameters of a MetaOp, which still carries its operators, are to be sharded.

    Raises InfeasibleError where they are, and it cannot run on all devices.
    """
    if metaop.component not in cost_options.shard_parameters or not _has_parameters(metaop.operators):
        return False
    if why := _why_not(metaop, cluster):
        raise InfeasibleError(
            f"the parameters of component {metaop.component!r} are to be sharded over all {cluster.num_devices} "
            f"devices, and MetaOp {metaop.name!r} {why}, or register the component without shard='parameters'"
        )
    return cluster.num_devices > 1


def on_all_devices(layouts: Mapping[int, Sequence[int]], cluster: Cluster) -> dict[int, list[int]]:
    """Of the layouts of a MetaOp the one in which its parameters are sharded."""
    return {n: [1] for n, degrees in layouts.items() if n == cluster.num_devices and 1 in degrees}


def shardable(metagraph: MetaGraph, cluster: Cluster, cost_options: CostOptions) -> tuple[str, ...]:
    """Components whose parameters a plan may shard, largest first, without ones that are sharded already or hold next
    to nothing. The MetaGraph still carries its operators.
    """
    if cost_options.optimizer not in ELEMENTWISE or cluster.num_devices < 2:
        return ()
    held: dict[str, dict[str, int]] = {}
    barred = {*cost_options.never_sharded, *cost_options.shard_parameters}
    for metaop in metagraph:
        if _has_parameters(metaop.operators) and (_why_not(metaop, cluster) or metaop.operators[0].tensor_parallel > 1):
            barred.add(metaop.component)
        for parameter in (p for operator in metaop.operators for p in operator.parameters):
            held.setdefault(metaop.component, {})[parameter.name] = parameter.num_bytes
    sizes = {name: sum(own.values()) for name, own in held.items()}
    least = LEAST_SHARE * sum(sizes.values())
    return tuple(sorted((n for n in sizes if n not in barred and sizes[n] > least), key=lambda n: (-sizes[n], n)))


def _has_parameters(operators: Iterable[Operator]) -> bool:
    return any(operator.parameters for operator in operators)


def _why_not(metaop: MetaOp, cluster: Cluster) -> str:
    """Why a MetaOp cannot run on all devices; "" where it can."""
    if cluster.num_devices > 1 and not all(operator.splittable for operator in metaop.operators):
        return "mixes samples, so that it runs on one: make what mixes them a component of its own"
    batch = metaop.operators[0].batch_size
    if batch % cluster.num_devices:
        return f"runs {batch} samples, which these do not share evenly: use a batch size that their number divides"
    return ""
