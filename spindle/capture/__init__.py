"""Capture: a Workload in; its TaskGraph and the code of every operator out. The data passes through in this order:

blocks      repeated layers are found
look        the user's task function is recorded on its first batches (spindle.record), whole and in parts, which show
            what mixes samples, and how each value is cut
grouping    what was recorded falls into groups: blocks and glue
assignment  which become operators, named by naming
costs       which are measured on fake tensors at the full batch
operators   and put together as codes
states      which buffers must keep the order of one process
writes      which parameters tasks write to, and whether a plan can do so in time
parts       by which recordings of other batches fall into the same operators
repeat      once for each concurrent micro-batch

eager runs the user's functions as they are, with the same random numbers: what planned runs are compared with.
"""

import warnings
from collections.abc import Callable
from itertools import permutations

from spindle.capture.blocks import Block, blocks_of, find_blocks
from spindle.capture.changes.buffers import make_buffers_real
from spindle.capture.changes.states import lines_of, with_states
from spindle.capture.changes.writes import checked_writes
from spindle.capture.codes import Captured, OperatorCode, TaskCode
from spindle.capture.look.looker import Looker
from spindle.capture.look.proposals import in_code, parts_of
from spindle.capture.look.refusals import Raised, TakeApart, TakeWhole, Unsettled, refuse_gradient_hooks
from spindle.capture.modules import refuse_modules
from spindle.capture.operators.naming import Namer
from spindle.capture.operators.of_task import Memo, TaskOperators, build_operators
from spindle.capture.repeat import repeated
from spindle.capture.signature import module_signature
from spindle.errors import SpindleWarning, WorkloadError
from spindle.record.changes.copies import attributes_kept, values_kept
from spindle.record.on_meta.known_shapes import KnownShapes
from spindle.record.skeleton import BlockInfo, Skeleton
from spindle.record.substitutes.patches import watchable_modules
from spindle.values.graph import TaskGraph
from spindle.workload import Component, Workload

LARGE = 5_000_000  # parameters; below that an operator in one piece costs a plan little

__all__ = ["Captured", "OperatorCode", "TaskCode", "capture"]


def capture(
    workload: Workload, on_task: Callable[[str], object] = str, *, changing: frozenset[str] = frozenset()
) -> Captured:
    """Record every task of a workload on its first batches. Raises WorkloadError naming the task and the reason.

    `on_task` is called with what is done before each. A workload that has not changed since is not captured again. Each
    of several concurrent micro-batches is a task. `changing`: buffers that others change, so that they are read when
    the tasks run, though these change none.
    """
    workload.require_tasks()
    refuse_modules(workload)
    make_buffers_real(workload)
    version = (changing, *_version(workload))
    if workload.captured is not None and workload.captured[0] == version:
        known = workload.captured[1]
        assert isinstance(known, Captured)
        return known
    found = repeated(_capture(workload, on_task, changing), workload.in_flight)
    _warn_of_nothing_to_compile(workload, found)
    workload.captured = ((changing, *_version(workload)), found)  # a task may have set the mode of its modules
    return found


def _version(workload: Workload) -> tuple[object, ...]:
    """What a capture depends on, as far as it can be seen from outside."""
    modules = [(name, m, m.training) for c in workload.components.values() for name, m in c.module.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.dtype, p.device) for name, p in workload.named_parameters()]
    return (workload.in_flight, workload.precision, tuple(workload.tasks.values()), tuple(modules), tuple(parameters))


def _warn_of_large_operators(workload: Workload) -> None:
    for component in workload.components.values():
        count = sum(parameter.numel() for parameter in component.module.parameters())
        if count > LARGE and not find_blocks(component.name, component.module, component.layers):
            warnings.warn(
                f"component {component.name!r} has {count / 1e6:.1f} million parameters but no repeated blocks "
                f"were found, so it cannot be cut into layers; {_proposal(component)}",
                SpindleWarning,
                stacklevel=4,
            )


def _proposal(component: Component) -> str:
    """What to do for a component to have layers, in paths that it has."""
    parts = parts_of(component)
    if not parts:
        return "put its layers into modules of their own inside it and name those in layers="
    return f"name its list of blocks or modules, for instance {in_code(parts)}"


def _warn_of_nothing_to_compile(workload: Workload, found: Captured) -> None:
    used = {operator.component for operator in found.graph}
    compiled = {operator.component for operator in found.graph if found.codes[operator.name].compilation}
    for component in workload.components.values():
        if component.compilation and component.name in used - compiled:
            warnings.warn(
                f"component {component.name!r} has compile=, but none of its code is a layer, and only layers are "
                f"compiled; {_proposal(component)}",
                SpindleWarning,
                stacklevel=4,
            )


