"""StarVLA's co-training: its sequential loop and the planned run are the same training."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spindle
from spindle.capture import capture
from spindle.capture.eager import drawing_as_planned
from spindle.inputs.batch import SampledBatch
from spindle.metrics import Callback, StepMetrics
from spindle.record.substitutes.draws import Stream
from spindle.runtime.loading.data import Feed

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "vla_cotraining"
NAMES = ("model", "loop")
STEPS = 3


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The example's model.py in float64, and its loop.py."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in NAMES:
        sys.modules.pop(name, None)
    model, loop = map(importlib.import_module, NAMES)
    for component in model.workload.components.values():
        component.module.double()
    tasks = model.workload.tasks
    for name, task in tasks.items():
        tasks[name] = replace(task, data=[in_float64(batch) for batch in islice(task.data, STEPS)])
    yield model, loop
    for name in NAMES:
        sys.modules.pop(name, None)


def in_float64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def looped(model: Any, loop: Any) -> tuple[list[dict[str, float]], list[float]]:
    """Losses of StarVLA's loop by step, and its rates in the end. It draws the noise of the planned run: its own would
    be that of `torch.manual_seed`.
    """
    workload, captured = model.workload, capture(model.workload)
    feeds = {name: Feed(task, 0) for name, task in workload.tasks.items()}
    step, given = 0, dict[str, SampledBatch]()

    class Drawn(loop.Loop):  # type: ignore[misc]
        def forward_backward(self, task: str, batch: dict[str, Tensor]) -> float:
            units = given[task].units
            stream = Stream(step=step, task=task, units=units, high=units.num_samples)
            with drawing_as_planned(workload, captured, stream):
                loss: float = super().forward_backward(task, batch)
            return loss

    plain, losses = Drawn(loop.Policy()), []
    for step in range(STEPS):  # noqa: B007 - forward_backward reads it
        given = {name: feed.next() for name, feed in feeds.items()}
        losses.append(plain.step(dict(given["action"].fields), dict(given["questions"].fields)))
    for feed in feeds.values():
        feed.close()
    return losses, [group["lr"] for group in plain.optimizer.param_groups]


def test_the_loop_and_the_plan_train_alike(example: tuple[Any, Any]) -> None:
    """Losses of each step, weights and rates, in float64."""
    model, loop = example
    workload = model.workload
    start = {name: value.detach().clone() for name, value in workload.named_parameters()}
    rates: list[dict[str, float]] = []

    class Rates(Callback):
        def on_step_end(self, metrics: StepMetrics) -> None:
            rates.append(dict(metrics.learning_rates))

    result = spindle.train(
        workload,
        spindle.make_plan(workload, "1x2:cpu", time_limit_s=1.0),
        optimizer=model.optimizer,
        scheduler=model.scheduler,
        steps=STEPS,
        launcher="threads",
        callbacks=[Rates()],
    )
    planned = {name: value.detach().clone() for name, value in workload.named_parameters()}
    for name, value in workload.named_parameters():
        value.data.copy_(start[name])
    losses, last_rates = looped(model, loop)
    for ours, theirs in zip(result.losses, losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert [rates[-1][name] for name in ("qwen_vl_interface", "action_model")] == pytest.approx(last_rates)
    for name, value in workload.named_parameters():
        torch.testing.assert_close(planned[name], value.detach(), rtol=0, atol=1e-8, msg=name)
    assert max(float((planned[name] - start[name]).abs().max()) for name in start) > 1e-4
