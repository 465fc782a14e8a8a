"""Patches: what users' code may call while it is recorded that no mode of torch sees, or that means another thing then.

- An autograd function of the user's own is one call, so that its own backward is kept; a checkpoint is a plain call.
- Wrappers for training in parallel, and compiled modules, call what they wrap.
- Inference mode is the mode without gradients: values made in it could not be distinguished later.
- Seeds, loss scaling, and modules that change between calls are refused.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spindle.record.lazy import HALF_AUTOCAST, Forbidden, any_lazy, is_lazy
from spindle.record.recorder import Recorder
from spindle.record.recording import tensors_in, tree
from spindle.record.substitutes.averages import update_parameters
from spindle.record.substitutes.checkpoints import going
from spindle.record.substitutes.patching import Change, Shared, in_place

Watch = Callable[[nn.Module, str, Any], None]
"""Called with each attribute of a module that is about to be set."""

_RECORDER: ContextVar[Recorder | None] = ContextVar("spindle_recorder", default=None)
_PLAINLY: ContextVar[bool] = ContextVar("spindle_plainly", default=False)
_WATCH: ContextVar[Watch | None] = ContextVar("spindle_watch", default=None)

SEEDED = (
    "it sets the state of torch's random numbers (manual_seed, set_rng_state), which a planned run has not: what it "
    "draws follows from seed=, step, task and sample; draw fixed numbers once, outside, and keep them in a buffer"
)
SCALED = (
    "it scales its loss with a GradScaler, and nothing takes that out of the gradients again; return the loss itself: "
    "bfloat16 (precision='bf16') needs no scaling"
)


@contextlib.contextmanager
def recorded_calls(recorder: Recorder) -> Iterator[None]:
    """While open, calls that no mode sees are recorded, or refused."""
    token = _RECORDER.set(recorder)
    try:
        with _CALLS, going(_Recorded()), plain_modules():
            yield
    finally:
        _RECORDER.reset(token)


@contextlib.contextmanager
def plain_modules() -> Iterator[None]:
    """While open, wrappers and compiled modules call what they wrap, and inference mode is the mode without gradients,
    also where nothing is recorded.
    """
    token = _PLAINLY.set(True)
    try:
        with _WRAPPERS:
            yield
    finally:
        _PLAINLY.reset(token)


def watchable_modules() -> contextlib.AbstractContextManager[None]:
    """While open, `watched_modules` is quick: a change of nn.Module makes Python forget what it knows of the attributes
    of all its subclasses, which takes milliseconds where transformers is loaded.
    """
    return _WRITES


@contextlib.contextmanager
def watched_modules(watch: Watch) -> Iterator[None]:
    """While open, `watch` is called with attributes of modules that are set."""
    token = _WATCH.set(watch)
    try:
        with _WRITES:
            yield
    finally:
        _WATCH.reset(token)


def _calls() -> list[Change]:
    from torch.amp import grad_scaler
    from torch.distributions import Distribution
    from torch.optim.swa_utils import AveragedModel

    return [
        (AveragedModel, "update_parameters", _average_patch(AveragedModel.update_parameters)),
        (torch.autograd.Function, "apply", classmethod(_function_patch(torch.autograd.Function.__dict__["apply"]))),
        (grad_scaler.GradScaler, "scale", _scaler_patch(grad_scaler.GradScaler.scale)),
        (torch.random, "default_generator", _Generator(torch.default_generator)),
        (torch.amp.autocast_mode.autocast, "__enter__", _autocast_patch(torch.amp.autocast_mode.autocast.__enter__)),
        (Distribution, "__init__", _distribution_patch(Distribution.__init__)),
        (Distribution, "_validate_sample", _sample_patch(Distribution._validate_sample)),
        (torch._C, "_set_default_dtype", _dtype_patch(torch._C._set_default_dtype)),
    ]


def _wrappers() -> list[Change]:
    from torch.autograd import grad_mode

    changes: list[Change] = [
        (
            nn.parallel.DistributedDataParallel,
            "forward",
            _plain_patch(nn.parallel.DistributedDataParallel.forward, "module"),
        ),
        (grad_mode.inference_mode, "__enter__", _inference_patch(grad_mode.inference_mode.__enter__)),
    ]
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None:
        changes.append((frames, "_stance", _Stance(frames._stance)))
        changes.append((frames.OptimizedModule, "__call__", _plain_patch(frames.OptimizedModule.__call__, "_orig_mod")))
    return changes


class _Stance:
    """Stands in place of what `torch.compiler.set_stance` has set: code that runs plainly is not compiled, while other
    threads run compiled layers.
    """

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return "force_eager" if name == "stance" and _PLAINLY.get() else getattr(self.own, name)


def _plain_patch(own: Callable[..., Any], inner: str) -> Callable[..., Any]:
    def called(module: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(module, inner)(*args, **kwargs) if _PLAINLY.get() else own(module, *args, **kwargs)

    return called


def _writes() -> list[Change]:
    own = nn.Module.__setattr__

    def written(module: nn.Module, name: str, value: Any) -> None:
        watch = _WATCH.get()
        if watch is not None:
            watch(module, name, value)
        own(module, name, value)

    return [(nn.Module, "__setattr__", written)]


_CALLS = Shared(lambda: in_place(_calls()))
_WRAPPERS = Shared(lambda: in_place(_wrappers()))
_WRITES = Shared(lambda: in_place(_writes()))


def _average_patch(own: Callable[..., Any]) -> Callable[..., Any]:
    def update(averaged: Any, model: nn.Module) -> None:
        recorder = _RECORDER.get()
        (own if recorder is None or recorder.inside else update_parameters)(averaged, model)

    return update


# -- autograd functions -----------------------------------------------------------------------------------------------


def _function_patch(own: Any) -> Callable[..., Any]:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = _RECORDER.get()
        call = own.__get__(None, cls)
        return call(*args, **kwargs) if recorder is None or recorder.inside else _applied(recorder, call, args, kwargs)

    return apply


def _applied(recorder: Recorder, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An autograd function is one call. Raises Forbidden where it computes with parameters that are not its arguments:
    what gradients these get is known to its own backward alone.
    """
    known, name = len(recorder.recording.nodes), getattr(getattr(own, "__self__", own), "__name__", "function")
    if not any(is_lazy(a) for a in tensors_in((args, kwargs))):
        result = own(*args, **kwargs)
        if len(recorder.recording.nodes) > known:
            raise _hidden(name)
        return result
    with torch._C.DisableTorchFunction():
        encoded = tree(recorder.encoded, args), tree(recorder.encoded, kwargs)
        given = tree(recorder.as_meta, args), tree(recorder.as_meta, kwargs)
        with _Reads(recorder, {id(value) for value in tensors_in(given)}) as reads:
            result = own(*given[0], **given[1])
        if reads.others or len(recorder.recording.nodes) > known:
            raise _hidden(name)
        return recorder.record(own, args, encoded, result)


