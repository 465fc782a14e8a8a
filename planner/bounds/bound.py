"""Bound: a Problem in, a number that no schedule of it can beat out, with the prices that prove it.

- area: every layer at its cheapest device time, spread over all devices:  sum_m L_m min_n n T_m(n) / N.
- path: the longest chain of MetaOps, each at its fastest count.
- allot (Jansen and Zhang 2006): an LP that splits the layers of each MetaOp over counts; its path sums and its area
  bound C. It relaxes only when things run. Its duals are a Certificate, which any (area price, paths) would be: the
  bound is evaluated from the prices, not taken from the solver, so an inexact solve costs strength and not validity.
- headtail: what `m` waits for, then `m` at its fastest, then what waits for `m`. Stronger where the graph is narrow.
- tix (`spindle.planner.bounds.timed`): prices over time, of up to a tenth of the search's time, where a plan's gap is
  worth it.

Transfers, reductions and memory only lengthen schedules, so the bound holds with them too.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spindle.planner.problem import Problem
from spindle.planner.work import UNITS_PER_S
from spindle.values.plan import Certificate

if TYPE_CHECKING:
    import pulp

HEADTAIL_PASSES = 4  # MetaOps whose head and tail are bounded by their own LPs; each costs two
TIX_SHARE = 0.1  # of the search's time, and
TIX_GAP = 0.003  # the least gap that prices over time are worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """`kind` names the argument that gave `bound_s`."""

    bound_s: float
    kind: str
    certificate: Certificate


def lower_bound(problem: Problem) -> Bound:
    """The strongest of the bounds above. One LP of O(sum of hull counts) variables, and a few smaller ones."""
    everything = range(len(problem))
    bounds = [_bound(problem, "area", Certificate(area_price=1.0)), _bound(problem, "path", _longest_path(problem))]
    bounds.append(_bound(problem, "allot", allot_certificate(problem, everything)))
    best = max(bounds, key=lambda b: b.bound_s)
    for certificate in _narrow_certificates(problem, best.bound_s):
        best = max(best, _bound(problem, "headtail", certificate), key=lambda b: b.bound_s)
    return best


def tightened(problem: Problem, bound: Bound, makespan_s: float, limit_s: float) -> Bound:
    """`bound`, or a stronger one by prices over time when a plan of `makespan_s` made in `limit_s` leaves a gap."""
    from spindle.planner.bounds.timed import timed_bound

    if makespan_s <= bound.bound_s * (1 + TIX_GAP):
        return bound
    prices = timed_bound(problem, bound.bound_s, makespan_s, TIX_SHARE * limit_s * UNITS_PER_S)
    if prices is None:
        return bound
    return Bound(bound_s=prices.horizon_s, kind="tix", certificate=replace(bound.certificate, over_time=prices))


def _bound(problem: Problem, kind: str, certificate: Certificate) -> Bound:
    value = certified_s(problem, certificate, range(len(problem)))
    return Bound(bound_s=value, kind=kind, certificate=certificate)


def certified_s(problem: Problem, certificate: Certificate, ops: Collection[int]) -> float:
    """What a certificate proves about the MetaOps `ops` (see `spindle.values.plan.Certificate` for the formula)."""
    if certificate.through:
        middle = problem.index[certificate.through]
        sides = ((certificate.head, problem.ancestors[middle]), (certificate.tail, problem.descendants[middle]))
        ends_s = sum(certified_s(problem, part, side) for part, side in sides if part)
        return ends_s + problem.layers[middle] * problem.curves[middle].times_s[-1]
    weight = [0.0] * len(problem)
    for path_weight, names in certificate.paths:
        for name in names:
            weight[problem.index[name]] += path_weight
    price = certificate.area_price
    total = sum(
        problem.layers[m] * min(t * (price * n + weight[m]) for n, t in problem.curves[m].time_by_count.items())
        for m in ops
    )
    return total / (price * problem.num_devices + sum(w for w, _ in certificate.paths))


def _longest_path(problem: Problem) -> Certificate:
    """The path bound's certificate: one path of weight 1."""
    end_s = [0.0] * len(problem)
    via = [-1] * len(problem)
    for m in problem.order:
        via[m] = max(problem.predecessors[m], key=lambda p: end_s[p], default=-1)
        end_s[m] = (end_s[via[m]] if via[m] >= 0 else 0.0) + problem.layers[m] * problem.curves[m].times_s[-1]
    at = max(range(len(problem)), key=lambda m: end_s[m])
    path = []
    while at >= 0:
        path.append(problem.metaops[at].name)
        at = via[at]
    return Certificate(paths=((1.0, tuple(reversed(path))),))


def _narrow_certificates(problem: Problem, best_s: float) -> list[Certificate]:
    """Head-and-tail certificates through the MetaOps where area and path bounds of both sides promise most."""
    everything = len(problem)
    promising = sorted(range(everything), key=lambda m: -_quick_headtail_s(problem, m))[:HEADTAIL_PASSES]
    found = []
    for m in promising:
        head, tail = problem.ancestors[m], problem.descendants[m]
        if 2 * (len(head) + len(tail) + 1) < everything or _quick_headtail_s(problem, m) < 0.7 * best_s:
            continue  # most MetaOps run beside m: the whole graph's area says more
        parts = [allot_certificate(problem, side) if side else None for side in (head, tail)]
        found.append(Certificate(through=problem.metaops[m].name, head=parts[0], tail=parts[1]))
    return found


