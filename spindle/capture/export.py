"""Export: a task function in, the graph that `torch.export` makes of it out.

- The user's own function runs on fake tensors with a free batch size: no compute, no memory.
- A component that cannot be traced becomes one opaque block. Its results' shapes are taken from a run on a few samples,
  since what stopped the trace stops fake tensors inside of it too.
"""

import contextlib
import inspect
import io
import logging
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from spindle.capture.blocks import Block, BlockCall, opaque_blocks, trace_for
from spindle.capture.caches import caches_off, caching_configs
from spindle.capture.draws import GLOBAL_GENERATORS
from spindle.capture.randomness import Drawing
from spindle.capture.recorded import Recording
from spindle.capture.rewrite import SplitReductions
from spindle.errors import SpindleWarning, WorkloadError
from spindle.workload import Batch, Component, Task, Workload

_LOUD = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.export")
_SIDE_DOOR = "fake tensor in the exported program constant's list"

Exported = tuple[torch.export.ExportedProgram, list[BlockCall], Drawing]
"""The program, the calls of blocks in it, and what its glue draws."""


def export(
    workload: Workload, task: Task, batch: Batch, blocks: Sequence[Block], untraceable: Mapping[str, Exception]
) -> Exported:
    """Export `task` around `blocks`, components in `untraceable` whole. Raises WorkloadError when that fails."""
    blocks = list(blocks)
    configs = caching_configs(nn.ModuleList(component.module for component in workload.components.values()))
    whole: list[Component] = [workload.components[name] for name in untraceable]
    failed = frozenset(untraceable)
    recording: Recording | None = None
    imported = False
    if whole:
        blocks = _with_whole(whole, blocks)
        recording = _recording(workload, task, batch, blocks, failed, configs)
        for component in whole:
            _warn(component, task, untraceable[component.name])
    while True:
        root, made = _TaskModule(workload, task), list[BlockCall]()
        try:
            with opaque_blocks(blocks, recording) as calls, caches_off(configs), _quiet():
                made = calls
                with _no_other_generators(task):
                    program = _export(root, batch)
                return program, calls, root.drawing
        except _Moved:
            if imported:
                raise
            imported = True  # modules that are imported by the first call may draw while they are
        except WorkloadError:
            raise
        except _Stranger as error:
            raise WorkloadError(
                f"task {task.name!r}{_place(error, task)} uses a trainable parameter ({error}) of no component, which "
                "would never be trained; register its module by workload.component(...), or freeze it"
            ) from error
        except Exception as error:
            culprits = [c for c in _culprits(error, workload, made) if c not in whole]
            fails = {call.path for call in made if call.failed}
            if not fails and not culprits:
                raise _explained(error, task) from error
            failed |= fails or {component.name for component in culprits}
            blocks = blocks if fails else _with_whole(culprits, blocks)
            recording = _recording(workload, task, batch, blocks, failed, configs)
            for component in [] if fails else culprits:
                whole.append(component)
                _warn(component, task, error)


def _recording(
    workload: Workload, task: Task, batch: Batch, blocks: Sequence[Block], paths: frozenset[str], configs: list[Any]
) -> Recording:
    recording = Recording(workload, task, batch, blocks, paths)
    with caches_off(configs):
        own = recording.error()
    if own is not None:
        raise _explained(own, task, "ran on real samples") from own
    return recording


def _with_whole(components: Sequence[Component], blocks: Sequence[Block]) -> list[Block]:
    """Blocks with whole components in place of those inside them."""
    inside = {module for component in components for module in component.module.modules()}
    whole = [Block(component.name, component.module) for component in components]
    return [block for block in blocks if block.module not in inside] + whole


class _TaskModule(nn.Module):
    """All components as children, so that export sees their parameters, and the user's function as forward."""

    def __init__(self, workload: Workload, task: Task) -> None:
        super().__init__()
        for component in workload.components.values():
            self.add_module(component.name, component.module)
        self.task = task
        self.drawing = Drawing("", None, as_operators=True)

    def forward(self, batch: Batch) -> Tensor:
        rows, *others = (value.shape[0] for value in batch.values())
        for other in others:
            torch._check(other == rows)  # type: ignore[no-untyped-call] # each field came with a size of its own
        trace_for(rows)
        with _NoStrangers(self), self.drawing, SplitReductions(rows):
            loss = self.task.function(batch)
        if not isinstance(loss, Tensor) or loss.ndim > 1 or not loss.is_floating_point() or loss.numel() != 1:
            raise WorkloadError(
                f"task {self.task.name!r} returned {_told(loss)}; return the loss, one floating-point scalar"
            )
        return loss


class _Stranger(Exception):
    """A trainable parameter that belongs to no component."""


