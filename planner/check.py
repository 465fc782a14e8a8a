"""Check: a plan in, what is wrong with it out, in words.

Shares no code with the makers of plans: every rule is evaluated from the plan, its MetaGraph and its cluster alone.
Rules that need a MetaGraph or a cluster the plan does not carry (and nobody gave) are left out.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isclose

from spindle.cluster import Cluster
from spindle.errors import PlanError
from spindle.metagraph import MetaGraph, MetaOp
from spindle.plan import Certificate, Plan, Slice

RELATIVE = 1e-9  # of the makespan: what sums of floats may be off by


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule: a sentence, and the waves' indices it is about."""

    text: str
    waves: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Case:
    plan: Plan
    slack_s: float
    slices: tuple[tuple[int, Slice], ...]  # (wave index, slice) in order of start


@dataclass(frozen=True)
class _PricedCase(_Case):
    metagraph: MetaGraph
    cluster: Cluster | None


def check_plan(plan: Plan, metagraph: MetaGraph | None = None, cluster: Cluster | None = None) -> tuple[Finding, ...]:
    """Findings about `plan`; none when it keeps every rule. MetaGraph and cluster are those it carries unless given."""
    metagraph, cluster = metagraph or plan.metagraph, cluster or plan.cluster
    slices = tuple(
        sorted(
            ((wave.index, s) for wave in plan.waves for s in wave.slices),
            key=lambda ws: (ws[1].start_s, ws[1].end_s, ws[1].metaop, ws[1].first_layer),
        )
    )
    case = _Case(plan, RELATIVE * plan.makespan_s, slices)
    findings = [finding for rule in _RULES for finding in rule(case)]
    if metagraph is not None:
        unknown = list(_unknown(slices, metagraph))
        findings += unknown
        if not unknown:
            priced = _PricedCase(plan, case.slack_s, slices, metagraph, cluster)
            findings += [finding for priced_rule in _PRICED_RULES for finding in priced_rule(priced)]
    return tuple(findings)


def require_plan(plan: Plan, metagraph: MetaGraph | None = None, cluster: Cluster | None = None) -> None:
    """Raise PlanError with the plan's table, the broken rows marked, unless the plan keeps every rule."""
    findings = check_plan(plan, metagraph, cluster)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise PlanError(f"{findings[0]}{more}; plan again, or mend it by hand\n{picture(plan, findings)}")


def picture(plan: Plan, findings: Sequence[Finding], *, rows: int = 24) -> str:
    """The waves that findings are about and their neighbours, one row each, with `<-- here` on the broken ones."""
    marked = {index for finding in findings for index in finding.waves}
    near = {index + step for index in marked for step in (-1, 0, 1)}
    lines = []
    for wave in plan.waves:
        if wave.index in near or (not marked and wave.index < rows):
            parts = ", ".join(f"{_name(s)} on {_devices(s.devices)}" for s in wave.slices)
            row = f"wave {wave.index:>4}  {wave.start_s:>10.6f} .. {wave.end_s:>10.6f} s  {parts}"
            lines.append(row[:91] + (" <-- here" if wave.index in marked else ""))
    return "\n".join(lines[:rows])


# ------------------------------------------------------------------------------------ rules of the plan by itself


def _waves_in_order(case: _Case) -> Iterator[Finding]:
    before_s = 0.0
    for index, wave in enumerate(case.plan.waves):
        if wave.index != index:
            yield Finding(f"wave {wave.index} stands at place {index}; number waves from 0 up", (wave.index,))
        if not wave.slices:
            yield Finding(f"wave {wave.index} has no slices; remove it", (wave.index,))
            continue
        if wave.start_s < before_s - case.slack_s:
            yield Finding(
                f"wave {wave.index} starts at {wave.start_s} s, before the wave in front of it", (wave.index,)
            )
        before_s = wave.start_s
        ends_s = max(s.end_s for s in wave.slices)
        if abs(wave.end_s - ends_s) > case.slack_s:
            yield Finding(f"wave {wave.index} ends at {wave.end_s} s but its last slice at {ends_s} s", (wave.index,))
        for s in wave.slices:
            if abs(s.start_s - wave.start_s) > case.slack_s + 1e-12:
                yield Finding(
                    f"{_name(s)} starts at {s.start_s} s in wave {wave.index}, which starts at {wave.start_s} s; "
                    "the slices of a wave start together",
                    (wave.index,),
                )


def _devices_exist(case: _Case) -> Iterator[Finding]:
    for wave, s in case.slices:
        if max(s.devices) >= case.plan.num_devices:
            yield Finding(
                f"{_name(s)} runs on device {max(s.devices)} but the plan has {case.plan.num_devices} devices", (wave,)
            )


