"""Likely: the outlook of a plan in, the lines that say it out, at most 100 columns wide."""

from collections.abc import Mapping

from spindle.planner.report.figures import titled
from spindle.values.outlook import Gain, Proof
from spindle.values.plan import Plan

CHANGES: Mapping[str, tuple[str, str]] = {
    "host": ("if launching kernels took half as long", "if twice as long"),
    "network": ("if links were twice as fast", "if half as fast"),
    "batch": ("with half of each batch", "with twice"),
}
"""In words what halves and what doubles, by the name of the move."""


def likely_lines(plan: Plan) -> list[str]:
    """How long the step is likely to take; () when nobody asked."""
    found = plan.outlook
    if found is None or found.low_s >= found.high_s:
        return []
    ends = f"{_digits(found.low_s)} to {_digits(found.high_s)} s a step"
    return titled("likely", f"{ends}: nine of ten measured steps lay so near to {found.source} costs")


def gain_lines(plan: Plan, source: str = "SOURCE", cluster: str = "C") -> list[str]:
    """How much of the step is likely gained, and how that changes with its causes; () when nobody asked.

    `source` and `cluster`: as the command line named them, for what would prove a gain.
    """
    if plan.outlook is None or plan.outlook.gain is None or plan.outlook.gain.share <= 0:
        return []
    gain = plan.outlook.gain
    ends = f"likely {_percent(gain.low)} to {_percent(gain.high)} %"
    text = f"a step {_percent(gain.share)} % shorter than with {gain.baseline}; {ends}"
    if gain.proof:
        text += f": unproven; {_proof(gain.proof, gain, plan, source, cluster)}"
    lines = titled("gain", text)
    for each in gain.moves:
        half, double = CHANGES[each.name]
        lines += titled("", f"{_moved(each.half)} {half}, {_moved(each.double)} {double}")
    return lines


def _moved(share: float | None) -> str:
    return "impossible" if share is None else f"{_percent(share)} %"


def _proof(proof: Proof, gain: Gain, plan: Plan, source: str, cluster: str) -> str:
    devices = plan.num_devices
    fit = f"spindle calibrate {source} --cluster {cluster} --steps FILE"
    if proof == "profile":
        return f"spindle profile {source} --cluster {cluster} -o profile.json would show"
    if proof == "devices":
        fewer = f"{devices} and {max(plan.devices_per_node, devices // 2)}"
        few = fewer if devices > plan.devices_per_node else f"{devices} and more"
        return f"measured steps of one batch on {few} GPUs would show ({fit})"
    if proof == "batches":
        return f"measured steps of two batches on {devices} GPUs would show ({fit})"
    return f"only runs would show: spindle train --plan, of this plan and of --method {gain.baseline}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _digits(value: float) -> str:
    """Three digits.

    >>> _digits(0.8154), _digits(1234.5), _digits(2.0)
    ('0.815', '1230', '2.00')
    """
    text = f"{value:#.3g}"
    return f"{float(text):g}" if "e" in text else text.removesuffix(".")
