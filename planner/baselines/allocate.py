"""Allocation: the MetaOps of one MetaLevel in, at most two (count, layers) tuples of each out (paper, section 3.3).

- The continuous optimum C* of the relaxed problem (paper, eq. 8: all MetaOps start and end together) comes from an LP
  or from bisection. Both work on the hull of each curve (`curves`), where they agree exactly and where C* is what
  mixing counts can reach; `form="hyperbola"` bisects on a + b/n as in the paper's Fig. 5a.
- Where valid counts end below N some devices stay free and C* is the slowest MetaOp's time on its largest count.
- A MetaOp so light that n* is below its first count shares a device in time: its dummy tuple (n = 0) is dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spindle.planner.costing.curves import Curve

if TYPE_CHECKING:
    import pulp

Form = Literal["hull", "hyperbola"]


@dataclass(frozen=True, slots=True)
class Tuple:
    """`layers` consecutive layers on `count` devices: the paper's ASL-tuple without a start time."""

    count: int
    layers: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The allocation plan of one MetaLevel.

    optimum_s   C*, the continuous optimum
    shares      n* of each MetaOp
    tuples      the discretised tuples of each MetaOp, larger count first
    """

    optimum_s: float
    shares: tuple[float, ...]
    tuples: tuple[tuple[Tuple, ...], ...]


def allocate(
    curves: Sequence[Curve],
    layers: Sequence[int],
    num_devices: int,
    *,
    method: Literal["bisection", "lp"] = "bisection",
) -> Allocation:
    """Allocate the devices to the MetaOps of one level.

    Example:
        >>> curve = Curve((1, 2, 4), (4.0, 2.0, 1.0))
        >>> allocate((curve, curve), (3, 1), 4).optimum_s
        4.0
    """
    hulls = [curve.hull for curve in curves]
    find = optimum_by_lp if method == "lp" else optimum_by_bisection
    optimum_s = find(hulls, layers, num_devices)
    return Allocation(
        optimum_s=optimum_s,
        shares=tuple(h.rate_inverse(optimum_s / count) for h, count in zip(hulls, layers, strict=True)),
        tuples=tuple(round_tuples(discretise(h, n, optimum_s), n) for h, n in zip(hulls, layers, strict=True)),
    )


def optimum_by_bisection(
    curves: Sequence[Curve], layers: Sequence[int], num_devices: int, *, form: Form = "hull", tolerance: float = 1e-12
) -> float:
    """C* by bisection on  sum_m T_m^-1(C / L_m) = N  (paper, eq. 9 and algorithm 2). O(M log(1 / tolerance))."""
    inverses = [_inverse(curve, form) for curve in curves]
    low = max(c.times_s[-1] * n for c, n in zip(curves, layers, strict=True))
    high = sum(c.times_s[0] * c.counts[0] * n for c, n in zip(curves, layers, strict=True))

    def needed(optimum_s: float) -> float:
        return sum(inverse(optimum_s / n) for inverse, n in zip(inverses, layers, strict=True))

    if needed(low) <= num_devices:
        return low
    while high - low > tolerance * high:
        middle = (low + high) / 2
        if needed(middle) < num_devices:
            high = middle
        else:
            low = middle
    return high


def _inverse(curve: Curve, form: Form) -> Callable[[float], float]:
    return curve.rate_inverse if form == "hull" else curve.inverse


def optimum_by_lp(curves: Sequence[Curve], layers: Sequence[int], num_devices: int) -> float:
    """C* as a linear programme over seconds y[m, n] that MetaOp m spends on n devices."""
    import pulp

    from spindle.planner.highs import THREADS

    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    optimum = problem.add_variable("C", lowBound=0)
    seconds = [
        {n: problem.add_variable(f"y_{m}_{n}", lowBound=0) for n in curve.counts} for m, curve in enumerate(curves)
    ]
    problem.setObjective(optimum)
    add_one_at_a_time(problem, seconds, optimum)
    add_capacity(problem, seconds, optimum, num_devices)
    add_all_layers(problem, seconds, curves, layers)
    problem.solve(pulp.HiGHS(msg=False, threads=THREADS))
    if problem.status != pulp.LpStatusOptimal:
        raise AssertionError(f"the allocation LP of {len(curves)} MetaOps ended {pulp.LpStatus[problem.status]}")
    return float(optimum.value())


Seconds = Sequence[dict[int, "pulp.LpVariable"]]


def add_one_at_a_time(problem: "pulp.LpProblem", seconds: Seconds, optimum: "pulp.LpVariable") -> None:
    """sum_n y[m, n] <= C: the tuples of a MetaOp run one after another (paper, eq. 6)."""
    for of_metaop in seconds:
        problem += sum(of_metaop.values()) <= optimum


def add_capacity(problem: "pulp.LpProblem", seconds: Seconds, optimum: "pulp.LpVariable", num_devices: int) -> None:
    """sum_{m, n} n y[m, n] <= N C: no more device time than there is (paper, eq. 5)."""
    problem += sum(n * y for of_metaop in seconds for n, y in of_metaop.items()) <= num_devices * optimum


def add_all_layers(problem: "pulp.LpProblem", seconds: Seconds, curves: Sequence[Curve], layers: Sequence[int]) -> None:
    """sum_n y[m, n] / T_m(n) = L_m: every layer runs (paper, eq. 7)."""
    for of_metaop, curve, num_layers in zip(seconds, curves, layers, strict=True):
        problem += sum(y * (1 / curve.time_by_count[n]) for n, y in of_metaop.items()) == num_layers


def discretise(curve: Curve, layers: int, optimum_s: float) -> tuple[Tuple, ...]:
    """Two tuples on the closest valid counts that together take C* (paper, eq. 10a and 10b):

        l_hi + l_lo = L   and   T(n_hi) l_hi + T(n_lo) l_lo = C*   =>   l_hi = (T(n_lo) L - C*) / (T(n_lo) - T(n_hi))

    The dummy tuple with n_lo = 0 is dropped, and all layers go to n_hi.
    """
    low, high = curve.neighbors(optimum_s / layers)
    if low in (0, high):
        return (Tuple(high, layers),)
    slow, fast = curve.time_by_count[low], curve.time_by_count[high]
    on_high = min(layers, max(0.0, (slow * layers - optimum_s) / (slow - fast)))
    return (Tuple(high, on_high), Tuple(low, layers - on_high))


def round_tuples(tuples: tuple[Tuple, ...], layers: int) -> tuple[Tuple, ...]:
    """Whole layers: round the first tuple, the other takes the rest, so that eq. 10a stays exact; empty ones go."""
    first = int(tuples[0].layers + 0.5)
    rounded = (Tuple(tuples[0].count, first), *(Tuple(t.count, layers - first) for t in tuples[1:]))
    return tuple(t for t in rounded if t.layers)
