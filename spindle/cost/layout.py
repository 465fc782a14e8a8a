"""Layouts: what tensor parallelism and sharded parameters add to a layer's computation, in seconds.

- Tensor parallelism: two all-reduces of the layer's boundary in forward and two in backward (Shoeybi et al. 2019), in
  the way of the computation, so nothing hides them. They take `TENSOR_PARALLEL_COST` times what they take alone.
- Sharded parameters (ZeRO stage 3, FSDP): all-gather before forward, all-gather and reduce-scatter in backward, beside
  the computation of the layer before. Both slow each other down: each second of communication that runs beside
  computation costs `overlap_cost` seconds (1: nothing is gained by overlap).
"""

from collections.abc import Sequence

from spindle.cost.links import collective_s, spread_over_nodes
from spindle.cost.roofline import OperatorTime
from spindle.values.cluster import Cluster

TENSOR_PARALLEL_COST = 2.0
"""Fitted on half of the step times of benchmarks/data/alephalpha_llama_a100_layouts.csv: devices do not arrive at one
time, and each collective starts when all have."""


def tensor_parallel_s(boundary_bytes: float, cluster: Cluster, degree: int) -> float:
    """Seconds that tensor parallelism of `degree` devices of one node adds to one direction of a layer."""
    return 2 * TENSOR_PARALLEL_COST * collective_s("all_reduce", boundary_bytes, cluster, (degree,))


def overlapped_s(compute_s: float, communication_s: float, cluster: Cluster) -> float:
    """Seconds of computation with communication beside it."""
    beside = min(compute_s, communication_s)
    return max(compute_s, communication_s) + cluster.device.overlap_cost * beside


def sharded_s(
    time: OperatorTime,
    parameter_bytes: float,
    cluster: Cluster,
    devices: int,
    *,
    gradient_bytes: float | None = None,
    regather: bool = True,
) -> OperatorTime:
    """A layer's time when its `parameter_bytes` are sharded over `devices`; no `regather`: backward still has them.
    `gradient_bytes` where not all of them are trained.
    """
    nodes: Sequence[int] = spread_over_nodes(devices, cluster)
    gather = collective_s("all_gather", parameter_bytes, cluster, nodes)
    scattered = parameter_bytes if gradient_bytes is None else gradient_bytes
    scatter = collective_s("reduce_scatter", scattered, cluster, nodes)
    return OperatorTime(
        overlapped_s(time.forward_s, gather, cluster),
        overlapped_s(time.backward_s, scatter + (gather if regather else 0.0), cluster),
    )