def _capture(workload: Workload, on_task: Callable[[str], object], changing: frozenset[str]) -> Captured:
    _warn_of_large_operators(workload)
    whole: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    settled: set[str] = set()
    uncounted: set[str] = set()
    while True:
        try:
            with watchable_modules():
                return _captured(workload, on_task, whole, apart, settled, uncounted, changing)
        except Unsettled:
            continue
        except TakeApart as taken:
            warnings.warn(taken.warning, SpindleWarning, stacklevel=4)
            apart |= taken.paths
        except TakeWhole as taken:
            warnings.warn(taken.warning, SpindleWarning, stacklevel=4)
            whole |= {taken.component}


def _captured(
    workload: Workload,
    on_task: Callable[[str], object],
    whole: frozenset[str],
    apart: frozenset[str],
    settled: set[str],
    uncounted: set[str],
    changing: frozenset[str],
) -> Captured:
    blocks = _blocks(workload, whole, apart)
    refuse_gradient_hooks(workload, {module for block in blocks for module in block.module.modules()})
    infos = [BlockInfo(block.path, block.module, module_signature(block.module)) for block in blocks]
    components = {name: c.module for name, c in workload.components.items()}
    skeleton = Skeleton(components, infos, learning=True, settled=settled, uncounted=uncounted)
    skeleton.set_stateful(set(changing))
    results, read = _of_tasks(workload, skeleton, blocks, whole, on_task)
    known: set[str] = set()
    while late := read & (skeleton.stateful | {t.buffer for r in results for t in r.touches if t.changes}):
        if late <= known:
            raise WorkloadError(
                f"buffer {min(late)!r} changes, and its module is registered under several names in its component; "
                "register it once, and keep other references to it in a list"
            )
        known |= late
        skeleton.set_stateful(late)  # a task reads them as constants, another one changes them
        results, read = _of_tasks(workload, skeleton, blocks, whole, on_task)
    skeleton.learning = False
    touched = [touch for result in results for touch in result.touches]
    operators = with_states([op for r in results for op in r.operators], touched, workload.in_flight)
    writes = checked_writes(workload, operators, {r.code.task: r.code.writes for r in results}, touched)
    return Captured(
        graph=TaskGraph(operators, writes, lines_of(touched)),
        codes={code.name: code for result in results for code in result.codes},
        tasks={task: result.code for task, result in zip(workload.tasks, results, strict=True)},
        losses={task: result.code.loss for task, result in zip(workload.tasks, results, strict=True)},
        weights={task.name: task.weight for task in workload.tasks.values()},
        parameters=dict(workload.named_parameters()),
        skeleton=skeleton,
        precision=workload.precision,
    )


def _of_tasks(
    workload: Workload,
    skeleton: Skeleton,
    blocks: list[Block],
    whole: frozenset[str],
    on_task: Callable[[str], object],
) -> tuple[list[TaskOperators], set[str]]:
    """The operators of each task, and the buffers that tasks read as constants outside of blocks."""
    namer, memo, shapes = Namer(blocks), Memo(), KnownShapes()
    results: list[TaskOperators] = []
    lookers: list[Looker] = []
    read: set[str] = set()
    modules = [part for component in workload.components.values() for part in component.module.modules()]
    for task in workload.tasks.values():
        on_task(f"recording {task.name}")
        with attributes_kept(modules, skeleton.steady.is_settled), values_kept(b for _, b in workload.named_buffers()):
            lookers.append(Looker(workload, skeleton, task, shapes, whole))
            try:
                seen = lookers[-1].look()
            except Raised as error:
                handed = (lookers[-1].history.lacking(other.history) for other in lookers[:-1])
                raise next(filter(None, handed), error) from error
            results.append(build_operators(workload, task, seen, namer, memo))
            for one, other in (pair for earlier in lookers[:-1] for pair in permutations((earlier, lookers[-1]))):
                one.history.refuse_what_others_set(other.history)
        read |= seen.read
    return results, read


def _blocks(workload: Workload, whole: frozenset[str], apart: frozenset[str]) -> list[Block]:
    """Blocks of all components, with whole components in place of the blocks inside them, and without those `apart`."""
    inside = {module for name in whole for module in workload.components[name].module.modules()}
    found = [
        block
        for block in blocks_of(workload)
        if block.module not in inside and not any(f"{block.path}.".startswith(f"{path}.") for path in apart)
    ]
    return found + [Block(name, workload.components[name].module) for name in sorted(whole)]
