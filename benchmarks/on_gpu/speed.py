"""Speed: a device in; predicted beside measured steps and memory, and what a rank adds to a plain loop, out."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.metrics import Callback, StepMetrics
from spindle.verbs.at_hand import devices_at_hand
from spindle.workload import Workload


@dataclass(frozen=True)
class Size:
    """How large the towers are, and how long is measured."""

    width: int
    depth: int
    batch: int
    tokens: int
    steps: int
    planning_s: float
    launcher: Literal["processes", "threads"]


SMALL, LARGE = Size(32, 1, 4, 8, 4, 0.3, "threads"), Size(1024, 12, 32, 256, 30, 5.0, "processes")
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16, recompute": {"precision": "bf16", "recompute": ["left", "right"]},
}


class Block(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:  # noqa: N803 - batch, time, channels
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.first(x_BTC)).chunk(3, -1))
        y: Tensor = x_BTC + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        z: Tensor = y + self.down(F.gelu(self.up(self.second(y))))
        return z


def towers(size: Size, **options: Any) -> Workload:
    """Two towers on two tasks: contrastive, and one tower alone."""
    torch.manual_seed(0)
    workload = Workload("towers", **options)
    left, right = (
        workload.component(name, nn.Sequential(*(Block(size.width) for _ in range(size.depth))))
        for name in ("left", "right")
    )
    draw = torch.Generator().manual_seed(1)

    def data() -> list[dict[str, Tensor]]:
        shape = (size.batch, size.tokens, size.width)
        return [{name: torch.randn(shape, generator=draw) for name in ("a", "b")} for _ in range(2)]

    @workload.task("match", batch_size=size.batch, data=data())
    def match(batch: dict[str, Tensor]) -> Tensor:
        a, b = (F.normalize(y.mean(1), dim=-1) for y in (left(batch["a"]), right(batch["b"])))
        logits = 5.0 * a @ b.T
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    @workload.task("alone", batch_size=size.batch, data=data())
    def alone(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(left(batch["a"]), batch["b"])

    return workload


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of all runs here."""
    return torch.optim.AdamW(parameters, lr=1e-4)


class Told(Callback):
    """Keeps what each step took, and the most memory."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []
        self.peak_bytes = 0

    def on_step_end(self, metrics: StepMetrics) -> None:
        """See Callback."""
        self.steps_s.append(metrics.step_s)
        self.peak_bytes = max(metrics.memory_bytes)


def predicted(device: str, *, small: bool) -> Iterator[dict[str, Any]]:
    """Profiles the towers, plans for one device, and runs the plan: predicted beside measured."""
    size, cluster = SMALL if small else LARGE, one_device()
    for name, options in list(OPTIONS.items())[: 1 if small else None]:
        workload = towers(size, **options)
        began_s = time.monotonic()
        profile = spindle.make_profile(workload, cluster=cluster, optimizer=adamw, launcher="processes")
        profile_s = time.monotonic() - began_s
        plan = spindle.make_plan(workload, cluster, profile=profile, time_limit_s=size.planning_s)
        told = Told()
        spindle.train(workload, plan, optimizer=adamw, steps=size.steps, launcher=size.launcher, callbacks=[told])
        yield {
            "case": name,
            "device": device,
            "profile_s": profile_s,
            "predicted_step_s": plan.step_s,
            "measured_step_s": statistics.median(told.steps_s),
            "predicted_peak_bytes": max(plan.memory.peak_bytes_per_device),
            "measured_peak_bytes": told.peak_bytes,
            "bytes_are_of": "tensors on the GPU" if device == "cuda" else "the process",
        }


def overhead(device: str, *, small: bool) -> Iterator[dict[str, Any]]:
    """A plain loop over the task functions, and one rank, with and without looking for what is not finite."""
    size, cluster = SMALL if small else LARGE, one_device()
    for name, options in list(OPTIONS.items())[: 1 if small else 2]:
        plain_s = plain_step_s(towers(size), device, size.steps, is_bf16=options.get("precision") == "bf16")
        found = {"case": name, "device": device, "plain_step_s": plain_s}
        for checks in ("ignore", "stop")[: 1 if small else None]:
            workload, told = towers(size, **options), Told()
            plan = spindle.make_plan(workload, cluster, time_limit_s=size.planning_s)
            spindle.train(
                workload,
                plan,
                optimizer=adamw,
                steps=size.steps,
                launcher=size.launcher,
                callbacks=[told],
                not_finite=checks,  # type: ignore[arg-type]
            )
            found[f"step_s, not_finite={checks}"] = statistics.median(told.steps_s)
        yield found


def plain_step_s(workload: Workload, device: str, steps: int, *, is_bf16: bool) -> float:
    """Seconds of a step of a plain loop, after the first."""
    modules = [component.module.to(device) for component in workload.components.values()]
    optimizer = adamw([p for module in modules for p in module.parameters()])
    batches = {name: list(task.batches()) for name, task in workload.tasks.items()}
    began_s = 0.0
    for step in range(steps + 1):
        if step == 1:
            settled(device)
            began_s = time.perf_counter()
        optimizer.zero_grad()
        for name, task in workload.tasks.items():
            batch = {key: value.to(device) for key, value in batches[name][step % 2].items()}
            with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
                loss = task.function(batch)
            torch.autograd.backward(loss)
        optimizer.step()
    settled(device)
    return (time.perf_counter() - began_s) / steps


def settled(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def one_device() -> str:
    """A cluster of one device of the kind that is here."""
    kind = devices_at_hand("processes").partition(":")[2]
    return f"1x1:{kind}" if kind else "1x1"
