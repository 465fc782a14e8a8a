import pytest

from spindle.errors import InfeasibleError
from spindle.planner.costing.curves import Curve, clean_curve
from tests.planner.planner_graphs import metaop


def test_counts_that_gain_nothing_are_dropped() -> None:
    """Four devices are no faster than two, three are slower; sixteen are more than there are."""
    curve = clean_curve(metaop("a", times={1: 8.0, 2: 4.0, 3: 5.0, 4: 4.0, 8: 1.0, 16: 0.5}), 8)
    assert curve == Curve((1, 2, 8), (8.0, 4.0, 1.0))


def test_counts_above_the_cluster_are_infeasible() -> None:
    with pytest.raises(InfeasibleError, match=r"'a' runs on 8, 16 devices but the cluster has 4"):
        clean_curve(metaop("a", times={8: 1.0, 16: 0.5}), 4)


def test_time_is_a_hyperbola_between_points() -> None:
    """T = 1 + 6/n passes through (1, 7) and (3, 3), so T(2) = 4; below one device it is shared in time."""
    curve = Curve((1, 3), (7.0, 3.0))
    assert curve.time(2) == pytest.approx(4.0)
    assert curve.time(0.5) == pytest.approx(14.0)
    assert curve.time(5) == 3.0
    assert curve.inverse(4.0) == pytest.approx(2.0)
    assert curve.inverse(14.0) == pytest.approx(0.5)
    assert curve.inverse(3.0) == 3


def test_step_time_is_that_of_the_largest_count_that_fits() -> None:
    curve = Curve((1, 2, 8), (8.0, 4.0, 1.0))
    assert [curve.step(n) for n in (1, 2, 7, 8, 9)] == [8.0, 4.0, 4.0, 1.0, 1.0]


def test_hull_drops_a_count_whose_rate_lies_under_its_neighbors() -> None:
    """Rates 1, 1.1, 4 on 1, 2, 4 devices: mixing one and four devices beats two devices."""
    assert Curve((1, 2, 4), (1.0, 1 / 1.1, 0.25)).hull.counts == (1, 4)
    assert Curve((1, 2, 4), (1.0, 0.5, 0.4)).hull.counts == (1, 2, 4)


def test_superlinear_points_leave_only_the_best_count_on_the_hull() -> None:
    """Two devices four times as fast as one: one device is never worth it (the counterexample to Theorem 1)."""
    assert Curve((1, 2), (1.0, 0.25)).hull == Curve((2,), (0.25,))


def test_rate_inverse_mixes_neighboring_counts() -> None:
    """Rates 1 and 2 on one and two devices: a rate of 1.5 takes half the time each."""
    curve = Curve((1, 2), (1.0, 0.5))
    assert curve.rate_inverse(1 / 1.5) == pytest.approx(1.5)
    assert curve.rate_inverse(4.0) == pytest.approx(0.25)
    assert curve.rate_inverse(0.1) == 2


def test_neighbors_of_a_time() -> None:
    curve = Curve((1, 2, 8), (8.0, 4.0, 1.0))
    assert [curve.neighbors(t) for t in (9.0, 8.0, 5.0, 4.0, 1.0, 0.9)] == [
        (0, 1),
        (0, 1),
        (1, 2),
        (1, 2),
        (2, 8),
        (8, 8),
    ]


def test_a_broken_curve_is_refused() -> None:
    with pytest.raises(AssertionError, match="rising counts and falling times"):
        Curve((1, 2), (1.0, 1.0))
