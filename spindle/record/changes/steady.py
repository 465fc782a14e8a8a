"""Steady: attributes of modules that change while a task is recorded.

A planned run calls layers in several processes, each as often as the plan needs, and each with a copy of the modules as
they are when it starts. So what code outside of a layer sets in it must be the same in every call of it, and what a
layer sets in itself must not count its calls.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from spindle.inputs.usercode import line_of
from spindle.record.lazy import Forbidden, is_lazy
from spindle.record.recorder import Recorder

_PLAIN = (bool, int, float, complex, str, type(None))
_MISSING = object()

REMEDY = (
    "which other calls of it, and other processes, do not see; set it once, before the workload is planned, or let a "
    "copy of the layer (copy.deepcopy), a component of its own, have the other value"
)


class _Kept:
    """Stands in place of a tensor that a layer keeps in itself: whatever is done with it fails."""


class Steady:
    """Watches the modules of components while tasks are recorded.

    `settled`: attributes that code outside of layers has set once. `unsettled`: it has just set one anew, so that all
    that was recorded before is out of date. `moving`: attributes of modules outside of layers that were set at capture.
    """

    def __init__(self, paths: Mapping[int, str], inside: Set[int], settled: set[str], moving: set[str]) -> None:
        """`paths` of modules by their id; `inside`: ids of the modules in blocks."""
        self.paths, self.inside, self.settled, self.moving = paths, inside, settled, moving
        self.unsettled = False
        self.called: set[int] = set()
        self._own: dict[tuple[int, str], tuple[nn.Module, Any]] = {}  # what a block has set in itself: values before

    def is_settled(self, module: nn.Module, name: str) -> bool:
        """Whether code outside of layers sets this attribute, always to the same."""
        return f"{self.paths.get(id(module))}.{name}" in self.settled

    def watch(self, recorder: Recorder, *, learning: bool) -> Callable[[nn.Module, str, Any], None]:
        """What is called with attributes that are set while a task is recorded; `learning`: at capture."""

        def check(module: nn.Module, name: str, value: Any) -> None:
            if id(module) not in self.paths:
                return
            if what := _replaced(module, name, value):
                raise Forbidden(
                    f"it puts another {what} in place of {name!r} of {self.paths[id(module)]!r}, which the optimizer "
                    "does not have; change the values of parameters themselves, under torch.no_grad()"
                )
            if any(name in held for held in _held(module)):
                return
            before = vars(module).get(name, getattr(type(module), name, _MISSING))
            if recorder.inside or recorder.for_real:
                self._own.setdefault((id(module), name), (module, before))
            elif name == "training" or id(module) in self.inside:
                self._set_from_outside(module, name, before, value, learning)
            elif _is_other(value, before):
                self._set_elsewhere(module, name, before, value, learning)

        return check

    def _set_elsewhere(self, module: nn.Module, name: str, before: Any, value: Any, learning: bool) -> None:
        """Raise Forbidden where a module outside of layers begins to keep another number only after capture."""
        path = self.paths[id(module)]
        if learning:
            self.moving.add(f"{path}.{name}")
        elif f"{path}.{name}" not in self.moving:
            line = line_of(type(module), name)
            was = "nothing" if before is _MISSING else repr(before)
            raise Forbidden(
                f"{path!r} sets its attribute {name!r}{f' ({line})' if line else ''} to {value!r}, and kept {was} "
                "until now; each rank would keep its own, and later steps would compute with it. Let it be set before "
                "the workload is planned (begin with the longest batch, say), or make it a buffer that __init__ "
                "registers"
            )

    def _set_from_outside(self, module: nn.Module, name: str, before: Any, value: Any, learning: bool) -> None:
        if value is before or (isinstance(value, _PLAIN) and type(value) is type(before) and value == before):
            return
        if not isinstance(value, (*_PLAIN, Tensor)):
            return
        path = self.paths[id(module)]
        key = f"{path}.{name}"
        if not learning or id(module) in self.called or key in self.settled or isinstance(value, Tensor):
            what = "it switches the mode of" if name == "training" else f"it sets {name!r} of"
            mode = f" ({'train' if value else 'eval'}())" if name == "training" else ""
            raise Forbidden(f"{what} layer {path!r}{mode} between calls of it, {REMEDY}")
        self.settled.add(key)
        self.unsettled = True

    @contextlib.contextmanager
    def in_block(self, path: str) -> Iterator[Callable[[], bool]]:
        """While open, a block runs for its shapes. What is given tells whether it is to run once more, since it has set
        attributes of its own; these have their values back afterwards.

        Raises Forbidden where the second run sets them anew, or reads a tensor that the first has kept.
        """
        self._own.clear()
        first: dict[tuple[int, str], Any] = {}

        def again() -> bool:
            for key, (module, before) in self._own.items():
                value = vars(module).get(key[1], _MISSING)
                if isinstance(value, Tensor) and is_lazy(value) and isinstance(before, Tensor):
                    first[key] = _Kept()
                    vars(module)[key[1]] = first[key]
                elif isinstance(value, _PLAIN) and value != before:
                    first[key] = value
            return bool(first)

        try:
            yield again
            for key, value in first.items():
                module, name = self._own[key][0], key[1]
                now = vars(module).get(name, _MISSING)
                if isinstance(value, _PLAIN) and now != value and now == now:
                    raise self._counted(module, name)
        except Forbidden:
            raise
        except Exception as error:
            kept = next((key for key, value in first.items() if isinstance(value, _Kept)), None)
            if kept is None or "_Kept" not in str(error):
                raise
            raise self._counted(self._own[kept][0], kept[1]) from error
        finally:
            for (_, name), (module, before) in self._own.items():
                if before is _MISSING:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = before
            self._own.clear()

    def _counted(self, module: nn.Module, name: str) -> Forbidden:
        line = line_of(type(module), name)
        return Forbidden(
            f"layer {self.paths[id(module)]!r} keeps a state of its own in attribute {name!r}"
            f"{f' ({line})' if line else ''}, which changes from call to call and which no plan can follow; make it a "
            "buffer that __init__ registers, with its first value"
        )


def _is_other(value: Any, before: Any) -> bool:
    """Whether a number, or a tensor of the batch, is put in place of another."""
    if isinstance(value, Tensor):
        return not is_lazy(value) and not (isinstance(before, Tensor) and _is_equal(value, before))
    return isinstance(value, _PLAIN) and (isinstance(before, Tensor) or value != before)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return a is b or (not b.is_meta and a.shape == b.shape and bool((a == b).all()))


def _replaced(module: nn.Module, name: str, value: Any) -> str:
    """Which kind of thing that is trained gets another in its place; "" for none."""
    own = module._parameters.get(name)
    if own is not None and value is not own:
        return "parameter"
    inner = module._modules.get(name)
    trained = any(isinstance(each, nn.Module) and any(True for _ in each.parameters()) for each in (inner, value))
    return "module" if inner is not None and value is not inner and trained else ""


def _held(module: nn.Module) -> list[Mapping[str, Any]]:
    return [vars(module).get(name, {}) for name in ("_parameters", "_buffers", "_modules")]
