"""Drift: batches of other sizes than those that a plan was made for."""

import warnings
from typing import Any

import pytest
import torch

import spindle
from spindle.errors import SpindleWarning
from spindle.inputs.batch import SampledBatch, sampled
from spindle.runtime.drift import Drift
from spindle.values.plan import SizeRange
from tests.capture.test_sizes import text, texts

SIZES = (
    SizeRange(task="t", field="samples", least=4, most=4),
    SizeRange(task="t", field="x", least=40, most=80),
)


def batch(samples: int, width: int) -> SampledBatch:
    """A batch of one field."""
    return sampled("task 't'", {"x": torch.zeros(samples, width)}, {}, samples)


@pytest.mark.parametrize(
    ("samples", "width", "is_inside"), [(4, 10, True), (4, 20, True), (4, 22, True), (4, 23, False)]
)
def test_a_batch_a_tenth_beyond_the_largest_is_outside(samples: int, width: int, is_inside: bool) -> None:
    """Some dozens of batches do not show the largest."""
    drift = Drift(SIZES)
    drift.look("t", 7, batch(samples, width))
    assert (not drift.found) is is_inside


def test_a_small_batch_is_outside_unless_it_is_not_full() -> None:
    """The last batch of a pass may hold a sample or two."""
    drift = Drift(SIZES)
    drift.look("t", 0, batch(2, 10))
    assert not drift.found
    drift.look("t", 1, batch(4, 5))
    assert "step 1: the batch has 20 entries of 'x', where the batches that the plan was made for had 40 to 80" in str(
        drift.found["t"]
    )


def test_the_first_sentence_of_a_task_stays() -> None:
    """One is enough; other tasks have theirs, and a task that the plan does not know has none."""
    drift = Drift(SIZES)
    drift.look("t", 3, batch(5, 10))
    drift.look("t", 4, batch(4, 90))
    drift.look("other", 4, batch(4, 90))
    assert list(drift.found) == ["t"]
    assert "step 3: the batch has 5 samples, where the batches that the plan was made for had 4;" in drift.found["t"]


def test_a_field_that_a_batch_lacks_is_inside() -> None:
    """A batch without images is no larger than planned."""
    drift = Drift((SizeRange(task="t", field="pixels", least=10, most=20), *SIZES))
    drift.look("t", 0, batch(4, 10))
    assert not drift.found


@pytest.mark.parametrize("launcher", ["threads", pytest.param("processes", marks=pytest.mark.gloo)])
def test_a_run_says_once_when_a_batch_leaves_the_sizes_of_its_plan(launcher: Any) -> None:
    """The plan is of short texts; the third batch is long, and so is the fourth."""
    plan = spindle.make_plan(texts([text(5), text(6)]), "1x2:cpu")
    later = texts([text(5), text(6), text(30), text(40)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spindle.train(later, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), steps=4, launcher=launcher)
    found = [str(w.message) for w in caught if issubclass(w.category, SpindleWarning)]
    assert [line.partition(",")[0] for line in found] == ["task 'read'"]
    assert "step 3: the batch has 120 entries of 'ids'" in found[0]
