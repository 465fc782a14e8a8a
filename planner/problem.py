"""Problem: a MetaGraph with costs and a cluster in, the tables that every maker of plans works on out.

MetaOps are numbered in the MetaGraph's order; all makers use these numbers and only `assemble` (in `solve`) goes back
to names. The checker does not use this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil

from spindle.errors import InfeasibleError
from spindle.planner.costing.curves import Curve, clean_curve
from spindle.planner.costing.memory import layer_memory_bytes, saved_bytes
from spindle.values.cluster import Cluster
from spindle.values.contract import meta_levels
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.turns import Turns


@dataclass(frozen=True)
class Problem:
    """What is to be planned.

    curves          seconds of one layer by count, by MetaOp; only counts whose single layer fits a device
    predecessors    MetaOps that each waits for; `successors` the other way round
    flow_bytes      bytes of each flow (source, target)
    pins            devices that a MetaOp must run on, if any
    turns           tasks by turn; (): all at once
    """

    metagraph: MetaGraph
    cluster: Cluster
    curves: tuple[Curve, ...]
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    flow_bytes: dict[tuple[int, int], float]
    pins: dict[int, tuple[int, ...]] = field(default_factory=dict)
    turns: Turns = ()

    def __len__(self) -> int:
        return len(self.metagraph)

    @cached_property
    def metaops(self) -> tuple[MetaOp, ...]:
        """MetaOps by number."""
        return self.metagraph.metaops

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers of each MetaOp."""
        return tuple(metaop.layers for metaop in self.metaops)

    @cached_property
    def num_devices(self) -> int:
        """Devices of the cluster."""
        return self.cluster.num_devices

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of each MetaOp by name."""
        return {metaop.name: i for i, metaop in enumerate(self.metaops)}

    @cached_property
    def order(self) -> tuple[int, ...]:
        """A topological order of the numbers."""
        return tuple(self.index[name] for name in self.metagraph.topological_order)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """MetaLevels (paper, section 3.1), first level first."""
        return tuple(tuple(self.index[name] for name in level) for level in meta_levels(self.metagraph))

    @cached_property
    def ancestors(self) -> tuple[frozenset[int], ...]:
        """All that each MetaOp waits for, directly or not."""
        return self._closure(self.order, self.predecessors)

    @cached_property
    def descendants(self) -> tuple[frozenset[int], ...]:
        """All that waits for each MetaOp, directly or not."""
        return self._closure(self.order[::-1], self.successors)

    def _closure(self, order: Sequence[int], near: Sequence[Sequence[int]]) -> tuple[frozenset[int], ...]:
        reached: list[frozenset[int]] = [frozenset()] * len(self)
        for op in order:
            reached[op] = frozenset(near[op]).union(*(reached[other] for other in near[op]))
        return tuple(reached)

    @cached_property
    def least_area_s(self) -> tuple[float, ...]:
        """Device-seconds of each MetaOp at its most efficient count."""
        return tuple(
            layers * min(n * t for n, t in curve.time_by_count.items())
            for layers, curve in zip(self.layers, self.curves, strict=True)
        )

    def time(self, op: int, count: int) -> float:
        """Seconds of one layer of MetaOp `op` on `count` devices."""
        return self.curves[op].time_by_count[count]

    @cached_property
    def has_memory(self) -> bool:
        """Whether any MetaOp says what memory it needs."""
        return any(metaop.memory_bytes for metaop in self.metaops)

    @cached_property
    def has_traffic(self) -> bool:
        """Whether any transfer or gradient reduction takes time."""
        return _has_traffic(self.metagraph)

    def layer_memory_bytes(self, op: int, count: int) -> float:
        """Bytes that one layer takes on each of `count` devices until the step ends; where parameters are sharded
        without those of `room_bytes`.
        """
        metaop = self.metaops[op]
        passing = _passing_bytes(metaop) - metaop.gathered_bytes
        return layer_memory_bytes(metaop, count) - passing / metaop.layers

    @cached_property
    def room_bytes(self) -> float:
        """Memory of a device without what is there only while a layer whose parameters are sharded computes: its own on
        all devices, so at most that of the largest.
        """
        return self.cluster.device.memory_bytes - max(map(_passing_bytes, self.metaops))

    @cached_property
    def saved_bytes(self) -> dict[str, float]:
        """Bytes that a further MetaOp with the same parameters saves on a device, for each layer."""
        return saved_bytes(self.metagraph)


def make_problem(metagraph: MetaGraph, cluster: Cluster, turns: Turns = ()) -> Problem:
    """Number and clean a MetaGraph; raises InfeasibleError when a MetaOp has no count that the cluster can hold, or,
    unless its tasks run in `turns`, when the cluster cannot hold all of them.
    """
    index = {metaop.name: i for i, metaop in enumerate(metagraph)}
    neighbors = (metagraph.predecessors, metagraph.successors)
    before, after = (tuple(tuple(sorted(index[n] for n in by[m.name])) for m in metagraph) for by in neighbors)
    problem = Problem(
        metagraph=metagraph,
        cluster=cluster,
        curves=tuple(_fitting_curve(metaop, cluster, with_idle=_has_traffic(metagraph)) for metaop in metagraph),
        predecessors=before,
        successors=after,
        flow_bytes={(index[f.source], index[f.target]): metagraph.flow_bytes(f) for f in metagraph.flows},
        turns=turns,
    )
    if not turns:
        _require_memory(problem)
    return problem


def _passing_bytes(metaop: MetaOp) -> float:
    """What is gathered and computed again, on each device, of a MetaOp whose parameters are sharded."""
    return metaop.gathered_bytes + metaop.recomputed_bytes / max(metaop.times) if metaop.is_sharded else 0.0


def _has_traffic(metagraph: MetaGraph) -> bool:
    moved = any(metagraph.flow_bytes(flow) for flow in metagraph.flows)
    return moved or any(m.output_bytes or m.layer_param_bytes for m in metagraph)


def _fitting_curve(metaop: MetaOp, cluster: Cluster, *, with_idle: bool) -> Curve:
    """The curve over counts on which at least one layer fits a device."""
    capacity = cluster.device.memory_bytes
    there = [n for n, _ in metaop.layer_time_s if n <= cluster.num_devices]
    fitting = tuple((n, t) for n, t in metaop.layer_time_s if layer_memory_bytes(metaop, n) <= capacity)
    if there and not any(n in there for n, _ in fitting):
        least = min(layer_memory_bytes(metaop, n) for n in there)
        raise InfeasibleError(
            f"MetaOp {metaop.name!r} needs {least / 2**30:.1f} GiB a device for one of its {metaop.layers} layers "
            f"but {cluster.device.name!r} has {capacity / 2**30:.1f} GiB for tensors; "
            "recompute activations, shard the optimizer, use more devices or a smaller batch"
        )
    return clean_curve(replace(metaop, layer_time_s=fitting), cluster.num_devices, with_idle=with_idle)


def _require_memory(problem: Problem) -> None:
    """Raise InfeasibleError when even all devices together are too small, whatever is shared."""
    if not problem.has_memory:
        return
    least = [_least_bytes(problem, op) for op in range(len(problem))]
    capacity = problem.num_devices * problem.room_bytes
    if capacity <= 0:
        device = problem.cluster.device
        taken = (device.memory_bytes - problem.room_bytes) / 2**30
        raise InfeasibleError(
            f"two gathered layers and what one computes again take {taken:.1f} GiB of each device, which is all that "
            f"{device.name!r} has; shard no parameters"
        )
    if sum(least) > capacity:
        heaviest = max(range(len(problem)), key=least.__getitem__)
        raise InfeasibleError(
            f"the MetaOps need {sum(least) / 2**30:.0f} GiB and all {problem.num_devices} devices have "
            f"{capacity / 2**30:.0f} GiB; {problem.metaops[heaviest].name!r} alone needs "
            f"{least[heaviest] / 2**30:.1f} GiB. Use {ceil(problem.num_devices * sum(least) / capacity)} devices or "
            "more, recompute activations, shard the optimizer, or a smaller batch"
        )


def _least_bytes(problem: Problem, op: int) -> float:
    """Bytes of a MetaOp over all its devices, at the count that needs least and with all sharable bytes shared."""
    saved = problem.saved_bytes.get(problem.metaops[op].parameters, 0.0)
    return problem.layers[op] * min(
        n * (problem.layer_memory_bytes(op, n) - saved) for n in problem.curves[op].time_by_count
    )
