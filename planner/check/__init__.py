"""Check: a plan in, what is wrong with it out, in words.

Shares no code with the makers of plans: every rule is evaluated from the plan, its MetaGraph and its cluster alone.
Rules that need a MetaGraph or a cluster the plan does not carry (and nobody gave) are left out.

case   what the rules look at
rules  waves, devices, layers, counts, data, memory
proof  what the certificate of the lower bound proves
timed  the same of prices over time
step   reductions, update and step as predicted; the baselines
"""

from collections.abc import Sequence

from spindle.errors import PlanError
from spindle.planner.check.case import RELATIVE, Case, CostedCase, Finding, named, ranges
from spindle.planner.check.proof import bound_is_proved
from spindle.planner.check.rules import METAGRAPH_RULES, PLAN_RULES, unknown_metaops
from spindle.planner.check.step import baselines_are_possible, step_is_predicted
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan

__all__ = ["Finding", "check_plan", "picture", "require_plan"]


def check_plan(plan: Plan, metagraph: MetaGraph | None = None, cluster: Cluster | None = None) -> tuple[Finding, ...]:
    """Findings about `plan`; none when it keeps every rule. MetaGraph and cluster are those it carries unless given."""
    metagraph, cluster = metagraph or plan.metagraph, cluster or plan.cluster
    slices = tuple(
        sorted(
            ((wave.index, s) for wave in plan.waves for s in wave.slices),
            key=lambda ws: (ws[1].start_s, ws[1].end_s, ws[1].metaop, ws[1].first_layer),
        )
    )
    case = Case(plan, RELATIVE * plan.makespan_s, slices)
    findings = [finding for rule in PLAN_RULES for finding in rule(case)]
    if metagraph is not None:
        unknown = list(unknown_metaops(slices, metagraph))
        findings += unknown
        if not unknown:
            costed = CostedCase(plan, case.slack_s, slices, metagraph, cluster)
            costed_rules = (*METAGRAPH_RULES, bound_is_proved, baselines_are_possible)
            findings += [finding for costed_rule in costed_rules for finding in costed_rule(costed)]
            findings += step_is_predicted(costed) if not findings else ()  # slices that break rules have no step
    return tuple(findings)


def require_plan(plan: Plan, metagraph: MetaGraph | None = None, cluster: Cluster | None = None) -> None:
    """Raise PlanError with the plan's table, the broken rows marked, unless the plan keeps every rule."""
    findings = check_plan(plan, metagraph, cluster)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise PlanError(f"{findings[0]}{more}; plan again, or mend it by hand\n{picture(plan, findings)}")


def picture(plan: Plan, findings: Sequence[Finding], *, rows: int = 24) -> str:
    """The waves that findings are about and their neighbors, one row each, with `<-- here` on the broken ones."""
    marked = {index for finding in findings for index in finding.waves}
    near = {index + step for index in marked for step in (-1, 0, 1)}
    lines = []
    for wave in plan.waves:
        if wave.index in near or (not marked and wave.index < rows):
            parts = ", ".join(f"{named(s)} on {ranges(s.devices)}" for s in wave.slices)
            row = f"wave {wave.index:>4}  {wave.start_s:>10.6f} .. {wave.end_s:>10.6f} s  {parts}"
            lines.append(row[:91] + (" <-- here" if wave.index in marked else ""))
    return "\n".join(lines[:rows])
