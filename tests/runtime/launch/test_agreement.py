"""Agreement: what ranks that made their own rank specs compare, and what is said of those that differ."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.errors import RunError
from spindle.runtime.controller import prepare
from spindle.runtime.launch.agreement import agreement, refuse_differences
from spindle.runtime.rank_spec import make_rank_specs
from spindle.values.plan import Plan
from tests.faults.breaking import Plain, rows
from tests.random_plans import random_plan, widest_plan


class Doubled(Plain):
    """A layer that differs from `Halved` in one number of its code."""

    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        return super().forward(x_BW) * 2.0


class Halved(Plain):
    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        return super().forward(x_BW) * 0.5


Halved.__qualname__ = Doubled.__qualname__  # as the same class in an edited file
Halved.__name__ = Doubled.__name__


def digests(
    *,
    layer: type[Plain] = Doubled,
    planned: Callable[[Any], Plan] = lambda metagraph: widest_plan(metagraph, 2),
    model_seed: int = 0,
    weight: float = 1.0,
    seed: int = 0,
    lr: float = 0.1,
) -> dict[str, str]:
    """What a rank that made its rank spec so would compare."""
    torch.manual_seed(model_seed)
    workload = spindle.Workload("compared")
    net = workload.component("net", nn.Sequential(layer(), layer()))

    @workload.task("t", batch_size=4, data=[rows(1.0)], weight=weight)
    def task(batch: dict[str, Tensor]) -> Tensor:
        return net(batch["x"]).square().mean()  # type: ignore[no-any-return]

    prepared = prepare(workload, planned(spindle.make_metagraph(workload)))
    optimizer = functools.partial(torch.optim.SGD, lr=lr)
    specs = make_rank_specs(prepared.program, prepared.captured, workload, optimizer=optimizer, seed=seed)
    return agreement(prepared.program, specs)


@pytest.mark.parametrize(
    ("otherwise", "kinds"),
    [
        ({}, set()),
        ({"planned": lambda metagraph: random_plan(metagraph, 2, seed=3)}, {"plan", "program"}),
        ({"planned": lambda metagraph: widest_plan(metagraph, 1)}, {"plan", "program"}),
        ({"weight": 2.0}, {"program"}),
        ({"layer": Halved}, {"code"}),
        ({"lr": 0.2}, {"code"}),
        ({"model_seed": 1}, {"weights"}),
        ({"seed": 1}, {"seed"}),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else None,
)
def test_what_differs_is_told_apart(otherwise: dict[str, Any], kinds: set[str]) -> None:
    """A rank made alike has the same digests in full; another differs in what is other alone."""
    one, other = digests(), digests(**otherwise)
    assert {kind for kind in one if one[kind] != other[kind]} == kinds


def test_the_few_are_named() -> None:
    """Of four ranks two came with other things than the rest, each with its own."""
    most = {"plan": "a", "seed": "a"} | dict.fromkeys(("versions of Python or torch", "program"), "a")
    most |= {"code": "a", "weights": "a"}
    found = [most | {"seed": "b"}, most, most | {"plan": "b"}, most]
    refuse_differences([most] * 4)
    with pytest.raises(RunError, match=r"ranks 0, 2 came with another plan \(.*\); seed \(.*\) than rank 1, so"):
        refuse_differences(found)
