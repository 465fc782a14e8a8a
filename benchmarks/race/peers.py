"""The other side of the runtime benchmark: the same workloads as people train them, in processes that wait for orders.

- `eager`: one process, the plain loop: every task forward and backward, then one step. It is as people write it; as
  `eager, memory kept` it keeps the memory that it frees, in large pages, as Spindle's ranks and the others here do.
- `ddp`: DistributedDataParallel over all tasks in turn, their losses summed, one backward and one reduction a step.
- `ddp, tuned`: as one who knows writes it (`runtime_fused`): each tower once on the samples of all tasks, one gather, a
  static graph, buffers that are not broadcast, gradients that lie in their buckets.
- `fsdp`: fully_shard of every block and of the whole, the same loop.
"""

import functools
import os
import resource
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from race.fused import FUSED, Losses
from race.models import WORKLOADS, one_task
from race.ragged import LARGE, two_towers
from torch import Tensor, nn

from spindle.capture.blocks import find_blocks
from spindle.runtime.comms.host import keep_freed_memory, own_cores
from spindle.runtime.comms.transport import join_store, serve_store
from spindle.workload import Workload


def adam(parameters: Any) -> torch.optim.Optimizer:
    """What all sides step with."""
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)


class AllTasks(nn.Module):
    """All tasks of a step in turn; the weighted sum of their losses."""

    def __init__(self, workload: Workload, fused: Callable[..., Losses] | None = None) -> None:
        super().__init__()
        self.fused = fused
        self.parts = nn.ModuleDict({name: component.module for name, component in workload.components.items()})
        self.tasks = list(workload.tasks.values())

    def forward(self, batches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.fused is not None:
            return self.fused(self.parts, batches)
        return {task.name: task.function(batches[task.name]) * task.weight for task in self.tasks}


Step = Callable[[], dict[str, Tensor]]
Stepper = Callable[[str, int, int], Step]
"""Kind, rank and number of ranks in; what makes a step of this rank, and returns its losses, out."""


class Peer:
    """Processes that train a workload in one of the baselines, or what `stepper` makes, a function of a module."""

    def __init__(
        self, kind: str, workload: str, num_ranks: int, num_threads: int, stepper: Stepper | None = None
    ) -> None:
        self.store = serve_store("127.0.0.1")
        context = get_context("spawn")
        self.pipes, self.children = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, kind, workload, rank, num_ranks, num_threads, self.store.port, stepper)
            child = context.Process(target=_serve, args=arguments, daemon=True)
            child.start()
            self.pipes.append(ours)
            self.children.append(child)
        for pipe in self.pipes:
            pipe.recv()

    def steps(self, count: int) -> tuple[float, dict[str, float]]:
        """Seconds of `count` steps, and the losses of the last, mean over ranks."""
        began = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(count)
        found = [pipe.recv() for pipe in self.pipes]
        took = time.perf_counter() - began
        return took, {name: sum(losses[name] for losses in found) / len(found) for name in found[0]}

    def close(self) -> float:
        """End; the largest peak memory of a rank in bytes."""
        for pipe in self.pipes:
            pipe.send(0)
        peaks = [pipe.recv() for pipe in self.pipes]
        for child in self.children:
            child.join(10.0)
        return float(max(peaks))


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(
    pipe: Connection,
    kind: str,
    name: str,
    rank: int,
    num_ranks: int,
    num_threads: int,
    port: int,
    stepper: Stepper | None,
) -> None:
    torch.set_num_threads(num_threads)
    if kind != "eager":
        keep_freed_memory()  # this and the next line as Spindle's ranks do it: the sides differ in the plan alone
    os.sched_setaffinity(0, own_cores((rank, num_ranks), list(os.sched_getaffinity(0))))
    if num_ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", store=join_store("127.0.0.1", port, 60.0), rank=rank, world_size=num_ranks)
    step = stepper(kind, rank, num_ranks) if stepper else _stepper(kind, _workload(name, num_ranks), rank, num_ranks)
    pipe.send(True)
    while count := pipe.recv():
        losses: dict[str, Tensor] = {}
        for _ in range(count):
            losses = step()
        pipe.send({name: float(loss.detach()) for name, loss in losses.items()})
    pipe.send(peak_bytes())
    if num_ranks > 1:
        dist.destroy_process_group()


def _workload(name: str, num_ranks: int) -> Workload:
    large = functools.partial(two_towers, sizes=LARGE)
    makers: dict[str, Callable[..., Workload]] = {
        **WORKLOADS,
        "one-task": one_task,
        "packed, small": two_towers,
        "packed, large": large,
    }
    return makers[name](_gathered if num_ranks > 1 else lambda x: x)


def _gathered(part: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import all_gather_single_autograd

    assert dist.group.WORLD is not None
    whole: Tensor = all_gather_single_autograd(part, 0, dist.group.WORLD)
    return whole


def _stepper(kind: str, workload: Workload, rank: int, num_ranks: int) -> Step:
    tuned = kind == "ddp, tuned"
    whole = AllTasks(workload, FUSED.get(workload.name) if tuned else None)
    used = _used(whole, workload)
    model: nn.Module = whole
    if kind.startswith("ddp"):
        for parameter in whole.parameters():
            parameter.requires_grad_(id(parameter) in used)
        model = nn.parallel.DistributedDataParallel(
            whole, gradient_as_bucket_view=True, static_graph=tuned, broadcast_buffers=not tuned
        )
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (num_ranks,))
        for component in workload.components.values():
            for block in find_blocks(component.name, component.module, component.layers):
                fully_shard(block.module, mesh=mesh)
            fully_shard(component.module, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    optimizer = adam([p for p in model.parameters() if p.requires_grad])
    feeds = {name: _endless(task, rank, num_ranks) for name, task in workload.tasks.items()}

    def eager() -> dict[str, Tensor]:
        losses = {}
        for name, task in workload.tasks.items():
            losses[name] = task.function(next(feeds[name])) * task.weight
            torch.autograd.backward(losses[name])
        optimizer.step()
        optimizer.zero_grad()
        return losses

    def together() -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model({name: next(feed) for name, feed in feeds.items()})
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        optimizer.step()
        optimizer.zero_grad(set_to_none=kind == "fsdp")
        return losses

    return eager if kind.startswith("eager") else together


def _used(whole: AllTasks, workload: Workload) -> set[int]:
    """Parameters that some task reaches; DDP would wait for the others for ever."""
    del whole
    found: set[int] = set()
    for task in workload.tasks.values():
        torch.autograd.backward(task.function(task.first_batch()))
    for _, parameter in workload.named_parameters():
        if parameter.grad is not None:
            found.add(id(parameter))
            parameter.grad = None
    return found


def _endless(task: Any, rank: int, num_ranks: int) -> Any:
    while True:
        for batch in task.batches():
            share = task.batch_size // num_ranks
            yield task.sampled(batch).part(rank * share, (rank + 1) * share)
