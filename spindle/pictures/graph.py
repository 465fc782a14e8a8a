"""Graph: a MetaGraph with costs in, what a picture of it shows out: MetaOps by level, and the tensors between them."""

from collections.abc import Sequence
from dataclasses import dataclass

from spindle.errors import GraphError
from spindle.values.contract import meta_levels
from spindle.values.graph import base_task
from spindle.values.metagraph import MetaGraph, MetaOp


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One MetaOp.

    level          0: it waits for nothing, else one more than the highest level that it waits for
    batch          samples; 0 where the MetaGraph does not say
    devices        the least number of devices that it can run on
    time_s         forward and backward of all its layers on that number
    shared_with    other tasks whose MetaOps have the same parameters
    one_device     it cannot be sharded over the batch; of a MetaGraph file: it states no time for two devices
    """

    name: str
    task: str
    component: str
    level: int
    layers: int
    batch: int
    devices: int
    time_s: float
    shared_with: tuple[str, ...]
    one_device: bool

    @property
    def device_s(self) -> float:
        """Seconds of device time, which a box is as high as."""
        return self.devices * self.time_s


@dataclass(frozen=True, slots=True)
class Edge:
    """`num_bytes` of the whole batch that pass from one MetaOp to another; 0 where the MetaGraph does not say."""

    source: str
    target: str
    num_bytes: float


@dataclass(frozen=True, slots=True)
class Graph:
    """What a picture shows; nodes in the order of levels, `tasks` in that in which one process runs them."""

    tasks: tuple[str, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    @property
    def levels(self) -> int:
        """How many there are."""
        return 1 + max(node.level for node in self.nodes)


def graph_of(metagraph: MetaGraph) -> Graph:
    """The picture's values of a MetaGraph. Raises GraphError where a MetaOp has no times yet."""
    bare = [metaop.name for metaop in metagraph if not metaop.layer_time_s]
    if bare:
        raise GraphError(
            f"MetaOp {bare[0]!r} has no times to draw; fill in its costs (spindle.verbs.source.costed_source)"
        )
    tasks_by_parameters: dict[str, list[str]] = {}
    for metaop in metagraph:
        if metaop.parameters:
            tasks_by_parameters.setdefault(metaop.parameters, []).append(base_task(metaop.task))
    nodes = tuple(
        _node(metagraph[name], level, tasks_by_parameters.get(metagraph[name].parameters, ()))
        for level, names in enumerate(meta_levels(metagraph))
        for name in names
    )
    edges = tuple(Edge(f.source, f.target, metagraph.flow_bytes(f)) for f in metagraph.flows)
    return Graph(metagraph.tasks, nodes, edges)


def _node(metaop: MetaOp, level: int, sharers: Sequence[str]) -> Node:
    devices, layer_s = metaop.layer_time_s[0]
    counts = [n for n, _ in metaop.layer_time_s]
    mixes = not all(operator.splittable for operator in metaop.operators)
    return Node(
        name=metaop.name,
        task=metaop.task,
        component=metaop.component,
        level=level,
        layers=metaop.layers,
        batch=metaop.operators[0].batch_size if metaop.operators else 0,
        devices=devices,
        time_s=metaop.layers * layer_s,
        shared_with=tuple(task for task in dict.fromkeys(sharers) if task != base_task(metaop.task)),
        one_device=mixes if metaop.operators else counts == [1],
    )
