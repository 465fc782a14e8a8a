"""Explain: a plan in, why it looks like this out: what bounds it, where its gap comes from, where devices idle.

The bound's prices (`spindle.values.plan.Certificate`: area price a, paths of weight w, p(m) of those through m) say
what a device-second and a second on a chain are worth. With D = a N + sum w, every plan of makespan C satisfies exactly

    D (C - bound) =   sum over slices of layers * (T(n) (a n + p) - min over n' of T(n') (a n' + p))    wrong counts
                    + sum over slices of transfers * (a n + p)                                          transfers
                    + a * idle device time                                                             idle
                    + sum over paths of w * (C - running time of the path's MetaOps)                   waiting

so the gap is split without rest. O(slices * devices).
"""

from collections import defaultdict
from dataclasses import dataclass

from spindle.errors import PlanError
from spindle.planner.bounds.bound import allot_certificate, certified_s
from spindle.planner.problem import Problem, make_problem
from spindle.planner.simulate import waits
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Certificate, Plan, Slice
from spindle.values.turns import Turns

MOST_WINDOWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaOpReason:
    """Why a MetaOp runs on the devices it has.

    counts      (devices, layers) in order
    cheapest    the number of devices that the bound's prices ask for
    chain_price share of its seconds' worth that lies in chains waiting for it, the rest being device time
    lost_s      what its counts add to the makespan over the bound
    """

    name: str
    layers: int
    counts: tuple[tuple[int, int], ...]
    cheapest: int
    chain_price: float
    start_s: float
    end_s: float
    lost_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleWindow:
    """A span of time in which `devices` devices wait, and for what."""

    start_s: float
    end_s: float
    devices: int
    device_s: float
    until: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All that `spindle explain` prints. Seconds of `gap_s` add up to makespan_s - priced_bound_s.

    `over_time`: what lies between priced_bound_s and lower_bound_s is proved by prices over time.
    """

    makespan_s: float
    lower_bound_s: float
    priced_bound_s: float
    device_share: float
    chains: tuple[tuple[float, tuple[str, ...]], ...]
    gap_s: tuple[tuple[str, float], ...]
    critical: tuple[str, ...]
    metaops: tuple[MetaOpReason, ...]
    idle_s: tuple[tuple[str, float], ...]
    windows: tuple[IdleWindow, ...]
    over_time: bool = False
    turns: Turns = ()


def explain(plan: Plan) -> Explanation:
    """Explain a plan that carries its MetaGraph and cluster; raises PlanError otherwise."""
    if plan.metagraph is None or plan.cluster is None:
        raise PlanError("the plan carries no MetaGraph or no cluster, so its gap cannot be explained; plan again")
    problem = make_problem(plan.metagraph, plan.cluster, plan.turns)
    certificate = plan.certificate
    if certificate is None or certificate.through:
        certificate = allot_certificate(problem, range(len(problem)))
    prices = _Prices(problem, certificate)
    chains = sorted(certificate.paths, reverse=True)
    total = certificate.area_price * problem.num_devices + sum(w for w, _ in chains)
    return Explanation(
        makespan_s=plan.makespan_s,
        lower_bound_s=plan.lower_bound_s,
        priced_bound_s=prices.bound_s,
        device_share=certificate.area_price * problem.num_devices / total,
        chains=tuple((w / total, names) for w, names in chains[:MOST_WINDOWS]),
        gap_s=_gap(plan, prices),
        critical=_critical(plan, plan.metagraph),
        metaops=tuple(_reason(plan, prices, name) for name in plan.metagraph.by_name),
        idle_s=_idle(plan),
        windows=_windows(plan, plan.metagraph),
        over_time=plan.certificate is not None and plan.certificate.over_time is not None,
        turns=plan.turns,
    )


class _Prices:
    """A certificate's prices by MetaOp."""

    def __init__(self, problem: Problem, certificate: Certificate) -> None:
        self.problem, self.certificate = problem, certificate
        self.area = certificate.area_price
        self.on_paths: dict[str, float] = defaultdict(float)
        for weight, names in certificate.paths:
            for name in names:
                self.on_paths[name] += weight
        self.total = self.area * problem.num_devices + sum(w for w, _ in certificate.paths)
        self.bound_s = certified_s(problem, certificate, range(len(problem)))

    def layer(self, name: str, count: int) -> float:
        """Worth of one layer on `count` devices, in seconds of makespan."""
        time_s = self.problem.metagraph[name].times[count]
        return time_s * (self.area * count + self.on_paths[name]) / self.total

    def cheapest(self, name: str) -> int:
        """The count with the least worth."""
        return min(self.problem.curves[self.problem.index[name]].counts, key=lambda n: (self.layer(name, n), n))


def _gap(plan: Plan, prices: _Prices) -> tuple[tuple[str, float], ...]:
    """Seconds of makespan over the bound by cause."""
    wide = narrow = transfers = busy = 0.0
    running: dict[str, float] = defaultdict(float)
    for s in plan.slices:
        n = len(s.devices)
        best = prices.cheapest(s.metaop)
        lost = s.num_layers * (prices.layer(s.metaop, n) - prices.layer(s.metaop, best))
        wide, narrow = (wide + lost, narrow) if n > best else (wide, narrow + lost)
        work_s = s.num_layers * prices.problem.metagraph[s.metaop].times[n]
        transfers += (s.span_s - work_s) * (prices.area * n + prices.on_paths[s.metaop]) / prices.total
        busy += n * s.span_s
        running[s.metaop] += s.span_s
    idle = prices.area * (plan.num_devices * plan.makespan_s - busy) / prices.total
    waiting = sum(
        w * (plan.makespan_s - sum(running[name] for name in names)) / prices.total
        for w, names in prices.certificate.paths
    )
    return (
        ("idle devices", idle),
        ("waiting on chains", waiting),
        ("more devices than pays off", wide),
        ("fewer devices than needed", narrow),
        ("transfers", transfers if abs(transfers) > 1e-12 * plan.makespan_s else 0.0),
    )


