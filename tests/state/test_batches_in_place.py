"""A task that changes its batch in place finds each batch as the data gave it, in each pass, planned or verified."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.errors import GraphError
from spindle.workload import Batch
from tests.random_plans import widest_plan

WIDTH = 4


def _scaled(batch: Batch) -> Tensor:
    x: Tensor = batch["x"]
    x.mul_(1.5)
    return x


def _scaled_in_lists(batch: Batch) -> Tensor:
    for sample in batch["list"]:
        sample.mul_(1.5)
    return torch.stack(batch["list"])


def _scaled_in_a_dict(batch: Batch) -> Tensor:
    batch["dict"]["scale"].add_(1)
    x: Tensor = batch["x"]
    scale: Tensor = batch["dict"]["scale"]
    return x * scale


@pytest.mark.parametrize("change", [_scaled, _scaled_in_lists, _scaled_in_a_dict])
def test_each_pass_finds_a_list_of_batches_as_it_was(change: Callable[[Batch], Tensor]) -> None:
    """Also where a batch is gone through anew without a recording; and what the user holds stays as it was."""
    torch.manual_seed(0)
    workload = spindle.Workload("in_place")
    net = workload.component("net", nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))).double())

    def given(seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(4, WIDTH, generator=draw, dtype=torch.float64)
        return {"x": x, "list": list(x.clone()), "dict": {"scale": torch.ones(1, dtype=torch.float64)}}

    data = [given(seed) for seed in range(2)]

    @workload.task("t", batch_size=4, data=data)
    def t(batch: Batch) -> Tensor:
        loss: Tensor = (net(change(batch)) - 1).square().mean()
        return loss

    report = spindle.verify(workload, widest_plan(spindle.make_metagraph(workload), 2), steps=5, launcher="threads")
    assert report.ok, report
    for seed, batch in enumerate(data):
        unchanged = given(seed)
        assert torch.equal(batch["x"], unchanged["x"])
        assert torch.equal(torch.stack(batch["list"]), unchanged["x"])
        assert torch.equal(batch["dict"]["scale"], unchanged["dict"]["scale"])


def test_a_parameter_of_a_type_without_a_size_is_refused_by_name() -> None:
    """Such as a complex one, of which no message and no file has a type."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.ones(WIDTH // 2 + 1, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=WIDTH)
            return y

    workload = spindle.Workload("complex")
    net = workload.component("net", nn.Sequential(Spectral(), Spectral()))

    @workload.task("t", batch_size=4, data=[{"x": torch.ones(4, WIDTH)}])
    def t(batch: Batch) -> Tensor:
        loss: Tensor = net(batch["x"]).square().mean()
        return loss

    with pytest.raises(GraphError, match=r"parameter 'net\.0\.filter': dtype 'complex64' is not known; hold it as one"):
        spindle.make_plan(workload, "1x2:cpu")