def _quick_headtail_s(problem: Problem, middle: int) -> float:
    """Areas of what `middle` waits for and of what waits for it, plus its own fastest time."""
    sides = (problem.ancestors[middle], problem.descendants[middle])
    area = sum(problem.least_area_s[m] for side in sides for m in side)
    return area / problem.num_devices + problem.layers[middle] * problem.curves[middle].times_s[-1]


def allot_certificate(problem: Problem, ops: Collection[int]) -> Certificate:
    """Solve the allot LP over the MetaOps `ops` and read its duals as prices.

    minimize C over layers x[m, n] >= 0 run on n devices, and ends E_m.
    """
    import pulp

    from spindle.planner.highs import THREADS

    ops = sorted(ops)
    lp = pulp.LpProblem("allot", pulp.LpMinimize)
    makespan = lp.add_variable("C", lowBound=0)
    layers = {m: {n: lp.add_variable(f"x_{m}_{n}", lowBound=0) for n in problem.curves[m].hull.counts} for m in ops}
    ends = {m: lp.add_variable(f"E_{m}", lowBound=0) for m in ops}
    lp.setObjective(makespan)
    add_all_layers(lp, problem, layers)
    area = add_area(lp, problem, layers, makespan)
    flows = add_precedence(lp, problem, layers, ends, makespan)
    lp.solve(pulp.HiGHS(msg=False, threads=THREADS))
    if lp.status != pulp.LpStatusOptimal:
        raise AssertionError(f"the allot LP of {len(ops)} MetaOps ended {pulp.LpStatus[lp.status]}")
    price = _price(lp, area)
    return Certificate(area_price=price, paths=_paths(problem, _dual_flow(lp, flows)))


Layers = Mapping[int, Mapping[int, "pulp.LpVariable"]]


def add_all_layers(lp: "pulp.LpProblem", problem: Problem, layers: Layers) -> None:
    """sum_n x[m, n] = L_m: every layer runs."""
    for m, by_count in layers.items():
        lp += _sum(by_count.values()) == problem.layers[m]


def add_area(lp: "pulp.LpProblem", problem: Problem, layers: Layers, makespan: "pulp.LpVariable") -> str:
    """sum_{m, n} n T_m(n) x[m, n] <= N C: device time. Returns the row's name."""
    used = [n * problem.time(m, n) * x for m, by_count in layers.items() for n, x in by_count.items()]
    lp += (_sum(used) - problem.num_devices * makespan <= 0, "area")
    return "area"


def add_precedence(
    lp: "pulp.LpProblem",
    problem: Problem,
    layers: Layers,
    ends: Mapping[int, "pulp.LpVariable"],
    makespan: "pulp.LpVariable",
) -> dict[tuple[int, int], str]:
    """E_p + sum_n T_m(n) x[m, n] <= E_m for each flow p -> m and for the start (p = -1), and E_m <= C at the ends.

    Returns the rows' names by (p, m), with m = -1 for the last kind.
    """
    rows: dict[tuple[int, int], str] = {}
    for m, by_count in layers.items():
        own = _sum(problem.time(m, n) * x for n, x in by_count.items())
        sources = [p for p in problem.predecessors[m] if p in layers]
        for p in sources or [-1]:
            rows[p, m] = f"flow_{p}_{m}".replace("-", "s")
            lp += (own - ends[m] + (ends[p] if p >= 0 else 0) <= 0, rows[p, m])
        if not any(s in layers for s in problem.successors[m]):
            rows[m, -1] = f"end_{m}"
            lp += (ends[m] - makespan <= 0, rows[m, -1])
    return rows


def _sum(terms: "Iterable[pulp.LpVariable | pulp.LpAffineExpression]") -> "pulp.LpAffineExpression":
    import pulp

    return pulp.lpSum(terms)


def _price(lp: "pulp.LpProblem", row: str) -> float:
    """What relaxing a `<=` row by one would take off the objective."""
    return max(0.0, -float(lp.get_constraint_by_name(row).pi))


def _dual_flow(lp: "pulp.LpProblem", rows: Mapping[tuple[int, int], str]) -> dict[int, dict[int, float]]:
    """Duals of the precedence rows as a flow from the start (-1) to the end: flow[p][m]."""
    flow: dict[int, dict[int, float]] = {}
    for (source, target), row in rows.items():
        value = _price(lp, row)
        if value > 1e-9:
            flow.setdefault(source, {})[target] = value
    return flow


def _paths(problem: Problem, flow: dict[int, dict[int, float]]) -> tuple[tuple[float, tuple[str, ...]], ...]:
    """Strip the flow path by path; each strip empties an edge, so there are no more paths than edges.

    Where rounding left no way on, the path ends early: still a chain of MetaOps that wait for each other.
    """
    paths: list[tuple[float, tuple[str, ...]]] = []
    while flow.get(-1):
        edges: list[tuple[int, int]] = []
        at = -1
        while flow.get(at):
            following = max(flow[at], key=lambda m: (flow[at][m], m))
            edges.append((at, following))
            if following < 0:
                break
            at = following
        weight = min(flow[source][target] for source, target in edges)
        for source, target in edges:
            flow[source][target] -= weight
            if flow[source][target] <= 1e-12:
                del flow[source][target]
        paths.append((weight, tuple(problem.metaops[target].name for _, target in edges if target >= 0)))
    return tuple(paths)
