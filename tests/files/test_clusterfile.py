"""Clusters as users write them: each form, and each way to write it wrong."""

from pathlib import Path

import pytest

from spindle.errors import ClusterError, FormatError, SpindleError
from spindle.files.clusterfile import parse_cluster, parse_yaml, read_yaml

GOOD = """
nodes: 2
devices_per_node: 4
device: {name: toy, memory_gib: 16, peak_tflops: 100, memory_bandwidth_gbps: 900}
intra_node: {bandwidth_gbps: 100, latency_us: 10}
inter_node: {bandwidth_gbps: 10, latency_us: 20}
"""


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "device"),
    [
        ("4x8", 4, 8, "a100-80g"),
        ("8", 1, 8, "a100-80g"),
        ("1x1", 1, 1, "a100-80g"),
        ("2x4:h100-80g", 2, 4, "h100-80g"),
        ("2x4:H100-80G", 2, 4, "h100-80g"),
        ("1x2:cpu", 1, 2, "cpu"),
        ("1x8:h100", 1, 8, "h100-80g"),
        ("1x8:MI250X", 1, 8, "mi250x-128g"),
    ],
)
def test_short_forms(text: str, nodes: int, per_node: int, device: str) -> None:
    made = parse_cluster(text)
    assert (made.nodes, made.devices_per_node, made.device.name) == (nodes, per_node, device)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not NODESxDEVICES; write 4x8"),
        ("many", "is not NODESxDEVICES; write 4x8"),
        ("4x", "is not NODESxDEVICES; write 4x8"),
        ("4x8x2", "is not NODESxDEVICES; write 4x8"),
        ("4.5x8", "is not NODESxDEVICES; write 4x8"),
        ("0x8", "nodes is 0; a cluster needs at least one"),
        ("4x0", "devices_per_node is 0; a cluster needs at least one"),
        ("-1x8", "nodes is -1; a cluster needs at least one"),
        ("4x8:a1000", r"device type 'a1000' is not known \(did you mean 'a100'\?\); the types are a100-40g"),
        ("4x8:a100", "several sizes of memory; write a100-40g or a100-80g"),
    ],
)
def test_short_forms_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ClusterError, match=words) as caught:
        parse_cluster(text)
    assert len(str(caught.value).splitlines()) == 1


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_in_its_units(tmp_path: Path) -> None:
    made = parse_cluster(written(tmp_path, GOOD))
    assert made.num_devices == 8
    assert made.device.memory_bytes == 16 * 2**30
    assert made.device.peak_flops == 100e12
    assert made.intra_node.bytes_per_s == 100e9
    assert made.inter_node.latency_s == pytest.approx(20e-6)


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    """One node; links between nodes like those inside; a built-in type brings its own links."""
    text = "devices_per_node: 4\n" + "\n".join(GOOD.splitlines()[3:5])
    made = parse_cluster(written(tmp_path, text))
    assert made.nodes == 1
    assert made.inter_node == made.intra_node
    built_in = parse_cluster(written(tmp_path, "{nodes: 2, devices_per_node: 8, device: a100-80g}"))
    assert built_in == parse_cluster("2x8:a100-80g")


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("nodes: 2", "nodes: 0", ClusterError, "nodes is 0"),
        ("nodes: 2", "nodes: two", FormatError, "nodes is 'two': input should be a valid integer"),
        ("nodes: 2", "nodes: 2.0", FormatError, "nodes is '2.0'"),
        ("nodes: 2", "nodes: true", FormatError, "nodes is 'True'"),
        ("nodes: 2", "knots: 2", FormatError, "knots is not a known field; remove it"),
        ("devices_per_node: 4", "", FormatError, "devices_per_node is missing; add it"),
        ("devices_per_node: 4", "devices_per_node: 4\nnodes: 3", FormatError, "'nodes' stands twice"),
        (
            "memory_gib: 16",
            "memory_gib: .nan",
            FormatError,
            "memory_gib is 'nan': input should be a finite",
        ),
        ("memory_gib: 16", "memory_gib: .inf", FormatError, "device.memory_gib is 'inf'"),
        ("memory_gib: 16", "memory_gib: -16", FormatError, "cluster.yaml: device.memory_gib is '-16'"),
        ("memory_gib: 16", "memory_gb: 16", FormatError, "memory_gb is not a known field"),
        (
            "{bandwidth_gbps: 100,",
            "{bandwidth_gbps: 0,",
            FormatError,
            "intra_node.bandwidth_gbps is '0'",
        ),
        ("{bandwidth_gbps: 10,", "{bandwidth_gbps: 1.0e-30,", FormatError, "inter_node.bandwidth_gbps is '1e-30'"),
        ("latency_us: 20", "latency_us: 1.0e+30", FormatError, "inter_node.latency_us is '1e.30'"),
        ("memory_gib: 16", "memory_gib: 16, reserved_gib: 16", ClusterError, "reserved_gib is 16 of 16 in memory_gib"),
        ("memory_gib: 16", "memory_gib: 16, reserved_gib: -1", FormatError, "device.reserved_gib is '-1'"),
        ("memory_gib: 16", "memory_gib: 16, matmul_efficiency: 80", FormatError, "efficiency is '80': .* equal to 1"),
        ("memory_gib: 16", "memory_gib: 16, attention_efficiency: 1.0e-30", FormatError, "attention_efficiency is"),
        ("nodes: 2", "nodes: 10000000", ClusterError, "cluster.yaml: .* are 40000000 devices; give at most 1048576"),
        ("device: {name: toy, ", "device: {", FormatError, "name is missing"),
        ("device: {name: toy", "device: [name, toy", FormatError, "not YAML"),
        ("inter_node: {", "inter_node: [{", FormatError, "not YAML"),
        (GOOD, "", FormatError, "the file is 'None'"),
        (GOOD, "- 4\n- 8", FormatError, "the file is"),
        (GOOD, "4x8", FormatError, "the file is '4x8'"),
        (GOOD, "{devices_per_node: 4, device: b1000}", ClusterError, "device type 'b1000' is not known"),
        (GOOD, "!!python/object/apply:os.system [echo]", FormatError, "not YAML .*could not determine a constructor"),
        (GOOD, "[" * 10_000, FormatError, "not YAML"),
        (GOOD, "&a [*a]", FormatError, "holds more than 100000 values"),
        (GOOD, "? [a]\n: b", FormatError, "not YAML"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, old: str, new: str, error: type[SpindleError], words: str) -> None:
    """Wrong fields, types, values and text, each refused in one line that names the file or the value."""
    assert old in GOOD
    with pytest.raises(error, match=words) as caught:
        parse_cluster(written(tmp_path, GOOD.replace(old, new)))
    assert type(caught.value) is error
    assert len(str(caught.value).splitlines()) == 1


def test_a_device_without_links_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"intra_node is missing; add intra_node: \{bandwidth"):
        parse_cluster(written(tmp_path, "\n".join(GOOD.splitlines()[:4])))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, a folder, bytes that are no text."""
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\x80\x00\xff")
    for name in ("missing.yaml", "folder.yaml", "bytes.yaml"):
        with pytest.raises(FormatError, match=rf"{name}: cannot be read \(.*\); check the path"):
            parse_cluster(str(tmp_path / name))


def test_yaml_is_data(tmp_path: Path) -> None:
    """Plain values come through; the path is named in errors."""
    path = tmp_path / "some.yaml"
    path.write_text("a: [1, 2.5, x]")
    assert read_yaml(path) == {"a": [1, 2.5, "x"]}
    with pytest.raises(FormatError, match=r"here: not YAML"):
        parse_yaml("a: [", source="here")
