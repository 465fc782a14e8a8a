"""Refusals: what a planned run cannot do as the user's code does it, and how to say so."""

import inspect
import os
import random
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from spindle.capture.look.proposals import collected_outputs, in_code, lists_of, running_module, with_module
from spindle.errors import SpindleError, WorkloadError
from spindle.record.lazy import INSTEAD, CameOut, Forbidden, LazyRead, Refused, Stranger
from spindle.record.run import Failure, Recorded
from spindle.record.substitutes.draws import GLOBAL_GENERATORS
from spindle.record.writes import INSTEAD as DO_INSTEAD
from spindle.workload import Component, Task, Workload

PASSES_ON = ("_on_meta", "_real", "__torch_function__")
"""Functions of the recorder that make the user's calls."""


class Raised(WorkloadError):
    """Code of a task raised, as it may in a plain run of that number of samples."""


class TakeWhole(Exception):
    """A component's own code cannot be recorded, so that it must run as one operator."""

    def __init__(self, component: str, warning: str) -> None:
        super().__init__(warning)
        self.component, self.warning = component, warning


class TakeApart(Exception):
    """Layers do what only code between layers can: they write to their parameters, or are called once a sample."""

    def __init__(self, paths: Iterable[str], warning: str) -> None:
        """`paths`: of the layers, or a component for all of its layers."""
        super().__init__(warning)
        self.paths, self.warning = frozenset(paths), warning


class Unsettled(Exception):
    """Code outside of layers has set an attribute in one, or loops over samples, so that what was recorded before is
    out of date.
    """


def unlike(task: Task, line: str, kept: str = "") -> WorkloadError:
    """The error for a task that does not compute the same of the same batch; `kept` is what it keeps from call to
    call.
    """
    why = (
        f"depends on {kept!r}, which its own calls change" if kept else "changes from call to call (a counter, a clock)"
    )
    return WorkloadError(
        f"task {task.name!r}, {line}: what it computes of one batch {why}, and "
        "a planned run calls it in several processes, as often as each needs; let it follow from the batch alone: the "
        "loader can give the step as a field"
    )


def own_generator(task: Task, name: str) -> WorkloadError:
    """The error for a task that draws from a generator of its own."""
    return WorkloadError(
        f"task {task.name!r} draws from {name!r}, a generator of its own, which would give every process other "
        "numbers; draw with torch, or in the loader"
    )


def explained(task: Task, failure: Failure, whole: frozenset[str], components: Mapping[str, Component]) -> Exception:
    """What to tell the user of a task function that raised while it was recorded: WorkloadError, or TakeWhole where one
    of the `components` that is not yet among `whole` is to blame.
    """
    error = failure.error
    if isinstance(error, WorkloadError):
        return error
    place = _place(error, task)
    if isinstance(error, Stranger):
        return WorkloadError(
            f"task {task.name!r}{place} uses a trainable parameter ({error}) of no component, which "
            "would never be trained; register its module by workload.component(...), or freeze it"
        )
    if isinstance(error, Forbidden):
        return WorkloadError(f"task {task.name!r}{place}: {error}")
    component = failure.component.partition("@")[0] or failure.block.partition(".")[0]
    if component and component not in whole and not _is_users(error):
        return TakeWhole(component, _whole_warning(task, components[component], error))
    if isinstance(error, NotImplementedError):
        return WorkloadError(f"task {task.name!r}{place}: {_without_shape(error)}; {INSTEAD}")
    if isinstance(error, LazyRead):
        return WorkloadError(f"task {task.name!r}{place}: {error.what} (if, while, int(), .item()); {error.instead}")
    if isinstance(error, Refused):
        return WorkloadError(f"task {task.name!r}{place}: {error}")
    remedy = "Mend that line"
    if "cuda" in str(error).lower() or "NVIDIA" in str(error):
        remedy = "Leave devices out (.cuda(), .to(device)): modules and batches are moved to where they run"
    reason = f": {_reason(error)}" if _reason(error) else ""
    kind = WorkloadError if _is_ours(error) else Raised
    return kind(f"task {task.name!r} raised {type(error).__name__} while it was recorded{place}{reason}. {remedy}")


