"""Fitting constants to steps: what determines them is found, what does not stays at 1 and is named."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.cost.measured.fitting import ROW, fit_steps
from spindle.values.calibration import Calibration, MeasuredStep

Parts = Callable[[int, int], tuple[float, float, float]]
"""Seconds of computation, host and network by (gpus, batch)."""
START = Calibration(device="d")


def parts(gpus: int, batch: int) -> tuple[float, float, float]:
    """Computation grows with the batch, the host's time does not, the network's grows with the number of devices."""
    return 0.05 * batch, 0.2, 0.02 * gpus


def told(calibration: Calibration, rows: Sequence[tuple[int, int]], of: Parts = parts) -> list[float]:
    factors = (calibration.compute, calibration.host, calibration.network)
    return [calibration.step_s + sum(f * p for f, p in zip(factors, of(*row), strict=True)) for row in rows]


def fitted(truth: Calibration, rows: Sequence[tuple[int, int]], of: Parts = parts) -> Calibration:
    steps = [
        MeasuredStep(gpus=gpus, per_gpu_batch=batch, seconds=seconds)
        for (gpus, batch), seconds in zip(rows, told(truth, rows, of), strict=True)
    ]
    return fit_steps(steps, lambda calibration: told(calibration, rows, of), START)


def test_a_right_model_is_left_alone() -> None:
    found = fitted(START, [(8, 2), (8, 16), (32, 2)])
    assert (found.compute, found.host, found.network) == pytest.approx((1, 1, 1), abs=1e-3)
    assert found.step_s == pytest.approx(0, abs=1e-3)
    assert all(abs(row.error) < 1e-3 for row in found.rows)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.builds(
        Calibration,
        device=st.just("d"),
        compute=st.floats(0.6, 2.5),
        network=st.floats(0.5, 2.5),
        step_s=st.floats(0, 0.3),
    )
)
def test_other_rows_are_told_from_three(truth: Calibration) -> None:
    """Whatever is wrong, steps inside the rows' range of batches and devices come out right."""
    found = fitted(truth, [(8, 2), (8, 24), (32, 2)])
    others = [(8, 8), (16, 2), (32, 16), (24, 12)]
    for right, predicted in zip(told(truth, others), told(found, others), strict=True):
        assert predicted == pytest.approx(right, rel=0.05)


def test_one_number_of_devices_says_nothing_about_the_network() -> None:
    found = fitted(Calibration(device="d", network=3.0), [(8, 2), (8, 24)])
    assert found.network == 1.0
    assert "network" in found.undetermined


@pytest.mark.parametrize("truth", [{"compute": 1.5}, {"host": 4.0}, {"step_s": 0.5}], ids=str)
def test_one_row_is_met_and_tells_nothing_apart(truth: dict[str, float]) -> None:
    """What is off goes to all that could be."""
    found = fitted(replace(START, **truth), [(8, 8)])  # type: ignore[arg-type]
    assert found.undetermined == ("network",)
    assert found.inseparable == (("compute", "host"), ("compute", "step_s"), ("host", "step_s"))
    assert abs(found.rows[0].error) < 3 * ROW


def test_what_moves_nothing_is_named() -> None:
    """Without any of the host's time its factor is open, and stays at 1."""
    found = fitted(START, [(8, 2), (8, 24), (32, 2)], lambda gpus, batch: (0.05 * batch, 0.0, 0.02 * gpus))
    assert found.undetermined == ("host",)
    assert found.host == pytest.approx(1.0)


def test_what_moves_all_rows_alike_is_named() -> None:
    """At one batch nobody tells the host's time from the fixed part."""
    found = fitted(START, [(8, 8), (32, 8)])
    assert ("host", "step_s") in found.inseparable
    assert not any("network" in pair for pair in found.inseparable)


def test_rows_that_no_constants_explain_show_so() -> None:
    """Twice the batch in half the time: the errors stay, and are told."""
    steps = [
        MeasuredStep(gpus=8, per_gpu_batch=4, seconds=2.0),
        MeasuredStep(gpus=8, per_gpu_batch=8, seconds=1.0),
    ]
    found = fit_steps(steps, lambda calibration: told(calibration, [(8, 4), (8, 8)]), START)
    assert found.rows[0].error < -0.2
    assert found.rows[1].error > 0.2
    assert found.step_s >= 0


def test_faster_steps_than_told_leave_no_negative_fixed_part() -> None:
    found = fitted(Calibration(device="d", compute=0.5, host=0.4), [(8, 2), (8, 24)])
    assert found.step_s == 0.0
    assert all(abs(row.error) < 0.05 for row in found.rows)
