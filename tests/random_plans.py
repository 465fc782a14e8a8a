"""Random valid plans: any order that dependencies allow, any cut of every chain, any devices, any turns."""

import random
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise

from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan, Slice, make_waves


def random_plan(
    metagraph: MetaGraph, num_devices: int, seed: int, *, on_all: Collection[str] = (), keeps: int | None = None
) -> Plan:
    """A plan of `metagraph` that keeps all rules of plans but wastes time freely; half of them run in turns. Components
    `on_all` run on all devices (or on the first `keeps`), and their parameters are sharded.
    """
    rng = random.Random(seed)
    turns = random_turns(metagraph, random.Random(-seed - 1))
    slices: list[Slice] = []
    for tasks in turns or (metagraph.tasks,):
        own = metagraph.only({metaop.name for metaop in metagraph if metaop.task in tasks})
        begin_s = max((s.end_s for s in slices), default=0.0)
        slices += _random_slices(own, num_devices, rng, begin_s, on_all, keeps or num_devices)
    return Plan(
        num_devices=num_devices,
        devices_per_node=num_devices,
        method="random",
        waves=make_waves(slices),
        makespan_s=max(s.end_s for s in slices),
        turns=turns,
        shard_parameters=tuple(on_all),
    )


def random_turns(metagraph: MetaGraph, rng: random.Random) -> tuple[tuple[str, ...], ...]:
    """Turns that keep all rules: tasks in order, those that hand each other data together; () half of the time."""
    together = {frozenset(metagraph[end].task for end in (flow.source, flow.target)) for flow in metagraph.flows}
    tasks = metagraph.tasks
    cuts = [
        place
        for place in range(1, len(tasks))
        if not any(pair & set(tasks[:place]) and pair & set(tasks[place:]) for pair in together)
    ]
    chosen = sorted(rng.sample(cuts, rng.randint(1, len(cuts)))) if cuts and rng.random() < 0.5 else []
    return tuple(tasks[a:b] for a, b in pairwise([0, *chosen, len(tasks)])) if chosen else ()


def _random_slices(
    metagraph: MetaGraph,
    num_devices: int,
    rng: random.Random,
    begin_s: float,
    on_all: Collection[str],
    keeps: int,
) -> list[Slice]:
    done = {metaop.name: 0 for metaop in metagraph}
    free_at = [begin_s] * num_devices
    ended_at = dict.fromkeys(done, begin_s)
    slices: list[Slice] = []
    while True:
        ready = [
            m
            for m in metagraph
            if done[m.name] < m.layers and all(done[p] == metagraph[p].layers for p in metagraph.predecessors[m.name])
        ]
        if not ready:
            break
        metaop = rng.choice(ready)
        operator = metaop.operators[done[metaop.name]]
        degrees = [n for n in range(1, num_devices + 1) if operator.tensor_parallel % n == 0]
        parts = rng.choice(degrees) if len(degrees) > 1 and operator.splittable else 1
        limit = min(num_devices // parts, operator.batch_size) if operator.splittable else 1
        devices = tuple(rng.sample(range(num_devices), parts * rng.randint(1, limit)))
        devices = tuple(sorted(devices)) if parts == 1 else devices
        if metaop.component in on_all and any(own.parameters for own in metaop.operators):
            devices = tuple(range(keeps))
        layers = rng.randint(1, metaop.layers - done[metaop.name])
        waits = [ended_at[metaop.name], *(ended_at[p] for p in metagraph.predecessors[metaop.name])]
        start_s = max([*waits, *(free_at[d] for d in devices)])
        end_s = start_s + layers * rng.uniform(0.5, 1.5)
        slices.append(
            Slice(
                metaop=metaop.name,
                first_layer=done[metaop.name],
                num_layers=layers,
                devices=devices,
                start_s=start_s,
                end_s=end_s,
                tensor_parallel=parts,
            )
        )
        for device in devices:
            free_at[device] = end_s
        ended_at[metaop.name] = end_s
        done[metaop.name] += layers
    return slices


def by_task(plan: Plan, metagraph: MetaGraph) -> Plan:
    """A plan that runs task after task, with a turn for each."""
    return replace(plan, turns=tuple((task,) for task in metagraph.tasks))


def widest_plan(metagraph: MetaGraph, num_devices: int) -> Plan:
    """Every MetaOp whole on as many devices as it allows, one after another."""
    slices = []
    for place, name in enumerate(metagraph.topological_order):
        metaop = metagraph[name]
        operator = metaop.operators[0]
        count = min(num_devices, operator.batch_size) if operator.splittable else 1
        slices.append(
            Slice(
                metaop=name,
                first_layer=0,
                num_layers=metaop.layers,
                devices=tuple(range(count)),
                start_s=float(place),
                end_s=float(place + 1),
            )
        )
    return Plan(
        num_devices=num_devices,
        devices_per_node=num_devices,
        method="widest",
        waves=make_waves(slices),
        makespan_s=float(len(slices)),
    )
