"""Reductions over all samples, rewritten while a task is traced: each sample first, then all samples.

The result is the same, but only one number a sample has to be gathered in one place, in place of whole activations or
logits. Mean losses over classes become (sum over counted positions) / (number of them), which holds for any split of
the batch; a mean of means would not.

`masked_scatter`, by which models put images among words, hands out its source in order, whichever sample it comes from.
Here each sample takes its own share, which is the same when every sample's mask takes just that; it is checked.

A list of samples that is put together again is what it was taken from, so the batch need not be of a fixed size.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

from spindle.capture.blocks import INSIDE_BLOCK
from spindle.errors import WorkloadError

_CLASS_LOSSES = (F.cross_entropy, F.nll_loss)
_ELEMENTWISE_LOSSES = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)
_SUMS = (torch.sum, Tensor.sum)
_MEANS = (torch.mean, Tensor.mean)
_UNBIND = (torch.unbind, Tensor.unbind)
_JOINS = (torch.cat, torch.stack)

RowCount = int | torch.SymInt


class SplitReductions(TorchFunctionMode):
    """While open, reductions over a first dimension that is a multiple of `rows` go by sample first."""

    def __init__(self, rows: RowCount) -> None:
        """`rows`: the batch size, as the trace knows it."""
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the reductions named above; leave every other function alone."""
        kwargs = kwargs or {}
        if func is Tensor.register_hook and not INSIDE_BLOCK.get():
            raise WorkloadError(
                "a tensor outside of blocks has a gradient hook, which a traced graph does not carry; remove it, or "
                "scale the values themselves"
            )
        if func is Tensor.__len__:
            return _length(args[0])
        if func in _CLASS_LOSSES:
            return self._class_loss(func, _bind(func, args, kwargs))
        if func in _ELEMENTWISE_LOSSES:
            return self._elementwise_loss(func, _bind(func, args, kwargs))
        if func in _SUMS and len(args) == 1 and not kwargs:
            return self._total(args[0])
        if func in _MEANS and len(args) == 1 and not kwargs:
            return self._mean(args[0])
        if func in _UNBIND and len(args) == 1 + bool(args[1:]) and not kwargs and not any(args[1:]):
            return self._samples(args[0])
        if func in _JOINS and (whole := _joined(args, kwargs)) is not None:
            return whole.flatten(0, 1) if func is torch.cat else whole
        if func is Tensor.masked_scatter and len(args) == 3 and self._are_samples(args[0], args[2]):
            return self._scattered(*args)
        return func(*args, **kwargs)

    def _class_loss(self, func: Callable[..., Tensor], given: Mapping[str, Any]) -> Tensor:
        target = given["target"]
        if given["reduction"] == "sum":
            return self._total(func(**{**given, "reduction": "none"}))
        if given["reduction"] != "mean" or given["weight"] is not None or target.is_floating_point():
            return func(**given)
        each = func(**{**given, "reduction": "none"})
        return self._total(each) / self._total(target != given["ignore_index"])

    def _elementwise_loss(self, func: Callable[..., Tensor], given: Mapping[str, Any]) -> Tensor:
        reduce = {"mean": self._mean, "sum": self._total}.get(given["reduction"])
        return func(**given) if reduce is None else reduce(func(**{**given, "reduction": "none"}))

    def _total(self, values: Tensor) -> Tensor:
        return values.reshape(self.rows, -1).sum(1).sum() if self._by_sample(values) else values.sum()

    def _mean(self, values: Tensor) -> Tensor:
        return values.reshape(self.rows, -1).mean(1).mean() if self._by_sample(values) else values.mean()

    def _samples(self, x: Tensor) -> tuple[Tensor, ...]:
        size: RowCount = x.shape[0]
        if isinstance(size, int):
            return x.unbind()
        samples = tuple(x.select(0, index) for index in range(int(size.node.hint)))
        for index, sample in enumerate(samples):
            sample._spindle_sample_of = (x, index, len(samples))  # type: ignore[attr-defined]
        return samples

    def _are_samples(self, *values: Tensor) -> bool:
        return all(v.ndim > 0 and statically_known_true(operator.mod(v.shape[0], self.rows) == 0) for v in values)

    def _scattered(self, x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        mask = mask.expand_as(x)
        width = x.shape[-1] if x.ndim > 1 and mask.stride(-1) == 0 else 1  # a mask of words covers whole vectors
        places = mask[..., :1] if width != 1 else mask
        shares = source.reshape(self.rows, -1, width)
        index = torch.ops.spindle.place_in_share(places.reshape(self.rows, -1), shares.shape[1])
        values = shares.gather(1, index[..., None].expand(-1, -1, width))
        return torch.where(mask, values.reshape(x.shape).to(x.dtype), x)

    def _by_sample(self, values: Tensor) -> bool:
        """Whether samples lie one after another in `values`, several numbers each."""
        if values.ndim == 0 or not statically_known_true(operator.mod(values.shape[0], self.rows) == 0):
            return False
        return values.ndim > 1 or not statically_known_true(values.shape[0] == self.rows)


def _joined(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a list of samples, all and in order, was taken from."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | dict(kwargs)
    samples = given.get("tensors")
    if given.keys() - {"tensors", "dim"} or given.get("dim", 0) != 0 or not isinstance(samples, list | tuple):
        return None
    marks = [getattr(sample, "_spindle_sample_of", None) for sample in samples]
    if not marks or marks[0] is None or len(marks) != marks[0][2]:
        return None
    source: Tensor = marks[0][0]
    in_order = all(mark is not None and mark[0] is source and mark[1] == i for i, mark in enumerate(marks))
    return source if in_order and source.ndim > 1 else None


_CHECKED: ContextVar[bool] = ContextVar("spindle_shares_checked", default=True)


@contextmanager
def unchecked_shares() -> Iterator[None]:
    """While open, masks may take any share: for samples that are made up."""
    token = _CHECKED.set(False)
    try:
        yield
    finally:
        _CHECKED.reset(token)


@torch.library.custom_op("spindle::place_in_share", mutates_args=())
def place_in_share(mask: Tensor, share: int) -> Tensor:
    """For each place that a sample's mask takes, which one of its `share` values goes there."""
    if _CHECKED.get() and bool((mask.sum(1) != share).any()):
        counts = sorted(set(mask.sum(1).tolist()))
        raise WorkloadError(
            f"masked_scatter: masks of samples take {', '.join(map(str, counts))} places where each sample has {share} "
            "values; give every sample as many places (image tokens) as it has values"
        )
    return (mask.to(torch.int64).cumsum(1) - 1).clamp(0, max(share - 1, 0))


@place_in_share.register_fake
def _(mask: Tensor, share: int) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.int64)


def _length(values: Tensor) -> int:
    """`len` must be a plain number. Taking it without telling the tracer keeps the batch size free elsewhere; code that
    bakes the number in shows when it is run on parts of the batch, and is then kept whole.
    """
    size: RowCount = values.shape[0]
    return size if isinstance(size, int) else int(size.node.hint)


def _bind(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
        raise TypeError(f"{func.__name__}: size_average and reduce are gone; use reduction=")
    return given