def _reason(plan: Plan, prices: _Prices, name: str) -> MetaOpReason:
    slices = [s for s in plan.slices if s.metaop == name]
    counts: list[tuple[int, int]] = []
    for s in slices:
        if counts and counts[-1][0] == len(s.devices):
            counts[-1] = (counts[-1][0], counts[-1][1] + s.num_layers)
        else:
            counts.append((len(s.devices), s.num_layers))
    best = prices.cheapest(name)
    lost_s = sum(layers * (prices.layer(name, n) - prices.layer(name, best)) for n, layers in counts)
    area, path = prices.area * best, prices.on_paths[name]
    return MetaOpReason(
        name=name,
        layers=prices.problem.metagraph[name].layers,
        counts=tuple(counts),
        cheapest=best,
        chain_price=path / (area + path) if area + path else 0.0,
        start_s=min(s.start_s for s in slices),
        end_s=max(s.end_s for s in slices),
        lost_s=lost_s,
        reason=_why(prices, name, {n for n, _ in counts}, best, lost_s),
    )


def _why(prices: _Prices, name: str, used: set[int], best: int, lost_s: float) -> str:
    valid = prices.problem.curves[prices.problem.index[name]].counts
    if len(valid) == 1:
        return "the only useful number"
    if used == {best}:
        return "others wait for it" if prices.on_paths[name] else "least device time"
    if lost_s < 1e-6 * prices.bound_s / prices.problem.num_devices:
        return "as good as the cheapest"
    if min(used) >= best:
        return "more: devices were free"
    if max(used) <= best:
        return "fewer: devices were taken"
    return "as devices came free"


def _critical(plan: Plan, metagraph: MetaGraph) -> tuple[str, ...]:
    """Slices from the start to the makespan, each waiting for the one in front (its data, its devices or its turn)."""
    slices = sorted(plan.slices, key=lambda s: (s.start_s, s.end_s, s.metaop, s.first_layer))
    turns = [plan.turn_by_task.get(metagraph[s.metaop].task, 0) for s in slices]
    earlier = [[i for i, other in enumerate(turns) if other == turn - 1] for turn in range(max(turns) + 1)]
    before = [found + earlier[turn] for found, turn in zip(waits(metagraph, slices), turns, strict=True)]
    at = max(range(len(slices)), key=lambda i: (slices[i].end_s, -i))
    chain = [_named(slices[at])]
    while before[at]:
        at = max(before[at], key=lambda i: (slices[i].end_s, -i))
        chain.append(_named(slices[at]))
    return tuple(reversed(chain))


def _named(s: Slice) -> str:
    return f"{s.metaop}[{s.first_layer}:{s.last_layer + 1}] x{len(s.devices)}"


def _idle(plan: Plan) -> tuple[tuple[str, float], ...]:
    """Idle device-seconds before the first, between, and after the last slice of each device."""
    first, last, busy = (defaultdict[int, float](float) for _ in range(3))
    for s in plan.slices:
        for d in s.devices:
            first[d] = min(first.get(d, s.start_s), s.start_s)
            last[d] = max(last[d], s.end_s)
            busy[d] += s.span_s
    at_start = sum(first.values())
    at_end = sum(plan.makespan_s - last[d] for d in range(plan.num_devices))
    between = sum(last[d] - first[d] - busy[d] for d in first)
    return (("before the first slice", at_start), ("between slices", between), ("after the last slice", at_end))


def _windows(plan: Plan, metagraph: MetaGraph) -> tuple[IdleWindow, ...]:
    """Where most device time is lost: the gaps that begin and end together, and what ends them."""
    gaps: dict[tuple[float, float, str], int] = defaultdict(int)
    free_s = [0.0] * plan.num_devices
    ends_s: dict[str, float] = {}
    turn, turn_s, latest_s = 0, 0.0, 0.0
    for s in plan.slices:
        if plan.turn_by_task.get(metagraph[s.metaop].task, 0) > turn:
            turn, turn_s = turn + 1, latest_s
        latest_s = max(latest_s, s.end_s)
        data = max(
            (p for p in (s.metaop, *metagraph.predecessors[s.metaop]) if p in ends_s),
            key=ends_s.__getitem__,
            default="",
        )
        for d in s.devices:
            if s.start_s - free_s[d] > 1e-9 * plan.makespan_s:
                waited = f"{_named(s)} waits for {data}" if data and ends_s[data] > free_s[d] else f"{_named(s)} waits"
                if turn_s > max(free_s[d], ends_s.get(data, 0.0)):
                    waited = f"{_named(s)} waits for the turn before it"
                gaps[free_s[d], s.start_s, waited] += 1
            free_s[d] = s.end_s
        ends_s[s.metaop] = s.end_s
    for d in range(plan.num_devices):
        if plan.makespan_s - free_s[d] > 1e-9 * plan.makespan_s:
            gaps[free_s[d], plan.makespan_s, "the end"] += 1
    found = [
        IdleWindow(start_s=start, end_s=end, devices=n, device_s=n * (end - start), until=until)
        for (start, end, until), n in gaps.items()
    ]
    return tuple(sorted(found, key=lambda w: (-w.device_s, w.start_s, w.until))[:MOST_WINDOWS])
