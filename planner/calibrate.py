"""Calibrate: measured steps and what they ran, in; the calibration that explains them best out.

A row's prediction is the whole step of its plan. Plans are made under the calibration of the round before, and inside
a round only costed again, so that a fit takes seconds; rounds end when the plans no longer change.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from spindle.cost.measured.fitting import fit_steps
from spindle.errors import SpindleWarning
from spindle.planner.recost import Costs
from spindle.values.calibration import Calibration, MeasuredStep
from spindle.values.cost_options import CostOptions
from spindle.values.plan import Plan

ROUNDS = 4

Solved = tuple[Plan, CostOptions]


@dataclass(frozen=True)
class Case:
    """A measured row: how it is planned under a calibration, and what its costs are made of.

    solve     the plan, its fixed part included, and the memory choices under which it fits
    costs     of the uncalibrated cluster, with given memory choices
    """

    row: MeasuredStep
    solve: Callable[[Calibration], Solved]
    costs: Callable[[CostOptions], Costs]


def calibrate_cases(cases: Sequence[Case], device: str) -> Calibration:
    """The calibration of `device`; its rows carry what the calibrated planner itself says of them."""
    found = Calibration(device=device)
    solved = [case.solve(found) for case in cases]
    for _ in range(ROUNDS):
        found = _fit(cases, solved, found)
        before, solved = solved, [case.solve(found) for case in cases]
        if all(_alike(one, other) for one, other in zip(before, solved, strict=True)):
            break
    if len({_choices(cost_options) for _, cost_options in solved}) > 1:
        _warn_of_choices(cases, solved)
    rows = (replace(case.row, predicted_s=plan.expected_s) for case, (plan, _) in zip(cases, solved, strict=True))
    return replace(found, rows=tuple(rows))


def _alike(one: Solved, other: Solved) -> bool:
    """Whether both run the same layers on the same devices, with the same memory choices."""
    runs = [[(s.metaop, s.first_layer, s.num_layers, s.devices) for s in plan.slices] for plan, _ in (one, other)]
    return runs[0] == runs[1] and one[1] == other[1]


def _choices(cost_options: CostOptions) -> tuple[bool, bool, bool]:
    return cost_options.shard_optimizer, cost_options.recompute, bool(cost_options.shard_parameters)


def _warn_of_choices(cases: Sequence[Case], solved: Sequence[Solved]) -> None:
    words = "sharded optimizer states", "recomputed activations", "sharded parameters"
    first: dict[tuple[bool, bool, bool], MeasuredStep] = {}
    for case, (_, cost_options) in zip(cases, solved, strict=True):
        first.setdefault(_choices(cost_options), case.row)

    def in_words(choices: tuple[bool, bool, bool]) -> str:
        chosen = [word for word, is_chosen in zip(words, choices, strict=True) if is_chosen]
        return f"with {' and '.join(chosen)}" if chosen else "as they are"

    ways = "; ".join(f"{row} {in_words(choices)}" for choices, row in first.items())
    warnings.warn(
        f"the rows fit memory in different ways ({ways}), and one program runs one way; set shard_optimizer, recompute "
        "and shard_parameters in the workload as they were in the measured steps",
        SpindleWarning,
        stacklevel=3,
    )


def _fit(cases: Sequence[Case], solved: Sequence[Solved], start: Calibration) -> Calibration:
    costs = [case.costs(cost_options) for case, (_, cost_options) in zip(cases, solved, strict=True)]

    def predict(calibration: Calibration) -> list[float]:
        found = []
        for (plan, _), cost in zip(solved, costs, strict=True):
            step_s = cost.under(calibration).step_s(plan)
            assert step_s is not None, "the slices of a plan have times on the batch that it was made for"
            found.append(step_s + calibration.step_s)
        return found

    return fit_steps([case.row for case in cases], predict, start)
