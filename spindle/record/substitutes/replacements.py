"""Replacements: functions of torch that draw, written in terms of draws that the present scope makes.

Dropout is a drawn mask. Attention with dropout is written out, since no fused kernel takes a mask that we made.
"""

import math
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Numbers = Sequence[float]


class Drawer(Protocol):
    """Where replacements get their numbers: `randomness.Drawing`."""

    writes_out_attention: bool

    def draw(
        self,
        fill: str,
        numbers: Numbers,
        shape: Sequence[int],
        *,
        like: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> Tensor:
        """Numbers that `Tensor.<fill>(*numbers)` draws; `like` gives the device and, without `dtype`, the type."""

    def rows(self, function: Callable[..., Tensor], values: Tensor, *args: Any) -> Tensor:
        """`function(values[i], *args)`, a draw, for each entry of the first dimension."""


# -- dropout ----------------------------------------------------------------------------------------------------------


def _rate(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability is {p}; it must lie between 0 and 1")
    return p


def _kept(mode: Drawer, x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    return mode.draw("bernoulli_", (1 - p,), shape, like=x, dtype=torch.bool)


def _dropped(mode: Drawer, x: Tensor, p: float, training: bool, shape: Sequence[int], inplace: bool) -> Tensor:
    if not training or _rate(p) == 0:
        return x
    if p == 1:
        return x.zero_() if inplace else x * 0
    result = torch.where(_kept(mode, x, p, shape), x * (1 / (1 - p)), 0)  # keeps one byte a number for backward
    return x.copy_(result) if inplace else result


def _dropout(mode: Drawer, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _dropped(mode, input, p, training, input.shape, inplace)


def _dropout_in_place(mode: Drawer, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropped(mode, input, p, train, input.shape, True)


def _of_channels(batched: int) -> Callable[..., Tensor]:
    """Dropout of whole channels; an input of one dimension less than `batched` has no samples."""

    def dropped(mode: Drawer, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        channels = 1 if input.ndim < batched else 2
        shape = (*input.shape[:channels], *(1 for _ in input.shape[channels:]))
        return _dropped(mode, input, p, training, shape, inplace)

    return dropped


def _native_dropout(mode: Drawer, input: Tensor, p: float, train: bool | None) -> Any:
    if train is False or p == 0:
        return input, torch.ones_like(input, dtype=torch.bool)
    kept = _kept(mode, input, p, input.shape)
    return torch.where(kept, input * (1 / (1 - p)), 0), kept


def _alpha(mode: Drawer, x: Tensor, p: float, training: bool, shape: Sequence[int], inplace: bool) -> Tensor:
    """Dropout that keeps mean and variance of self-normalizing networks (Klambauer et al. 2017)."""
    if not training or _rate(p) == 0:
        return x
    low = -1.7580993408473766
    scale = 1 / math.sqrt((1 - p) * (1 + p * low * low)) if p < 1 else 0.0
    result = torch.where(_kept(mode, x, p, shape), x, low) * scale - scale * low * p
    return x.copy_(result) if inplace else result


def _alpha_dropout(
    mode: Drawer, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha(mode, input, p, training, input.shape, inplace)


def _feature_alpha(
    mode: Drawer, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    shape = (*input.shape[:2], *(1 for _ in input.shape[2:]))
    return _alpha(mode, input, p, training, shape, inplace)


def _attention(
    mode: Drawer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` written out, as its documentation has it."""
    if not dropout_p:
        return NotImplemented  # type: ignore[no-any-return]
    mode.writes_out_attention = True
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(causal.logical_not(), float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    if attn_mask is not None:  # a row that may look at nothing gives zeros, as the fused kernels do
        weights = weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    return _dropout(mode, weights.to(value.dtype), dropout_p) @ value


# -- numbers ----------------------------------------------------------------------------------------------------------


def _sizes(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], list | tuple) else size


def _fresh(fill: str, numbers: Numbers) -> Callable[..., Any]:
    """`torch.rand` and `torch.randn`."""

    def made(mode: Drawer, *size: Any, **options: Any) -> Any:
        if options.get("out") is not None:
            return NotImplemented
        shape = _sizes(size) if size else tuple(options["size"])
        result = mode.draw(fill, numbers, shape, dtype=options.get("dtype"), device=options.get("device"))
        return result.requires_grad_() if options.get("requires_grad") else result

    return made


def _alike(fill: str, numbers: Numbers) -> Callable[..., Any]:
    """`torch.rand_like` and `torch.randn_like`."""

    def made(mode: Drawer, input: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
        result = mode.draw(fill, numbers, input.shape, like=input, dtype=dtype)
        return result.requires_grad_() if options.get("requires_grad") else result

    return made


def _whole_numbers(mode: Drawer, *args: Any, **options: Any) -> Any:
    """`torch.randint(low=0, high, size)`."""
    bounds = [value for value in args if isinstance(value, int)]
    bounds = (
        [options[name] for name in ("low",) if name in options]
        + bounds
        + [options[name] for name in ("high",) if name in options]
    )
    shape = next((value for value in args if isinstance(value, list | tuple)), options.get("size"))
    if shape is None or options.get("out") is not None:
        return NotImplemented
    low, high = bounds if len(bounds) == 2 else (0, *bounds)
    kind = options.get("dtype") or torch.int64
    return mode.draw("random_", (low, high), tuple(shape), dtype=kind, device=options.get("device"))


def _whole_numbers_alike(mode: Drawer, input: Tensor, *args: int, **options: Any) -> Tensor:
    bounds = args or tuple(options[name] for name in ("low", "high") if name in options)
    low, high = bounds if len(bounds) == 2 else (0, *bounds)
    return mode.draw("random_", (low, high), input.shape, like=input, dtype=options.get("dtype"))


def _bernoulli(mode: Drawer, input: Tensor, p: float | None = None, **options: Any) -> Any:
    if options.get("out") is not None:
        return NotImplemented
    if p is not None:
        return mode.draw("bernoulli_", (p,), input.shape, like=input)
    return (mode.draw("uniform_", (0.0, 1.0), input.shape, like=input) < input).to(input.dtype)


def _bernoulli_in_place(mode: Drawer, input: Tensor, p: float | Tensor = 0.5, **_: Any) -> Tensor:
    if isinstance(p, Tensor):
        kind = p.dtype
        return input.copy_(mode.draw("uniform_", (0.0, 1.0), input.shape, like=input, dtype=kind) < p)
    return input.copy_(mode.draw("bernoulli_", (p,), input.shape, like=input))


def _in_place(fill: str, **defaults: float) -> Callable[..., Any]:
    """`Tensor.uniform_` and similar methods: numbers by position or name."""

    def filled(mode: Drawer, input: Tensor, *args: float, **options: Any) -> Tensor:
        named = dict(zip(defaults, args, strict=False)) | {k: v for k, v in options.items() if k in defaults}
        numbers = tuple((defaults | named).values())
        return input.copy_(mode.draw(fill, numbers, input.shape, like=input))

    return filled


def _by_row(function: Callable[..., Tensor], *numbers: str) -> Callable[..., Any]:
    """A function whose law each row of its first argument has by itself."""

    def drawn(mode: Drawer, input: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("out") is not None:
            return NotImplemented
        given = dict(zip(numbers, args, strict=False)) | {k: v for k, v in options.items() if k in numbers}
        return mode.rows(lambda row, *rest, **named: function(row, *rest, **named), input, *given.values())

    return drawn


def _permutation(mode: Drawer, n: int, **options: Any) -> Any:
    if options.get("out") is not None:
        return NotImplemented
    order = mode.draw("uniform_", (0.0, 1.0), (n,), dtype=torch.float64, device=options.get("device")).argsort()
    return order.to(options.get("dtype") or torch.int64)


def _normal(mode: Drawer, mean: Any = 0.0, std: Any = 1.0, size: Any = None, **options: Any) -> Any:
    if options.get("out") is not None:
        return NotImplemented
    like = mean if isinstance(mean, Tensor) else std if isinstance(std, Tensor) else None
    if like is None:
        return mode.draw("normal_", (mean, std), tuple(size), dtype=options.get("dtype"), device=options.get("device"))
    shape = (mean + std).shape
    return mean + std * mode.draw("normal_", (0.0, 1.0), shape, like=like)


def _open(func: Any) -> Callable[..., Any]:
    """A function of torch.nn.functional with its check for overrides taken out, so that calls inside it are seen."""
    inner = {name: lambda *_, **__: False for name in func.__globals__ if name.startswith("has_torch_function")}
    opened = types.FunctionType(func.__code__, {**func.__globals__, **inner}, func.__name__, func.__defaults__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


COMPOSITES: dict[Any, Callable[..., Any]] = {
    func: _open(func) for func in (F.multi_head_attention_forward, F.gumbel_softmax)
}
"""Functions inside of which calls that draw are replaced."""

REPLACED: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    torch.dropout_: _dropout_in_place,
    F.dropout1d: _of_channels(3),
    F.dropout2d: _of_channels(3),  # torch takes three dimensions as samples, channels, length here
    F.dropout3d: _of_channels(5),
    torch.feature_dropout: _of_channels(2),
    F.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout: _alpha_dropout,
    F.feature_alpha_dropout: _feature_alpha,
    torch.feature_alpha_dropout: _feature_alpha,
    torch.native_dropout: _native_dropout,
    F.scaled_dot_product_attention: _attention,
    torch.rand: _fresh("uniform_", (0.0, 1.0)),
    torch.randn: _fresh("normal_", (0.0, 1.0)),
    torch.rand_like: _alike("uniform_", (0.0, 1.0)),
    torch.randn_like: _alike("normal_", (0.0, 1.0)),
    torch.randint: _whole_numbers,
    torch.randint_like: _whole_numbers_alike,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_in_place,
    torch.normal: _normal,
    torch.randperm: _permutation,
    torch.multinomial: _by_row(torch.multinomial, "num_samples", "replacement"),
    Tensor.multinomial: _by_row(torch.multinomial, "num_samples", "replacement"),
    torch.poisson: _by_row(torch.poisson),
    torch._sample_dirichlet: _by_row(torch._sample_dirichlet),
    torch._standard_gamma: _by_row(torch._standard_gamma),
    Tensor.uniform_: _in_place("uniform_", **{"from": 0.0, "to": 1.0}),
    Tensor.normal_: _in_place("normal_", mean=0.0, std=1.0),
    Tensor.exponential_: _in_place("exponential_", lambd=1.0),
    Tensor.log_normal_: _in_place("log_normal_", mean=1.0, std=2.0),
    Tensor.cauchy_: _in_place("cauchy_", median=0.0, sigma=1.0),
    Tensor.geometric_: _in_place("geometric_", p=0.5),
}
"""What stands in for each function that draws; NotImplemented where it draws in a way that is left alone."""
