"""MetaGraph: chains of identical operators (MetaOps), what one of their layers costs, and the flows between them.

The planner's whole input. `layer_time_s` holds seconds of forward and backward of ONE layer by device count; a MetaOp
fresh from contraction has none until its costs are filled in (`spindle.cost.metaops`).
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from spindle.errors import GraphError
from spindle.values.graph import Operator, in_one_process

if TYPE_CHECKING:
    import networkx as nx

Points = tuple[tuple[int, float], ...]
"""(device count, value) pairs, counts rising and unique."""


_AMOUNTS = (
    "layer_param_bytes",
    "layer_state_bytes",
    "kept_bytes",
    "recomputed_bytes",
    "gathered_bytes",
    "layer_update_s",
    "load_s",
    "output_bytes",
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def points(values: Mapping[int, float] | Iterable[tuple[int, float]]) -> Points:
    """Make Points of a mapping or of pairs; raises GraphError when a count stands twice."""
    pairs = sorted(values.items() if isinstance(values, Mapping) else values)
    for (count, _), (following, _) in pairwise(pairs):
        if count == following:
            raise GraphError(f"device count {count} is given twice; give each count one value")
    return tuple(pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaOp:
    """A chain of `layers` identical operators of one task (paper, section 2.1).

    layer_time_s          (n, seconds): forward and backward of one layer on n devices; its counts are the valid ones
    memory_bytes          (n, bytes): per device, for the whole chain on n devices
    layer_param_bytes     parameters of one layer whose gradients are reduced
    layer_state_bytes     what MetaOps with the same parameters hold once on a device: parameters, gradients and states
                          of the optimizer, of one layer; 0: not known
    kept_bytes            of memory_bytes: activations of the whole chain, whole batch, that wait for backward, an
                          n-th on each of n devices; 0: not known
    recomputed_bytes      of memory_bytes: activations of one layer, whole batch, that exist only while backward
                          computes them again, so once on a device
    gathered_bytes        beside memory_bytes: parameters and gradients of two layers, which are whole only while these
                          compute, so once on a device; 0: its parameters are not sharded
    layer_update_s        seconds of the optimizer's step over one layer, once a device for MetaOps that share it
    load_s                seconds in which a rank loads a batch of the task; 0: the MetaOp reads no field of it
    output_bytes          one layer boundary, whole batch
    parameters            equal strings name shared parameters; "" shares with nobody
    forward_fraction      share of layer_time_s that is forward
    tensor_parallel       (n, degree): where one copy of a layer is spread over several of the n devices
    operators             what was contracted, first layer first; () when the MetaOp came from a file
    """

    name: str
    task: str
    component: str
    layers: int
    layer_time_s: Points = ()
    memory_bytes: Points = ()
    layer_param_bytes: float = 0.0
    layer_state_bytes: float = 0.0
    kept_bytes: float = 0.0
    recomputed_bytes: float = 0.0
    gathered_bytes: float = 0.0
    layer_update_s: float = 0.0
    load_s: float = 0.0
    output_bytes: float = 0.0
    parameters: str = ""
    forward_fraction: float = 1 / 3
    tensor_parallel: tuple[tuple[int, int], ...] = ()
    operators: tuple[Operator, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.name:
            raise GraphError("a MetaOp has an empty name; name it, for instance 'task.component'")
        if _CONTROL.search(self.name + self.task + self.component):  # a terminal would obey them
            raise GraphError(f"MetaOp {self.name!r}: a name has control characters; leave them out")
        if self.layers < 1:
            raise GraphError(f"MetaOp {self.name!r}: layers is {self.layers}; it must be at least one")
        if self.operators and len(self.operators) != self.layers:
            raise GraphError(
                f"MetaOp {self.name!r} holds {len(self.operators)} operators but {self.layers} layers; give one each"
            )
        if not 0 <= self.forward_fraction <= 1:
            raise GraphError(
                f"MetaOp {self.name!r}: forward_fraction is {self.forward_fraction!r}; it must be between 0 and 1"
            )
        for label in _AMOUNTS:
            if not 0 <= getattr(self, label) < math.inf:
                raise GraphError(f"MetaOp {self.name!r}: {label} is {getattr(self, label)!r}; it must be 0 or more")
        for count, degree in self.tensor_parallel:
            if degree < 1 or count % degree:
                raise GraphError(
                    f"MetaOp {self.name!r}: tensor_parallel on {count} devices is {degree}; it must divide their number"
                )
        self._check_points("layer_time_s", self.layer_time_s, least=0.0)
        self._check_points("memory_bytes", self.memory_bytes, least=-1.0)

    def _check_points(self, label: str, values: Points, *, least: float) -> None:
        for count, value in values:
            if count < 1:
                raise GraphError(f"MetaOp {self.name!r}: {label} names {count} devices; counts start at 1")
            if not (math.isfinite(value) and value > least):
                rule = "a positive number" if least == 0 else "zero or more"
                raise GraphError(f"MetaOp {self.name!r}: {label} on {count} devices is {value!r}; it must be {rule}")
        if values != points(values):
            raise GraphError(f"MetaOp {self.name!r}: {label} must list counts in rising order; use metagraph.points()")

    @property
    def times(self) -> dict[int, float]:
        """Seconds of one layer by device count."""
        return dict(self.layer_time_s)

    def degree_on(self, count: int) -> int:
        """Over how many of `count` devices one copy of a layer is spread: 1 unless it is tensor parallel there."""
        return dict(self.tensor_parallel).get(count, 1)

    @property
    def is_sharded(self) -> bool:
        """Whether each of its devices keeps a part of its layers' parameters (FSDP2, ZeRO-3)."""
        return self.gathered_bytes > 0

    @property
    def memory(self) -> dict[int, float]:
        """Bytes per device of the whole chain by device count."""
        return dict(self.memory_bytes)


