"""Workloads whose loader or block breaks in a chosen step, on a chosen rank, in a chosen way.

Workers import this module; it leaves out tests.tiny_workloads, whose libraries take them seconds.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import spindle
from spindle.workload import Workload

Batches = Callable[[], Iterator[dict[str, Tensor]]]

SECONDS = 60.0  # a stall is longer than any test; whoever waits for its end is killed or released
RELEASE = threading.Event()  # ends the stalls of this process


class Plain(nn.Module):
    """A block that works, large enough to be kept whole when it repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        y: Tensor = x_BW + self.down(torch.tanh(self.up(self.norm(x_BW))))
        return y


class Breaking(Plain):
    """A block that breaks once a file exists, on the rank whose first row begins with a 1: that is rank 0. Only where
    it computes: while a task is recorded its parameters have no numbers.
    """

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = str(flag)

    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        with torch._C.DisableTorchFunction():  # a recorder answers questions like the next one as if it computed
            computes = not self.up.weight.is_meta
        if computes and os.path.exists(self.flag) and x_BW.detach()[0, 0].item() == 1.0:
            self.act()
        return super().forward(x_BW)

    def act(self) -> None:
        raise NotImplementedError


class Raising(Breaking):
    """Raises, as a user's code would."""

    def act(self) -> None:
        raise ValueError("too hot")


class Killed(Breaking):
    """Its process is killed from outside, as by a machine out of memory."""

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Stalling(Breaking):
    """Does not come back."""

    def act(self) -> None:
        from tests.faults import breaking  # by its name: processes are sent what a class of this file refers to

        breaking.RELEASE.wait(SECONDS)


class Exiting(Breaking):
    """Ends its process as native code does: at once, without a word."""

    def act(self) -> None:
        os._exit(7)


def workload_of(data: Batches, *blocks: Plain, **options: object) -> Workload:
    """One task "t" through these blocks, on batches of four rows of four numbers."""
    torch.manual_seed(0)
    workload = Workload("breaking")
    net = workload.component("net", nn.Sequential(*(blocks or (Plain(), Plain()))))

    @workload.task("t", batch_size=4, data=data, **options)  # type: ignore[arg-type]
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = net(batch["x"])
        return y.square().mean()

    return workload


def rows(first: float = 0.0, samples: int = 4) -> dict[str, Tensor]:
    """A batch whose first row begins with `first`."""
    x = torch.zeros(samples, 4)
    x[0, 0] = first
    return {"x": x}


def marked() -> Iterator[dict[str, Tensor]]:
    """Batches whose first row is marked: rank 0 holds it."""
    while True:
        yield rows(1.0)


def good_then(last: object) -> Batches:
    """Two good batches, then another object; an exception is raised."""

    def batches() -> Iterator[dict[str, Tensor]]:
        yield rows()
        yield rows()
        if isinstance(last, Exception):
            raise last
        yield last  # type: ignore[misc]

    return batches


def breaking_block(block: type[Breaking], flag: Path) -> Workload:
    """A workload with blocks of this kind, captured while all is well; from now on they break."""
    workload = workload_of(marked, block(flag), block(flag))
    spindle.make_metagraph(workload)
    flag.touch()
    return workload
