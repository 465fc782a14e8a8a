"""Batch shards: parts of a tensor by samples, cut out and put together again."""

from collections.abc import Iterable

import torch
from torch import Tensor

from spindle.runtime.programs.program import Message
from spindle.values.graph import BYTES_BY_DTYPE, TensorSpec
from spindle.values.units import Bounds, Units

BatchShard = tuple[int, int, Tensor]
"""First sample, last sample + 1, and the tensor that holds them."""


def cut(value: Tensor, spec: TensorSpec, units: Units, held: Bounds, low: int, high: int) -> Tensor:
    """Samples low..high-1 of `value`, which holds samples held[0]..held[1]-1; all of it when it cannot be cut."""
    if not spec.rows or held == (low, high):
        return value
    return value.narrow(spec.row_dim, *units.span(spec.unit, value.shape[spec.row_dim], held, (low, high)))


def shard_shape(
    whole: tuple[int, ...], spec: TensorSpec, units: Units, held: Bounds, low: int, high: int
) -> tuple[int, ...]:
    """Shape of samples low..high-1 of a tensor of shape `whole` that holds samples `held`."""
    if not spec.rows or held == (low, high):
        return whole
    _, length = units.span(spec.unit, whole[spec.row_dim], held, (low, high))
    return (*whole[: spec.row_dim], length, *whole[spec.row_dim + 1 :])


def joined(shards: Iterable[BatchShard], spec: TensorSpec) -> Tensor:
    """The shards side by side, in the order of their samples."""
    ordered = [value for _, _, value in sorted(shards, key=lambda shard: shard[:2])]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, spec.row_dim)


def summed(shards: Iterable[BatchShard], spec: TensorSpec, units: Units, held: Bounds, like: Tensor) -> Tensor | None:
    """Gradient of a tensor that several readers have read parts of: the sum of theirs; None where none leads back."""
    shards = list(shards)
    if not shards:
        return None
    if len(shards) == 1 and (not spec.rows or shards[0][:2] == held):
        return shards[0][2]
    total = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for low, high, value in shards:
        cut(total, spec, units, held, low, high).add_(value)
    return total


def message_bytes(spec: TensorSpec, message: Message) -> int:
    """Bytes of one message of a batch like the one that was captured."""
    return torch.Size(spec.shape_of(message.high - message.low)).numel() * BYTES_BY_DTYPE[spec.dtype]
