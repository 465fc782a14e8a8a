"""Rules of the whole step: reductions, update and step as predicted, and what the baselines are said to take.

The step is run through once more, turn by turn: forward slices in the plan's order, each after its batch where the
device loads that itself, backward in reverse, each as soon as its data and its devices are there; then gradients,
reduced in buckets beside backward where the device type gains by it, the optimizer, and, where its states are sharded,
the parameters that it updated.
Seconds of one collective come from `spindle.cost.links`, as those of a layer come from the MetaGraph.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose
from typing import NamedTuple

from spindle.cost.links import collective_s, times_sent
from spindle.planner.check.case import CostedCase, Finding, received_s
from spindle.values.cluster import Cluster, Collective
from spindle.values.plan import Slice

CLOSE = 1e-6  # of the step


def step_is_predicted(case: CostedCase) -> Iterator[Finding]:
    """reduction_s, update_s and step_s are what the slices take; a plan without step_s predicts none of them."""
    plan = case.plan
    if case.cluster is None or not plan.step_s:
        return
    found = _run_step(case, case.cluster)
    for name, stated_s, takes_s in (
        ("reduction_s", plan.reduction_s, found.reduction_s),
        ("update_s", plan.update_s, found.update_s),
        ("step_s", plan.step_s, found.both_s + found.reduction_s + found.update_s + plan.fixed_s),
    ):
        if not isclose(stated_s, takes_s, rel_tol=CLOSE, abs_tol=CLOSE * plan.makespan_s):
            yield Finding(
                f"{name} is {stated_s} but the slices take {takes_s} s; write that, or step_s 0 for no prediction"
            )


def baselines_are_possible(case: CostedCase) -> Iterator[Finding]:
    """No baseline is said to be shorter than any schedule can be."""
    plan = case.plan
    for field, pairs in (("baselines_s", plan.baselines_s), ("baseline_steps_s", plan.baseline_steps_s)):
        for name, seconds in pairs:
            if seconds < plan.lower_bound_s - case.slack_s:
                yield Finding(
                    f"{field} says {name!r} takes {seconds} s, below lower_bound_s {plan.lower_bound_s}, "
                    "which no schedule can beat"
                )
    stated_s = dict(plan.baselines_s).get(plan.method)
    if stated_s is not None and abs(stated_s - plan.makespan_s) > case.slack_s:
        yield Finding(
            f"the plan is {plan.method!r}, whose makespan baselines_s gives as {stated_s}, not {plan.makespan_s} s"
        )


@dataclass(frozen=True, slots=True)
class _Step:
    both_s: float
    reduction_s: float
    update_s: float


@dataclass(frozen=True, slots=True)
class _Held:
    """Layers of one parameter set that the same slices run: their numbers, gradients' bytes, seconds of the update."""

    first: int
    count: int
    slices: tuple[int, ...]
    devices: tuple[int, ...]
    num_bytes: float
    update_s: float


class _Ready(NamedTuple):
    """Gradients of a layer: when they are there, from the end of backward."""

    at_s: float
    devices: tuple[int, ...]
    num_bytes: float


def _run_step(case: CostedCase, cluster: Cluster) -> _Step:
    computed_s, both_s = _backward(case, loads=_loading(case) if cluster.device.is_cpu else {})
    held = _held(case)
    ready = [found for h in held for found in _ready(case, h, computed_s, both_s)]
    done_s, order = _reduce(cluster, ready, case.plan.bucket_bytes, divided=case.metagraph.shard_optimizer)
    reduction_s = max(done_s.values(), default=0.0)
    busy_s = defaultdict[int, float](float)
    for h in held:
        for device in h.devices:
            busy_s[device] += h.update_s
    for device, seconds in done_s.items():
        busy_s[device] += seconds
    if case.metagraph.shard_optimizer:
        _exchange(cluster, held, order, busy_s)
    last_s = max([reduction_s, *busy_s.values()])
    return _Step(_at_least_loading(case, cluster, both_s, last_s), reduction_s, last_s - reduction_s)


def _ready(case: CostedCase, held: _Held, computed_s: list[float], both_s: float) -> Iterator[_Ready]:
    """The gradients of each layer: a slice computes those of its last layer first, the others at even distances; those
    of tensor parallel layers count when the slice ends."""
    for layer in range(held.first, held.first + held.count):
        moments = []
        for i in held.slices:
            _, s = case.slices[i]
            cut = case.metagraph[s.metaop].degree_on(len(s.devices)) > 1
            each_s = 0.0 if cut else _work_s(case, s, forward=False) / s.num_layers
            moments.append(computed_s[i] - both_s - (layer - s.first_layer) * each_s)
        yield _Ready(round(max(moments), 12), held.devices, held.num_bytes / held.count)