@dataclass(frozen=True, slots=True)
class Flow:
    """Data that MetaOp `source` hands to MetaOp `target`; None: as much as the source's output_bytes."""

    source: str
    target: str
    num_bytes: float | None = None


@dataclass(frozen=True)
class MetaGraph:
    """MetaOps and the flows between them: a DAG.

    `shard_optimizer`: the devices that hold a layer divide its optimizer's step, and then send each other what they
    have updated.
    """

    metaops: tuple[MetaOp, ...]
    flows: tuple[Flow, ...] = ()
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        if not self.metaops:
            raise GraphError("the MetaGraph has no MetaOps; an empty workload cannot be planned")
        if len(self.by_name) != len(self.metaops):
            names = [metaop.name for metaop in self.metaops]
            twice = next(name for name in names if names.count(name) > 1)
            raise GraphError(f"MetaOp {twice!r} stands twice in the MetaGraph, where names are unique; rename one")
        seen: set[tuple[str, str]] = set()
        for flow in self.flows:
            self._check_flow(flow, seen)
        self._check_acyclic()

    def __iter__(self) -> Iterator[MetaOp]:
        return iter(self.metaops)

    def __len__(self) -> int:
        return len(self.metaops)

    def __getitem__(self, name: str) -> MetaOp:
        try:
            return self.by_name[name]
        except KeyError:
            raise GraphError(f"MetaOp {name!r} is not in the MetaGraph; it has {_some(self.by_name)}") from None

    @cached_property
    def by_name(self) -> dict[str, MetaOp]:
        """MetaOps by name."""
        return {metaop.name: metaop for metaop in self.metaops}

    @cached_property
    def predecessors(self) -> dict[str, tuple[str, ...]]:
        """Names of the MetaOps that each MetaOp waits for."""
        return self._neighbors((flow.target, flow.source) for flow in self.flows)

    @cached_property
    def successors(self) -> dict[str, tuple[str, ...]]:
        """Names of the MetaOps that wait for each MetaOp."""
        return self._neighbors((flow.source, flow.target) for flow in self.flows)

    def _neighbors(self, pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {metaop.name: [] for metaop in self.metaops}
        for name, neighbor in pairs:
            found[name].append(neighbor)
        return {name: tuple(neighbors) for name, neighbors in found.items()}

    @cached_property
    def topological_order(self) -> tuple[str, ...]:
        """Names, each after all it depends on; ties in the order given."""
        import networkx as nx

        index = {metaop.name: i for i, metaop in enumerate(self.metaops)}
        return tuple(nx.lexicographical_topological_sort(self.digraph, key=index.__getitem__))

    @cached_property
    def digraph(self) -> "nx.DiGraph[str]":
        """The MetaOps' names as a networkx graph, an edge for each flow."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(metaop.name for metaop in self.metaops)
        graph.add_edges_from((flow.source, flow.target) for flow in self.flows)
        return graph

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks, micro-batches each by itself, in the order in which one process runs them."""
        return in_one_process(metaop.task for metaop in self.metaops)

    def only(self, names: Collection[str]) -> "MetaGraph":
        """The MetaOps of these names, and the flows between them; a flow from another one is cut."""
        return replace(
            self,
            metaops=tuple(metaop for metaop in self.metaops if metaop.name in names),
            flows=tuple(flow for flow in self.flows if flow.source in names and flow.target in names),
        )

    def flow_bytes(self, flow: Flow) -> float:
        """Bytes that `flow` carries, whole batch."""
        return self[flow.source].output_bytes if flow.num_bytes is None else flow.num_bytes

    def _check_flow(self, flow: Flow, seen: set[tuple[str, str]]) -> None:
        for end in (flow.source, flow.target):
            if end not in self.by_name:
                raise GraphError(
                    f"flow {flow.source!r} -> {flow.target!r} names MetaOp {end!r}, which does not exist; "
                    f"the MetaOps are {_some(self.by_name)}"
                )
        if flow.source == flow.target:
            raise GraphError(f"flow {flow.source!r} -> {flow.target!r} leads back to its own MetaOp; remove it")
        if (flow.source, flow.target) in seen:
            raise GraphError(f"flow {flow.source!r} -> {flow.target!r} is given twice; give it once")
        if flow.num_bytes is not None and not 0 <= flow.num_bytes < math.inf:
            raise GraphError(
                f"flow {flow.source!r} -> {flow.target!r} carries {flow.num_bytes!r} bytes; give 0 or more"
            )
        seen.add((flow.source, flow.target))

    def _check_acyclic(self) -> None:
        import networkx as nx

        if not nx.is_directed_acyclic_graph(self.digraph):
            cycle = [source for source, _ in nx.find_cycle(self.digraph)]
            raise GraphError(
                f"MetaOps {' -> '.join([*cycle, cycle[0]])} depend on each other in a circle; remove one of these flows"
            )


def _some(names: Iterable[str], limit: int = 8) -> str:
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
