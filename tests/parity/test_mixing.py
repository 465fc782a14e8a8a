"""Parity where samples see each other in one task, or in one batch, and not in another."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.workload import Batch, Workload
from tests.random_plans import widest_plan

WIDTH = 8


class Layer(nn.Module):
    """Attention over all positions of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def lengths(batch: Batch) -> Mapping[str, Any]:
    """Texts of two, one and three vectors in one row."""
    return {"x": (1, batch["lengths"])}


def two_tasks(order: str, masks: bool) -> Workload:
    """Padded texts in one task; packed ones in the other, which see each other unless `masks`."""
    torch.manual_seed(0)
    workload = Workload("mixing")
    layers = workload.component("layers", nn.ModuleList(Layer() for _ in range(3)).double())

    def padded(batch: Batch) -> Tensor:
        h = batch["x"]
        for layer in layers:
            h = layer(h)
        loss: Tensor = h.square().mean()
        return loss

    def packed(batch: Batch) -> Tensor:
        owner = torch.repeat_interleave(torch.arange(len(batch["lengths"])), batch["lengths"])
        mask = owner[:, None] == owner[None, :] if masks else torch.ones(len(owner), len(owner), dtype=torch.bool)
        h = batch["x"]
        for layer in layers:
            h = layer(h, mask[None])
        loss: Tensor = h.square().mean()
        return loss

    for name in order.split():
        if name == "padded":
            data = [{"x": torch.randn(3, 4, WIDTH, dtype=torch.float64)}]
            workload.task(name, batch_size=3, data=data)(padded)
        else:
            data = [{"x": torch.randn(1, 6, WIDTH, dtype=torch.float64), "lengths": torch.tensor([2, 1, 3])}]
            workload.task(name, batch_size=3, data=data, rows=lengths)(packed)
    return workload


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("order", ["padded packed", "packed padded"])
@pytest.mark.parametrize("masks", [True, False])
def test_a_layer_may_mix_samples_in_one_task_and_not_in_another(order: str, masks: bool) -> None:
    """What is known of it from one way of calling it does not hold for another."""
    workload = two_tasks(order, masks)
    metagraph = spindle.make_metagraph(workload)
    operators = [op for m in metagraph for op in m.operators if op.parameters]
    splittable = {name: all(op.splittable for op in operators if op.task == name) for name in workload.tasks}
    assert splittable == {"padded": True, "packed": masks}
    report = spindle.verify(workload, widest_plan(metagraph, 2), steps=1, launcher="threads")
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("by_vector", [True, False])
def test_a_first_batch_in_which_nothing_counts_hides_no_sum(by_vector: bool) -> None:
    """Its masked sums are zero for all samples and all parts; those of the second batch are not."""
    torch.manual_seed(0)
    workload = Workload("masked")
    layer = workload.component("layer", nn.Linear(WIDTH, WIDTH).double())
    x, mask = torch.randn(4, WIDTH, dtype=torch.float64), torch.tensor([True, False, True, True])
    data = [{"x": x, "mask": torch.zeros(4, dtype=torch.bool)}, {"x": x, "mask": mask}]

    @workload.task("t", batch_size=4, data=lambda: data)
    def t(batch: Batch) -> Tensor:
        weight = batch["mask"].double()
        h = layer(batch["x"]) * weight[:, None]
        total = (h.sum(0).square().sum() if by_vector else h.square().sum()) / weight.sum().clamp(min=1)
        found: Tensor = total
        return found

    plan = widest_plan(spindle.make_metagraph(workload), 2)
    report = spindle.verify(workload, plan, steps=2, launcher="threads")
    assert report.ok, str(report)


def test_a_loss_that_is_nan_hides_no_mean() -> None:
    """It is NaN for all samples and all parts, and its gradients are finite."""
    torch.manual_seed(0)
    workload = Workload("endless")
    layer = workload.component("layer", nn.Linear(WIDTH, WIDTH).double())

    @workload.task("t", batch_size=4, data=[{"x": torch.randn(4, WIDTH, dtype=torch.float64)}])
    def t(batch: Batch) -> Tensor:
        return torch.log(-layer(batch["x"]).square()).mean()

    plan = widest_plan(spindle.make_metagraph(workload), 2)
    report = spindle.verify(workload, plan, steps=2, launcher="threads")
    assert report.ok, str(report)
