"""Schedules that take parameter groups by their place, which settings of components would change."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import spindle
from spindle.errors import WorkloadError
from tests.state.test_optimizers import towers


class FirstDecays:
    """DINO's schedule: the decay of the first group grows, and all rates fall."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        self.optimizer.param_groups[0]["weight_decay"] = 0.1 * self.steps
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.steps = state["steps"]


@pytest.mark.parametrize("own", [{"weight_decay": 0.3}, {"momentum": 0.5}])
def test_a_schedule_that_takes_groups_by_their_place_is_refused_where_they_are_split(own: dict[str, float]) -> None:
    """Its first group would be another; without settings, and with a group for the component alone, it is exact."""

    def by_dimension(parameters: Any) -> Optimizer:
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
        return torch.optim.SGD([{"params": matrices}, {"params": vectors}], lr=0.1, momentum=0.9)

    def by_component(named_parameters: Any) -> Optimizer:
        trunk = [p for name, p in named_parameters if name.startswith("trunk.")]
        others = [p for name, p in named_parameters if not name.startswith("trunk.")]
        return torch.optim.SGD([{"params": others}, {"params": trunk}], lr=0.1, momentum=0.9)

    schedule: Any = FirstDecays
    with pytest.raises(WorkloadError, match="FirstDecays gives 'weight_decay' to groups by their place"):
        spindle.verify(towers(own=own), optimizer=by_dimension, scheduler=schedule, launcher="threads")
    report = spindle.verify(towers(), optimizer=by_dimension, scheduler=schedule, launcher="threads")
    assert report.ok, report
    report = spindle.verify(towers(own=own), optimizer=by_component, scheduler=schedule, launcher="threads")
    assert report.ok, report
