"""A workload in which a rank fails in a chosen way at a chosen place, as often as files say; else it trains.

The fault is real: the rank's own process is killed, stopped, asked to end or raises, in code that the run calls there.

Workers import this module; it leaves out tests.tiny_workloads, whose libraries take them seconds.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import spindle
from spindle.values.plan import Plan, make_waves
from spindle.workload import Workload
from tests.random_plans import widest_plan

PHASES = ("start", "load", "forward", "transfer", "reduction", "optimizer", "checkpoint")
KINDS = ("killed", "stopped", "exits", "raises", "out of memory", "hangs", "asked to end")
RELEASE = threading.Event()  # ends the hangs of this process


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a rank, where, at which of its calls there, and how often: a file in `folder` for each time."""

    kind: str
    phase: str
    folder: Path
    rank: int = 1
    call: int = 4

    def armed(self, times: int = 1) -> "Fault":
        """It will happen so often."""
        self.folder.mkdir(exist_ok=True)
        for number in range(times):
            (self.folder / str(number)).touch()
        return self

    def is_armed(self) -> bool:
        """Whether it is still to happen."""
        return any(self.folder.glob("[0-9]"))

    def happens(self) -> bool:
        """Whether it is to happen now; takes a file away."""
        for file in sorted(self.folder.glob("[0-9]")):
            file.unlink()
            (self.folder / "at").write_text(str(time.monotonic()))  # alike in all processes of a machine
            return True
        return False


class Trigger:
    """Counts the calls of one place in one process, and lets the fault happen."""

    def __init__(self, fault: Fault, phase: str, call: int | None = None) -> None:
        self.fault, self.phase, self.call, self.calls = fault, phase, call or fault.call, 0

    def __call__(self) -> None:
        rank = own_rank()
        if self.phase != self.fault.phase or rank is None:
            return
        self.calls += 1
        chosen = self.phase == "load" or rank == self.fault.rank  # one rank reads for all of a machine
        if chosen and self.calls >= self.call and self.fault.happens():
            act(self.fault.kind)


def own_rank() -> int | None:
    """The rank that this is, whether process or thread; None in the driver."""
    if dist.is_initialized():
        return dist.get_rank()
    name = threading.current_thread().name
    return int(name[4:].partition("_")[0]) if name.startswith("rank") else None


def act(kind: str) -> None:
    """Do it to this process."""
    if kind in ("killed", "stopped", "asked to end"):
        numbers = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "asked to end": signal.SIGTERM}
        os.kill(os.getpid(), numbers[kind])
    elif kind == "exits":
        os._exit(7)
    elif kind == "raises":
        raise ValueError("too hot")
    elif kind == "out of memory":
        torch.empty(2**60, dtype=torch.uint8)
    elif kind == "hangs":
        from tests.faults import injected  # by its name: processes are sent what a class of this file refers to

        injected.RELEASE.wait(60.0)


class Block(nn.Module):
    """A block that lets the fault happen before it computes, and after its gradients are computed."""

    def __init__(self, fault: Fault, *, second: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        phases = ("transfer",) if second else ("forward", "reduction")
        self.before = [Trigger(fault, phase) for phase in phases if phase != "reduction"]
        self.after = [Trigger(fault, phase) for phase in phases if phase == "reduction"]

    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        with torch._C.DisableTorchFunction():  # a recorder answers questions like the next one as if it computed
            computes = not self.up.weight.is_meta
        if computes:
            for trigger in self.before:
                trigger()
        y: Tensor = x_BW + self.down(torch.tanh(self.up(self.norm(x_BW))))
        if computes and self.after and y.requires_grad:
            y.register_hook(self._gradient)  # type: ignore[no-untyped-call]  # of torch's stubs
        return y

    def _gradient(self, gradient: Tensor) -> Tensor:
        for trigger in self.after:
            trigger()
        return gradient


class Optimizer(torch.optim.SGD):
    """Gradient descent that lets the fault happen in a step, and when a checkpoint asks for its state."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.05, momentum=0.9)

    def arm(self, fault: Fault) -> "Optimizer":
        self.on_step, self.on_save = Trigger(fault, "optimizer"), Trigger(fault, "checkpoint", call=2)
        return self

    def step(self, closure: Any = None) -> Any:
        self.on_step()
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        self.on_save()
        return super().state_dict()


def optimizer_of(fault: Fault) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """What makes the optimizer; called at the start of each rank, where a fault may happen too."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        Trigger(fault, "start", call=1)()
        return Optimizer(parameters).arm(fault)

    return make


def workload_of(fault: Fault) -> Workload:
    """Two components of two blocks, which are kept whole since they repeat; batches that differ from step to step."""
    torch.manual_seed(0)
    workload = Workload("injected")
    first, second = (
        workload.component(name, nn.Sequential(*(Block(fault, second=name == "second") for _ in range(2))))
        for name in ("first", "second")
    )

    def batches() -> Iterator[dict[str, Tensor]]:
        trigger = Trigger(fault, "load")
        for seed in range(100):
            trigger()
            yield {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))}

    @workload.task("t", batch_size=4, data=batches)
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = second(first(batch["x"]))
        return y.square().mean()

    return workload


def plan_of(workload: Workload, *, split: bool) -> Plan:
    """All on both ranks, or each component on one of its own."""
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    if not split:
        return plan
    apart = {"t.first": (0,), "t.second": (1,)}
    return replace(plan, waves=make_waves([replace(s, devices=apart.get(s.metaop, (1,))) for s in plan.slices]))


def trained(fault: Fault, **options: Any) -> tuple["spindle.verbs.training.TrainResult", dict[str, Tensor]]:
    """A run of eight steps with the fault, a checkpoint every second one: what it gives, and its weights."""
    workload = workload_of(fault)
    given = {"steps": 8, "checkpoint_every": 2, "timeout_s": 3.0} | options
    plan = given.pop("plan", None) or plan_of(workload, split=fault.phase == "transfer")
    result = spindle.train(workload, plan, optimizer=optimizer_of(fault), **given)
    return result, {name: value.detach().clone() for name, value in workload.named_parameters()}


def undisturbed(fault: Fault) -> dict[str, Tensor]:
    """The weights of the run in which the fault does not happen."""
    calm = replace(fault, folder=fault.folder / "none")
    return trained(calm, launcher="threads", timeout_s=30.0)[1]
