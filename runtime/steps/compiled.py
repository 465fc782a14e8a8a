"""Compiled: a rank's codes in; the layers of components with `compile=` run by `torch.compile`.

- A layer's own `forward` is compiled, so hooks, checkpoints around the layer and recordings stay as they are.
- Equal layers of a component (one class, settings and shapes) share one compiled code: torch keeps what it compiles
  with a function, and takes parameters as arguments. Each kind of layer has a function of its own, since torch compiles
  one for a few cases (sizes, gradients on and off, train and eval mode), and from then on runs it as it is.
- Random numbers are drawn by an operator that compiled code calls, from the place of the draw in training, so they are
  those of the layer that is not compiled.
"""

import contextlib
import secrets
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils.checkpoint import checkpoint

from spindle.capture.codes import OperatorCode
from spindle.capture.signature import module_signature
from spindle.errors import WorkloadError
from spindle.inputs.compilation import Compilation
from spindle.record.substitutes.draws import Draw, current, draw
from spindle.record.substitutes.randomness import Drawing, RowDraw

CASES = 64
"""Of one layer, torch's own limit is 8: gradients wanted for its input or not, kept or computed again, train or eval
mode, a size that is fixed, one, or any."""
ALIGNED = 16  # bytes: compiled code of GPUs loads this many at once

_DRAWING: ContextVar[Drawing | None] = ContextVar("spindle_compiled_drawing", default=None)


def compile_layers(codes: Mapping[str, OperatorCode]) -> None:
    """Let the layers of compiled components run compiled, from their first call on. Parameters stand in their places.

    Raises WorkloadError where a GPU's compiled code could not load parameters that stand in a row with others.
    """
    functions: dict[tuple[object, ...], Callable[..., Any]] = {}
    for code in codes.values():
        block = code.module.block
        if code.compilation is None or block is None or isinstance(vars(block).get("forward"), CompiledForward):
            continue
        _check_alignment(code)
        own = None if "forward" in vars(block) else type(block).forward
        if isinstance(own, types.FunctionType):
            kind = own, module_signature(block), id(code.compilation)
            if kind not in functions:
                functions[kind] = _compiled(_own_function(own), code.compilation, code.name)
            function: Callable[..., Any] = types.MethodType(functions[kind], block)
        else:  # of this layer alone
            function = _compiled(block.forward, code.compilation, code.name)
        block.forward = CompiledForward(function, type(block).__name__)


def _compiled(function: Callable[..., Any], compilation: Compilation, operator: str) -> Callable[..., Any]:
    try:
        return torch.compile(function, **compilation.arguments)
    except Exception as error:  # each backend has its own
        raise WorkloadError(
            f"{operator!r}: torch.compile does not take what compile= of its component says: {_first(error)}; give "
            "True, or what torch.compile is documented to take"
        ) from error


def _first(error: Exception) -> str:
    """The first paragraph of an error in one line."""
    return " ".join(str(error).partition("\n\n")[0].split())[:300] or type(error).__name__


