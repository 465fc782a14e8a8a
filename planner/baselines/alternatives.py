"""Alternatives: a MetaGraph with costs under each memory choice in; what people would train it with instead of a plan,
with its step and its memory under the choice that is fastest for it, out.

- DDP: each device has all parameters and a part of each task's batch. One all-reduce a step: all losses are summed, or
  gradients add up without reduction (`no_sync`) until the last task's backward. One a task, as written naively.
- ZeRO-1/2: the same with optimizer states, or gradients too, divided over the devices.
- FSDP2, ZeRO-3: parameters too; each layer's are gathered before its forward and again before its backward, and its
  gradients are scattered, beside the computation of the layer before.
- Task groups: the devices are divided among the tasks. Component groups: among the components of all tasks, or of each
  task in turn (after DistMM).

A task runs on the largest count that its batch allows. Reductions overlap as DDP's do (`overlap`); memory is counted as
that of our own plans (`cost.memory`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from spindle.cost.parallel import parallel_cost
from spindle.cost.shards import all_sharded
from spindle.errors import InfeasibleError
from spindle.planner.baselines.baselines import component_group_waves, component_split_waves, task_split_waves
from spindle.planner.baselines.overlap import accumulated_step_s, bucketed_step_s, repeated_step_s
from spindle.planner.baselines.place import place
from spindle.planner.baselines.waves import Waves
from spindle.planner.costing.memory import layer_memory_bytes, peak_bytes
from spindle.planner.problem import Problem, make_problem
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.graph import TaskGraph
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Alternative, Slice

DDP = "DDP, one all-reduce a step"
DDP_BY_TASK = "DDP, one all-reduce a task"
ZERO = "ZeRO-1/2, optimizer states sharded"
FSDP = "FSDP2 / ZeRO-3, parameters sharded"
TASK_GROUPS = "devices divided among tasks"
COMPONENT_GROUPS = "devices divided among components"
OWN_LAYOUT = "the layout that the workload names"
NAMES = (DDP, DDP_BY_TASK, ZERO, FSDP, TASK_GROUPS, COMPONENT_GROUPS)


@dataclass(frozen=True)
class Choice:
    """A MetaGraph costed under a memory choice, and the same in several steps where batches differ."""

    metagraph: MetaGraph
    steps: tuple[MetaGraph, ...] = ()
    recompute: bool = False

    @property
    def words(self) -> str:
        """What it does besides."""
        return "recompute" if self.recompute else ""


@dataclass(frozen=True)
class _Way:
    """One way to run a choice: how, bytes of the fullest device, and seconds of a step of any MetaGraph of it."""

    name: str
    how: str
    peak_bytes: float
    step_s: Callable[[MetaGraph], float]


def alternatives(choices: Sequence[Choice], cluster: Cluster) -> tuple[Alternative, ...]:
    """Each in its fastest way that fits; where none does, what the smallest takes.

    Where batches differ, ways are compared on the mean batch. A way without a costed choice is left out: ZeRO-1/2
    needs one with sharded states, DDP and FSDP2 one without.
    """
    best: dict[str, tuple[Alternative, _Way, Choice]] = {}
    for choice in choices:
        for way in _ways(choice, cluster):
            fits = way.peak_bytes <= cluster.device.memory_bytes
            found = Alternative(
                name=way.name,
                step_s=way.step_s(choice.metagraph) if fits else 0.0,
                choice=", ".join(filter(None, (way.how, choice.words))),
                peak_bytes=way.peak_bytes,
                fits=fits,
                recompute=choice.recompute,
                shard_optimizer=choice.metagraph.shard_optimizer,
            )
            if way.name not in best or _rank(found) < _rank(best[way.name][0]):
                best[way.name] = found, way, choice
    found_by_name = {name: _on_average(*row) for name, row in best.items()}
    for name in (TASK_GROUPS, COMPONENT_GROUPS):  # a schedule is made only where it fits
        found_by_name.setdefault(name, Alternative(name=name, fits=False))
    return tuple(found_by_name[name] for name in NAMES if name in found_by_name)


def own_layout(metagraph: MetaGraph, cluster: Cluster, cost_options: CostOptions) -> tuple[Alternative, ...]:
    """The layout that a workload names (`spindle.cost.parallel`); () where it names none. `metagraph` still carries its
    operators. Raises WorkloadError when the layout does not divide the cluster.
    """
    operators = tuple(operator for metaop in metagraph for operator in metaop.operators)
    if cost_options.layout is None or not operators:
        return ()
    found = parallel_cost(TaskGraph(operators), cluster, cost_options, cost_options.layout)
    fits = found.memory_bytes <= cluster.device.memory_bytes
    return (
        Alternative(
            name=OWN_LAYOUT,
            step_s=found.step_s if fits else 0.0,
            choice=str(cost_options.layout),
            peak_bytes=found.memory_bytes,
            fits=fits,
            recompute=cost_options.recompute,
            shard_optimizer=cost_options.layout.shard != "nothing",
        ),
    )


def step_again_s(found: Alternative, choice: Choice, cluster: Cluster, *, must_fit: bool = False) -> float | None:
    """Seconds of a step of an alternative that was found before, at other costs or on other batches; None where it does
    not run so (`must_fit`: or does not fit).
    """
    steps = choice.steps or (choice.metagraph,)
    seconds = [
        fmean(way.step_s(step) for step in steps)
        for way in _ways(choice, cluster, found.name)
        if ", ".join(filter(None, (way.how, choice.words))) == found.choice
        and not (must_fit and way.peak_bytes > cluster.device.memory_bytes)
    ]
    return min(seconds, default=None)


def _on_average(found: Alternative, way: _Way, choice: Choice) -> Alternative:
    """The mean over steps where batches differ."""
    if not (found.fits and choice.steps):
        return found
    return replace(found, step_s=fmean(way.step_s(step) for step in choice.steps))


def _rank(found: Alternative) -> tuple[bool, float]:
    return not found.fits, found.step_s if found.fits else found.peak_bytes


def _ways(choice: Choice, cluster: Cluster, name: str = "") -> Iterator[_Way]:
    """All ways of a choice, or those of one name."""
    if name not in (TASK_GROUPS, COMPONENT_GROUPS):
        yield from (way for way in _on_all_devices(choice, cluster) if name in ("", way.name))
    if name in ("", TASK_GROUPS, COMPONENT_GROUPS):
        yield from (way for way in _on_groups(choice, cluster) if name in ("", way.name))


def _on_all_devices(choice: Choice, cluster: Cluster) -> Iterator[_Way]:
    metagraph = choice.metagraph
    replicas = Replicas(metagraph, cluster)
    if metagraph.shard_optimizer:
        yield from _accumulating(ZERO, "", replicas, replicas.state_bytes)
        yield from _accumulating(ZERO, "gradients too", replicas, replicas.state_bytes - replicas.scattered_bytes)
    else:
        yield from _accumulating(DDP, "", replicas, replicas.state_bytes)
        yield _Way(DDP_BY_TASK, "", replicas.state_bytes + replicas.kept_bytes(by_group=True), replicas.by_task)
        whole = Replicas(all_sharded(metagraph, cluster), cluster)
        peak_bytes = whole.state_bytes + whole.gathered_bytes + whole.kept_bytes(by_group=True)
        yield _Way(FSDP, "", peak_bytes, replicas.fully_sharded)


def _on_groups(choice: Choice, cluster: Cluster) -> Iterator[_Way]:
    metagraph = choice.metagraph
    how = "states sharded" if metagraph.shard_optimizer else ""
    for name, slices in _groups(metagraph, cluster):
        peak = max(peak_of(metagraph, slices, cluster))
        yield _Way(name, how, peak, partial(_bucketed, slices, cluster))


def _bucketed(slices: Sequence[Slice], cluster: Cluster, metagraph: MetaGraph) -> float:
    return bucketed_step_s(slices, metagraph, cluster)


def peak_of(metagraph: MetaGraph, slices: Sequence[Slice], cluster: Cluster) -> tuple[float, ...]:
    """Bytes on each device."""
    return peak_bytes(metagraph, slices, cluster.num_devices)


def _accumulating(name: str, how: str, replicas: "Replicas", state_bytes: float) -> Iterator[_Way]:
    """One reduction a step: of all losses at once, or after the last task."""
    several = len(replicas.groups) > 1
    at_once, in_turn = (", ".join(filter(None, (how, what))) for what in ("losses summed" * several, "no_sync"))
    yield _Way(name, at_once, state_bytes + replicas.kept_bytes(by_group=False), replicas.at_once)
    if several:
        yield _Way(name, in_turn, state_bytes + replicas.kept_bytes(by_group=True), replicas.in_turn)


def _groups(metagraph: MetaGraph, cluster: Cluster) -> Iterator[tuple[str, tuple[Slice, ...]]]:
    """Schedules on groups of devices that fit."""
    try:
        problem = make_problem(metagraph, cluster)
    except InfeasibleError:
        return
    makers: tuple[tuple[str, Callable[[Problem], Waves], bool], ...] = (
        (TASK_GROUPS, task_split_waves, False),
        (TASK_GROUPS, partial(task_split_waves, wide=True), False),
        (COMPONENT_GROUPS, component_split_waves, True),
        (COMPONENT_GROUPS, partial(component_split_waves, wide=True), True),
        (COMPONENT_GROUPS, component_group_waves, False),
        (COMPONENT_GROUPS, partial(component_group_waves, wide=True), False),
    )
    for name, make, aligned in makers:
        try:
            yield name, place(problem, make(problem), aligned=aligned)
        except InfeasibleError:
            continue


class Replicas:
    """Every device runs all tasks, each on its part of the batch."""

    def __init__(self, metagraph: MetaGraph, cluster: Cluster) -> None:
        self.metagraph, self.cluster = metagraph, cluster
        self.counts = {m.name: _widest(m, cluster.num_devices) for m in metagraph}
        self.groups = self._groups_of_tasks()

    def at_once(self, metagraph: MetaGraph) -> float:
        """Seconds of a step with all losses summed."""
        return bucketed_step_s([s for group in self.groups for s in group], metagraph, self.cluster)

    def in_turn(self, metagraph: MetaGraph) -> float:
        """Seconds of a step in which tasks run one after another and the last one reduces."""
        return accumulated_step_s(self.groups, metagraph, self.cluster)

    def by_task(self, metagraph: MetaGraph) -> float:
        """Seconds of a step in which each task reduces."""
        return repeated_step_s(self.groups, metagraph, self.cluster)

    def fully_sharded(self, metagraph: MetaGraph) -> float:
        """Seconds of a step whose parameters are sharded over all devices."""
        return self.at_once(all_sharded(metagraph, self.cluster))

    @property
    def state_bytes(self) -> float:
        """Parameters, gradients and optimizer states on a device."""
        return sum(m.layers * m.layer_state_bytes for m in _distinct(self.metagraph))

    @property
    def scattered_bytes(self) -> float:
        """Of those, gradients that others keep when they are scattered."""
        share = 1 - 1 / self.cluster.num_devices
        each = ((m.layers, min(m.layer_param_bytes, m.layer_state_bytes)) for m in _distinct(self.metagraph))
        return share * sum(layers * num_bytes for layers, num_bytes in each)

    @property
    def gathered_bytes(self) -> float:
        """Of two layers whose parameters are sharded, while they compute."""
        return max(m.gathered_bytes for m in self.metagraph)

    def kept_bytes(self, *, by_group: bool) -> float:
        """Activations on a device that wait for backward: of all tasks, or of the largest group of them."""
        names = [[s.metaop for s in group] for group in self.groups]
        sums = [sum(self._kept(self.metagraph[name]) for name in group) for group in names]
        again = max(m.recomputed_bytes / self.counts[m.name] for m in self.metagraph)
        return (max(sums) if by_group else sum(sums)) + again

    def _kept(self, metaop: MetaOp) -> float:
        count = self.counts[metaop.name]
        own = layer_memory_bytes(metaop, count) * metaop.layers
        return max(0.0, own - metaop.layers * metaop.layer_state_bytes - metaop.recomputed_bytes / count)

    def _groups_of_tasks(self) -> list[list[Slice]]:
        """Slices of each task in order of their data; tasks that hand each other data are one group."""
        owner = {m.task: m.task for m in self.metagraph}
        for flow in self.metagraph.flows:
            one, two = (owner[self.metagraph[end].task] for end in (flow.source, flow.target))
            owner = {task: one if first == two else first for task, first in owner.items()}
        groups: dict[str, list[Slice]] = {}
        order = self.metagraph.topological_order
        for name in order:
            metaop = self.metagraph[name]
            groups.setdefault(owner[metaop.task], []).append(self._slice(metaop))
        at = iter(range(len(order)))
        return [
            [replace(s, start_s=float(i), end_s=i + 1.0) for s, i in zip(group, at, strict=False)]
            for group in groups.values()
        ]

    def _slice(self, metaop: MetaOp) -> Slice:
        devices = tuple(range(self.counts[metaop.name]))
        return Slice(
            metaop=metaop.name, first_layer=0, num_layers=metaop.layers, devices=devices, start_s=0.0, end_s=1.0
        )


def _widest(metaop: MetaOp, num_devices: int) -> int:
    """The largest count that its batch allows."""
    fitting = [n for n, _ in metaop.layer_time_s if n <= num_devices]
    if not fitting:
        raise InfeasibleError(
            f"MetaOp {metaop.name!r} runs on {metaop.layer_time_s[0][0]} devices or more but the cluster has "
            f"{num_devices}; use a larger cluster"
        )
    return max(fitting)


def _distinct(metagraph: MetaGraph) -> Iterator[MetaOp]:
    """MetaOps; the first one of each group that shares parameters."""
    seen: set[str] = set()
    for metaop in metagraph:
        if metaop.parameters not in seen:
            yield metaop
        seen.update({metaop.parameters} - {""})
