"""A model family for benchmarks/models.py: how to build a tiny one with random weights, and a task for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spindle.workload import Workload

WORDS = 37  # vocabulary of every text model
BATCH = 4
Batch = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A built model: its parts by name, a batch or several of different shapes, and the task's loss.

    `layers`: where the user must say it; `rows`: how many entries of packed fields belong to each sample.
    """

    parts: dict[str, nn.Module]
    batches: Batch | Sequence[Batch]
    loss: Callable[[Batch], Tensor]
    layers: dict[str, Any] | None = None
    rows: Callable[[Batch], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Family:
    """Name as the table prints it, where the model comes from, what builds it, and the type it computes in.

    `refused`: words of the sentence with which it must be refused; "" where it must work.
    """

    name: str
    origin: str
    build: Callable[[], Sample]
    dtype: torch.dtype = torch.float64
    refused: str = ""

    def workload(self) -> Workload:
        """A workload of one task around a fresh model. A single batch comes twice, with its rows in another order."""
        torch.manual_seed(0)
        sample = self.build()
        workload = Workload(self.name)
        for name, part in sample.parts.items():
            layers = (sample.layers or {}).get(name)
            workload.component(name, part.to(self.dtype).train(), layers=layers)
        data = [self._typed(batch) for batch in _listed(sample.batches)]
        if len(data) == 1:
            data.append({name: value.flip(0) for name, value in data[0].items()})
        workload.task("task", batch_size=BATCH, data=data, rows=sample.rows)(sample.loss)
        return workload

    def _typed(self, batch: Batch) -> Batch:
        return {
            name: value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
        }


def _listed(batches: Batch | Sequence[Batch]) -> list[Batch]:
    return [batches] if isinstance(batches, dict) else list(batches)


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


def padded(texts: Sequence[Sequence[int]], special: int) -> Batch:
    """Texts of any lengths, padded to the longest; tokens from `special` on stand for images or sounds and are not
    learned.
    """
    rows = [torch.tensor(text) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    known = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = tokens.masked_fill((known == 0) | (tokens >= special), -100)
    return {"input_ids": tokens, "attention_mask": known, "labels": labels}
