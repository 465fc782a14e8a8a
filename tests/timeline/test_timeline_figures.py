"""Figures: the numbers of the page, as values that JSON holds."""

import json

import pytest

from spindle.errors import InputError
from spindle.planner.simulate import simulate
from spindle.timeline import timeline_figures
from tests.timeline.timeline_samples import by_hand, made_up_run, planned


def test_a_step_that_fits_in_the_head() -> None:
    """Device 1 waits while a runs (1 s) and is sent (1 s each way), computes 0.5 s forward and 1 s backward."""
    plan = by_hand()
    (view,) = timeline_figures(plan, predicted=simulate(plan))["views"]
    first, second = view["devices"]
    assert (view["source"], view["step_s"]) == ("predicted", 6.5)
    assert second["by_cause_s"] == pytest.approx(
        {"unmade": 1.0, "underway": 2.0, "forward": 0.5, "backward": 1.0, "nothing": 2.0}
    )
    assert (second["busy_s"], first["busy_s"]) == pytest.approx((1.5, 4.5))
    assert second["idle_share"] == pytest.approx(5.0 / 6.5)
    assert second["peak_bytes"] is None  # the MetaGraph says nothing of memory
    assert [(wave["wave"], wave["kind"]) for wave in view["waves"]] == [
        (0, "forward"),
        (1, "forward"),
        (1, "backward"),
        (0, "backward"),
    ]


def test_planned_beside_measured() -> None:
    """A run's waves bear the times planned for them; causes add up; memory peaks where the plan says."""
    plan, predicted = planned(8)
    found = timeline_figures(plan, predicted=predicted, measured=made_up_run(plan, predicted), threshold=0.1)
    told = json.loads(json.dumps(found, allow_nan=False))
    before, after = told["views"]
    assert (before["source"], after["source"], after["num_steps"]) == ("predicted", "measured", 3)
    planned_s = {(w["wave"], w["kind"]): w["seconds"] for w in before["waves"]}
    assert {(w["wave"], w["kind"]): w["planned_s"] for w in after["waves"]} == pytest.approx(planned_s)
    missed = [w for w in after["waves"] if w["missed"]]
    assert missed  # runs are made up to be 0 to 50 % slower
    assert all(w["seconds"] > 1.1 * w["planned_s"] for w in missed)
    for view in (before, after):
        whole_s = sum(view["by_cause_s"].values())
        assert whole_s == pytest.approx(8 * view["step_s"])
        assert whole_s == pytest.approx(sum(sum(d["by_cause_s"].values()) for d in view["devices"]))
        assert [d["peak_bytes"] for d in view["devices"]] == pytest.approx(plan.memory.peak_bytes_per_device)


def test_a_trace_of_another_run() -> None:
    with pytest.raises(InputError, match="show a plan with a trace of its own run"):
        timeline_figures(planned(4)[0], measured=planned(8)[1])
