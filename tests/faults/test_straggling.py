"""A rank that computes longer than the others in every step of a real run is named; in an ordinary run none is."""

import re
import warnings

import pytest
import torch
from torch import Tensor

import spindle
from spindle.runtime.controller import Launcher
from spindle.workload import Workload
from tests.faults.breaking import Plain, workload_of
from tests.faults.injected import own_rank
from tests.random_plans import widest_plan
from tests.tiny_workloads import floats


class Busy(Plain):
    """A block that computes many times over on one rank."""

    def __init__(self, rank: int, times: int) -> None:
        super().__init__()
        self.rank, self.times = rank, times

    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        with torch._C.DisableTorchFunction():  # a recorder answers questions like the next one as if it computed
            computes = not self.up.weight.is_meta
        y: Tensor = super().forward(x_BW)
        if computes and own_rank() == self.rank:
            work = torch.ones(64, 64)
            with torch.no_grad():
                for _ in range(self.times):
                    work = torch.tanh(work @ work)
        return y


def busy(times: int) -> Workload:
    data = [{"x": floats(4, 4, seed=3, dtype=torch.float32)}]
    return workload_of(lambda: iter(data * 400), Busy(1, times), Busy(1, times))


def stragglers(made: Workload, launcher: Launcher) -> list[str]:
    """What is said of slow ranks and links in a run of two."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spindle.train(
            made,
            widest_plan(spindle.make_metagraph(made), 2),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            steps=160,
            launcher=launcher,
        )
    return [text for text in (str(each.message) for each in caught) if re.search(r"straggler|is slow in", text)]


@pytest.mark.gloo
def test_a_busy_rank_is_named() -> None:
    (told, *_) = stragglers(busy(100), "processes")
    words = (
        r"rank 1 is a straggler in steps \d+ to \d+: it computes \d+\.\d times as long as rank 0 for the same layers"
    )
    assert re.match(words, told)


@pytest.mark.gloo
def test_in_an_ordinary_run_none_is_named() -> None:
    """On whatever this machine does besides."""
    assert stragglers(busy(0), "processes") == []
