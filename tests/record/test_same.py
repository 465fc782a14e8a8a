"""Same numbers: NaN is NaN, and neither zero nor infinity; checkpoints are compared by it, too."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spindle.inputs.same import same_numbers
from spindle.runtime.checkpoints.checkpoint_report import _difference

NAN, INF = math.nan, math.inf
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("one", "other", "is_same", "far"),
    [
        ([1.0, NAN], [1.0, NAN], True, 0.0),
        ([0.0], [-0.0], True, 0.0),
        ([INF], [INF], True, 0.0),
        ([0.0], [NAN], False, INF),
        ([INF], [LARGEST], False, INF),
        ([INF], [-INF], False, INF),
        ([1.0, NAN], [3.0, NAN], False, 2.0),
    ],
)
def test_what_is_no_number_equals_itself_alone(one: Any, other: Any, is_same: bool, far: float) -> None:
    a, b = torch.tensor(one), torch.tensor(other)
    assert same_numbers(a, b) is same_numbers(b, a) is is_same
    found = list(_difference("p", source(a), source(b)))
    assert [difference.largest for difference in found] == [far] * (not is_same)


def source(tensor: Tensor) -> Any:
    """A tensor of a checkpoint, as it is read."""
    return SimpleNamespace(shape=tuple(tensor.shape), read=lambda name: tensor)


def test_types_shapes_and_layouts() -> None:
    ones = torch.ones(2, 3)
    assert not same_numbers(ones, ones.double())
    assert not same_numbers(ones, torch.ones(3, 2))
    assert same_numbers(ones, ones.to_sparse())
    assert same_numbers(torch.empty(0, 4), torch.empty(0, 4))
    assert same_numbers(torch.tensor([True, False]), torch.tensor([True, False]))
    assert not same_numbers(torch.tensor([1 + 2j]), torch.tensor([1 - 2j]))