def _one_slice_at_a_time(case: _Case) -> Iterator[Finding]:
    last: dict[int, tuple[int, Slice]] = {}
    told: set[tuple[Slice, Slice]] = set()
    for wave, s in case.slices:
        for device in s.devices:
            before = last.get(device)
            if before and s.start_s < before[1].end_s - case.slack_s and (before[1], s) not in told:
                told.add((before[1], s))
                yield Finding(
                    f"device {device} runs {_name(s)} from {s.start_s} s while {_name(before[1])} holds it until "
                    f"{before[1].end_s} s; a device runs one slice at a time",
                    (before[0], wave),
                )
            if not before or s.end_s >= before[1].end_s:
                last[device] = (wave, s)


def _makespan(case: _Case) -> Iterator[Finding]:
    plan = case.plan
    ends_s = max((s.end_s for _, s in case.slices), default=0.0)
    if abs(plan.makespan_s - ends_s) > case.slack_s:
        yield Finding(f"makespan_s is {plan.makespan_s} but the last slice ends at {ends_s} s")
    if plan.makespan_s < plan.lower_bound_s - case.slack_s:
        yield Finding(
            f"makespan_s is {plan.makespan_s}, below lower_bound_s {plan.lower_bound_s}, which no schedule can beat"
        )


# --------------------------------------------------------------------------------- rules that need the MetaGraph


def _unknown(slices: Sequence[tuple[int, Slice]], metagraph: MetaGraph) -> Iterator[Finding]:
    for wave, s in slices:
        if s.metaop not in metagraph.by_name:
            yield Finding(f"{_name(s)}: the MetaGraph has no MetaOp {s.metaop!r}", (wave,))


def _every_layer_once(case: _PricedCase) -> Iterator[Finding]:
    slices_of = _by_metaop(case)
    for metaop in case.metagraph:
        following, until_s = 0, 0.0
        for wave, s in slices_of[metaop.name]:
            if s.first_layer != following:
                yield Finding(
                    f"{_name(s)} comes when layer {following} of {metaop.name!r} is due; "
                    "every layer runs once and in order",
                    (wave,),
                )
            if s.start_s < until_s - case.slack_s:
                yield Finding(f"{_name(s)} starts at {s.start_s} s, before the layers in front of it end", (wave,))
            following, until_s = s.first_layer + s.num_layers, s.end_s
        if following != metaop.layers:
            yield Finding(f"{metaop.name!r} has {metaop.layers} layers but the plan runs {following} of them")


def _counts_and_spans(case: _PricedCase) -> Iterator[Finding]:
    received_s = _received_s(case)
    for (wave, s), extra_s in zip(case.slices, received_s, strict=True):
        metaop = case.metagraph[s.metaop]
        time_s = metaop.times.get(len(s.devices))
        if time_s is None:
            valid = ", ".join(str(n) for n in metaop.times)
            yield Finding(f"{_name(s)} runs on {len(s.devices)} devices; valid counts are {valid}", (wave,))
            continue
        least_s = s.num_layers * time_s + extra_s
        if s.end_s - s.start_s < least_s - case.slack_s:
            why = f"{s.num_layers} layers of {time_s} s" + (f" and {extra_s} s of transfers" if extra_s else "")
            yield Finding(f"{_name(s)} lasts {s.end_s - s.start_s} s but takes {least_s} s: {why}", (wave,))


def _dependencies(case: _PricedCase) -> Iterator[Finding]:
    ends: dict[str, tuple[float, int]] = {}
    for wave, s in case.slices:
        ends[s.metaop] = max(ends.get(s.metaop, (0.0, wave)), (s.end_s, wave))
    for wave, s in case.slices:
        for name in case.metagraph.predecessors[s.metaop]:
            end_s, its_wave = ends.get(name, (0.0, wave))
            if s.start_s < end_s - case.slack_s:
                yield Finding(
                    f"{_name(s)} starts at {s.start_s} s but needs {name!r}, which ends at {end_s} s", (its_wave, wave)
                )


