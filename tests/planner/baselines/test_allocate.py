import pytest

from spindle.planner.baselines.allocate import (
    Tuple,
    allocate,
    discretise,
    optimum_by_bisection,
    optimum_by_lp,
    round_tuples,
)
from spindle.planner.costing.curves import Curve


def hyperbola(a: float, b: float) -> Curve:
    return Curve((1, 2), (a + b, a + b / 2))


# T = a + b/n such that C* = 1 gives the shares of the paper's Fig. 5a: n* = 1.905, 1.538, 0.557
FIG_5A = (
    (hyperbola(0.02, (1 / 8 - 0.02) * 1.9047619), 8),
    (hyperbola(0.01, (1 / 12 - 0.01) * 1.5384615), 12),
    (Curve((1,), (0.5567766 / 6,)), 6),
)


def test_figure_5a_shares() -> None:
    """The paper's worked example on four devices: the hyperbolic inverse gives C* = 1 and its three shares."""
    optimum_s = optimum_by_bisection([c for c, _ in FIG_5A], [n for _, n in FIG_5A], 4, form="hyperbola")
    assert optimum_s == pytest.approx(1.0, abs=1e-6)
    shares = [curve.inverse(optimum_s / n) for curve, n in FIG_5A]
    assert shares == pytest.approx([1.905, 1.538, 0.557], abs=1e-3)


def test_figure_5a_tuples() -> None:
    """7.6 and 0.4 layers round to 8 and none, 8.4 and 3.6 to 8 and 4; the dummy tuple of the third is dropped."""
    (first, _), (second, _), (third, _) = FIG_5A
    assert [t.layers for t in discretise(first, 8, 1.0)] == pytest.approx([7.6, 0.4])
    assert [t.layers for t in discretise(second, 12, 1.0)] == pytest.approx([8.4, 3.6])
    assert round_tuples(discretise(first, 8, 1.0), 8) == (Tuple(2, 8),)
    assert round_tuples(discretise(second, 12, 1.0), 12) == (Tuple(2, 8), Tuple(1, 4))
    assert discretise(third, 6, 1.0) == (Tuple(1, 6),)


def test_halves_round_so_that_the_layers_still_add_up() -> None:
    assert round_tuples((Tuple(2, 2.5), Tuple(1, 2.5)), 5) == (Tuple(2, 3), Tuple(1, 2))


def test_two_equal_metaops_share_evenly() -> None:
    """Four layers of 4 s on one device, twice, on two devices: one each."""
    curve = Curve((1, 2), (4.0, 3.0))
    allocation = allocate((curve, curve), (4, 4), 2)
    assert allocation.optimum_s == pytest.approx(16.0)
    assert allocation.shares == pytest.approx((1.0, 1.0))


def test_capped_counts_leave_devices_free() -> None:
    """One device is the only valid count of either: on four devices the slower one decides."""
    allocation = allocate((Curve((1,), (1.0,)), Curve((1,), (2.0,))), (3, 3), 4)
    assert allocation.optimum_s == 6.0
    assert allocation.tuples == ((Tuple(1, 3),), (Tuple(1, 3),))


def test_superlinear_metaops_take_turns() -> None:
    """The paper's Theorem 1 would give C* = 1 with one device each; one after another on both takes half."""
    curve = Curve((1, 2), (1.0, 0.25))
    assert allocate((curve, curve), (1, 1), 2).optimum_s == pytest.approx(0.5)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_lp_and_bisection_agree_by_hand(num_devices: int) -> None:
    curves = (Curve((1, 2, 8), (8.0, 5.0, 1.0)).hull, Curve((1, 4), (1.0, 0.5)), Curve((2,), (0.5,)))
    usable = [c for c in curves if c.counts[0] <= num_devices]
    cut = [Curve(*zip(*((n, t) for n, t in c.time_by_count.items() if n <= num_devices), strict=True)) for c in usable]
    layers = (3, 5, 2)[: len(cut)]
    assert optimum_by_lp(cut, layers, num_devices) == pytest.approx(optimum_by_bisection(cut, layers, num_devices))
