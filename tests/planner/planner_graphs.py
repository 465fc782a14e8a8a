"""Small MetaGraphs and clusters that planner tests share; most can be planned in the head."""

from spindle.values.cluster import Cluster, Device, Link
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points
from spindle.values.plan import Plan, Slice, make_waves

LINEAR = {1: 8.0, 2: 4.0, 4: 2.0, 8: 1.0}


def metaop(
    name: str,
    layers: int = 1,
    times: dict[int, float] | None = None,
    *,
    memory: dict[int, float] | None = None,
    layer_param_bytes: float = 0.0,
    output_bytes: float = 0.0,
    parameters: str = "",
    forward_fraction: float = 1 / 3,
) -> MetaOp:
    """A MetaOp whose task is the first part of its name; times fall as 1/n unless given."""
    task, _, component = name.partition(".")
    return MetaOp(
        name=name,
        task=task,
        component=component or name,
        layers=layers,
        layer_time_s=points(times or LINEAR),
        memory_bytes=points(memory or {}),
        layer_param_bytes=layer_param_bytes,
        output_bytes=output_bytes,
        parameters=parameters,
        forward_fraction=forward_fraction,
    )


def graph(*metaops: MetaOp, flows: str = "") -> MetaGraph:
    """`flows` as "a>b b>c"."""
    pairs = (flow.split(">") for flow in flows.split())
    return MetaGraph(metaops, tuple(Flow(source, target) for source, target in pairs))


def cluster(nodes: int = 1, per_node: int = 4, memory_bytes: float = 80e9) -> Cluster:
    """Links of 1 byte a second inside a node and a tenth of that between nodes, without latency."""
    return Cluster(
        nodes=nodes,
        devices_per_node=per_node,
        device=Device(name="toy", memory_bytes=memory_bytes, peak_flops=1e12, memory_bytes_per_s=1e12),
        intra_node=Link(bytes_per_s=1.0, latency_s=0.0),
        inter_node=Link(bytes_per_s=0.1, latency_s=0.0),
    )


def plan(*slices: Slice, num_devices: int = 4, per_node: int = 4, metagraph: MetaGraph | None = None) -> Plan:
    """A plan of these slices, without a cluster."""
    return Plan(
        num_devices=num_devices,
        devices_per_node=per_node,
        method="hand",
        waves=make_waves(slices),
        makespan_s=max(s.end_s for s in slices),
        metagraph=metagraph,
    )


def piece(name: str, layers: range, devices: range | tuple[int, ...], start_s: float, end_s: float) -> Slice:
    """A slice."""
    return Slice(
        metaop=name,
        first_layer=layers.start,
        num_layers=len(layers),
        devices=tuple(devices),
        start_s=start_s,
        end_s=end_s,
    )