def _memory(case: _PricedCase) -> Iterator[Finding]:
    plan, cluster = case.plan, case.cluster
    peaks = _peaks(case)
    reported = plan.memory.peak_bytes_per_device
    if reported and len(reported) != len(peaks):
        yield Finding(f"memory tells of {len(reported)} devices but the plan has {len(peaks)}")
    for device, (peak, told) in enumerate(zip(peaks, reported, strict=False)):
        if not isclose(peak, told, rel_tol=1e-6, abs_tol=1.0):
            yield Finding(f"device {device} needs {peak:.0f} bytes but the plan says {told:.0f}")
            break
    if cluster is None:
        return
    full = [device for device, peak in enumerate(peaks) if peak > cluster.device.memory_bytes * (1 + RELATIVE)]
    if full:
        worst = max(full, key=lambda device: peaks[device])
        waves = tuple(sorted({wave for wave, s in case.slices if worst in s.devices}))
        yield Finding(
            f"device {worst} needs {peaks[worst] / 2**30:.2f} GiB but {cluster.device.name!r} has "
            f"{cluster.device.memory_bytes / 2**30:.2f} GiB ({len(full)} devices overflow)",
            waves[:1],
        )
    if plan.memory.fits == bool(full):
        yield Finding(f"memory.fits is {str(plan.memory.fits).lower()} but {len(full)} devices overflow")


def _cluster_shape(case: _PricedCase) -> Iterator[Finding]:
    plan, cluster = case.plan, case.cluster
    if cluster and (plan.num_devices, plan.devices_per_node) != (cluster.num_devices, cluster.devices_per_node):
        yield Finding(
            f"the plan is for {plan.num_devices} devices, {plan.devices_per_node} a node, but the cluster has "
            f"{cluster.num_devices}, {cluster.devices_per_node} a node"
        )


def _bound_is_proved(case: _PricedCase) -> Iterator[Finding]:
    plan = case.plan
    if plan.certificate is not None:
        names = frozenset(case.metagraph.by_name)
        try:
            proved_s = _proved_s(case, plan.certificate, names)
        except _BadCertificate as error:
            yield Finding(str(error))
            return
        if plan.lower_bound_s > proved_s * (1 + RELATIVE):
            yield Finding(f"lower_bound_s is {plan.lower_bound_s} but its certificate proves only {proved_s}")
    for kind, bound_s in (("device time", _area_s(case)), ("the longest chain", _chain_s(case))):
        if plan.makespan_s < bound_s - case.slack_s:
            yield Finding(f"makespan_s is {plan.makespan_s} but {kind} alone takes {bound_s} s")


Rule = Callable[[_Case], Iterator[Finding]]
PricedRule = Callable[[_PricedCase], Iterator[Finding]]
_RULES: tuple[Rule, ...] = (_waves_in_order, _devices_exist, _one_slice_at_a_time, _makespan)
_PRICED_RULES: tuple[PricedRule, ...] = (
    _cluster_shape,
    _every_layer_once,
    _counts_and_spans,
    _dependencies,
    _memory,
    _bound_is_proved,
)


# ------------------------------------------------------------------------------------------------------- helpers


class _BadCertificate(Exception):
    """A certificate that speaks of MetaOps that do not exist or do not depend on each other."""


def _by_metaop(case: _PricedCase) -> dict[str, list[tuple[int, Slice]]]:
    found: dict[str, list[tuple[int, Slice]]] = defaultdict(list)
    for wave, s in case.slices:
        found[s.metaop].append((wave, s))
    return found


def _usable(case: _PricedCase, metaop: MetaOp) -> list[tuple[int, float]]:
    """Counts that the cluster has, on which at least one layer fits a device; all that the cluster has when none do."""
    capacity = case.cluster.device.memory_bytes if case.cluster else float("inf")
    there = [(n, t) for n, t in metaop.layer_time_s if n <= case.plan.num_devices]
    return [(n, t) for n, t in there if _layer_bytes(metaop, n) <= capacity] or there


def _area_s(case: _PricedCase) -> float:
    least = (metaop.layers * min((n * t for n, t in _usable(case, metaop)), default=0.0) for metaop in case.metagraph)
    return sum(least) / case.plan.num_devices


def _fastest_s(case: _PricedCase, metaop: MetaOp) -> float:
    return metaop.layers * min((t for _, t in _usable(case, metaop)), default=0.0)


def _chain_s(case: _PricedCase) -> float:
    end_s: dict[str, float] = {}
    for name in case.metagraph.topological_order:
        before_s = max((end_s[p] for p in case.metagraph.predecessors[name]), default=0.0)
        end_s[name] = before_s + _fastest_s(case, case.metagraph[name])
    return max(end_s.values())