def _hidden(name: str) -> Forbidden:
    return Forbidden(
        f"the autograd function {name!r} computes with parameters that are not among its arguments (a checkpoint of "
        "its own, say), whose gradients only its backward knows; call the layers without it, and name their component "
        "in the workload's recompute=, or use torch.utils.checkpoint"
    )


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether values of the model are read that are not given."""

    def __init__(self, recorder: Recorder, given: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder, self.given, self.others = recorder, given, False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note and go on."""
        kwargs = kwargs or {}
        for value in tensors_in((args, kwargs)):
            self.others |= id(value) not in self.given and self.recorder.number(value) is not None
        return func(*args, **kwargs)


# -- checkpoints ------------------------------------------------------------------------------------------------------


class _Recorded:
    """Outside of blocks activations are kept or computed again as the plan says, so a checkpoint is a plain call."""

    def reentrant(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The function's results. Raises Forbidden where torch would give no gradient to what it computes with."""
        with _checkpointed():
            result = function(*args)
        if not torch.is_grad_enabled() or any(value.requires_grad for value in args if isinstance(value, Tensor)):
            return result
        if any(value.requires_grad for value in tensors_in(result)):
            raise Forbidden(
                "it calls a checkpoint with use_reentrant=True on values that need no gradient, so torch gives none to "
                "the layers inside; pass use_reentrant=False, or let what goes in need one "
                "(model.enable_input_require_grads())"
            )
        return result

    def steps(self, own: Callable[..., Any], function: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[None]:
        """The recorder knows that this is in a checkpoint."""
        del own, function, args, kwargs
        with _checkpointed():
            yield


def _checkpointed() -> contextlib.AbstractContextManager[None]:
    recorder = _RECORDER.get()
    return contextlib.nullcontext() if recorder is None else recorder.checkpointed()


# -- modes, seeds, scaling --------------------------------------------------------------------------------------------


def _inference_patch(own: Callable[..., Any]) -> Callable[..., Any]:
    def entered(mode: Any) -> None:
        if not _PLAINLY.get():
            own(mode)
            return
        mode._inference_mode_context = torch.set_grad_enabled(not mode.mode)

    return entered


def _autocast_patch(own: Callable[..., Any]) -> Callable[..., Any]:
    """A recording is made on the CPU, and what it holds runs on whatever devices the plan has."""

    def entered(mode: Any) -> Any:
        recorder = _RECORDER.get()
        if recorder is not None and mode.device != "cpu":
            matters = mode._enabled or (torch.is_autocast_enabled("cpu") and torch.cuda.is_available())
            if mode._enabled and mode.fast_dtype is torch.float16:
                raise Forbidden(HALF_AUTOCAST)
            if matters and not recorder.inside:
                raise Forbidden(
                    f"it calls torch.autocast({mode.device!r}) outside of layers, where code is recorded for any kind "
                    "of device; give it the type of the tensors' device (x.device.type), or use precision='bf16' of "
                    "the workload"
                )
        return own(mode)

    return entered


def _scaler_patch(own: Callable[..., Any]) -> Callable[..., Any]:
    def scale(scaler: Any, outputs: Any) -> Any:
        if _RECORDER.get() is not None and scaler.is_enabled():
            raise Forbidden(SCALED)
        return own(scaler, outputs)

    return scale


def _distribution_patch(own: Callable[..., None]) -> Callable[..., None]:
    """By default distributions of torch check their arguments, and raise: of values of the model nothing can tell."""

    def made(distribution: Any, *args: Any, validate_args: bool | None = None, **kwargs: Any) -> None:
        if validate_args is None and _holds_lazy(_held(distribution)):
            validate_args = False
        own(distribution, *args, validate_args=validate_args, **kwargs)

    return made


def _held(distribution: torch.distributions.Distribution) -> Iterator[Any]:
    """What a distribution, and the distributions it is made of, are given."""
    for value in vars(distribution).values():
        if isinstance(value, torch.distributions.Distribution):
            yield from _held(value)
        yield value


def _sample_patch(own: Callable[..., None]) -> Callable[..., None]:
    def checked(distribution: Any, value: Any) -> None:
        if not _holds_lazy([value]):
            own(distribution, value)

    return checked


def _holds_lazy(values: Iterable[Any]) -> bool:
    """Whether code that a recorder sees has made values of the model among these."""
    with torch._C.DisableTorchFunction():
        return _RECORDER.get() is not None and any_lazy(values)


def _dtype_patch(own: Callable[..., Any]) -> Callable[..., Any]:
    def changed(dtype: torch.dtype) -> None:
        if _RECORDER.get() is not None and dtype != torch.get_default_dtype():
            raise Forbidden(
                f"it calls torch.set_default_dtype({dtype}), which other code of the process would see meanwhile; give "
                "dtype= to what it makes, or set it before the workload is planned"
            )
        own(dtype)

    return changed


class _Generator:
    """Stands in place of torch's default generator where `torch.manual_seed` and similar functions find it."""

    def __init__(self, own: torch.Generator) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def _refuse(self) -> None:
        recorder = _RECORDER.get()
        if recorder is not None and not recorder.for_real:
            raise Forbidden(SEEDED)

    def manual_seed(self, seed: int) -> torch.Generator:
        """Refused in code that is recorded."""
        self._refuse()
        return self.own.manual_seed(seed)

    def seed(self) -> int:
        """Refused in code that is recorded."""
        self._refuse()
        return self.own.seed()

    def set_state(self, state: Tensor) -> torch.Generator:
        """Refused in code that is recorded, but at the end of fork_rng, which puts back what stood there."""
        if sys._getframe(2).f_code.co_name != "fork_rng":
            self._refuse()
        return self.own.set_state(state)