class _NoStrangers(TorchFunctionMode):
    """Parameters of modules that were never registered would be constants of the graph, and never be trained."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.known = set(map(id, root.parameters()))

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at what the function is given."""
        for value in (*args, *(kwargs or {}).values()):
            strange = isinstance(value, nn.Parameter) and id(value) not in self.known
            if strange and value.requires_grad and torch.is_grad_enabled():
                raise _Stranger(" x ".join(map(str, value.shape)) or "one number")
        return func(*args, **(kwargs or {}))


def _told(value: object) -> str:
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"a {dtype} tensor of {value.ndim} dimensions" if value.ndim else f"a scalar of {dtype}"


def _export(root: _TaskModule, batch: Batch) -> torch.export.ExportedProgram:
    shapes = {"batch": {name: {0: torch.export.Dim.AUTO} for name in batch}}
    return torch.export.export(root, (batch,), dynamic_shapes=shapes, strict=False)


class _Moved(WorkloadError):
    """A generator that is not ours has drawn."""


@contextlib.contextmanager
def _no_other_generators(task: Task) -> Iterator[None]:
    """Numbers of Python's or numpy's generators would be baked into the graph, the same in every step."""
    alone = GLOBAL_GENERATORS.acquire(timeout=5.0)  # a loader of another run moves them too; one that hangs we outwait
    try:
        before = random.getstate(), np.random.get_state()
        yield
        after = random.getstate(), np.random.get_state()
    finally:
        if alone:
            GLOBAL_GENERATORS.release()
    for name, old, new in zip(("random", "numpy.random"), map(repr, before), map(repr, after), strict=True):
        if old != new:
            raise _Moved(
                f"task {task.name!r} draws from {name} in its function or model, which would give every step the same "
                "numbers; draw with torch, or in the loader"
            )


# -- when it fails ----------------------------------------------------------------------------------------------------


def _culprits(error: BaseException, workload: Workload, calls: Sequence[BlockCall]) -> list[Component]:
    """The component in whose code an error arose; or, when tensors left blocks by hooks, those with blocks."""
    if _SIDE_DOOR in str(error):
        used = {call.path.partition(".")[0] for call in calls}
        return [component for name, component in workload.components.items() if name in used]
    by_module = {id(component.module): component for component in workload.components.values()}
    chain: BaseException | None = error
    while chain is not None:
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(chain.__traceback__)]
        found = [by_module[id(owner)] for owner in frames if id(owner) in by_module]
        if found:
            return [found[-1]]
        chain = chain.__cause__ or chain.__context__
    return []


def _warn(component: Component, task: Task, error: Exception) -> None:
    if _SIDE_DOOR in str(error):
        why = (
            "its layers hand tensors to hooks (it collects hidden states, attentions or router logits); "
            "switch that off, or compute what you need from the layers' results"
        )
    else:
        reason = _branches(error) or _reason(error).removeprefix(f"task {task.name!r}: ")
        why = (
            f"{reason}; take what depends on values of the batch (positions, grids, lengths) out of it and give it as "
            "arguments, or name parts of it that stand alone, as in layers=['visual']"
        )
    warnings.warn(
        f"task {task.name!r}: component {component.name!r} cannot be traced and runs as one operator: {why}",
        SpindleWarning,
        stacklevel=7,
    )


def _explained(error: Exception, task: Task, when: str = "was traced on fake tensors") -> WorkloadError:
    if _branches(error):
        return WorkloadError(
            f"task {task.name!r}{_place(error, task)}: {_branches(error)}, which a trace cannot follow; "
            "use torch.where, or put it into a module and register that"
        )
    remedy = "Outside of blocks a task may not branch on tensor values" if _of_torch(error) else "Mend that line"
    if "cuda" in str(error).lower() or "NVIDIA" in str(error):
        remedy = "Leave devices out (.cuda(), .to(device)): modules and batches are moved to where they run"
    return WorkloadError(
        f"task {task.name!r} raised {type(error).__name__} while it {when}"
        f"{_place(error, task)}: {_reason(error)}. {remedy}"
    )


def _branches(error: Exception) -> str:
    """What stopped a trace, where it is a value of a tensor that decides what comes next."""
    data_dependent = isinstance(error, GuardOnDataDependentSymNode)
    return "it branches on a value of a tensor (if, while, int(), a mask whose size matters)" if data_dependent else ""


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _of_torch(error: Exception) -> bool:
    return type(error).__module__.startswith("torch.")


def _place(error: Exception, task: Task) -> str:
    """The last line of the task function's file that was running."""
    code = getattr(inspect.unwrap(task.function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if code is not None and f.filename == code.co_filename]
    return f", line {lines[-1]} of {os.path.basename(code.co_filename)}" if code is not None and lines else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export prints the whole graph beside what it raises; our error says it in a line."""
    logs, printed = [logging.getLogger(name) for name in _LOUD], io.StringIO()
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attributes", category=UserWarning)  # recurrent layers
            yield
        sys.stderr.write(printed.getvalue())  # nothing of the user's is lost
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
