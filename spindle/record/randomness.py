"""Randomness: functions of torch that draw, replaced by ones that draw from the present stream.

- `Drawing` is open around the glue of a task or one call of a block (its scope), and counts what is drawn in it.
- While a task is recorded the shapes of draws are noted, which show along which dimension the samples lie.
- Attention with dropout is written out, since no fused kernel takes a mask that we made.
- What draws in another way (inside of recurrent kernels, from a generator of one's own) is found when an operator is
  measured, and refused: `Undrawn`.
"""

import math
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spindle.errors import WorkloadError
from spindle.record.draws import Draw, Site, current, draw, draw_rows, is_drawing
from spindle.record.recorder import Recorder, is_lazy

Numbers = Sequence[float]


class Drawing(TorchFunctionMode):
    """While open, random functions draw in one scope of a task."""

    def __init__(self, scope: str, sites: Sequence[Site] | None) -> None:
        """`sites`: of each draw of the scope, in order; None: none of them is made of samples."""
        super().__init__()
        self.scope, self.sites = scope, sites
        self.shapes: list[tuple[int, ...]] = []  # of all draws so far
        self.writes_out_attention = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace what draws; leave every other function alone."""
        kwargs = kwargs or {}
        replacement = _REPLACED.get(func)
        if replacement is not None and kwargs.get("generator") is None:
            result = replacement(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _COMPOSITES:
            with self:
                return _COMPOSITES[func](*args, **kwargs)
        return func(*args, **kwargs)

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
        """The next draw of this scope; `like` gives the device and, without `dtype`, the type."""
        where = like.device if like is not None else torch.device(device or current().device)
        found = dtype or (like.dtype if like is not None else torch.get_default_dtype())
        what = Draw(fill, tuple(numbers), tuple(shape), found, where)
        return self._drawn(what, like)

    def _drawn(self, what: Draw, like: Tensor | None) -> Tensor:
        del like
        return draw(what, self.scope, *self._next(what.shape))

    def rows(self, function: Callable[..., Tensor], values: Tensor, *args: Any) -> Tensor:
        """The next draw of this scope, `function(values[i], *args)` for each entry of the first dimension."""
        return RowDraw(function, args, self.scope, *self._next(values.shape))(values)

    def _next(self, shape: Sequence[int]) -> tuple[int, Site]:
        """Number and site of the next draw."""
        index = len(self.shapes)
        self.shapes.append(tuple(shape))
        if self.sites is None:
            return index, Site(-1, 0, self.shapes[-1])
        if index >= len(self.sites):
            raise WorkloadError(
                f"{self.scope or 'the task'} draws random numbers {index + 1} times, but did {len(self.sites)} times "
                "when it was captured; draw alike in every step, and switch off checkpointing of the model's own "
                "(recompute= of the workload does it)"
            )
        return index, self.sites[index]


@dataclass(frozen=True, slots=True)
class DrawLike:
    """A draw on the device of a value: what a recording notes of it."""

    what: Draw
    scope: str
    index: int
    site: Site

    def __call__(self, like: Tensor) -> Tensor:
        """The numbers for the samples at hand."""
        return draw(replace(self.what, device=like.device), self.scope, self.index, self.site)


@dataclass(frozen=True, slots=True)
class RowDraw:
    """A draw whose law is that of each row of a value: Dirichlet, Gamma, categories."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    scope: str
    index: int
    site: Site

    def __call__(self, values: Tensor) -> Tensor:
        """The numbers for the samples at hand."""
        stream = current()
        if stream.fake or values.is_meta:
            return self.function(values.detach(), *self.args)
        if values.ndim == 0:
            return draw_rows(self.function, values[None], self.args, stream.key(self.scope, self.index), 0)[0]
        first = stream.first_entry(self.site, len(values)) if self.site.dim == 0 else 0
        return draw_rows(self.function, values, self.args, stream.key(self.scope, self.index), first)


