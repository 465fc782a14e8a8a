"""Cluster: nodes of equal devices, and what their links carry.

A node is one island: its devices reach each other over `intra_node`, all others over `inter_node`.
Devices are numbered node by node: device d stands in node d // devices_per_node.
"""

from dataclasses import dataclass

from spindle.errors import ClusterError


def _require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ClusterError(f"{owner}: {name} is {value!r}; it must be a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device type: memory, peak dense rate at the training precision, memory bandwidth."""

    name: str
    memory_bytes: float
    peak_flops: float  # operations per second, a multiply-add counted as two
    memory_bytes_per_s: float

    def __post_init__(self) -> None:
        _require_positive(
            f"device {self.name!r}",
            memory_bytes=self.memory_bytes,
            peak_flops=self.peak_flops,
            memory_bytes_per_s=self.memory_bytes_per_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link level: bytes per second in one direction, and the fixed time of one message."""

    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        _require_positive("link", bytes_per_s=self.bytes_per_s)
        if not 0 <= self.latency_s < float("inf"):
            raise ClusterError(f"link: latency_s is {self.latency_s!r}; it must be zero or a positive number")

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds that one message of `num_bytes` takes (alpha-beta: Hockney 1994)."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`nodes` islands of `devices_per_node` equal devices."""

    nodes: int
    devices_per_node: int
    device: Device
    intra_node: Link
    inter_node: Link

    def __post_init__(self) -> None:
        for name, count in (("nodes", self.nodes), ("devices_per_node", self.devices_per_node)):
            if count < 1:
                raise ClusterError(f"cluster: {name} is {count}; a cluster needs at least one")

    @property
    def num_devices(self) -> int:
        """Devices of all nodes together."""
        return self.nodes * self.devices_per_node

    def node_of(self, device: int) -> int:
        """The node in which `device` stands."""
        return device // self.devices_per_node

    def link(self, a: int, b: int) -> Link:
        """The link between two different devices."""
        return self.intra_node if self.node_of(a) == self.node_of(b) else self.inter_node
