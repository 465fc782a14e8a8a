"""What whole models of sound and vision do in their glue: alignment losses, layers left out, rows written in turn."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.errors import SpindleWarning, WorkloadError
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import WIDTH, Residual, floats

Task = Callable[[dict[str, Any]], Tensor]


class Stack(nn.Module):
    """Layers between a stem and a head; each is left out with some probability."""

    def __init__(self, layerdrop: float = 0.0) -> None:
        super().__init__()
        self.layerdrop = layerdrop
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 7)
        self.layers = nn.ModuleList(Residual(WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if not self.layerdrop or torch.rand([]) >= self.layerdrop:
                x = layer(x)
        y: Tensor = self.head(x)
        return y


def wrapped(module: nn.Module, batches: list[dict[str, Any]], task: Task) -> spindle.Workload:
    workload = spindle.Workload("w")
    workload.component("m", module.double())
    workload.task("t", batch_size=4, data=batches)(task)
    return workload


def exact(workload: spindle.Workload) -> None:
    metagraph = spindle.make_metagraph(workload)
    for plan in (widest_plan(metagraph, 3), random_plan(metagraph, 2, 0)):
        report = spindle.verify(workload, plan, launcher="threads")
        assert report.ok, str(report)


def sharded(workload: spindle.Workload) -> bool:
    return all(op.splittable for op in capture(workload).graph if not op.name.endswith("loss"))


def waves(*lengths: int) -> dict[str, Any]:
    heard = torch.tensor([min(n // 2, 3) for n in lengths])
    return {
        "x": floats(len(lengths), max(lengths), 5, seed=len(lengths), dtype=torch.float64),
        "lengths": torch.tensor(lengths),
        "heard": heard,
        "said": torch.randint(1, 7, (len(lengths), int(heard.max())), generator=torch.Generator().manual_seed(0)),
    }


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("is_joined", [False, True])
def test_an_alignment_loss_goes_sample_by_sample(reduction: str, is_joined: bool) -> None:
    """Transcripts side by side or one after another; the layers go by samples, and all gradients agree."""
    torch.manual_seed(0)
    model = Stack()

    def task(batch: dict[str, Any]) -> Tensor:
        likely = model(batch["x"]).log_softmax(-1).transpose(0, 1)
        said = batch["said"]
        if is_joined:
            said = said[torch.arange(said.shape[1]) < batch["heard"][:, None]]
        found = F.ctc_loss(likely, said, batch["lengths"], batch["heard"], reduction=reduction, zero_infinity=True)
        return found.mean() / 100

    workload = wrapped(model, [waves(6, 3, 8, 5), waves(4, 9, 7, 6)], task)
    assert sharded(workload)
    exact(workload)


def test_layers_that_are_left_out_by_chance_are_refused() -> None:
    model = Stack(layerdrop=0.2)
    workload = wrapped(model, [waves(6, 3, 8, 5)], lambda batch: model(batch["x"]).square().mean())
    with pytest.raises(WorkloadError, match=r"calls m.layers.\d in some steps and leaves it out in others"):
        capture(workload)


def test_a_number_that_is_drawn_may_scale_what_is_computed() -> None:
    torch.manual_seed(0)
    model = Stack()
    workload = wrapped(
        model, [waves(6, 3, 8, 5)] * 2, lambda batch: (model(batch["x"]) * float(torch.rand([]))).square().mean()
    )
    exact(workload)


class Placed(nn.Module):
    """Positions, stretched to the length of each sample, are written into a tensor sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, WIDTH, 4))
        self.stack = Stack()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        placed = torch.zeros(len(x), x.shape[1], WIDTH, dtype=x.dtype)
        for index, length in enumerate(lengths.tolist()):
            placed[index, :length] = F.interpolate(self.positions, length, mode="linear")[0].T
        y = self.stack.stem(x) + placed
        for layer in self.stack.layers:
            y = layer(y)
        z: Tensor = self.stack.head(y)
        return z


def test_rows_that_are_written_sample_by_sample_go_by_sample() -> None:
    torch.manual_seed(0)
    model = Placed()
    workload = wrapped(
        model,
        [waves(6, 3, 8, 5), waves(4, 9, 7, 6)],
        lambda batch: model(batch["x"], batch["lengths"]).square().mean(),
    )
    assert sharded(workload)
    exact(workload)


def test_samples_in_turn_run_on_one_device_and_the_line_is_named() -> None:
    torch.manual_seed(0)
    model = Stack()

    def task(batch: dict[str, Any]) -> Tensor:
        x = model.layers[0](model.stem(batch["x"])).repeat(2, 1, 1)
        y = model.head(x)[..., :5] + batch["x"].repeat(2, 1, 1)
        z: Tensor = model.head(model.layers[1](model.stem(y)))
        return z.square().mean()

    workload = wrapped(model, [waves(6, 3, 8, 5), waves(4, 9, 7, 6)], task)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SpindleWarning)
        assert not sharded(workload)
    told = " ".join(str(warning.message) for warning in caught)
    assert "of test_whole_models.py gives the samples in turn by 'repeat'; use repeat_interleave" in told
    exact(workload)
