"""Calibrate: measured steps and what they ran, in; the calibration that explains them best out.

A row's prediction is the whole step of its plan. Plans are made under the calibration of the round before, and inside
a round only costed again, so that a fit takes seconds; rounds end when the calibration no longer moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log

from spindle.calibration import FACTORS, Calibration, MeasuredStep
from spindle.cost.fitting import fit_steps
from spindle.plan import Plan
from spindle.planner.recost import Costs
from spindle.pricing import Pricing

ROUNDS = 4
SETTLED = 0.01  # change of a factor's logarithm, and of the fixed part over the shortest step, that ends the rounds


@dataclass(frozen=True)
class Case:
    """A measured row: how it is planned under a calibration, and what its costs are made of.

    solve     the plan, its fixed part included, and the memory choices under which it fits
    costs     of the uncalibrated cluster, with given memory choices
    """

    row: MeasuredStep
    solve: Callable[[Calibration], tuple[Plan, Pricing]]
    costs: Callable[[Pricing], Costs]


def calibrate_cases(cases: Sequence[Case], device: str) -> Calibration:
    """The calibration of `device`; its rows carry what the calibrated planner itself says of them."""
    rows = [case.row for case in cases]
    found = Calibration(device=device)
    for _ in range(ROUNDS):
        before, found = found, _fit(cases, rows, found)
        if _moved(before, found, min(row.seconds for row in rows)) < SETTLED:
            break
    told = [case.solve(found)[0].expected_s for case in cases]
    return replace(found, rows=tuple(replace(row, predicted_s=s) for row, s in zip(rows, told, strict=True)))


def memory_choices_differ(cases: Sequence[Case], calibration: Calibration) -> bool:
    """Whether some rows only fit with other memory choices than others: one program would use one."""
    return len({case.solve(calibration)[1] for case in cases}) > 1


def _fit(cases: Sequence[Case], rows: Sequence[MeasuredStep], start: Calibration) -> Calibration:
    solved = [case.solve(start) for case in cases]
    costs = [case.costs(pricing) for case, (_, pricing) in zip(cases, solved, strict=True)]

    def predict(calibration: Calibration) -> list[float]:
        found = []
        for (plan, _), cost in zip(solved, costs, strict=True):
            step_s = cost.under(calibration).step_s(plan)
            assert step_s is not None, "the slices of a plan have times on the batch that it was made for"
            found.append(step_s + calibration.step_s)
        return found

    return fit_steps(rows, predict, start.device)


def _moved(before: Calibration, after: Calibration, shortest_s: float) -> float:
    factors = [abs(log(getattr(after, name) / getattr(before, name))) for name in FACTORS]
    return max(*factors, abs(after.step_s - before.step_s) / shortest_s)
