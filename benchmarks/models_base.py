"""A model family for benchmarks/models.py: how to build a tiny one with random weights, and a task for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spindle.workload import Workload

WORDS = 37  # vocabulary of every text model
BATCH = 4
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """A built model: its parts by name, a batch, and the task's loss. `layers`: where the user must say it."""

    parts: dict[str, nn.Module]
    batch: Batch
    loss: Callable[[Batch], Tensor]
    layers: dict[str, Any] | None = None


@dataclass(frozen=True)
class Family:
    """Name as the table prints it, where the model comes from, what builds it, and the type it computes in."""

    name: str
    origin: str
    build: Callable[[], Sample]
    dtype: torch.dtype = torch.float64

    def workload(self) -> Workload:
        """A workload of one task around a fresh model; the batch comes twice, with its rows in another order."""
        torch.manual_seed(0)
        dtype = self.dtype
        sample = self.build()
        workload = Workload(self.name)
        for name, part in sample.parts.items():
            layers = (sample.layers or {}).get(name)
            workload.component(name, part.to(dtype).train(), layers=layers)
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sample.batch.items()}
        data = [batch, {name: value.flip(0) for name, value in batch.items()}]
        size = next(iter(batch.values())).shape[0]
        workload.task("task", batch_size=size, data=data)(sample.loss)
        return workload


def ids(length: int = 7, batch: int = BATCH, low: int = 3) -> Tensor:
    """Token numbers."""
    return torch.randint(low, WORDS, (batch, length), generator=torch.Generator().manual_seed(length))


def mask(length: int = 7, batch: int = BATCH) -> Tensor:
    """A padding mask; every sample is of another length, the first is whole."""
    return (torch.arange(length) < length - torch.arange(batch)[:, None] % length).long()


def floats(*shape: int) -> Tensor:
    """Numbers of a standard normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def classes(count: int = 3, batch: int = BATCH) -> Tensor:
    """A class for each sample."""
    return torch.arange(batch) % count
