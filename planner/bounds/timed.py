"""Timed bound: a Problem, a bound and the makespan of a plan in, a stronger bound, proved by prices over time, out.

The allot bound forgets when things run. Here [0, C] is cut into K intervals of d_k seconds. p_k >= 0 is the price of a
device-second in interval k; q_k >= 0, of a flow m -> s, the price of each second of k after s has started less each
second after m has ended. A schedule that ends by C pays at most N sum_k p_k d_k for device time, and never more than 0
for a flow, since m ends before s starts. It pays at least the sum over MetaOps of

    min over start S and end E of   (device time of its layers in [S, E] at prices p)
                                  + (seconds after S at prices q of flows into it) - (those after E, of flows out of it)

so where that sum is more than N sum_k p_k d_k, no schedule ends by C, whatever the prices are.

- `worth` is the quotient. S and E are not before all that must come before, nor after C less what must come after. In
  each pair of cells for S and E the device time is bounded by a price of a layer (any is valid; the best is taken).
- Prices are duals of the time-indexed LP (`_TimedLp`), so an inexact solve costs strength and never validity. Prices at
  one C are good ones at a larger C too: the largest C that they prove is found by arithmetic, then the LP is solved
  there again.
- Work is counted before it is done, so the same input gives the same bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import highspy
import numpy as np
import numpy.typing as npt

from spindle.planner.highs import is_solved, make_highs
from spindle.planner.problem import Problem
from spindle.values.plan import TimePrices

Array = npt.NDArray[np.float64]
INTERVALS = (8, 12, 24, 24, 32, 32)  # of one solve after another, as far as the work goes: more never proves less
MOST_METAOPS = 40
TRIALS = 6  # horizons tried for each set of prices
LP_UNITS, CELL_UNITS = 7.5e-3, 2e-3  # for each squared column, for each cell and layer price; as in `search.work`
MARGIN = 1e-9  # of the worth: what sums of floats may be off by
INF = highspy.kHighsInf


@dataclass(frozen=True, slots=True)
class _Windows:
    """Least seconds before the start and after the end of each MetaOp, and of itself."""

    before_s: tuple[float, ...]
    after_s: tuple[float, ...]
    own_s: tuple[float, ...]


def timed_bound(problem: Problem, bound_s: float, makespan_s: float, units: float) -> TimePrices | None:
    """Prices that prove the largest horizon found beyond `bound_s`; None when `units` of work buy none.

    `makespan_s` is that of any valid schedule, which no bound exceeds.
    """
    windows = _windows(problem)
    best: TimePrices | None = None
    for intervals in INTERVALS if len(problem) <= MOST_METAOPS else ():
        units -= _units(problem, intervals)
        if units < 0:
            break
        prices = _TimedLp(problem, _edges(bound_s, intervals, windows), windows).prices()
        found = _largest(problem, prices, windows, bound_s, makespan_s) if prices else None
        gained = found.horizon_s / bound_s - 1 if found else 0.0
        if found:
            bound_s, best = found.horizon_s, found
        if gained < 1e-4 and intervals == INTERVALS[-1]:
            break
    return best


def _units(problem: Problem, intervals: int) -> float:
    """Estimated work of one solve and the trials that follow."""
    counts = [len(curve.hull.counts) for curve in problem.curves]
    columns = intervals * (sum(counts) + 3 * len(counts))
    cells = sum(counts) * intervals * (2 * intervals) ** 2
    return LP_UNITS * columns**2 + TRIALS * CELL_UNITS * cells


def _windows(problem: Problem) -> _Windows:
    """Before each MetaOp: the longest chain to it, or the device time of all that it waits for; after it alike."""
    own_s = tuple(n * curve.times_s[-1] for n, curve in zip(problem.layers, problem.curves, strict=True))
    sides = (
        (problem.order, problem.predecessors, problem.ancestors),
        (problem.order[::-1], problem.successors, problem.descendants),
    )
    found: list[tuple[float, ...]] = []
    for order, near, far in sides:
        away_s = [0.0] * len(problem)
        for m in order:
            area_s = sum(problem.least_area_s[other] for other in far[m]) / problem.num_devices
            away_s[m] = max([area_s, *(away_s[other] + own_s[other] for other in near[m])])
        found.append(tuple(away_s))
    return _Windows(before_s=found[0], after_s=found[1], own_s=own_s)


def _edges(horizon_s: float, intervals: int, windows: _Windows) -> Array:
    """Even edges. Where few windows begin or end, the nearest edges are moved there, since there much changes."""
    edges = np.linspace(0.0, horizon_s, intervals + 1)
    times_s = {*windows.before_s, *(horizon_s - after_s for after_s in windows.after_s)}
    if len(times_s) <= intervals // 4:
        for time_s in sorted(times_s):
            nearest = round(intervals * time_s / horizon_s)
            if 0 < nearest < intervals and abs(edges - time_s).min() > 1e-3 * horizon_s / intervals:
                edges[nearest] = time_s
    return edges


def _largest(problem: Problem, prices: TimePrices, windows: _Windows, low_s: float, high_s: float) -> TimePrices | None:
    """The prices stretched to the largest horizon they prove, by false position (Illinois); None: not `low_s`."""

    def stretched(horizon_s: float) -> TimePrices:
        factor = horizon_s / prices.horizon_s
        return replace(prices, edges_s=tuple(factor * edge for edge in prices.edges_s))

    def excess(horizon_s: float) -> float:
        return min(1.0, worth(problem, stretched(horizon_s), windows) - 1 - MARGIN)

    low, high = excess(low_s), 0.0  # of a horizon that is proved, and of one that is not once there is one
    if low <= 0:
        return None
    proved_s = low_s
    for _ in range(TRIALS):
        # what a horizon pays hardly depends on it, so its worth tells how far it may be stretched
        stretch_s = low_s * (1 + low) if high == 0 else low_s + (high_s - low_s) * low / (low - high)
        trial_s = min(stretch_s, high_s)
        value = excess(trial_s)
        if value > 0:
            proved_s = low_s = trial_s
            low, high = value, high / 2
        else:
            high_s, high, low = trial_s, min(value, -MARGIN), low / 2
        if high_s - low_s < 1e-6 * low_s:
            break
    return stretched(proved_s)


def worth(problem: Problem, prices: TimePrices, windows: _Windows | None = None) -> float:
    """What all MetaOps pay at least over what all device time is worth; more than 1 proves the horizon."""
    windows = windows or _windows(problem)
    edges, device = np.array(prices.edges_s), np.array(prices.device_prices)
    into, out_of = np.zeros((2, len(problem), len(device)))
    for source, target, seconds in prices.wait_prices:
        into[problem.index[target]] += seconds
        out_of[problem.index[source]] += seconds
    paid = sum(_least(problem, m, edges, device, into[m], out_of[m], windows) for m in range(len(problem)))
    return float(paid / (problem.num_devices * (device @ np.diff(edges))))


def _least(
    problem: Problem, m: int, edges: Array, device: Array, into: Array, out_of: Array, windows: _Windows
) -> float:
    """What MetaOp m pays at least: the least over cells of S and E of the best over prices of a layer."""
    first_s, last_s = windows.before_s[m], edges[-1] - windows.after_s[m]
    if last_s - first_s < windows.own_s[m] * (1 - 1e-9):
        return float("inf")  # nothing ends by C
    points = np.sort(np.concatenate([edges, (edges[1:] + edges[:-1]) / 2]))
    grid = np.concatenate([[first_s], points[(points > first_s) & (points < last_s)], [last_s]])
    corners = _corners(problem, m)
    slopes = [(n - n0) / (rate - rate0) for (n0, rate0), (n, rate) in pairwise(corners)]
    layer = np.unique(np.outer(device, [0.0, *slopes, 4 * slopes[-1]]))  # where the best count changes, and beyond
    counts, rates = np.array(corners).T
    gain = (layer[:, None, None] * rates - device[:, None] * counts).max(axis=2)  # a second's layers less its devices
    of_cell = np.clip(np.searchsorted(edges, (grid[1:] + grid[:-1]) / 2) - 1, 0, len(device) - 1)
    gained = np.zeros((len(layer), len(grid)))
    gained[:, 1:] = np.cumsum(gain[:, of_cell] * np.diff(grid), axis=1)
    start = gained + _after(edges, into, grid)
    end = -gained - _after(edges, out_of, grid)
    start, end = np.minimum(start[:, :-1], start[:, 1:]), np.minimum(end[:, :-1], end[:, 1:])
    paid = (layer[:, None, None] * problem.layers[m] + start[:, :, None] + end[:, None, :]).max(axis=0)
    possible = grid[None, 1:] - grid[:-1, None] >= windows.own_s[m] * (1 - 1e-9)
    return float(paid[possible].min())


def _corners(problem: Problem, m: int) -> list[tuple[float, float]]:
    """(devices, layers a second) on the concave envelope, from nothing on."""
    hull = problem.curves[m].hull
    return [(0.0, 0.0), *((float(n), 1 / t) for n, t in zip(hull.counts, hull.times_s, strict=True))]


def _after(edges: Array, price: Array, at_s: Array) -> Array:
    """Price of all seconds after each of `at_s`."""
    until = np.concatenate([[0.0], np.cumsum(price * np.diff(edges))])
    return until[-1] - np.interp(at_s, edges, until)  # type: ignore[no-any-return]


class _TimedLp:
    """The time-indexed LP at a horizon: minimize nu, the devices needed over the devices there are.

    y[m, n, k]: share of interval k in which m runs on n devices; w[m, k], z[m, k]: share of k after m has started, has
    ended; f[m, k]: share of m done at the end of k. Any schedule that ends by the horizon is a point with nu <= 1.
    """

    def __init__(self, problem: Problem, edges: Array, windows: _Windows) -> None:
        self.problem, self.edges, self.lengths = problem, edges, np.diff(edges)
        self.bounds: list[tuple[float, float]] = []
        self.rows: list[tuple[float, list[tuple[int, float]]]] = []  # (least, terms): least <= terms <= 0
        self.nu = self._column(0.0, INF)
        ops, ks = range(len(problem)), range(len(self.lengths))
        first_s, last_s = windows.before_s, [edges[-1] - after_s for after_s in windows.after_s]
        self.w = [[self._column(0.0, self._share_after(k, first_s[m])) for k in ks] for m in ops]
        self.z = [[self._column(self._share_after(k, last_s[m]), 1.0) for k in ks] for m in ops]
        self.f = [[self._column(1.0 if k == ks[-1] else 0.0, 1.0) for k in ks] for m in ops]
        self.y = [
            [
                [(self._column(0.0, INF), n, t) for n, t in _hull(problem, m)]
                if edges[k + 1] > first_s[m] and edges[k] < last_s[m]
                else []
                for k in ks
            ]
            for m in ops
        ]
        for m in ops:
            self._add_progress(m)
            self._add_running(m)
            self._add_order(m)
        self.device_rows = [self._add_devices(k) for k in ks]
        self.flow_rows = {(m, s): self._add_flow(m, s) for m in ops for s in problem.successors[m]}

    def _share_after(self, k: int, time_s: float) -> float:
        return float(np.clip((self.edges[k + 1] - time_s) / self.lengths[k], 0.0, 1.0))

    def _column(self, low: float, high: float) -> int:
        self.bounds.append((low, high))
        return len(self.bounds) - 1

    def _row(self, *terms: tuple[int, float], least: float = -INF) -> int:
        self.rows.append((least, list(terms)))
        return len(self.rows) - 1

    def _add_progress(self, m: int) -> None:
        """f[m, k] = f[m, k-1] + d_k sum_n y[m, n, k] / (T_m(n) L_m); the last f is 1: every layer runs."""
        for k, ys in enumerate(self.y[m]):
            before = [(self.f[m][k - 1], 1.0)] if k else []
            done = [(y, self.lengths[k] / (t * self.problem.layers[m])) for y, _, t in ys]
            self._row((self.f[m][k], -1.0), *before, *done, least=0.0)

    def _add_running(self, m: int) -> None:
        """sum_n y[m, n, k] <= w[m, k] - z[m, k]: it runs only between its start and its end, on one count at a time."""
        for k, ys in enumerate(self.y[m]):
            self._row(*((y, 1.0) for y, _, _ in ys), (self.w[m][k], -1.0), (self.z[m][k], 1.0))

    def _add_order(self, m: int) -> None:
        """z[m, k] <= f[m, k] <= w[m, k+1]; w[m, k] <= w[m, k+1]; z[m, k] <= z[m, k+1]."""
        w, z, f = self.w[m], self.z[m], self.f[m]
        for k in range(len(f)):
            self._row((z[k], 1.0), (f[k], -1.0))
        for k in range(len(f) - 1):
            for low, high in ((f[k], w[k + 1]), (w[k], w[k + 1]), (z[k], z[k + 1])):
                self._row((low, 1.0), (high, -1.0))

    def _add_devices(self, k: int) -> int:
        """sum_{m, n} n y[m, n, k] <= nu N."""
        used = [(y, float(n)) for by_k in self.y for y, n, _ in by_k[k]]
        return self._row(*used, (self.nu, -float(self.problem.num_devices)))

    def _add_flow(self, source: int, target: int) -> list[int]:
        """w[target, k] <= z[source, k]: nobody starts before what it waits for has ended."""
        pairs = zip(self.w[target], self.z[source], strict=True)
        return [self._row((w, 1.0), (z, -1.0)) for w, z in pairs]

    def prices(self) -> TimePrices | None:
        """Duals of devices and flows, of four digits; None when the solver gives none."""
        duals = self._solve()
        if duals is None:
            return None
        per_second = {key: -duals[rows] / self.lengths for key, rows in self.flow_rows.items()}
        device = -duals[self.device_rows] / self.lengths
        if device.max() <= 0:
            return None
        names = [metaop.name for metaop in self.problem.metaops]
        waits = ((names[m], names[s], _rounded(seconds / device.max())) for (m, s), seconds in per_second.items())
        return TimePrices(
            edges_s=tuple(map(float, self.edges)),
            device_prices=_rounded(device / device.max()),
            wait_prices=tuple(wait for wait in waits if any(wait[2])),
        )

    def _solve(self) -> Array | None:
        highs = make_highs(solver="simplex")
        terms = [term for _, row in self.rows for term in row]
        cost = np.zeros(len(self.bounds))
        cost[self.nu] = 1.0
        low, high = np.array(self.bounds).T
        highs.passModel(
            len(self.bounds),
            len(self.rows),
            len(terms),
            2,  # by rows
            1,  # minimize
            0.0,
            cost,
            low.copy(),
            high.copy(),
            np.array([least for least, _ in self.rows]),
            np.zeros(len(self.rows)),
            np.cumsum([0, *(len(row) for _, row in self.rows[:-1])], dtype=np.int32),
            np.array([column for column, _ in terms], dtype=np.int32),
            np.array([value for _, value in terms]),
            np.zeros(len(self.bounds), dtype=np.int32),  # all continuous
        )
        if not is_solved(highs):
            return None
        return np.array(highs.getSolution().row_dual)


def _hull(problem: Problem, m: int) -> Sequence[tuple[int, float]]:
    hull = problem.curves[m].hull
    return tuple(zip(hull.counts, hull.times_s, strict=True))


def _rounded(prices: Array) -> tuple[float, ...]:
    """Four decimals: any prices of the right sign prove something, and short ones keep files short."""
    return tuple(max(0.0, round(float(price), 4)) for price in prices)
