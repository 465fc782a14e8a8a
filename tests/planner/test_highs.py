"""HiGHS: an LP that is not even tried is an error, not one without an optimum."""

import highspy
import numpy as np
import pytest

from spindle.errors import PlanError
from spindle.planner.highs import is_solved, make_highs


def given(highs: highspy.Highs, least: float, most: float = highspy.kHighsInf) -> highspy.Highs:
    """The least x >= 0 with least <= x <= most."""
    one, row = np.ones(1), np.zeros(1, dtype=np.int32)
    highs.passModel(
        1, 1, 1, 1, 1, 0.0, one, np.zeros(1), np.full(1, highspy.kHighsInf), np.array([least]), np.array([most]),
        row, row, one, row,
    )  # fmt: skip
    return highs


def test_an_lp_with_and_without_an_optimum() -> None:
    highs = given(make_highs(solver="simplex"), 2.0)
    assert is_solved(highs)
    assert highs.getSolution().col_value == [2.0]
    assert not is_solved(given(make_highs(), 2.0, 1.0))


def test_an_lp_that_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As newer releases of HiGHS do where another part of the process has set other threads."""
    monkeypatch.setattr(highspy.Highs, "run", lambda _: highspy.HighsStatus.kError)
    with pytest.raises(PlanError, match=r"HiGHS 1\.\d+\.\d+ did not run.* let it set threads=1 too"):
        is_solved(given(make_highs(), 2.0))