class CompiledForward:
    """The compiled forward of one layer, of class `layer`."""

    def __init__(self, function: Callable[..., Any], layer: str) -> None:
        self.function, self.layer = function, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives. Raises WorkloadError where it cannot be compiled."""
        _among_others()
        try:
            return self._called(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise WorkloadError(
                f"a layer of class {self.layer} cannot be compiled: {_first(error)}; install what the backend needs, "
                "give another backend, or leave out compile= of its component"
            ) from error

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """Where the layer draws, the innermost mode is its Drawing."""
        modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        drawing = modes[-1] if modes and isinstance(modes[-1], Drawing) else None
        if drawing is None:
            return self.function(*args, **kwargs)
        with _pop_mode_temporarily(), _draws_of(drawing), CompiledDrawing(drawing) as compiled:
            result = self.function(*args, **kwargs)
        drawing.shapes[:] = compiled.shapes
        return result


class CompiledDrawing(Drawing):
    """What stands in place of a Drawing while compiled code is made and runs: draws become calls of `spindle::draw`."""

    def __init__(self, drawing: Drawing) -> None:
        super().__init__("", None)
        self.own, self.device = drawing, current().device
        self.shapes = list(drawing.shapes)  # whose number is all that compiled code knows of them

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See Drawing. A checkpoint stays out of compiled code, where torch would draw in it by itself."""
        if func is checkpoint:
            torch._dynamo.graph_break()
        return super().__torch_function__(func, types, args, kwargs)

    def again_from(self, number: int) -> Drawing:
        """See Drawing; what is computed again is not compiled."""
        again = Drawing(self.own.scope, self.own.sites)
        again.shapes = self.shapes[:number]
        return again

    def draw(
        self,
        fill: str,
        numbers: Sequence[float],
        shape: Sequence[int],
        *,
        like: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> Tensor:
        """See Drawing."""
        where = like.device if like is not None else torch.device(device or self.device)
        found = dtype or (like.dtype if like is not None else torch.get_default_dtype())
        index = len(self.shapes)
        self.shapes.append(())
        values: Tensor = torch.ops.spindle.draw(fill, [float(n) for n in numbers], list(shape), index, found, where)
        return values

    def rows(self, function: Callable[..., Tensor], values: Tensor, *args: Any) -> Tensor:
        """See Drawing; such draws interrupt compiled code."""
        torch._dynamo.graph_break()
        index = len(self.shapes)
        self.shapes.append(())
        return RowDraw(function, args, self.own.scope, index, self.own.site(index, values.shape))(values)


@torch.library.custom_op("spindle::draw", mutates_args=())
def _draw(
    fill: str, numbers: list[float], shape: list[int], index: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Draw number `index` of the layer that runs just now."""
    drawing = _DRAWING.get()
    if drawing is None:
        raise WorkloadError(
            "a compiled layer draws random numbers outside of its forward, where the place of the draw in training is "
            "not known; leave out compile= of its component"
        )
    what = Draw(fill, tuple(numbers), tuple(shape), dtype, device)
    return draw(what, drawing.scope, index, drawing.site(index, what.shape))


@_draw.register_fake
def _(
    fill: str, numbers: list[float], shape: list[int], index: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@contextlib.contextmanager
def _draws_of(drawing: Drawing) -> Iterator[None]:
    token = _DRAWING.set(drawing)
    try:
        yield
    finally:
        _DRAWING.reset(token)


def apart_from_compiling() -> contextlib.AbstractContextManager[object]:
    """While open, no thread compiles: meanwhile torch puts functions of its own in place of those of nn.Module, which a
    recording would take for the user's.
    """
    compiling = sys.modules.get("torch._dynamo.convert_frame")
    return contextlib.nullcontext() if compiling is None else compiling.compile_lock


def _among_others() -> None:
    """Of this thread: a layer runs uncompiled, and does not fail, while another thread compiles; backward is compiled
    with forward, where `apart_from_compiling` holds; and a layer is compiled for CASES at least.
    """
    from torch._dynamo import config
    from torch._functorch import config as backwards

    if config.error_on_nested_fx_trace:
        config.error_on_nested_fx_trace = False
    if config.recompile_limit < CASES:
        config.recompile_limit = CASES
    if not backwards.force_non_lazy_backward_lowering:
        backwards.force_non_lazy_backward_lowering = True


def _own_function(function: types.FunctionType) -> types.FunctionType:
    """The same function with code of its own; another name keeps torch from taking sizes that differ between kinds of
    layers for sizes that change.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{secrets.token_hex(4)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    own.__dict__.update(vars(function))
    return own


def _check_alignment(code: OperatorCode) -> None:
    """Torch looks once, for all equal layers, at whether parameters stand where a GPU loads them quickest."""
    for inner, name in code.parameters:
        value = code.module.get_parameter(inner)
        if value.device.type != "cpu" and not is_aligned(value):
            raise WorkloadError(
                f"component {name.partition('.')[0]!r} is compiled, and {name!r} stands "
                f"{value.storage_offset() * value.itemsize} bytes after the beginning of memory that it shares with "
                f"others, as sharded parameters do, which is no multiple of {ALIGNED} as compiled code needs it; "
                "register it with shard='nothing' and plan again, or leave out compile="
            )


def is_aligned(value: Tensor) -> bool:
    """Whether a tensor begins at a multiple of ALIGNED bytes in its storage."""
    return value.storage_offset() * value.itemsize % ALIGNED == 0
