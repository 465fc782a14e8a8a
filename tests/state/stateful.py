"""Workloads that change more than gradients do, and a comparison of all that they hold with one process."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.values.plan import Plan
from tests.random_plans import random_plan

WIDTH = 6
Make = Callable[[], spindle.Workload]


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


def batches(seed: int, size: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(size, WIDTH, generator=generator, dtype=torch.float64),
            "y": torch.randint(0, 3, (size,), generator=generator),
        }
        for _ in range(4)
    ]


def values(workload: spindle.Workload) -> dict[str, Tensor]:
    """All parameters and buffers."""
    named = (*workload.named_parameters(), *workload.named_buffers())
    return {name: value.detach().clone() for name, value in named}


def one_process(workload: spindle.Workload, steps: int) -> dict[str, Tensor]:
    """What plain training of the user's own functions leaves: task after task, batch after batch."""
    count, at = workload.accumulate, dict.fromkeys(workload.tasks, 0)
    optimizer = sgd([p for _, p in workload.named_parameters() if p.requires_grad])
    for step in range(steps):
        optimizer.zero_grad()
        for name in workload.tasks_of(step, 0):
            task = workload.tasks[name]
            data = list(task.data)  # type: ignore[arg-type]
            for _ in range(count):
                loss = task.function(dict(data[at[name] % len(data)]))
                at[name] += 1
                torch.autograd.backward(loss * (task.weight / count))
        optimizer.step()
    return values(workload)


def planned(workload: spindle.Workload, plan: Plan, steps: int) -> dict[str, Tensor]:
    """What a planned run leaves."""
    spindle.train(workload, plan, optimizer=sgd, steps=steps, launcher="threads", timeout_s=30.0)
    return values(workload)


def follows(make: Make, num_ranks: int, seed: int, *, steps: int = 3) -> None:
    """A random plan leaves every parameter and every buffer as one process does."""
    wanted = one_process(make(), steps)
    workload = make()
    before = values(workload)
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed)
    torch.testing.assert_close(values(workload), before, rtol=0, atol=0)  # capture leaves the user's modules alone
    found = planned(workload, plan, steps)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def tasks_on(
    workload: spindle.Workload, trunk: Callable[[Tensor], Tensor], count: int, *, every: int = 1
) -> spindle.Workload:
    """Tasks that classify what a trunk gives, each with a head of its own; the second takes part `every` so often."""
    for index in range(count):
        options = {"every": every} if index == 1 else {}
        head = workload.component(f"head{index}", nn.Linear(WIDTH, 3).double())

        @workload.task(f"t{index}", batch_size=6, data=batches(index), weight=1.0 + index, **options)  # type: ignore[arg-type]
        def task(batch: dict[str, Tensor], head: nn.Module = head) -> Tensor:
            return F.cross_entropy(head(trunk(batch["x"])), batch["y"])

    return workload


def stack(layer: Callable[[], nn.Module], depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer() for _ in range(depth))).double()
