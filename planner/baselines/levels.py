"""Levels: a Problem in, its MetaLevels out, in which a tiny MetaOp takes no level of its own (paper, section 3.1).

- A MetaOp is glue when all its layers, on the count that is fastest, take at most GLUE of the work that each device has
  on average: an embedding table in front of a tower, a loss behind it.
- The level of any other MetaOp is one more than the highest among the other ones that it waits for, directly or through
  glue. So a tower stands beside its neighbors whether or not a table comes first.
- Glue runs in steps of its own between levels, as soon as all it waits for is done: a step costs no more than the glue
  itself. No step and no level has a flow inside it.
"""

from math import inf

from spindle.planner.problem import Problem

GLUE = 0.005


def meta_levels(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Levels and steps of glue, in the order in which they run."""
    glue = _glue(problem)
    turns: dict[int, tuple[int, float]] = {}  # (levels before it, steps of glue after those; inf: it is of the level)
    for op in problem.order:
        before = [turns[b] for b in problem.predecessors[op]]
        if op in glue:
            turns[op] = max(((n + 1, 0) if step == inf else (n, step + 1) for n, step in before), default=(0, 0))
        else:
            turns[op] = (max((n + 1 if step == inf else n for n, step in before), default=0), inf)
    return tuple(tuple(op for op in problem.order if turns[op] == turn) for turn in sorted(set(turns.values())))


def _glue(problem: Problem) -> frozenset[int]:
    most_s = GLUE * sum(problem.least_area_s) / problem.num_devices
    fastest_s = (layers * curve.times_s[-1] for layers, curve in zip(problem.layers, problem.curves, strict=True))
    return frozenset(op for op, time_s in enumerate(fastest_s) if time_s <= most_s)
