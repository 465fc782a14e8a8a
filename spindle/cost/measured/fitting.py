"""Fitting: measured steps and what a calibration makes of them in, the calibration that explains them best out.

- Least squares of logarithms of predicted over measured seconds, each row known to `ROW`; Gauss and Newton's steps,
  with differences for derivatives, each halved until it helps.
- A mild prior holds logarithms of factors near 0 and the fixed part of a step small (`PRIOR`), so that two rows
  determine four constants: what they say nothing about stays at 1.
- What rows cannot say by their design is not fitted: rows of one number of devices say nothing about the network.
- A constant is undetermined when it is not fitted, or all of its prior moves the rows by less than their error; two are
  inseparable when they move all rows alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from spindle.values.calibration import CONSTANTS, FACTORS, Calibration, Constant, MeasuredStep

ROW = 0.02  # relative error of a measured step
PRIOR = {"compute": 0.4, "host": 0.4, "network": 0.5, "step_s": 1.0}
FIXED_SHARE = 0.25  # the fixed part of a step is expected to be about this share of the shortest one
MOST = log(50.0)  # factors beyond this say that another program was measured
STEPS = 40
SETTLED = 1e-3  # of a logarithm, and of the fixed part over its scale, that ends the steps
DIFFERENCE = 0.02  # of a logarithm, for derivatives
ALIKE = 0.98  # cosine between what two constants do to the rows

Predict = Callable[[Calibration], Sequence[float]]
"""A calibration in, predicted seconds of every row out, `step_s` included."""
Array = NDArray[np.floating]


@dataclass(frozen=True)
class _Model:
    """Rows and their prediction as functions of four numbers: three logarithms, and the fixed part over its scale."""

    seconds: Array
    scale_s: float
    start: Calibration
    predict: Predict
    fitted: tuple[int, ...]

    def calibration(self, values: Array) -> Calibration:
        compute, host, network, fixed = values.tolist()
        return replace(
            self.start, compute=exp(compute), host=exp(host), network=exp(network), step_s=fixed * self.scale_s
        )

    def misses(self, values: Array) -> Array:
        """Logarithms of predicted over measured, in units of a row's error."""
        predicted = np.array(self.predict(self.calibration(values)))
        found: Array = np.log(predicted / self.seconds) / ROW
        return found

    def slopes(self, values: Array, misses: Array) -> Array:
        found = np.zeros((len(misses), len(CONSTANTS)))
        for index in self.fitted:
            moved = values.copy()
            moved[index] += DIFFERENCE
            found[:, index] = (self.misses(moved) - misses) / DIFFERENCE
        return found


def fit_steps(rows: Sequence[MeasuredStep], predict: Predict, start: Calibration) -> Calibration:
    """The calibration under which `predict` is nearest to the rows, with its own word on each; `start`: of the same
    device, where to begin.
    """
    seconds = np.array([row.seconds for row in rows])
    scale_s = FIXED_SHARE * float(seconds.min())
    model = _Model(seconds, scale_s, Calibration(device=start.device), predict, _fitted(rows))
    widths = np.array([PRIOR[name] for name in CONSTANTS])
    begin = np.array([*(log(getattr(start, name)) for name in FACTORS), start.step_s / scale_s])
    values = _solve(model, widths, begin)
    found = model.calibration(values)
    undetermined, inseparable = _doubts(model, model.slopes(values, model.misses(values)), widths)
    predicted = predict(found)
    return replace(
        found,
        rows=tuple(replace(row, predicted_s=float(time_s)) for row, time_s in zip(rows, predicted, strict=True)),
        undetermined=undetermined,
        inseparable=inseparable,
    )


def _fitted(rows: Sequence[MeasuredStep]) -> tuple[int, ...]:
    """Numbers of the constants that rows on these numbers of devices can say anything about."""
    return (0, 1, 2, 3) if len({row.gpus for row in rows}) > 1 else (0, 1, 3)


def _solve(model: _Model, widths: Array, begin: Array) -> Array:
    values = begin
    misses = model.misses(values)
    for _ in range(STEPS):
        squares = _squares(misses, values, widths)
        slopes = model.slopes(values, misses)
        free = [i for i in model.fitted if i < 3 or _moves(values, slopes, misses, widths)]
        terms = np.concatenate([slopes, np.diag(1 / widths)])[:, free]
        step = np.zeros(len(widths))
        step[free] = np.linalg.lstsq(terms, -np.concatenate([misses, values / widths]), rcond=None)[0]
        for share in 0.5 ** np.arange(8):
            tried = _allowed(values + share * step)
            there = model.misses(tried)
            if _squares(there, tried, widths) < squares * (1 - 1e-9):
                break
        else:
            return values
        small = float(np.abs(tried - values).max()) < SETTLED
        values, misses = tried, there
        if small:
            break
    return values


def _moves(values: Array, slopes: Array, misses: Array, widths: Array) -> bool:
    """Whether the fixed part may move: it rests at zero where the rows would have it less."""
    downhill = -(slopes[:, 3] @ misses) - values[3] / widths[3] ** 2
    return bool(values[3] > 0 or downhill > 0)


def _allowed(values: Array) -> Array:
    found = np.clip(values, -MOST, MOST)
    found[3] = max(values[3], 0.0)
    return found


def _squares(misses: Array, values: Array, widths: Array) -> float:
    return float((misses**2).sum() + ((values / widths) ** 2).sum())


def _doubts(
    model: _Model, slopes: Array, widths: Array
) -> tuple[tuple[Constant, ...], tuple[tuple[Constant, Constant], ...]]:
    """What rows leave open: constants that do not move them, and pairs that move all of them alike."""
    moved = np.sqrt((slopes**2).sum(0))
    open_ = [i for i in range(len(CONSTANTS)) if i not in model.fitted or moved[i] * widths[i] < 1]
    pairs = [
        (i, j)
        for i, j in combinations(range(len(CONSTANTS)), 2)
        if i not in open_ and j not in open_ and slopes[:, i] @ slopes[:, j] > ALIKE * moved[i] * moved[j]
    ]
    return tuple(CONSTANTS[i] for i in open_), tuple((CONSTANTS[i], CONSTANTS[j]) for i, j in pairs)