def writes_parameter(task: str, block: str, module: nn.Module, how: str, *, cut: bool) -> Exception:
    """What to do with a layer that writes to a parameter: TakeApart, so that its calls are recorded as those of code
    between layers; WorkloadError where they cannot be, of a whole component or one that tensor parallelism `cut`s.
    """
    path, kind = block.partition("@")[0], type(module).__name__
    component = path.partition(".")[0]
    if path == component or cut:
        return WorkloadError(f"task {task!r}: {block} (a {kind}) {how}; {DO_INSTEAD}")
    return TakeApart(
        [component],
        f"task {task!r}: {block} (a {kind}) {how}, so component {component!r} is not cut into layers, which would "
        f"write where they run; {DO_INSTEAD}, for a plan to move its layers",
    )


def looped(task: Task, paths: Sequence[str], line: str) -> TakeApart:
    """The warning for layers that a component calls more often for more samples, or longer ones."""
    return TakeApart(
        paths,
        f"task {task.name!r}: layer {paths[0]!r}{f' ({line})' if line else ''} is called in a loop that is longer for "
        "some batches, or parts of one, so that it counts as code between layers and runs on one device; call it once "
        "on all samples, or let the module that holds the loop be one layer: name it in layers=",
    )


def check_loss(task: Task, found: Recorded) -> None:
    """Raise WorkloadError unless the task returned a loss: one floating-point scalar that needs a gradient, if it has
    any weight.
    """
    recording = found.recording
    result: object = found.result
    if task.evaluates:
        if result is None and recording.loss >= 0:
            return
        raise WorkloadError(
            f"evaluation task {task.name!r} returned nothing that a component of the workload has computed; return the "
            "loss, or a dict of tensors, of which one at least comes from a module of the workload and the batch"
        )
    needs_grad = False
    if result is None and recording.loss >= 0:
        result = torch.empty(recording.shapes[recording.loss], dtype=recording.dtypes[recording.loss], device="meta")
        needs_grad = recording.needs_grad[recording.loss]
    if not isinstance(result, Tensor) or not (result.ndim <= 1 and result.numel() == 1 and result.is_floating_point()):
        raise WorkloadError(
            f"task {task.name!r} returned {_kind_of(result)}; return the loss, one floating-point scalar"
        )
    if not needs_grad and task.weight:
        raise WorkloadError(
            f"task {task.name!r}: its loss needs no gradient; let it depend on a trained parameter, or give the task "
            "weight=0, with which it runs forward only"
        )


def _kind_of(loss: object) -> str:
    if not isinstance(loss, Tensor):
        return "None" if loss is None else f"a {type(loss).__name__}"
    dtype = str(loss.dtype).removeprefix("torch.")
    return f"a {dtype} tensor of {loss.ndim} dimensions" if loss.ndim else f"a scalar of {dtype}"


def _is_users(error: Exception) -> bool:
    """Whether an error would be raised in a plain run too: what a recording cannot do fails in other ways."""
    return not isinstance(error, LazyRead | Refused | NotImplementedError | RuntimeError)


def _whole_warning(task: Task, component: Component, error: Exception) -> str:
    reason = error.what if isinstance(error, LazyRead) else str(error) if isinstance(error, Refused) else _reason(error)
    return (
        f"task {task.name!r}: component {component.name!r} cannot be recorded and runs as one operator: {reason}"
        f"{_innermost(error)}; {_instead_of_whole(component, error)}"
    )


def _instead_of_whole(component: Component, error: Exception) -> str:
    outputs = collected_outputs(component) if isinstance(error, CameOut) else ()
    if outputs:
        return f"in its config, set {' and '.join(f'{name}=False' for name in outputs)}"
    running, lists = running_module(error.__traceback__, component), lists_of(component)
    if running and (len(layers := with_module(component, running)) > 1 or not lists):
        remedy = f"let {running!r}, where it runs, be one layer: {in_code(layers)}"
    else:  # one layer that holds all lists would be next to nothing gained
        beside = f" beside {', '.join(map(repr, lists))}" if lists else ""
        remedy = f"move it into a module of its own and name that in layers={beside}"
    return f"take what depends on such values out of it, or {remedy}"


