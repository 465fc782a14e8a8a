"""Accounts: a row of items in, its seconds by cause out; they add up to the step.

Where items overlap (a reduction beside backward), each moment is booked once, under the first cause in the order of
`Cause`. What no item covers is booked as overhead between instructions.
"""

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise

from spindle.timeline.items import IDLING, Cause, Item, StepView

Accounts = Mapping[Cause, float]
ROUNDING = 1e-12
_ORDER = {cause: index for index, cause in enumerate(Cause)}
_Piece = tuple[float, float, Cause]


def account(row: Sequence[Item], step_s: float) -> Accounts:
    """Seconds of `step_s` by cause; causes without time are left out."""
    pieces = [piece for item in row for piece in _pieces(item)]
    pieces.sort(key=lambda piece: (piece[0], piece[1]))
    if any(before[1] > after[0] for before, after in pairwise(pieces)):
        pieces = _disjoint(pieces)
    found: dict[Cause, float] = {}
    for start_s, end_s, cause in pieces:
        found[cause] = found.get(cause, 0.0) + end_s - start_s
    rest_s = step_s - sum(found.values())
    if rest_s > ROUNDING * step_s:
        found[Cause.OVERHEAD] = found.get(Cause.OVERHEAD, 0.0) + rest_s
    return found


def total(view: StepView) -> Accounts:
    """Device-seconds of a step by cause."""
    found: dict[Cause, float] = dict.fromkeys(Cause, 0.0)
    for row in view.rows:
        for cause, seconds in account(row, view.step_s).items():
            found[cause] += seconds
    return {cause: seconds for cause, seconds in found.items() if seconds > 0}


def idle_share(accounts: Accounts) -> float:
    """Share of the time in which devices neither compute nor communicate, nor are at another step."""
    whole_s = sum(accounts.values())
    return sum(accounts.get(cause, 0.0) for cause in IDLING) / whole_s if whole_s else 0.0


def _pieces(item: Item) -> list[_Piece]:
    if not item.blocked_s:
        return [(item.start_s, item.end_s, item.what.cause)] if item.end_s > item.start_s else []
    middle_s = min(item.start_s + item.blocked_s, item.end_s)
    both = ((item.start_s, middle_s, item.what.blocked_cause), (middle_s, item.end_s, item.what.cause))
    return [piece for piece in both if piece[1] > piece[0]]


def _disjoint(pieces: Sequence[_Piece]) -> list[_Piece]:
    """The same moments, each under the first of its causes. `pieces` in order of start."""
    moments = sorted({moment for start_s, end_s, _ in pieces for moment in (start_s, end_s)})
    open_now: list[tuple[int, float, Cause]] = []
    found, at = [], 0
    for start_s, end_s in pairwise(moments):
        while at < len(pieces) and pieces[at][0] <= start_s:
            heapq.heappush(open_now, (_ORDER[pieces[at][2]], pieces[at][1], pieces[at][2]))
            at += 1
        while open_now and open_now[0][1] <= start_s:
            heapq.heappop(open_now)
        if open_now:
            found.append((start_s, end_s, open_now[0][2]))
    return found