def _at_least_loading(case: CostedCase, cluster: Cluster, both_s: float, last_s: float) -> float:
    """Forward and backward with what is waited for where loaders run beside them: no step is shorter than loading."""
    if cluster.device.is_cpu:
        return both_s
    seconds = defaultdict[int, float](float)
    for (device, _), load_s in _loading(case).items():
        seconds[device] += load_s
    return max([both_s, *(load_s - last_s for load_s in seconds.values())])


def _loading(case: CostedCase) -> dict[tuple[int, str], float]:
    """Seconds in which a device loads a task's batch, for all tasks of which it runs a MetaOp that reads fields."""
    found = dict[tuple[int, str], float]()
    for _, s in case.slices:
        metaop = case.metagraph[s.metaop]
        for device in s.devices if metaop.load_s else ():
            found.setdefault((device, metaop.task), metaop.load_s)
    return found


def _backward(case: CostedCase, loads: dict[tuple[int, str], float]) -> tuple[list[float], float]:
    """When each slice's gradients are there, and when backward ends. `loads` stand before a device's first slice that
    reads a batch."""
    slices = [s for _, s in case.slices]
    moves_s = [both / 2 for both in received_s(case)]
    computed_s, begins_s = [0.0] * len(slices), 0.0
    for places in _places_by_turn(case):
        middle_s = _forward_end_s(case, places, moves_s, loads, begins_s)
        back_s, idle_s = dict[str, float](), dict[int, float]()
        for i in reversed(places):
            s = slices[i]
            own = [back_s.get(name, middle_s) for name in (s.metaop, *case.metagraph.successors[s.metaop])]
            begin_s = max(*own, *(idle_s.get(d, middle_s) for d in s.devices))
            end_s = begin_s + moves_s[i] + _work_s(case, s, forward=False)
            computed_s[i] = end_s - moves_s[i]  # the input's gradient is sent last
            back_s[s.metaop] = end_s
            idle_s.update(dict.fromkeys(s.devices, end_s))
        begins_s = max(back_s.values())
    return computed_s, begins_s


def _places_by_turn(case: CostedCase) -> list[list[int]]:
    """Numbers of the slices of each turn that has any."""
    turns = [set(tasks) for tasks in case.plan.turns] or [{metaop.task for metaop in case.metagraph}]
    found = [[i for i, (_, s) in enumerate(case.slices) if case.metagraph[s.metaop].task in tasks] for tasks in turns]
    return [places for places in found if places]


def _forward_end_s(
    case: CostedCase, places: list[int], moves_s: list[float], loads: dict[tuple[int, str], float], begins_s: float
) -> float:
    """When the forward of a turn that begins at `begins_s` ends."""
    graph = case.metagraph
    free_s, ends_s = dict[int, float](), dict[str, float]()
    for i in places:
        s = case.slices[i][1]
        own = [ends_s.get(name, begins_s) for name in (s.metaop, *graph.predecessors[s.metaop])]
        own += [free_s.get(d, begins_s) for d in s.devices]
        task = graph[s.metaop].task
        loading_s = max(loads.pop((d, task), 0.0) for d in s.devices) if graph[s.metaop].load_s else 0.0
        end_s = max(own) + moves_s[i] + loading_s + _work_s(case, s, forward=True)
        ends_s[s.metaop] = end_s
        free_s.update(dict.fromkeys(s.devices, end_s))
    return max(ends_s.values())


def _work_s(case: CostedCase, s: Slice, *, forward: bool) -> float:
    metaop = case.metagraph[s.metaop]
    share = metaop.forward_fraction if forward else 1 - metaop.forward_fraction
    return s.num_layers * metaop.times[len(s.devices)] * share


def _held(case: CostedCase) -> list[_Held]:
    """Trained layers by who runs them, neighbors together."""
    runs: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (_, s) in enumerate(case.slices):
        metaop = case.metagraph[s.metaop]
        if metaop.layer_param_bytes or metaop.layer_update_s:
            for layer in range(s.first_layer, s.first_layer + s.num_layers):
                runs[metaop.parameters or f"only {metaop.name}"][layer].append(i)
    found = []
    for by_layer in runs.values():
        edges = {e for s in {i for held in by_layer.values() for i in held} for e in _edges(case.slices[s][1])}
        for first in sorted(edges & by_layer.keys()):
            count = min(e for e in edges if e > first) - first
            slices = tuple(by_layer[first])
            metaops = [case.metagraph[case.slices[i][1].metaop] for i in slices]
            devices = tuple(sorted({d for i in slices for d in case.slices[i][1].devices}))
            divided = case.metagraph.shard_optimizer or metaops[0].is_sharded
            found.append(
                _Held(
                    first=first,
                    count=count,
                    slices=slices,
                    devices=devices,
                    num_bytes=count * max(m.layer_param_bytes for m in metaops),
                    update_s=count * max(m.layer_update_s for m in metaops) / (len(devices) if divided else 1),
                )
            )
    return found


