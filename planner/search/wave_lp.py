"""Wave LP: layers left and an order of waves in, the shortest fractional schedule in that order out (the wave LP).

    minimize    sum_k d_k
    subject to  sum_n y[m, n, k] <= d_k                        a MetaOp runs at most all of a wave
                sum_{m, n} n y[m, n, k] <= N d_k               devices
                sum_{n, k} y[m, n, k] / T_m(n) = left_m        every layer
                y[m, n, k] > 0 only for a_m <= k <= b_m        b_m: the last wave before any follower's first

d_k are the lengths of the waves, y[m, n, k] the seconds that m runs on n devices in wave k. a_m are the first waves.
An LP over all orders would be a bound; over one order it is an upper estimate of what the fluid optimum takes, and its
solution tells how far each MetaOp should be at the end of each wave. The beam solves some hundred of these a second,
so the arrays go straight to HiGHS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from spindle.planner.highs import is_solved, make_highs
from spindle.planner.search.model import Model
from spindle.planner.work import Work

LP_UNITS = 180.0  # of any LP, and
COLUMN_UNITS = 5.0  # for each column
ITERATION_UNITS = 40.0  # of the simplex method with more than LARGE MetaOps, where these may take longer
LARGE = 90


@dataclass(frozen=True, slots=True)
class Targets:
    """ends_s: when each wave ends, from now; rest[m][k]: layers left at the end of wave k; widest[m][k]: index of the
    largest count that m uses in wave k (in the waves before when it does not run in k)."""

    ends_s: list[float]
    rest: list[list[float]]
    widest: list[list[int]]
    narrowest: list[list[int]]


class WaveLp:
    """Solves wave LPs of one model."""

    def __init__(self, model: Model, work: Work) -> None:
        self.model = model
        self.work = work
        self.highs = make_highs(presolve="off", solver="simplex")

    def solve(self, left: Sequence[float], first: Sequence[int]) -> Targets | None:
        """Targets for `left` layers of each MetaOp with first waves `first`; None when the solver finds none."""
        model = self.model
        ops = [m for m in range(len(model)) if left[m] > 0]
        waves = 1 + max(first[m] for m in ops)
        last = [min((first[s] for s in model.after[m]), default=waves) - 1 for m in range(len(model))]
        columns = _columns(model, ops, left, first, last)
        values = self._run(ops, waves, columns, first, last)
        return _read(model, ops, left, waves, columns, values, first, last) if values is not None else None

    def _run(
        self, ops: list[int], waves: int, columns: "_Columns", first: Sequence[int], last: Sequence[int]
    ) -> list[float] | None:
        model, scale = self.model, self.model.bound_s
        n = len(columns.op)
        # rows: layers of each op, devices of each wave, then one for each (op, wave) of its window
        row_of_op = {m: i for i, m in enumerate(ops)}
        window_row, at = {}, len(ops) + waves
        for m in ops:
            window_row[m] = at - first[m]
            at += last[m] - first[m] + 1
        index = np.empty(3 * n, dtype=np.int32)
        index[0::3] = [row_of_op[m] for m in columns.op]
        wave = np.array(columns.wave, dtype=np.int32)
        index[1::3] = len(ops) + wave
        index[2::3] = np.array([window_row[m] for m in columns.op], dtype=np.int32) + wave
        value = np.ones(3 * n)
        value[0::3] = columns.rate
        value[1::3] = columns.count
        # columns d_k after the y: -N in the row of devices, -1 in every window row of that wave
        starts = [3 * n]
        d_index: list[int] = []
        d_value: list[float] = []
        for k in range(waves):
            d_index.append(len(ops) + k)
            d_value.append(-float(model.num_devices))
            for m in ops:
                if first[m] <= k <= last[m]:
                    d_index.append(window_row[m] + k)
                    d_value.append(-1.0)
            starts.append(3 * n + len(d_index))
        num_rows, num_cols = at, n + waves
        lower, upper = np.full(num_rows, -highspy.kHighsInf), np.zeros(num_rows)
        lower[: len(ops)] = upper[: len(ops)] = 1.0
        cost = np.zeros(num_cols)
        cost[n:] = 1.0
        units = LP_UNITS + COLUMN_UNITS * num_cols
        self.work.spend(units)
        self.highs.clearModel()
        value[0::3] *= scale
        self.highs.passModel(
            num_cols,
            num_rows,
            3 * n + len(d_index),
            1,  # by columns
            1,  # minimize
            0.0,
            cost,
            np.zeros(num_cols),
            np.full(num_cols, highspy.kHighsInf),
            lower,
            upper,
            np.array([*range(0, 3 * n, 3), *starts[:-1]], dtype=np.int32),
            np.concatenate([index, np.array(d_index, dtype=np.int32)]),
            np.concatenate([value, np.array(d_value)]),
            np.zeros(num_cols, dtype=np.int32),  # all continuous
        )
        solved = is_solved(self.highs)
        if len(self.model) > LARGE:
            self.work.spend(max(0.0, ITERATION_UNITS * self.highs.getInfo().simplex_iteration_count - units))
        if not solved:
            return None
        return [scale * v for v in self.highs.getSolution().col_value]


@dataclass(slots=True)
class _Columns:
    op: list[int]
    count_index: list[int]
    wave: list[int]
    rate: list[float]  # share of what is left of the MetaOp, each second
    count: list[float]


def _columns(
    model: Model, ops: list[int], left: Sequence[float], first: Sequence[int], last: Sequence[int]
) -> _Columns:
    columns = _Columns([], [], [], [], [])
    for m in ops:
        span = range(first[m], last[m] + 1)
        for c in model.hull[m]:
            columns.op += [m] * len(span)
            columns.count_index += [c] * len(span)
            columns.wave += span
            columns.rate += [1 / (model.times[m][c] * left[m])] * len(span)
            columns.count += [float(model.counts[m][c])] * len(span)
    return columns


def _read(
    model: Model,
    ops: list[int],
    left: Sequence[float],
    waves: int,
    columns: _Columns,
    values: list[float],
    first: Sequence[int],
    last: Sequence[int],
) -> Targets:
    ends_s, at_s = [], 0.0
    for d in values[len(columns.op) :]:
        at_s += max(0.0, d)
        ends_s.append(at_s)
    size = len(model)
    done = [[0.0] * waves if left[m] > 0 else [] for m in range(size)]
    widest = [[-1] * waves if left[m] > 0 else [] for m in range(size)]
    narrowest = [[-1] * waves if left[m] > 0 else [] for m in range(size)]
    tiny = 1e-6 * model.bound_s
    for m, c, k, rate, seconds in zip(
        columns.op, columns.count_index, columns.wave, columns.rate, values, strict=False
    ):
        if seconds > tiny:
            done[m][k] += rate * seconds
            widest[m][k] = max(c, widest[m][k])
            if narrowest[m][k] < 0 or c < narrowest[m][k]:
                narrowest[m][k] = c
    rest: list[list[float]] = [[] for _ in range(size)]
    for m in ops:
        total, wide, narrow = 0.0, max(0, *widest[m]), max(0, *narrowest[m])
        for k in range(waves):
            total += done[m][k]
            rest[m].append(max(0.0, left[m] * (1 - total)))
            if widest[m][k] >= 0:
                wide, narrow = widest[m][k], narrowest[m][k]
            widest[m][k], narrowest[m][k] = wide, narrow
        for k in range(last[m], waves):
            rest[m][k] = 0.0
    return Targets(ends_s, rest, widest, narrowest)


def residual_waves(
    model: Model, left: Sequence[float], ready: Sequence[bool], first: Sequence[int], *, cut: bool = True
) -> list[int]:
    """First waves of what is left: 0 for what is ready, the order of `first` for the rest, without empty waves."""
    waiting = [m for m in model.order if left[m] > 0 and not ready[m]]
    shift = min((first[m] for m in waiting), default=1) - 1 if cut else 0
    found = [0] * len(model)
    for m in waiting:
        least = max((found[p] + 1 for p in model.before[m] if left[p] > 0), default=0)
        found[m] = max(least, first[m] - shift, 1)
    return found