def _without_shape(error: NotImplementedError) -> str:
    """What to say of a call whose result has no shape that torch can tell without numbers."""
    known = re.search(r"aten::(\w+)", str(error))
    name = known[1].strip("_") if known else ""
    if known and not name.startswith(("nonzero", "unique", "masked_select", "argwhere")):
        return f"torch cannot tell without numbers what {name!r} gives of a value computed from parameters"
    return "it takes as many rows as a value computed from parameters tells (y[y > 0], nonzero(), unique())"


def _is_ours(error: Exception) -> bool:
    """Whether a check of ours raised, and no call of the user's that we passed on."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SpindleError) or not frames:
        return isinstance(error, SpindleError)
    return f"{os.sep}spindle{os.sep}" in frames[-1].filename and frames[-1].name not in PASSES_ON


def _innermost(error: Exception) -> str:
    """The innermost line outside of torch and of us that was running."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}torch{os.sep}" not in frame.filename and f"{os.sep}spindle{os.sep}" not in frame.filename
    ]
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _place(error: BaseException, task: Task) -> str:
    """The last line of the task function's file that was running."""
    code = getattr(inspect.unwrap(task.function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if code is not None and f.filename == code.co_filename]
    return f", line {lines[-1]} of {os.path.basename(code.co_filename)}" if code is not None and lines else ""


class Moved(WorkloadError):
    """A generator of another library has drawn in a task."""


def _states() -> dict[str, object]:
    """Of Python's and numpy's generators what tells that they have drawn."""
    state: Any = np.random.get_state()
    return {"random": random.getstate(), "numpy.random": (state[1].tobytes(), *state[2:])}


@contextmanager
def no_other_generators(task: Task, *, by_line: bool = False) -> Iterator[None]:
    """Numbers of Python's or numpy's generators would differ between ranks: raise Moved where one has drawn. `by_line`:
    the error names the line, for which code runs slowly.
    """
    alone = GLOBAL_GENERATORS.acquire(timeout=5.0)  # a loader of another run moves them too; one that hangs we outwait
    try:
        before = _states()
        with _tracing(before) if by_line else nullcontext([""]) as lines:
            yield
        after = _states()
    finally:
        if alone:
            GLOBAL_GENERATORS.release()
    for name, state in before.items():
        if state != after[name]:
            at = f" ({lines[0]})" if lines[0] else ""
            raise Moved(
                f"task {task.name!r} draws from {name} in its function or model{at}, which would give every rank other "
                "numbers; draw with torch, or in the loader"
            )


@contextmanager
def _tracing(before: dict[str, object]) -> Iterator[list[str]]:
    """While open, the one entry becomes the line of user code that runs, until generators have moved from `before`."""
    lines, found, outer = [""], False, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal found
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if found or package in ("torch", "spindle", "random", "numpy"):
            return None
        found = _states() != before
        if not found:
            lines[0] = f"line {frame.f_lineno} of {os.path.basename(frame.f_code.co_filename)}"
        return trace

    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(outer)


def refuse_gradient_hooks(workload: Workload, inside: set[nn.Module]) -> None:
    """Recorded calls carry none, and parameters of a run are copies. Inside blocks modules keep theirs."""
    for kind in ("forward", "forward_pre", "backward", "backward_pre"):
        if getattr(modules, f"_global_{kind}_hooks"):
            raise WorkloadError(
                f"a {kind.replace('_', ' ')} hook is registered for all modules (register_module_..._hook), which "
                "other processes would not have; remove it, or register it on the modules that it is for"
            )
    for name, parameter in workload.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise WorkloadError(
                f"parameter {name!r} has a gradient hook, which would see the gradients of parts of the batch; "
                "remove it and change gradients in the optimizer"
            )
    for component in workload.components.values():
        for path, module in component.module.named_modules():
            if module not in inside and (module._backward_hooks or module._backward_pre_hooks):
                where = f"component {component.name!r}" + (f": module {path!r}" if path else "")
                raise WorkloadError(
                    f"{where} has a backward hook outside of blocks, which a "
                    f"recording does not carry; remove it{_or_as_layer(component, path)}"
                )


def _or_as_layer(component: Component, path: str) -> str:
    return f", or let the module be one layer: {in_code(with_module(component, path))}" if path else ""
