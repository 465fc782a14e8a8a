"""Averages: torch's AveragedModel, whose update branches on a count of its own, as code without a branch.

It copies the model the first time and averages from then on. Here both are computed, and the count, which is a tensor,
chooses: then each device that holds the average can write it, whatever the step.
"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

_AVERAGES: Any = swa_utils


def update_parameters(averaged: AveragedModel, model: nn.Module) -> None:
    """As `averaged.update_parameters(model)`, to the bit."""
    count = averaged.n_averaged
    is_first = count == 0
    with torch.no_grad():
        for mine, theirs in _pairs(averaged, model):
            new = _averaged(averaged, mine, theirs.detach(), count)
            mine.detach().copy_(torch.where(is_first, theirs.detach(), new))
        if not averaged.use_buffers:
            for kept, given in zip(averaged.module.buffers(), model.buffers(), strict=True):
                kept.detach().copy_(given.detach())
    averaged.n_averaged += 1


def _pairs(averaged: AveragedModel, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    own: Any = averaged.parameters()
    others: Any = model.parameters()
    if averaged.use_buffers:
        own = itertools.chain(averaged.module.parameters(), averaged.module.buffers())
        others = itertools.chain(model.parameters(), model.buffers())
    yield from zip(own, others, strict=False)


def _averaged(averaged: AveragedModel, mine: Tensor, theirs: Tensor, count: Tensor) -> Tensor:
    """The average with one more; what averages several at once writes it in place."""
    function = averaged.multi_avg_fn
    if function is None:
        found: Tensor = (averaged.avg_fn or _AVERAGES.get_swa_avg_fn())(mine.detach(), theirs, count)
        return found
    codes = [getattr(inspect.unwrap(each), "__code__", None) for each in (function, _AVERAGES.get_swa_multi_avg_fn())]
    if codes[0] is codes[1] and mine.is_floating_point():
        mine.detach().lerp_(theirs, (1 / (count + 1)).to(mine.dtype))  # without making a number of the count
    else:
        function([mine.detach()], [theirs], count)
    return mine.detach()
