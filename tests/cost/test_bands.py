"""Bands: what they hold, and that the file they come from is what the cost model makes of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spindle.cost.bands import (
    COVERS,
    EXACT,
    Band,
    BandSource,
    band,
    band_of,
    between,
    factor_bands,
    held_out,
    pair_band,
)
from spindle.values.calibration import FACTORS

ROOT = Path(__file__).parents[2]
ratios = st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 10)), min_size=1, max_size=80)


@given(ratios)
def test_a_band_holds_nine_of_ten(found: list[tuple[str, float]]) -> None:
    """Whatever the tables, and with ends that were measured."""
    got = band_of(found)
    values = [ratio for _, ratio in found]
    assert sum(map(got.holds, values)) >= COVERS * len(values)
    assert {got.low, got.high} <= set(values)


def test_few_rows_are_all_held() -> None:
    assert band_of([("a", 0.5), *[("a", 1.0)] * 9]) == Band(0.5, 1.0)


def test_of_many_rows_the_outer_ones_are_left_out() -> None:
    """Of 199 in order, a further one lies beyond the ninth from either end one time in ten."""
    got = band_of([("a", 1 + k / 1000) for k in range(199)])
    assert got == Band(1.009, 1.189)


def test_a_long_table_does_not_decide_alone() -> None:
    """Ten rows elsewhere weigh more than their number beside two hundred alike."""
    found = [("long", 1.0)] * 200 + [("short", 2.0)] * 10
    assert band_of(found).high == 2.0


@pytest.mark.parametrize("source", ["predicted", "calibrated", "profiled"])
def test_the_printed_bands_hold_nine_of_ten(source: BandSource) -> None:
    """Of the held-out rows of their source; when this fails, look at the rows and make the file again."""
    rows = [row.ratio for row in held_out().rows if row.source == source]
    held = sum(map(band(source).holds, rows))
    assert held >= COVERS * len(rows), (
        f"{source}: {held} of {len(rows)}; run python -m benchmarks.pages.held_out --write"
    )


def test_the_file_is_not_stale() -> None:
    """Every row that takes seconds is as the cost model, and the last results, make it now."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pages.held_out", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, f"run python -m benchmarks.pages.held_out --write\n{done.stdout}{done.stderr}"


def test_bands_narrow_with_what_is_known() -> None:
    """One that measures is never told a wider band than one that does not."""
    profiled, predicted = band("profiled"), band("predicted")
    assert predicted.low <= profiled.low <= profiled.high <= predicted.high
    halfway = between(profiled, predicted)
    assert predicted.low <= halfway.low <= profiled.low
    assert profiled.high <= halfway.high <= predicted.high
    assert profiled.wider(0.1).low < profiled.low < profiled.high < profiled.wider(0.1).high


def test_factors_move_either_way() -> None:
    assert set(factor_bands()) == set(FACTORS)
    for found in factor_bands().values():
        assert found.holds(1.0)
        assert found.low * found.high == pytest.approx(1.0)
    assert pair_band().around(EXACT) == pair_band()
