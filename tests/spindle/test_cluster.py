"""Cluster: every rule of its values, and where devices stand."""

import pytest

from spindle.errors import ClusterError
from spindle.values.cluster import Cluster, Device, Link, Protocol
from tests.refusals import Refusal, check_refusal, each

NAN, INF = float("nan"), float("inf")


def device(**fields: float) -> Device:
    given = {"memory_bytes": 1e9, "peak_flops": 1e12, "memory_bytes_per_s": 1e12, **fields}
    return Device(name="toy", **given)  # type: ignore[arg-type]


def link(**fields: float) -> Link:
    return Link(**{"bytes_per_s": 10.0, "latency_s": 0.5, **fields})  # type: ignore[arg-type]


def protocol(**fields: float) -> Protocol:
    return Protocol(**{"latency_s": 0.0, "hop_s": 0.0, "bytes_per_s": 1.0, **fields})  # type: ignore[arg-type]


def cluster(nodes: int = 2, devices_per_node: int = 3) -> Cluster:
    slow = link(bytes_per_s=1.0)
    return Cluster(nodes=nodes, devices_per_node=devices_per_node, device=device(), intra_node=link(), inter_node=slow)


RULES: dict[str, Refusal] = {
    "no nodes": (lambda: cluster(nodes=0), "cluster", "nodes is 0", "at least one"),
    "no devices": (lambda: cluster(devices_per_node=0), "cluster", "devices_per_node is 0", "at least one"),
    "devices below zero": (lambda: cluster(devices_per_node=-8), "cluster", "is -8", "at least one"),
    "no memory": (lambda: device(memory_bytes=0.0), "device 'toy'", "memory_bytes is 0.0", "positive number"),
    "no rate": (lambda: device(peak_flops=-1.0), "device 'toy'", "peak_flops is -1.0", "positive number"),
    "a rate that is no number": (lambda: device(peak_flops=NAN), "device 'toy'", "is nan", "positive number"),
    "endless bandwidth": (lambda: device(memory_bytes_per_s=INF), "device 'toy'", "is inf", "positive number"),
    "nothing reached": (lambda: device(matmul_efficiency=0.0), "'toy'", "matmul_efficiency", "positive number"),
    "no attention": (lambda: device(attention_efficiency=NAN), "'toy'", "attention_efficiency", "positive number"),
    "no float32": (lambda: device(float32_rate=0.0), "'toy'", "float32_rate", "positive number"),
    "a launch before time": (lambda: device(launch_s=-1e-6), "'toy'", "launch_s is -1e-06", "zero or a positive"),
    "traffic that is no number": (lambda: device(elementwise_traffic=NAN), "'toy'", "elementwise_traffic", "zero or"),
    "overlap that gains": (lambda: device(overlap_cost=-0.1), "'toy'", "overlap_cost is -0.1", "zero or a positive"),
    "a link that carries nothing": (lambda: link(bytes_per_s=0.0), "link", "bytes_per_s is 0.0", "positive number"),
    "a latency below zero": (lambda: link(latency_s=-1.0), "link", "latency_s is -1.0", "zero or a positive"),
    "a latency that is no number": (lambda: link(latency_s=NAN), "link", "latency_s is nan", "zero or a positive"),
    "a protocol that carries nothing": (lambda: protocol(bytes_per_s=0.0), "protocol", "0.0", "positive number"),
    "a hop below zero": (lambda: protocol(hop_s=-1.0), "protocol", "hop_s is -1.0", "zero or a positive"),
    "a protocol's endless latency": (lambda: protocol(latency_s=INF), "protocol", "is inf", "zero or a positive"),
}


@each(RULES)
def test_rules_of_clusters(refusal: Refusal) -> None:
    check_refusal(refusal, ClusterError)


def test_devices_are_numbered_node_by_node() -> None:
    made = cluster()
    assert made.num_devices == 6
    assert [made.node_of(d) for d in range(6)] == [0, 0, 0, 1, 1, 1]
    assert made.link(0, 2) is made.intra_node
    assert made.link(2, 3) is made.inter_node


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 0.0), (10, 1.5), (100, 10.5)])
def test_a_message_takes_latency_and_its_bytes(num_bytes: int, seconds: float) -> None:
    """Nothing to send takes no time at all."""
    assert link().transfer_s(num_bytes) == seconds
