"""Orders: a model in, first waves of its MetaOps out: which MetaOp may start in which wave of the wave LP.

- By level: as many waves as the longest chain has MetaOps (the paper's MetaLevels, but slices may stay longer).
- By search of the wave LP: more waves, moved about at random while the wave LP gets no longer.
- By schedule: the starts of a finished schedule, cut into waves of equal numbers.
"""

import random
from bisect import bisect_right
from collections.abc import Sequence

from spindle.planner.search.list_scheduler import Run
from spindle.planner.search.model import Model
from spindle.planner.search.wave_lp import WaveLp
from spindle.planner.work import Work

MOST_LEVELS = 8
THRESHOLD = 5e-4


def by_level(model: Model) -> list[int]:
    """The longest chain before each MetaOp."""
    return list(model.levels)


def by_search(model: Model, lp: WaveLp, work: Work, units: float, seed: int) -> list[int]:
    """Move MetaOps between waves; take what is not longer than the current order by a shrinking threshold."""
    rng = random.Random(seed)
    left = [float(n) for n in model.layers]
    depth = 1 + max(model.levels)
    waves = max(MOST_LEVELS, depth + 4)
    first = by_level(model)
    targets = lp.solve(left, first)
    value = best_value = targets.ends_s[-1] if targets else float("inf")
    best, begun = first, work.spent
    while work.spent - begun < units and not work.is_stopped:
        moved = first[:]
        for _ in range(rng.randint(1, 3)):
            m = rng.randrange(len(model))
            moved[m] = min(waves - 1, max(0, moved[m] + rng.choice((-2, -1, 1, 2))))
        _repair(model, moved)
        targets = lp.solve(left, moved)
        if targets is None:
            continue
        threshold = THRESHOLD * (1 - (work.spent - begun) / units)
        if targets.ends_s[-1] <= value * (1 + threshold):
            first, value = moved, targets.ends_s[-1]
            if value < best_value:
                best, best_value = first, value
    return best


def by_schedule(model: Model, runs: Sequence[Run], waves: int) -> list[int]:
    """Starts of the MetaOps in a schedule, cut into `waves` equal numbers."""
    starts = [float("inf")] * len(model)
    for m, _, _, start, _, _ in runs:
        starts[m] = min(starts[m], start)
    ordered = sorted(starts)
    marks = [ordered[len(ordered) * k // waves] for k in range(1, waves)]
    first = [bisect_right(marks, start) for start in starts]
    _repair(model, first)
    return first


def _repair(model: Model, first: list[int]) -> None:
    """Raise first waves until everything starts after all it waits for."""
    for m in model.order:
        for p in model.before[m]:
            first[m] = max(first[m], first[p] + 1)
