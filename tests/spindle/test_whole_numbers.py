"""Whole numbers: every option that counts steps or samples refuses what is none, by name, before anything runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.errors import InputError
from spindle.words.whole_numbers import is_whole


def made() -> spindle.Workload:
    workload = spindle.Workload("w")
    net = workload.component("net", nn.Linear(2, 2))

    @workload.task("t", batch_size=2, data=[{"x": torch.ones(2, 2)}])
    def t(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = net(batch["x"]).square().mean()
        return loss

    return workload


def evaluated(workload: spindle.Workload) -> spindle.Evaluation:
    found = spindle.Evaluation(workload)
    task = workload.tasks["t"]
    found.task("t", batch_size=2, data=task.data)(task.function)
    return found


@pytest.mark.parametrize("value", [1.5, "3", -1, True])
@pytest.mark.parametrize(
    "name",
    [
        *("steps", "trace_steps", "checkpoint_every", "keep_checkpoints", "max_samples", "max_tokens"),
        *("check_replicas_every", "evaluate_every"),
    ],
)
def test_train_refuses_what_is_no_whole_number(name: str, value: Any, tmp_path: Path) -> None:
    workload = made()
    evaluation = {"evaluation": evaluated(workload)} if name == "evaluate_every" else {}
    options: dict[str, Any] = {"steps": 2, "launcher": "threads", "checkpoints": tmp_path, **evaluation, name: value}
    with pytest.raises(InputError, match=f"{name} is {value!r}; give"):
        spindle.train(workload, spindle.make_plan(workload, "1x1:cpu"), optimizer=torch.optim.SGD, **options)


@pytest.mark.parametrize("value", [1.5, "3", -1, True])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda value: spindle.EMA(0.9, start=value), "start is"),
        (lambda value: spindle.EMA(0.9, every=value), "every"),
        (lambda value: spindle.EarlyStop(metric="t:loss", patience=value), "patience is"),
        (lambda value: spindle.Workload("w", accumulate=value), "accumulate is"),
        (lambda value: spindle.Workload("w", in_flight=value), "in_flight"),
        (lambda value: made().task("u", batch_size=2, data=[], every=value), "every is"),
        (lambda value: made().task("u", batch_size=2, data=[], prefetch=value), "prefetch is"),
        (lambda value: made().mixture({"t": 1.0, "u": 1.0}, tasks_per_step=value), "draws"),
        (
            lambda value: spindle.train_stages(made(), [spindle.Stage(until=value)], checkpoints="none"),
            "until= of a stage is",
        ),
    ],
)
def test_settings_refuse_what_is_no_whole_number(make: Callable[[Any], object], words: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{words} {value!r}"):
        make(value)


def test_whole_numbers_of_any_type_are_taken() -> None:
    assert is_whole(torch.tensor(3), 1)
    assert not is_whole(torch.tensor(1.0), 1)
