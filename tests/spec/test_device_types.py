"""Device types: every one that ships is sound, files may describe new ones, plans carry what was used."""

from pathlib import Path

import pytest

import spindle.files.clusterfile
from spindle.errors import ClusterError, FormatError
from spindle.files.clusterfile import parse_cluster, parse_yaml, read_yaml
from spindle.files.formats import dumps, loads
from spindle.values.cluster import Device, Link, Protocol
from spindle.values.plan import Plan, Slice, make_waves

TYPES = sorted(read_yaml(Path(spindle.files.clusterfile.__file__).with_name("devices.yaml")))


def test_known_types() -> None:
    wanted = {
        "v100-32g",
        "a100-40g",
        "a100-80g",
        "a800-80g",
        "h100-80g",
        "h200-141g",
        "b200-192g",
        "mi250x-128g",
        "cpu",
    }
    assert wanted <= set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_types_are_sound(name: str) -> None:
    cluster = parse_cluster(f"2x8:{name}")
    assert cluster.device.name == name
    assert 0.3 < cluster.device.matmul_efficiency <= 1
    assert 0.05 < cluster.device.attention_efficiency < cluster.device.matmul_efficiency
    assert cluster.intra_node.bytes_per_s >= cluster.inter_node.bytes_per_s


def test_a_new_type_needs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        """
nodes: 2
devices_per_node: 4
device: {name: mine, memory_gib: 16, peak_tflops: 10, memory_bandwidth_gbps: 100, matmul_efficiency: 0.5, launch_us: 2}
intra_node:
  bandwidth_gbps: 50
  latency_us: 1
  protocols: [{latency_us: 5, hop_us: 1, bandwidth_gbps: 20}, {latency_us: 9, bandwidth_gbps: 48, in_network: true}]
"""
    )
    cluster = parse_cluster(str(path))
    assert cluster.device.matmul_efficiency == 0.5
    assert cluster.device.launch_s == 2e-6
    assert cluster.intra_node.protocols[1] == Protocol(latency_s=9e-6, hop_s=0.0, bytes_per_s=48e9, in_network=True)
    plan = Plan(
        num_devices=8,
        devices_per_node=4,
        method="test",
        waves=make_waves([Slice(metaop="m", first_layer=0, num_layers=1, devices=(0,), start_s=0.0, end_s=1.0)]),
        makespan_s=1.0,
        cluster=cluster,
    )
    assert loads(dumps(plan), Plan) == plan


def test_bad_values_are_refused() -> None:
    with pytest.raises(ClusterError, match="matmul_efficiency is 0"):
        Device(name="d", memory_bytes=1, peak_flops=1, memory_bytes_per_s=1, matmul_efficiency=0.0)
    with pytest.raises(ClusterError, match="launch_s is -1"):
        Device(name="d", memory_bytes=1, peak_flops=1, memory_bytes_per_s=1, launch_s=-1.0)
    with pytest.raises(ClusterError, match="hop_s is nan"):
        Protocol(latency_s=0.0, hop_s=float("nan"), bytes_per_s=1.0)
    with pytest.raises(ClusterError, match="latency_s"):
        Link(bytes_per_s=1.0, latency_s=-1.0)


def test_yaml_with_a_key_twice_is_refused() -> None:
    with pytest.raises(FormatError, match="'a' stands twice in the mapping that begins at line 2"):
        parse_yaml("x:\n  a: 1\n  a: 2\n")
