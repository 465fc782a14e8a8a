"""Random valid plans: any order that dependencies allow, any cut of every chain, any devices."""

import random

from spindle.metagraph import MetaGraph
from spindle.plan import Plan, Slice, make_waves


def random_plan(metagraph: MetaGraph, num_devices: int, seed: int) -> Plan:
    """A plan of `metagraph` that keeps all rules of plans but wastes time freely."""
    rng = random.Random(seed)
    done = {metaop.name: 0 for metaop in metagraph}
    free_at = [0.0] * num_devices
    ended_at = dict.fromkeys(done, 0.0)
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
    return Plan(
        num_devices=num_devices,
        devices_per_node=num_devices,
        method="random",
        waves=make_waves(slices),
        makespan_s=max(s.end_s for s in slices),
    )


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