def _proved_s(case: _PricedCase, certificate: Certificate, names: frozenset[str]) -> float:
    """What a certificate proves about the MetaOps `names` (the formula stands in `spindle.plan.Certificate`)."""
    if certificate.through:
        if certificate.through not in names:
            raise _BadCertificate(f"the certificate names {certificate.through!r}, which is not there to be named")
        before = _reach(case.metagraph.predecessors, certificate.through) & names
        after = _reach(case.metagraph.successors, certificate.through) & names
        ends_s = sum(_proved_s(case, c, s) for c, s in ((certificate.head, before), (certificate.tail, after)) if c)
        return ends_s + _fastest_s(case, case.metagraph[certificate.through])
    on_paths: dict[str, float] = defaultdict(float)
    for weight, path in certificate.paths:
        for name, following in zip(path, (*path[1:], ""), strict=True):
            if name not in names or (following and following not in case.metagraph.successors[name]):
                raise _BadCertificate(f"the certificate's path {' -> '.join(path)} is not a chain of the MetaGraph")
            on_paths[name] += weight
    divisor = certificate.area_price * case.plan.num_devices + sum(weight for weight, _ in certificate.paths)
    if not divisor:
        return 0.0
    total = 0.0
    for name in names:
        metaop = case.metagraph[name]
        prices = [t * (certificate.area_price * n + on_paths[name]) for n, t in _usable(case, metaop)]
        total += metaop.layers * min(prices, default=0.0)
    return total / divisor


def _reach(neighbours: dict[str, tuple[str, ...]], start: str) -> frozenset[str]:
    found: set[str] = set()
    todo = list(neighbours[start])
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += neighbours[name]
    return frozenset(found)


def _received_s(case: _PricedCase) -> list[float]:
    """Seconds, both directions, in which each slice receives its input when the cluster is known.

    Between different device sets: latency + bytes / (smaller set * rate), over the slower link if they span nodes.
    """
    if case.cluster is None:
        return [0.0] * len(case.slices)
    cluster, size = case.cluster, case.cluster.devices_per_node
    sources: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for flow in case.metagraph.flows:
        sources[flow.target].append((flow.source, case.metagraph.flow_bytes(flow)))
    at: dict[str, tuple[int, ...]] = {}
    seconds = []
    for _, s in case.slices:
        own = [(s.metaop, case.metagraph[s.metaop].output_bytes)] if s.first_layer else sources[s.metaop]
        total_s = 0.0
        for name, num_bytes in own:
            there = at.get(name, s.devices)
            if num_bytes and set(there) != set(s.devices):
                inside = len({device // size for device in there + s.devices}) == 1
                link = cluster.intra_node if inside else cluster.inter_node
                share = num_bytes / min(len(there), len(s.devices))
                total_s += 2 * (link.latency_s + share / link.bytes_per_s)
        seconds.append(total_s)
        at[s.metaop] = s.devices
    return seconds


def _layer_bytes(metaop: MetaOp, count: int) -> float:
    """Memory of one layer on each of `count` devices: by the largest count given that is no larger."""
    given = [b for n, b in metaop.memory_bytes if n <= count] or [b for _, b in metaop.memory_bytes[:1]] or [0.0]
    return given[-1] / metaop.layers


def _peaks(case: _PricedCase) -> list[float]:
    """Bytes of each device: all its layers; weight and gradient of a shared layer once."""
    twice: dict[str, float] = {}
    for metaop in case.metagraph:
        if metaop.parameters:
            smallest = min((b / metaop.layers for _, b in metaop.memory_bytes), default=0.0)
            saved = min(smallest, metaop.layer_state_bytes or 2 * metaop.layer_param_bytes)
            twice[metaop.parameters] = min(saved, twice.get(metaop.parameters, saved))
    peaks = [0.0] * case.plan.num_devices
    copies: dict[tuple[int, str, int], int] = defaultdict(int)
    for _, s in case.slices:
        metaop = case.metagraph[s.metaop]
        for device in (d for d in s.devices if d < len(peaks)):
            peaks[device] += _layer_bytes(metaop, len(s.devices)) * s.num_layers
            if twice.get(metaop.parameters):
                for layer in range(s.first_layer, s.first_layer + s.num_layers):
                    copies[device, metaop.parameters, layer] += 1
    for (device, key, _), count in copies.items():
        peaks[device] -= (count - 1) * twice[key]
    return peaks


def _name(s: Slice) -> str:
    return f"{s.metaop}[{s.first_layer}:{s.last_layer + 1}]"


def _devices(devices: Sequence[int]) -> str:
    first, last = min(devices), max(devices)
    if last - first + 1 == len(devices):
        return f"{first}-{last}" if last > first else str(first)
    return ",".join(map(str, devices[:6])) + (f",... ({len(devices)})" if len(devices) > 6 else "")