class RecordedDrawing(Drawing):
    """Draws of glue while it is recorded: on the device of a value of the model as calls, others for real."""

    def __init__(self, recorder: Recorder, sites: Sequence[Site] | None) -> None:
        super().__init__("", sites)
        self.recorder = recorder

    def _drawn(self, what: Draw, like: Tensor | None) -> Tensor:
        index, site = self._next(what.shape)
        if like is None or not is_lazy(like):
            found: Tensor = self.recorder.real(draw, (what, self.scope, index, site))
            return found
        with torch._C.DisableTorchFunction():
            made = torch.empty(what.shape, dtype=what.dtype, device="meta")
            return self.recorder.draw(DrawLike(what, self.scope, index, site), like, made)

    def rows(self, function: Callable[..., Tensor], values: Tensor, *args: Any) -> Tensor:
        """See Drawing."""
        call = RowDraw(function, args, self.scope, *self._next(values.shape))
        if not is_lazy(values):
            found: Tensor = self.recorder.real(call, (values,))
            return found
        with torch._C.DisableTorchFunction():
            return self.recorder.draw(call, values, function(values.detach(), *args))


class NotingShapes(Drawing):
    """Draws of a block that runs for its shapes alone: nothing is drawn."""

    def _drawn(self, what: Draw, like: Tensor | None) -> Tensor:
        del like
        self._next(what.shape)
        return torch.empty(what.shape, dtype=what.dtype, device="meta")

    def rows(self, function: Callable[..., Tensor], values: Tensor, *args: Any) -> Tensor:
        """See Drawing."""
        self._next(values.shape)
        with torch._C.DisableTorchFunction():
            return function(torch.empty_like(values, device="meta"), *args)


# -- dropout ----------------------------------------------------------------------------------------------------------


