"""Cluster: nodes of equal devices, and what their links carry.

A node is one island: its devices reach each other over `intra_node`, all others over `inter_node`.
Devices are numbered node by node: device d stands in node d // devices_per_node.
"""

from dataclasses import dataclass
from typing import Literal

from spindle.errors import ClusterError

MOST_DEVICES = 2**20  # each is simulated by itself; more than that would take minutes to say anything

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "reduce", "broadcast"]


def _require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ClusterError(f"{owner}: {name} is {value!r}; it must be a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device type: memory, peak dense rate at the training precision, memory bandwidth, and what is reached of it.

    memory_bytes           what tensors may take
    reserved_bytes         what CUDA, communication libraries and fragmentation take besides; 0: not known
    matmul_efficiency      share of peak_flops that a large matrix product reaches
    attention_efficiency   share of peak_flops that fused attention reaches on the scores it computes
    elementwise_traffic    how many times what stands between matrix products moves their inputs and outputs
    eager_traffic          the same of eager PyTorch; 0: `execution.EAGER_TRAFFIC` times that of fused layers
    kernels_per_matmul     kernels that are started in forward for each matrix product, itself among them
    overlap_cost           seconds lost for each second of communication that runs beside computation
    launch_s               seconds that a kernel takes besides its work: its start, on the host and on the device
    parallel_units         tiles of a matrix product that are computed at once (streaming multiprocessors)
    float32_rate           rate of four-byte matrix products over peak_flops in TF32 (eight-byte ones: half of that)
    full_float32_rate      the same without TF32
    host_bytes_per_s       rate between the device and its host's memory, for optimizer states that are offloaded
    """

    name: str
    memory_bytes: float
    peak_flops: float  # operations per second, a multiply-add counted as two
    memory_bytes_per_s: float
    matmul_efficiency: float = 0.8
    attention_efficiency: float = 0.3
    elementwise_traffic: float = 5.0
    eager_traffic: float = 0.0
    kernels_per_matmul: float = 3.5
    overlap_cost: float = 1.0
    launch_s: float = 2.5e-6
    parallel_units: int = 108
    float32_rate: float = 0.5
    full_float32_rate: float = 0.0625
    host_bytes_per_s: float = 25e9  # what sixteen lanes of PCIe 4 reach
    reserved_bytes: float = 0.0

    @property
    def is_cpu(self) -> bool:
        """Whether what a rank does beside its computation, such as loading, takes time from it."""
        return self.name.startswith("cpu")

    def __post_init__(self) -> None:
        positive = ["memory_bytes", "peak_flops", "memory_bytes_per_s"]
        positive += ["matmul_efficiency", "attention_efficiency", "float32_rate", "full_float32_rate"]
        positive += ["host_bytes_per_s"]
        _require_positive(f"device {self.name!r}", **{name: getattr(self, name) for name in positive})
        zero = ("elementwise_traffic", "eager_traffic", "kernels_per_matmul", "overlap_cost", "launch_s")
        for name in (*zero, "parallel_units", "reserved_bytes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ClusterError(
                    f"device {self.name!r}: {name} is {getattr(self, name)!r}; it must be zero or a positive number"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One way in which a library runs collectives over a link (NCCL: LL, Simple, NVLS); the fastest is taken.

    latency_s     fixed time
    hop_s         time for each further member of the group
    bytes_per_s   bus bandwidth: what each member sends, over the time
    in_network    the switch reduces: each member sends its bytes once, however many members there are
    operation     the collective that it is for; None: all that have none of their own
    from_bytes    what each member sends from which on it stands in for segments that begin below
    """

    latency_s: float
    hop_s: float
    bytes_per_s: float
    in_network: bool = False
    operation: Collective | None = None
    from_bytes: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("protocol", bytes_per_s=self.bytes_per_s)
        for name in ("latency_s", "hop_s", "from_bytes"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ClusterError(f"protocol: {name} is {value!r}; it must be zero or a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link level: what one device sends in one direction, the fixed time of one message, and how collectives run.

    Without protocols, collectives run as rings at the link's own rate and latency. `node_bytes_per_s` is what all
    devices of a node send together, where they share its network ports; None: each has a port of its own.
    """

    bytes_per_s: float
    latency_s: float
    protocols: tuple[Protocol, ...] = ()
    node_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        _require_positive("link", bytes_per_s=self.bytes_per_s)
        if self.node_bytes_per_s is not None:
            _require_positive("link", node_bytes_per_s=self.node_bytes_per_s)
        if not 0 <= self.latency_s < float("inf"):
            raise ClusterError(f"link: latency_s is {self.latency_s!r}; it must be zero or a positive number")

    def transfer_s(self, num_bytes: float, senders: int = 1) -> float:
        """Seconds of a message of `num_bytes` while `senders` devices of a node send one each (Hockney 1994)."""
        return self.latency_s + num_bytes / self.rate(self.bytes_per_s, senders) if num_bytes else 0.0

    def rate(self, bytes_per_s: float, senders: int) -> float:
        """Bytes per second of each of `senders` devices of a node, which would send `bytes_per_s` alone."""
        return bytes_per_s if self.node_bytes_per_s is None else min(bytes_per_s, self.node_bytes_per_s / senders)


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
        if self.num_devices > MOST_DEVICES:
            raise ClusterError(
                f"cluster: {self.nodes} nodes of {self.devices_per_node} are {self.num_devices} devices; give at most "
                f"{MOST_DEVICES}"
            )

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
