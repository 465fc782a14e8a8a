"""Links: bytes and a group of devices in, seconds of a collective out (piecewise alpha-beta: Hockney 1994)."""

from math import ceil, log2

from spindle.cluster import Cluster, Link
from spindle.graph import Operator


def all_reduce_s(num_bytes: float, devices: int, link: Link) -> float:
    """Seconds of a ring all-reduce over `devices` devices that all reach each other over `link`."""
    if devices < 2 or not num_bytes:
        return 0.0
    return 2 * ceil(log2(devices)) * link.latency_s + 2 * (devices - 1) / devices * num_bytes / link.bytes_per_s


def tensor_parallel_s(operator: Operator, cluster: Cluster, *, data_parallel: int, tensor_parallel: int) -> float:
    """Seconds that tensor parallelism adds to one direction: two all-reduces of the layer's output (Shoeybi 2019)."""
    if tensor_parallel < 2:
        return 0.0
    local = (operator.output_bytes or operator.input_bytes) / data_parallel
    return 2 * all_reduce_s(local, tensor_parallel, cluster.intra_node)