def _rate(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability is {p}; it must lie between 0 and 1")
    return p


def _kept(mode: Drawing, x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    return mode.draw("bernoulli_", (1 - p,), shape, like=x, dtype=torch.bool)


def _dropped(mode: Drawing, x: Tensor, p: float, training: bool, shape: Sequence[int], inplace: bool) -> Tensor:
    if not training or _rate(p) == 0:
        return x
    if p == 1:
        return x.zero_() if inplace else x * 0
    result = torch.where(_kept(mode, x, p, shape), x * (1 / (1 - p)), 0)  # keeps one byte a number for backward
    return x.copy_(result) if inplace else result


def _dropout(mode: Drawing, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _dropped(mode, input, p, training, input.shape, inplace)


def _dropout_in_place(mode: Drawing, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropped(mode, input, p, train, input.shape, True)


def _of_channels(batched: int) -> Callable[..., Tensor]:
    """Dropout of whole channels; an input of one dimension less than `batched` has no samples."""

    def dropped(mode: Drawing, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        channels = 1 if input.ndim < batched else 2
        shape = (*input.shape[:channels], *(1 for _ in input.shape[channels:]))
        return _dropped(mode, input, p, training, shape, inplace)

    return dropped


def _native_dropout(mode: Drawing, input: Tensor, p: float, train: bool | None) -> Any:
    if train is False or p == 0:
        return input, torch.ones_like(input, dtype=torch.bool)
    kept = _kept(mode, input, p, input.shape)
    return torch.where(kept, input * (1 / (1 - p)), 0), kept


def _alpha(mode: Drawing, x: Tensor, p: float, training: bool, shape: Sequence[int], inplace: bool) -> Tensor:
    """Dropout that keeps mean and variance of self-normalising networks (Klambauer et al. 2017)."""
    if not training or _rate(p) == 0:
        return x
    low = -1.7580993408473766
    scale = 1 / math.sqrt((1 - p) * (1 + p * low * low)) if p < 1 else 0.0
    result = torch.where(_kept(mode, x, p, shape), x, low) * scale - scale * low * p
    return x.copy_(result) if inplace else result


def _alpha_dropout(
    mode: Drawing, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha(mode, input, p, training, input.shape, inplace)


def _feature_alpha(
    mode: Drawing, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    shape = (*input.shape[:2], *(1 for _ in input.shape[2:]))
    return _alpha(mode, input, p, training, shape, inplace)


def _attention(
    mode: Drawing,
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

    def made(mode: Drawing, *size: Any, **options: Any) -> Any:
        if options.get("out") is not None:
            return NotImplemented
        shape = _sizes(size) if size else tuple(options["size"])
        result = mode.draw(fill, numbers, shape, dtype=options.get("dtype"), device=options.get("device"))
        return result.requires_grad_() if options.get("requires_grad") else result

    return made


def _alike(fill: str, numbers: Numbers) -> Callable[..., Any]:
    """`torch.rand_like` and `torch.randn_like`."""

    def made(mode: Drawing, input: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
        result = mode.draw(fill, numbers, input.shape, like=input, dtype=dtype)
        return result.requires_grad_() if options.get("requires_grad") else result

    return made


def _whole_numbers(mode: Drawing, *args: Any, **options: Any) -> Any:
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


def _whole_numbers_alike(mode: Drawing, input: Tensor, *args: int, **options: Any) -> Tensor:
    bounds = args or tuple(options[name] for name in ("low", "high") if name in options)
    low, high = bounds if len(bounds) == 2 else (0, *bounds)
    return mode.draw("random_", (low, high), input.shape, like=input, dtype=options.get("dtype"))


def _bernoulli(mode: Drawing, input: Tensor, p: float | None = None, **options: Any) -> Any:
    if options.get("out") is not None:
        return NotImplemented
    if p is not None:
        return mode.draw("bernoulli_", (p,), input.shape, like=input)
    return (mode.draw("uniform_", (0.0, 1.0), input.shape, like=input) < input).to(input.dtype)


def _bernoulli_in_place(mode: Drawing, input: Tensor, p: float | Tensor = 0.5, **_: Any) -> Tensor:
    if isinstance(p, Tensor):
        kind = p.dtype
        return input.copy_(mode.draw("uniform_", (0.0, 1.0), input.shape, like=input, dtype=kind) < p)
    return input.copy_(mode.draw("bernoulli_", (p,), input.shape, like=input))


def _in_place(fill: str, **defaults: float) -> Callable[..., Any]:
    """`Tensor.uniform_` and its kin: numbers by position or name."""

    def filled(mode: Drawing, input: Tensor, *args: float, **options: Any) -> Tensor:
        named = dict(zip(defaults, args, strict=False)) | {k: v for k, v in options.items() if k in defaults}
        numbers = tuple((defaults | named).values())
        return input.copy_(mode.draw(fill, numbers, input.shape, like=input))

    return filled


def _by_row(function: Callable[..., Tensor], *numbers: str) -> Callable[..., Any]:
    """A function whose law each row of its first argument has by itself."""

    def drawn(mode: Drawing, input: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("out") is not None:
            return NotImplemented
        given = dict(zip(numbers, args, strict=False)) | {k: v for k, v in options.items() if k in numbers}
        return mode.rows(lambda row, *rest, **named: function(row, *rest, **named), input, *given.values())

    return drawn


def _permutation(mode: Drawing, n: int, **options: Any) -> Any:
    if options.get("out") is not None:
        return NotImplemented
    order = mode.draw("uniform_", (0.0, 1.0), (n,), dtype=torch.float64, device=options.get("device")).argsort()
    return order.to(options.get("dtype") or torch.int64)


def _normal(mode: Drawing, mean: Any = 0.0, std: Any = 1.0, size: Any = None, **options: Any) -> Any:
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


_COMPOSITES: dict[Any, Callable[..., Any]] = {
    func: _open(func) for func in (F.multi_head_attention_forward, F.gumbel_softmax)
}

_REPLACED: dict[Any, Callable[..., Any]] = {
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


# -- what is not replaced ---------------------------------------------------------------------------------------------


class Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, random operations that no stream knows of are noted by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note and go on."""
        kwargs = kwargs or {}
        if not is_drawing() and draws(func, args, kwargs):
            self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **kwargs)


def undrawn(where: str, names: Iterable[str]) -> WorkloadError:
    """The error for code that draws in a way that cannot be repeated on another part of the batch."""
    return WorkloadError(
        f"{where} draws random numbers by {', '.join(sorted(names))}, which cannot be given the same numbers however "
        "the batch is cut; set dropout of recurrent layers to 0 and put nn.Dropout between them, draw by torch.rand or "
        "torch.randn without a generator of your own, or let the loader draw"
    )


def draws(func: Any, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether an operation of ATen draws, given its arguments: dropout with probability 0 does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()) or func._schema.name == "spindle::draw":
        return False
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    rate = next((given[name] for name in ("dropout_p", "dropout") if name in given), None)
    if rate is None and ("attention" in func._schema.name or "dropout" in func._schema.name):
        rate = given.get("p", 0.0)
    on = given.get("train", given.get("training"))
    return rate != 0 and on is not False
