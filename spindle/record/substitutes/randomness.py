"""Randomness: functions of torch that draw, replaced by ones that draw from the present stream.

- `Drawing` is open around the glue of a task or one call of a block (its scope), and counts what is drawn in it.
- While a task is recorded the shapes of draws are noted, which show along which dimension the samples lie.
- What draws in another way (inside of recurrent kernels, from a generator of one's own) is found when an operator is
  measured, and refused: `Undrawn`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spindle.errors import WorkloadError
from spindle.record.lazy import is_lazy
from spindle.record.on_meta.known_shapes import KnownShapes
from spindle.record.recorder import Recorder
from spindle.record.sites import innermost_line
from spindle.record.substitutes.draws import Draw, Site, current, draw, draw_rows, is_drawing
from spindle.record.substitutes.replacements import COMPOSITES, REPLACED, Numbers


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
        replacement = REPLACED.get(func)
        if replacement is not None and kwargs.get("generator") is None:
            result = replacement(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
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

    def again_from(self, number: int) -> "Drawing":
        """What draws once more from draw `number` of this scope on."""
        again = Drawing(self.scope, self.sites)
        again.shapes = self.shapes[:number]
        return again

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
        return index, self.site(index, shape)

    def site(self, index: int, shape: Sequence[int]) -> Site:
        """Where draw number `index` of this scope stands. Raises WorkloadError where it had none when captured."""
        if self.sites is None:
            return Site(-1, 0, tuple(shape))
        if index >= len(self.sites):
            raise WorkloadError(
                f"{self.scope or 'the task'} draws random numbers {index + 1} times, but did {len(self.sites)} times "
                "when it was captured; draw alike in every step, and switch off checkpointing of the model's own "
                "(recompute= of the workload does it)"
            )
        return self.sites[index]


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


class RealDrawing(Drawing):
    """Draws of a block that runs for its shapes on real numbers: no other mode sees its calls."""

    def __init__(self) -> None:
        super().__init__("", None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See Drawing."""
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            return super().__torch_function__(func, types, args, kwargs)


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


# -- what is not replaced ---------------------------------------------------------------------------------------------


class Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, random operations that no stream knows of are noted by name, each with the line that came first.

    `shapes`: known ones, by which operations on the meta device need not run again.
    """

    def __init__(self, shapes: KnownShapes | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: dict[str, str] = {}
        self.shapes = shapes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note and go on."""
        kwargs = kwargs or {}
        if not is_drawing() and draws(func, args, kwargs):
            self.lines.setdefault(func._schema.name.partition("::")[2], innermost_line())
        with torch._C.DisableTorchFunction():  # else code that no mode saw (torch.jit) is seen here, below autograd
            return func(*args, **kwargs) if self.shapes is None else self.shapes.run(func, args, kwargs)


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
