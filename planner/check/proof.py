"""Rule of the bound: what the plan's certificate proves, by its prices alone."""

from collections import defaultdict
from collections.abc import Iterator

from spindle.planner.check.case import RELATIVE, BadCertificate, CostedCase, Finding, usable
from spindle.planner.check.timed import horizon_proved_s
from spindle.values.metagraph import MetaOp
from spindle.values.plan import Certificate


def bound_is_proved(case: CostedCase) -> Iterator[Finding]:
    """lower_bound_s is no more than the certificate proves, and the makespan no less than the obvious bounds."""
    plan = case.plan
    if plan.certificate is not None:
        names = frozenset(case.metagraph.by_name)
        try:
            proved_s = _proved_s(case, plan.certificate, names)
            if plan.certificate.over_time:
                proved_s = max(proved_s, horizon_proved_s(case, plan.certificate.over_time))
        except BadCertificate as error:
            yield Finding(str(error))
            return
        if plan.lower_bound_s > proved_s * (1 + RELATIVE):
            yield Finding(f"lower_bound_s is {plan.lower_bound_s} but its certificate proves only {proved_s}")
    for kind, bound_s in (("device time", _area_s(case)), ("the longest chain", _chain_s(case))):
        if plan.makespan_s < bound_s - case.slack_s:
            yield Finding(f"makespan_s is {plan.makespan_s} but {kind} alone takes {bound_s} s")


def _area_s(case: CostedCase) -> float:
    least = (metaop.layers * min((n * t for n, t in usable(case, metaop)), default=0.0) for metaop in case.metagraph)
    return sum(least) / case.plan.num_devices


def _fastest_s(case: CostedCase, metaop: MetaOp) -> float:
    return metaop.layers * min((t for _, t in usable(case, metaop)), default=0.0)


def _chain_s(case: CostedCase) -> float:
    end_s: dict[str, float] = {}
    for name in case.metagraph.topological_order:
        before_s = max((end_s[p] for p in case.metagraph.predecessors[name]), default=0.0)
        end_s[name] = before_s + _fastest_s(case, case.metagraph[name])
    return max(end_s.values())


def _proved_s(case: CostedCase, certificate: Certificate, names: frozenset[str]) -> float:
    """What a certificate proves about the MetaOps `names` (the formula stands in `spindle.values.plan.Certificate`)."""
    if certificate.through:
        if certificate.through not in names:
            raise BadCertificate(f"the certificate names {certificate.through!r}, which is not there to be named")
        before = _reach(case.metagraph.predecessors, certificate.through) & names
        after = _reach(case.metagraph.successors, certificate.through) & names
        ends_s = sum(_proved_s(case, c, s) for c, s in ((certificate.head, before), (certificate.tail, after)) if c)
        return ends_s + _fastest_s(case, case.metagraph[certificate.through])
    on_paths: dict[str, float] = defaultdict(float)
    for weight, path in certificate.paths:
        for name, following in zip(path, (*path[1:], ""), strict=True):
            if name not in names or (following and following not in case.metagraph.successors[name]):
                raise BadCertificate(f"the certificate's path {' -> '.join(path)} is not a chain of the MetaGraph")
            on_paths[name] += weight
    divisor = certificate.area_price * case.plan.num_devices + sum(weight for weight, _ in certificate.paths)
    if not divisor:
        return 0.0
    total = 0.0
    for name in names:
        metaop = case.metagraph[name]
        prices = [t * (certificate.area_price * n + on_paths[name]) for n, t in usable(case, metaop)]
        total += metaop.layers * min(prices, default=0.0)
    return total / divisor


def _reach(neighbors: dict[str, tuple[str, ...]], start: str) -> frozenset[str]:
    found: set[str] = set()
    todo = list(neighbors[start])
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += neighbors[name]
    return frozenset(found)
