"""Calls: what stands in place of `forward` while a task is recorded, of components to tell whose code runs, and of
repeated layers, which are one node each and give tensors without numbers.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spindle.record.changes.copies import attributes_kept
from spindle.record.lazy import Forbidden, Refused, is_lazy, refuse_modes
from spindle.record.recorder import Recorder
from spindle.record.recording import tensors_in, tree
from spindle.record.shapes import Drawn, Habit, Made, Results, Shape, ShapeRule, results_of, run_for_real, sizes_in

if TYPE_CHECKING:
    from spindle.record.skeleton import BlockInfo, Skeleton

MOST_KNOWN = 4096  # results of blocks that are kept, by shapes of arguments


NO_FORWARD = nn.Module.forward
Around = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A module's `forward` in; what is called in its place out."""


class _InPlace:
    """What stands in place of a `forward`. A deep copy of the module would go on calling the module itself."""

    def __init__(self, called: Callable[..., Any]) -> None:
        self.called = called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.called(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> Any:
        raise Forbidden(
            "it makes a deep copy of a module of the workload, whose parameters no plan knows; copy the module before "
            "the workload is planned, register the copy as a component, and write to its parameters under no_grad"
        )


@contextlib.contextmanager
def forwards_replaced(wanted: Iterable[tuple[nn.Module, Around]]) -> Iterator[None]:
    """While open, other functions stand in place of the `forward` of modules; of a module named twice, the first."""
    replaced: dict[int, tuple[nn.Module, bool, Any]] = {}
    try:
        for module, around in wanted:
            if id(module) not in replaced:
                replaced[id(module)] = (module, "forward" in module.__dict__, module.forward)
                module.forward = _InPlace(around(module.forward))
        yield
    finally:
        for module, patched, own in replaced.values():
            if patched:
                module.forward = own
            else:
                module.__dict__.pop("forward", None)


def call_name(name: str, of: Any, calls: Counter[Any]) -> str:
    """Name of the next call of something: `name`, then `name@1`; `calls` counts them."""
    number = calls[of]
    calls[of] += 1
    return f"{name}@{number}" if number else name


def component_call(
    skeleton: "Skeleton", name: str, module: nn.Module, recorder: Recorder, calls: Counter[Any]
) -> Around:
    """Note which call of a component its code runs in: "vision", "vision@1" for the second."""

    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            skeleton.steady.called.add(id(module))
            if recorder.component or recorder.inside:
                return own(*args, **kwargs)
            recorder.component = name if name in skeleton.uncounted else call_name(name, module, calls)
            try:
                return own(*args, **kwargs)
            except Exception as error:
                recorder.failed = error, recorder.component
                raise
            finally:
                recorder.component = ""

        return called

    return make


def block_call(skeleton: "Skeleton", block: "BlockInfo", recorder: Recorder, calls: Counter[Any]) -> Around:
    """What stands in place of a block's `forward`: it notes the call, and gives tensors without numbers."""

    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if recorder.inside or recorder.for_real:  # a block in a block is part of it
                return own(*args, **kwargs)
            refuse_modes(inside=False)
            skeleton.check_block(block)
            scope = call_name(block.path, block.path, calls)
            results = _results(skeleton, block, own, recorder, args, kwargs)
            with torch._C.DisableTorchFunction():
                made = tree(lambda leaf: leaf.tensor() if isinstance(leaf, Made) else leaf, results.structure)
                encoded = tree(recorder.encoded, args), tree(recorder.encoded, kwargs)
                recorder.drawn[scope] = results.drawn
                return recorder.record(own, args, encoded, made, block=scope, changes=skeleton.changed_by(block))

        return called

    return make


def _results(
    skeleton: "Skeleton",
    block: "BlockInfo",
    own: Callable[..., Any],
    recorder: Recorder,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Results:
    """What a block gives: known for arguments of these shapes, predicted by habit, or found."""
    kinds, given = _signature((args, kwargs))
    like = (block.kind, torch.is_grad_enabled(), kinds)
    key = (*like, given)
    results = skeleton.known.get(key)
    if results is None:
        habit = skeleton.habits.setdefault(like, Habit())
        results = None if skeleton.learning else habit.tell(given)
    if results is None:
        recorder.block = block.path
        with attributes_kept(block.module.modules()):
            results = _found(skeleton, block, own, recorder, args, kwargs)
        recorder.block = ""
        if torch.is_grad_enabled() and _may_learn(block.module, (args, kwargs)):
            results = results.with_gradients()
        habit.learn(results, given)
        if len(skeleton.known) > MOST_KNOWN:
            skeleton.known.clear()
        skeleton.known[key] = results
    return results


def _may_learn(module: nn.Module, given: Any) -> bool:
    """Whether a block, or what it is given, is trained."""
    with torch._C.DisableTorchFunction():
        return any(tensor.requires_grad for tensor in (*module.parameters(), *tensors_in(given)))


def _found(
    skeleton: "Skeleton",
    block: "BlockInfo",
    own: Callable[..., Any],
    recorder: Recorder,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Results:
    """What a block gives: by its rule, on the meta device, or, while learning, for real."""
    rule = skeleton.rules.get(block.kind)
    if rule is None:
        try:
            with attributes_kept(block.module.modules()):  # hooks too, that a run which fails has registered
                return _run_on_meta(skeleton, block, own, recorder, args, kwargs)
        except Forbidden:
            raise
        except Exception as error:
            if not skeleton.learning:
                raise
            reason = error
    elif not skeleton.learning:
        structure, shapes = rule.results(sizes_in((args, kwargs)))
        return Results(structure, Drawn(shapes, rule.written_out))
    else:
        reason = None
    recorder.for_real = True
    try:
        with skeleton.real(block.module), skeleton.steady.in_block(block.path) as again:
            found = run_for_real(own, args, kwargs, reason)
            if again():
                run_for_real(own, args, kwargs, reason)
    finally:
        recorder.for_real = False
    try:
        skeleton.rules[block.kind] = ShapeRule.learned(rule, found, sizes_in((args, kwargs)))
    except ValueError as error:
        raise Refused(
            f"of what {block.path!r} gives, {error}, so that no rank knows them before it has run; give it a tensor "
            "of such a size, or the size itself, as an argument"
        ) from None
    return found


def _run_on_meta(
    skeleton: "Skeleton", block: "BlockInfo", own: Callable[..., Any], recorder: Recorder, args: Any, kwargs: Any
) -> Results:
    from spindle.record.substitutes.randomness import NotingShapes

    recorder.inside = True
    try:
        with skeleton.steady.in_block(block.path) as again:
            with NotingShapes("", None) as noted:
                structure = own(*args, **kwargs)
            if again():
                with NotingShapes("", None):
                    own(*args, **kwargs)
    finally:
        recorder.inside = False
    return results_of(structure, noted.shapes, written_out=noted.writes_out_attention)


def _signature(structure: Any) -> tuple[tuple[object, ...], tuple[Shape, ...]]:
    """Types and constants of nested arguments, and the shapes of tensors; other objects count by their class."""
    found: list[object] = []
    shapes: list[Shape] = []

    def note(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            shapes.append(tuple(leaf.shape))
            found.append((leaf.ndim, leaf.dtype, leaf.requires_grad, is_lazy(leaf)))
        else:
            found.append(leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf).__qualname__)

    with torch._C.DisableTorchFunction():
        tree(note, structure)
    return tuple(found), tuple(shapes)
