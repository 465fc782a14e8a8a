"""Islands: a problem on a few nodes with slow links between them in; a node for each component out.

Where summing gradients over all devices takes a good part of a step, a component whose MetaOps all stay in one node has
its gradients summed inside it. The search moves one MetaOp at a time, and each such move alone gains nothing, so it
does not get there by itself: it starts a second time from these pins.
"""

from collections import defaultdict

from spindle.planner.costing.reduction import reduce_s
from spindle.planner.problem import Problem

MOST_NODES = 4  # of a cluster; with more, a component alone on a node has too little of it
LEAST_SHARE = 0.25  # of the lower bound that one reduction over all devices must take


def is_slow_between_nodes(problem: Problem, bound_s: float) -> bool:
    """Whether gradients that cross nodes would take so much of a step that islands are worth a search."""
    cluster = problem.cluster
    if not 2 <= cluster.nodes <= MOST_NODES or cluster.devices_per_node < 2:
        return False
    trained = {m.parameters or m.name: m.layers * m.layer_param_bytes for m in problem.metaops}
    return reduce_s(cluster, sum(trained.values()), tuple(range(problem.num_devices))) > LEAST_SHARE * bound_s


def island_pins(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Devices of one node for each MetaOp that has parameters: those of a component on the same node.

    Components go to the node with the least work so far, the largest first (Graham 1969).
    """
    members: dict[str, list[int]] = defaultdict(list)
    for op, metaop in enumerate(problem.metaops):
        if metaop.parameters or metaop.layer_param_bytes:
            members[metaop.component].append(op)
    work_s = {name: sum(problem.least_area_s[op] for op in ops) for name, ops in members.items()}
    per_node = problem.cluster.devices_per_node
    load_s = [0.0] * problem.cluster.nodes
    pins: dict[str, tuple[int, ...]] = {}
    for name in sorted(members, key=lambda name: (-work_s[name], name)):
        node = min(range(len(load_s)), key=lambda n: (load_s[n], n))
        load_s[node] += work_s[name]
        for op in members[name]:
            counts = [n for n in problem.curves[op].time_by_count if n <= per_node]
            if counts:
                first = node * per_node
                pins[problem.metaops[op].name] = tuple(range(first, first + max(counts)))
    return pins
