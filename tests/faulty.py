"""Workloads that break on purpose, when a file appears."""

import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn

from spindle.workload import Workload
from tests.tiny_workloads import Residual


class Fragile(Residual):
    """A block that fails once a file exists."""

    def __init__(self, width: int, flag: Path, *, kill: bool) -> None:
        super().__init__(width)
        self.flag = str(flag)
        self.kill = kill

    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        if os.path.exists(self.flag):
            if not self.kill:
                raise ValueError("too hot")
            if os.environ.get("SPINDLE_TEST_VICTIM", "1") == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x_BW)


def fragile_workload(flag: Path, *, kill: bool = False) -> Workload:
    """One task through two fragile blocks."""
    torch.manual_seed(0)
    workload = Workload("fragile")
    net = workload.component("net", nn.Sequential(Fragile(4, flag, kill=kill), Fragile(4, flag, kill=kill)))

    @workload.task("task", batch_size=4, data=[{"x": torch.ones(4, 4)}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = net(batch["x"])
        return y.square().mean()

    return workload
