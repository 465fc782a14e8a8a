"""Paper: a Problem in, the slices of the paper's planner out: level optimum, tuples, waves, placement (its section 3).

What it leaves open is settled by its own result: waves are made by each of `READINGS`, devices are chosen for a wave's
items in each of `ORDERS`, and the schedule that ends first is taken. Where it is said what differs from the letter:

- Tiny MetaOps take no level of their own (`levels`).
- A wave may end with another tuple than its shortest, and tuples may stand on counts that divide the devices (`waves`).
- Waves are an order, not a barrier: a device goes on when its next slice's data is there. The paper's runtime is made
  to transfer and to reduce, not to wait for all (section 3.6). Strict waves (`aligned`) keep the barrier.
"""

from collections.abc import Sequence

from spindle.errors import InfeasibleError
from spindle.planner.baselines.place import ORDERS, Order, place
from spindle.planner.baselines.waves import PRINTED, READINGS, Reading, Waves, paper_waves
from spindle.planner.problem import Problem
from spindle.values.plan import Slice

MOST_TRIED = 4096  # MetaOps times devices beyond which a few readings are tried
PLACED_AGAIN = 6  # schedules whose devices are chosen in other orders too

Schedule = tuple[Slice, ...]


def paper_slices(problem: Problem, *, aligned: bool = False) -> Schedule:
    """The schedule of the paper's planner; raises InfeasibleError when none fits the memory of the devices."""
    first = ORDERS[0]
    found: list[tuple[float, Schedule, Waves]] = []
    reason: InfeasibleError | None = None
    for reading in _readings(problem):
        waves = paper_waves(problem, reading)
        try:
            slices = _placed(problem, waves, first, aligned)
        except InfeasibleError as error:
            reason = error
            continue
        found.append((_end_s(slices), slices, waves))
    if not found:
        assert reason is not None, "each reading gives a schedule or an InfeasibleError"
        raise reason
    found.sort(key=lambda row: row[0])
    schedules = [slices for _, slices, _ in found[:PLACED_AGAIN]]
    for _, _, waves in found[:PLACED_AGAIN] if not aligned else ():
        for order in ORDERS[1:]:
            try:
                schedules.append(_placed(problem, waves, order, aligned))
            except InfeasibleError:  # another order fitted
                continue
    return min(schedules, key=_end_s)


def _readings(problem: Problem) -> Sequence[Reading]:
    if len(problem) * problem.num_devices > MOST_TRIED:
        return (PRINTED, *(r for r in READINGS if r.propose == "count" and r.align == "full" and not r.ahead))
    return READINGS


def _placed(problem: Problem, waves: Waves, order: Order, aligned: bool) -> Schedule:
    return place(problem, waves, aligned=aligned, in_order=None if aligned else order)


def _end_s(slices: Schedule) -> float:
    return max(s.end_s for s in slices)
