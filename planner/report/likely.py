"""Likely: the outlook of a plan in, the lines that say it out, at most 100 columns wide."""

import textwrap
from collections.abc import Mapping

from spindle.outlook import Gain, Moves, Proof
from spindle.plan import Plan

WIDTH = 100
TITLES: Mapping[str, str] = {"host": "launch overhead", "network": "link time", "batch": "batch"}


def outlook_lines(plan: Plan, source: str = "SOURCE", cluster: str = "C") -> list[str]:
    """How long the step is likely to take, how much of it is likely gained, and how that moves; () when not asked for.

    `source` and `cluster`: as the command line named them, for what would prove a gain.
    """
    found = plan.outlook
    if found is None:
        return []
    lines = []
    if found.low_s < found.high_s:
        ends = f"{_digits(found.low_s)} to {_digits(found.high_s)} s a step"
        text = f"{ends} ({found.source} costs: nine of ten held-out steps lie in such a band)"
        lines += _folded("likely", text)
    if found.gain is not None and found.gain.share > 0:
        lines += _folded("gain", _gain(found.gain, plan, source, cluster))
        lines += _folded("", _moves(found.gain.moves))
    return lines


def _gain(gain: Gain, plan: Plan, source: str, cluster: str) -> str:
    ends = f"{_percent(gain.low)} to {_percent(gain.high)} %"
    text = f"{_percent(gain.share)} % of the step of {gain.baseline}, likely {ends}"
    return f"{text}: unproven; {_proof(gain.proof, gain, plan, source, cluster)}" if gain.proof else text


def _proof(proof: Proof, gain: Gain, plan: Plan, source: str, cluster: str) -> str:
    devices = plan.num_devices
    fit = f"spindle calibrate {source} --cluster {cluster} --steps FILE"
    if proof == "profile":
        return f"spindle profile {source} --cluster {cluster} -o profile.json would tell"
    if proof == "devices":
        fewer = f"{devices} and {max(plan.devices_per_node, devices // 2)}"
        few = fewer if devices > plan.devices_per_node else f"{devices} and more"
        return f"measured steps of one batch on {few} GPUs would tell ({fit})"
    if proof == "batches":
        return f"measured steps of two batches on {devices} GPUs would tell ({fit})"
    return f"only runs would tell: spindle train --plan, of this plan and of --method {gain.baseline}"


def _moves(moves: tuple[Moves, ...]) -> str:
    if not moves:
        return ""
    rows = [
        f"{TITLES[each.name]} {', '.join(_percent(value) for value in (each.half, each.as_is, each.double))} %"
        for each in moves
    ]
    return f"with halved, same and doubled {'; '.join(rows)}"


def _folded(title: str, text: str) -> list[str]:
    if not text:
        return []
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{title:<11}",
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _digits(value: float) -> str:
    """Three digits.

    >>> _digits(0.8154), _digits(1234.5), _digits(2.0)
    ('0.815', '1230', '2.00')
    """
    text = f"{value:#.3g}"
    return f"{float(text):g}" if "e" in text else text.removesuffix(".")
