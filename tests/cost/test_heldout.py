"""Held out: curves are exact on what they can express, and the error of what they cannot is told."""

import pytest

from spindle.cost.measured.heldout import between, held_out, left_out, render_held_out
from spindle.values.profile import LinkEntry, Profile, ProfileEntry


def entry(n: int, seconds: float) -> ProfileEntry:
    return ProfileEntry(kind="k", num_devices=n, forward_s=seconds / 4, backward_s=seconds * 3 / 4)


def message(num_bytes: int, seconds: float) -> LinkEntry:
    return LinkEntry(operation="transfer", level="intra_node", members=2, num_bytes=num_bytes, seconds=seconds)


def test_alpha_beta_times_are_told_exactly() -> None:
    """T = 1 + 8 / n and alpha + bytes / rate: no error at any point left out."""
    profile = Profile(
        "cpu",
        entries=tuple(entry(n, 1 + 8 / n) for n in (1, 2, 4, 8)),
        links=tuple(message(size, 1e-4 + size / 1e9) for size in (1000, 10_000, 100_000, 1_000_000)),
    )
    rows = held_out(profile)
    assert [(row.what, row.at) for row in rows] == [
        ("k", 2),
        ("k", 4),
        ("transfer of 2, intra_node", 10_000),
    ]
    assert all(row.error == pytest.approx(0, abs=1e-9) for row in rows)


def test_a_spike_is_told_and_not_smeared() -> None:
    """Three devices take twice what their neighbors say: the error there is one half, the point itself is kept."""
    entries = {1: entry(1, 12.0), 3: entry(3, 8.0), 6: entry(6, 2.0)}
    (row,) = left_out("k", entries)
    assert row.at == 3
    assert row.predicted_s == pytest.approx(4.0)
    assert row.error == pytest.approx(-0.5)
    assert between(3, (1, 12.0), (6, 2.0)) == pytest.approx(4.0)


def test_two_counts_leave_nothing_to_hold_out() -> None:
    rows = held_out(Profile("cpu", entries=(entry(1, 2.0), entry(2, 1.0))))
    assert rows == ()
    assert "nothing to hold out" in render_held_out(rows)


def test_the_table_ends_with_mean_and_largest_error() -> None:
    rows = held_out(Profile("cpu", entries=(entry(1, 12.0), entry(3, 8.0), entry(6, 2.0))))
    assert render_held_out(rows).splitlines()[-1] == "1 points not used: mean error 50.0 %, largest 50.0 %"
