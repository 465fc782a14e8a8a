"""Scales: views in; whether each has a time axis of its own, and what to say of it, out.

On one axis a step that is far shorter than the other would be a sliver. Then each step fills the width instead.
"""

from collections.abc import Sequence

from spindle.timeline.items import View

OWN_AXIS_RATIO = 2.0  # beyond this ratio of the two shown steps each has an axis of its own


def have_own_axes(views: Sequence[View]) -> bool:
    """Whether one view's shown step lasts more than OWN_AXIS_RATIO times the other's."""
    lengths_s = [view.shown.step_s for view in views]
    return min(lengths_s) > 0 and max(lengths_s) > OWN_AXIS_RATIO * min(lengths_s)


def scales_in_words(views: Sequence[View]) -> str:
    """Which view is drawn smaller, and by how much; empty where all share one axis."""
    if not have_own_axes(views):
        return ""
    shorter, longer = sorted(views, key=lambda view: view.shown.step_s)
    ratio = longer.shown.step_s / shorter.shown.step_s
    number = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
    return f"the {_noun(longer)} is drawn at 1/{number} of the {_noun(shorter)}'s scale"


def _noun(view: View) -> str:
    return "run" if view.source == "measured" else "plan"
