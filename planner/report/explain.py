"""Explain: a plan in, why it looks like this out: what bounds it, where its gap comes from, where devices idle.

The bound's prices (`spindle.plan.Certificate`: area price a, paths of weight w, p(m) the weight of paths through m) say
what a device-second and a second on a chain are worth. With D = a N + sum w, every plan of makespan C satisfies exactly

    D (C - bound) =   sum over slices of layers * (T(n) (a n + p) - min over n' of T(n') (a n' + p))    wrong counts
                    + sum over slices of transfers * (a n + p)                                          transfers
                    + a * idle device time                                                             idle
                    + sum over paths of w * (C - running time of the path's MetaOps)                   waiting

so the gap is split without rest. O(slices * devices).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from spindle.errors import PlanError
from spindle.metagraph import MetaGraph
from spindle.plan import Certificate, Plan, Slice
from spindle.planner.bound import allot_certificate, certified_s
from spindle.planner.problem import Problem, make_problem
from spindle.planner.simulate import waits
from spindle.turns import Turns, turns_in_words

MOST_WINDOWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaOpReason:
    """Why a MetaOp runs on the devices it has.

    counts      (devices, layers) in order
    cheapest    the count that the bound's prices ask for
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
        raise PlanError("the plan carries no MetaGraph or no cluster, so nothing can be priced; plan again")
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
        ("counts too large", wide),
        ("counts too small", narrow),
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
        return "its only useful count"
    if used == {best}:
        return "what its chain is worth" if prices.on_paths[name] else "least device time"
    if lost_s < 1e-6 * prices.bound_s / prices.problem.num_devices:
        return "as good as the cheapest count"
    if min(used) >= best:
        return "wider: devices were free"
    if max(used) <= best:
        return "narrower: devices were taken"
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


# ------------------------------------------------------------------------------------------------------------ text

WIDTH = 100


def render_explanation(found: Explanation) -> str:
    """The explanation as text within 100 columns."""
    return "\n\n".join(
        "\n".join(part)
        for part in (_bound_lines(found), _gap_lines(found), _metaop_lines(found.metaops), _idle_lines(found))
    )


def _bound_lines(found: Explanation) -> list[str]:
    lines = [
        *(wrap(turns_in_words(found.turns), WIDTH, break_on_hyphens=False) if found.turns else ()),
        f"makespan   {found.makespan_s:.6f} s; no schedule is shorter than {found.lower_bound_s:.6f} s",
        f"bounded by device time ({100 * found.device_share:.0f} %) and chains of MetaOps "
        f"({100 * (1 - found.device_share):.0f} %)",
    ]
    lines += [_clip(f"  chain {100 * w:>4.1f} %  {' > '.join(names)}") for w, names in found.chains]
    lines.append(f"critical   {len(found.critical)} slices that wait for each other, the last ones")
    lines += [_clip(f"  {name}") for name in found.critical[-6:]]
    return lines


def _gap_lines(found: Explanation) -> list[str]:
    gap_s = found.makespan_s - found.priced_bound_s
    lines = [f"{'gap by the prices of the bound':32} {'seconds':>12} {'% of bound':>11}"]
    for name, seconds in found.gap_s:
        lines.append(f"{name:32} {seconds:>12.6f} {100 * seconds / found.priced_bound_s:>11.2f}")
    lines.append(f"{'together':32} {gap_s:>12.6f} {100 * gap_s / found.priced_bound_s:>11.2f}")
    if found.lower_bound_s > found.priced_bound_s * (1 + 1e-6):
        rest_s = found.lower_bound_s - found.priced_bound_s
        lines.append(
            f"of that, no schedule can save {rest_s:.6f} s: these prices prove {found.priced_bound_s:.6f} s, "
            f"{'those over time' if found.over_time else 'the plan'} the rest"
        )
    return lines


def _metaop_lines(metaops: Sequence[MetaOpReason]) -> list[str]:
    names = min(30, max(len("MetaOp"), *(len(m.name) for m in metaops)))
    lines = [f"{'MetaOp':{names}} {'layers x devices':20} {'cheapest':>8} {'chain %':>7} {'lost ms':>8}  why"]
    for m in sorted(metaops, key=lambda m: (-m.lost_s, m.start_s, m.name)):
        counts = _clip(" + ".join(f"{layers}x{n}" for n, layers in m.counts), 20)
        row = (
            f"{_clip(m.name, names):{names}} {counts:20} {m.cheapest:>8} {100 * m.chain_price:>7.0f} "
            f"{1e3 * m.lost_s:>8.3f}  {m.reason}"
        )
        lines.append(_clip(row))
    return lines


def _idle_lines(found: Explanation) -> list[str]:
    lines = [f"{'idle device time':32} {'device-s':>12}"]
    lines += [f"{name:32} {seconds:>12.6f}" for name, seconds in found.idle_s]
    if found.windows:
        lines.append(f"{'most of it':>12}  {'from s':>10} {'to s':>10} {'devices':>7}  until")
    for w in found.windows:
        lines.append(_clip(f"{w.device_s:>12.6f}  {w.start_s:>10.6f} {w.end_s:>10.6f} {w.devices:>7}  {w.until}"))
    return lines


def _clip(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
