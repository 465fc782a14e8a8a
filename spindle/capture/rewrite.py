"""Reductions over all samples, rewritten while a task is traced: each sample first, then all samples.

The result is the same, but only one number a sample has to be gathered in one place, in place of whole activations or
logits. Mean losses over classes become (sum over counted positions) / (number of them), which holds for any split of
the batch; a mean of means would not.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
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

    def _by_sample(self, values: Tensor) -> bool:
        """Whether samples lie one after another in `values`, several numbers each."""
        if values.ndim == 0 or not statically_known_true(operator.mod(values.shape[0], self.rows) == 0):
            return False
        return values.ndim > 1 or not statically_known_true(values.shape[0] == self.rows)


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
