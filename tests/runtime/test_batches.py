"""Batches: what is recorded beside the step before is what would be recorded in its own step."""

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import spindle
from spindle.runtime.devices import Streams
from spindle.runtime.loading.batches import Batches
from spindle.runtime.loading.recordings import LoadedBatch, Recordings
from spindle.values.units import Bounds
from tests.random_plans import random_plan
from tests.tiny_workloads import WIDTH, Residual, floats


def ragged(*, accumulate: int = 1, in_flight: int = 1) -> spindle.Workload:
    """Two tasks on one stack, their batches of any length; one of them every other step, one that draws."""
    torch.manual_seed(0)
    workload = spindle.Workload("ragged", accumulate=accumulate, in_flight=in_flight)
    body = workload.component("body", torch.nn.Sequential(*(Residual(WIDTH) for _ in range(3))).double())
    lengths = [5, 3, 7, 2]
    data = [{"x": floats(4, n, WIDTH, seed=n, dtype=torch.float64)} for n in lengths]

    @workload.task("mean", batch_size=4, data=data)
    def mean(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = body(batch["x"] + torch.rand_like(batch["x"]))
        return y.sum(1).square().mean() / batch["x"].shape[1]

    @workload.task("last", batch_size=4, data=lambda: iter(data[::-1]), every=2)
    def last(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = body(batch["x"])[:, -1]
        return y.square().mean()

    return workload


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Recording ahead is on; counts recordings by the kind of thread that made them."""
    own, record = Batches.__init__, Recordings.record
    seen: Counter[str] = Counter()

    def with_thread(self: Batches, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **{**kwargs, "ahead": Streams(torch.device("cpu"))})

    def counted(self: Recordings, loaded: LoadedBatch, bounds: Bounds) -> Any:
        seen["ahead" if threading.current_thread().name.startswith("recording") else "in the step"] += 1
        return record(self, loaded, bounds)

    monkeypatch.setattr(Batches, "__init__", with_thread)
    monkeypatch.setattr(Recordings, "record", counted)
    return seen


@pytest.mark.parametrize(("accumulate", "in_flight"), [(1, 1), (2, 1), (4, 2)])
def test_steps_recorded_ahead_are_exact(ahead: Counter[str], accumulate: int, in_flight: int) -> None:
    """Rounds, micro-batches, a task that rests, draws by step: all as in one process."""
    workload = ragged(accumulate=accumulate, in_flight=in_flight)
    plan = random_plan(spindle.make_metagraph(workload), 2, 3)
    report = spindle.verify(workload, plan, steps=4, launcher="threads")
    assert report.ok, str(report)
    assert ahead["ahead"] > ahead["in the step"]


def test_a_batch_that_cannot_be_recorded_is_told_in_its_own_step(ahead: Counter[str]) -> None:
    """Looked at in step 1, it fails in step 2, with the words and the place that it has without looking ahead."""
    workload = spindle.Workload("w")
    body = workload.component("body", torch.nn.Linear(3, 2))

    @workload.task("t", batch_size=2, data=lambda: iter([{"x": torch.ones(2, 3)}, {"x": torch.ones(2, 4)}]))
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = body(batch["x"])
        return y.square().mean()

    plan = spindle.make_plan(workload, "1x1:cpu")
    losses: list[int] = []
    with pytest.raises(spindle.SpindleError, match="task 't', step 2"):
        spindle.train(
            workload,
            plan,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            steps=2,
            launcher="threads",
            on_step=lambda step, _: losses.append(step),
        )