def _edges(s: Slice) -> tuple[int, int]:
    return s.first_layer, s.first_layer + s.num_layers


def _reduce(
    cluster: Cluster, ready: list[_Ready], bucket_bytes: float, *, divided: bool
) -> tuple[dict[int, float], list[tuple[int, ...]]]:
    """When each device is done after backward, and the sets of devices in the order of their first reductions.

    All devices meet the buckets in one order: as they become full.
    """
    cost = cluster.device.overlap_cost
    free_s, beside_s, ports_s = dict[int, float](), defaultdict[int, float](float), dict[int, float]()
    operation: Collective = "reduce" if divided else "all_reduce"
    order: dict[tuple[int, ...], None] = {}
    for ready_s, devices, num_bytes in sorted(_buckets(ready, bucket_bytes, divided=divided, beside=cost < 1)):
        order[devices] = None
        start_s = max(ready_s, *(free_s.get(d, ready_s) for d in devices))
        end_s = start_s + _collective_s(cluster, operation, num_bytes, devices)
        end_s = max(end_s, _through_ports(cluster, operation, num_bytes, devices, start_s, ports_s))
        for device in devices:
            free_s[device] = end_s
            beside_s[device] += cost * max(0.0, min(end_s, 0.0) - start_s)
    done_s = {device: max(end_s, 0.0) + beside_s[device] for device, end_s in free_s.items()}
    return done_s, list(order)


def _buckets(ready: list[_Ready], bucket_bytes: float, *, divided: bool, beside: bool) -> Iterator[_Ready]:
    """Gradients of the same devices, gathered as they come until they make a bucket. `divided`: at least one bucket for
    each device, which are cut where one is full."""
    by_devices = defaultdict[tuple[int, ...], list[_Ready]](list)
    for found in ready:
        if found.num_bytes and len(found.devices) > 1:
            by_devices[found.devices].append(found if beside else found._replace(at_s=0.0))
    for devices, members in by_devices.items():
        limit = bucket_bytes
        if divided:
            limit = min(limit, sum(m.num_bytes for m in members) / len(devices))
        gathered = 0.0
        members.sort()
        for member in members:
            gathered += member.num_bytes
            while gathered >= limit:
                yield _Ready(member.at_s, devices, limit if divided else gathered)
                gathered = gathered - limit if divided else 0.0
        if gathered > (1e-9 * limit if divided else 0.0):  # less is left over by rounding
            yield _Ready(members[-1].at_s, devices, gathered)


def _collective_s(cluster: Cluster, operation: Collective, num_bytes: float, devices: tuple[int, ...]) -> float:
    members = tuple(Counter(d // cluster.devices_per_node for d in devices).values())
    return collective_s(operation, num_bytes, cluster, members)


def _through_ports(
    cluster: Cluster,
    operation: Collective,
    num_bytes: float,
    devices: tuple[int, ...],
    start_s: float,
    ports_s: dict[int, float],
) -> float:
    """When the ports that the devices of each node share have carried a message, after those in `ports_s`, by node."""
    nodes = {device // cluster.devices_per_node for device in devices}
    rate = cluster.inter_node.node_bytes_per_s
    if rate is None or len(nodes) == 1:
        return start_s
    for node in nodes:
        begin_s = max(ports_s.get(node, start_s), start_s)
        ports_s[node] = begin_s + times_sent(operation, len(devices)) * num_bytes / rate
    return max(ports_s[node] for node in nodes)


def _exchange(cluster: Cluster, held: list[_Held], order: list[tuple[int, ...]], busy_s: dict[int, float]) -> None:
    """Prolong `busy_s`, until when devices step, by what they then send each other: all parameters that they share."""
    ports_s = dict[int, float]()
    for devices in order:
        num_bytes = sum(h.num_bytes for h in held if h.devices == devices)
        start_s = max(busy_s[d] for d in devices)
        # one message from each device, with its part
        end_s = start_s + len(devices) * _collective_s(cluster, "broadcast", num_bytes / len(devices), devices)
        end_s = max(end_s, _through_ports(cluster, "broadcast", num_bytes, devices, start_s, ports_s))
        busy_s.update(dict.fromkeys(devices, end_s))
