"""Travel: task functions and modules as bytes, without weights, for the processes that record them."""

import contextlib
import copyreg
import importlib
import inspect
import io
import marshal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import CodeType, ModuleType
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spindle.errors import WorkloadError


def dumped(value: Any, functions: Iterable[Any] = ()) -> bytes:
    """Anything that holds modules as bytes for `cloudpickle.loads`; parameters become meta tensors.

    `functions` use these modules. The files that define them are sent too: imported anew they would make modules of
    their own.
    """
    buffer = io.BytesIO()
    with _sent_by_value({sys.modules.get(getattr(inspect.unwrap(f), "__module__", "")) for f in functions}):
        try:
            _WithoutWeights(buffer).dump(value)
        except Exception as error:
            raise WorkloadError(
                f"the task functions, or what they use, cannot be sent to the processes of ranks ({error}); keep "
                "locks, files and connections out of them"
            ) from error
    return buffer.getvalue()


@contextlib.contextmanager
def _sent_by_value(modules: Iterable[ModuleType | None]) -> Iterator[None]:
    """While open, what the user's own files define is sent as it is; installed packages are imported where it
    arrives.
    """
    known = cloudpickle.list_registry_pickle_by_value()
    own = [m for m in modules if m is not None and m.__name__ not in known and _is_users(m)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _is_users(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    installed = ("site-packages", "dist-packages")
    return module.__name__ != "__main__" and file is not None and not any(name in file for name in installed)


class _WithoutWeights(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends parameters as their shapes, and code with the name of its file."""

    def reducer_override(self, value: Any) -> Any:
        """Parameters become meta parameters; code goes as Python itself writes it."""
        if isinstance(value, nn.Parameter):
            return meta_parameter, (tuple(value.shape), value.dtype, value.requires_grad)
        if isinstance(value, nn.parallel.DistributedDataParallel):
            return Wrapped, ("module", value.module)
        if type(value).__name__ == "OptimizedModule":
            return Wrapped, ("_orig_mod", value._orig_mod)
        if isinstance(value, CodeType):  # cloudpickle from 3.1.3 on leaves out its file, which places and messages name
            return marshal.loads, (marshal.dumps(value),)
        return super().reducer_override(value)


class Wrapped(nn.Module):
    """What a wrapper (of DistributedDataParallel, torch.compile) is where only what it wraps is called."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, inner)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper has not, what it wraps has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.name), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call what is wrapped."""
        return getattr(self, self.name)(*args, **kwargs)


def meta_parameter(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> Tensor:
    """A parameter without numbers."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)


_CAPTURING = "transformers.utils.output_capturing"


def recordable_outputs(modules: Iterable[nn.Module]) -> dict[str, Any]:
    """What transformers notes when it makes a model: which outputs (hidden states, attentions) models of these classes
    can give, by the class's name. A process that makes no model, and is sent one, does not know.
    """
    known = getattr(sys.modules.get(_CAPTURING), "_CAN_RECORD_REGISTRY", {})
    return {name: known[name] for name in {str(type(module)) for module in modules} if dict.__contains__(known, name)}


def let_record(outputs: Mapping[str, Any]) -> None:
    """Let transformers know in this process what `recordable_outputs` found in another."""
    if outputs:
        dict.update(importlib.import_module(_CAPTURING)._CAN_RECORD_REGISTRY, outputs)


def let_travel(modules: Iterable[nn.Module]) -> None:
    """Let pickle send parametrized modules (spectral norm, weight norm), which torch itself does not."""
    for module in (part for root in modules for part in root.modules()):
        if parametrize.is_parametrized(module):
            copyreg.pickle(type(module), _parametrized)


def _parametrized(module: nn.Module) -> tuple[Any, ...]:
    return _parametrized_again, (type(module).__bases__[0], dict(vars(module)))


def _parametrized_again(own: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    module = own.__new__(own)
    vars(module).update(attributes)
    parametrize._inject_new_class(module)
    for name in attributes["_modules"]["parametrizations"]:
        parametrize._inject_property(module, name)
    return module


def _context_variable(value: "ContextVar[Any]") -> tuple[Any, ...]:
    """Context variables, which hooks of transformers read, are found again by the module that holds them, or holds an
    object that does.
    """
    for name, module in list(sys.modules.items()):
        for attribute, held in list(vars(module).items()) if isinstance(module, ModuleType) else ():
            if held is value:
                return _found_again, (name, attribute)
            inner = getattr(held, "__dict__", None) if not isinstance(held, type | ModuleType) else None
            for own, part in list(inner.items()) if isinstance(inner, dict) else ():
                if part is value:
                    return _found_again, (name, attribute, own)
    raise TypeError(f"context variable {value.name!r} belongs to no module, so it cannot be sent to another process")


def _found_again(module: str, *attributes: str) -> "ContextVar[Any]":
    __import__(module)
    found: Any = sys.modules[module]
    for attribute in attributes:
        found = getattr(found, attribute)
    assert isinstance(found, ContextVar)
    return found


copyreg.pickle(ContextVar, _context_variable)
