"""Capture: a Workload in; its TaskGraph and the code of every operator out. The data passes through in this order:

blocks      repeated layers are found, and traced around
tracing     the user's task function becomes a graph
export      by torch.export on fake tensors; what it cannot follow is one block, seen on a few samples (recorded)
rewrite     reductions over all samples go by sample first
randomness  what draws random numbers does so as a function of its place (draws)
partition   the graph falls into groups: blocks, glue, and what any rank can compute by itself
probing     each group shows, by running on a few samples (rows), whether it goes by samples
extract     groups become torch modules
costs       which are measured on fake tensors at the full batch
operators   and put together, named by naming, as codes
repeat      once for each micro-batch in flight

eager runs the user's functions as they are, with the same random numbers: what planned runs are compared with.
"""

import warnings
from collections.abc import Callable

from spindle.capture.blocks import find_blocks
from spindle.capture.codes import AuxCode, Captured, CodeInput, FieldSpecs, OperatorCode, field_specs
from spindle.capture.naming import Namer
from spindle.capture.operators import DataDependentSize, Memo, TaskOperators, build_operators
from spindle.capture.partition import partition
from spindle.capture.repeat import repeated
from spindle.capture.tracing import TracedTask, blocks_of, trace
from spindle.errors import SpindleWarning
from spindle.graph import TaskGraph
from spindle.workload import Batch, Task, Workload

LARGE = 5_000_000  # parameters; below that an operator in one piece costs a plan little

__all__ = ["AuxCode", "Captured", "CodeInput", "OperatorCode", "capture"]


def capture(workload: Workload, on_task: Callable[[str], object] = str) -> Captured:
    """Trace every task of a workload on its first batch. Raises WorkloadError naming the task and the reason.

    `on_task` is told what is done before each.

    A workload that has not changed since is not traced again. With several micro-batches in flight each is a task.
    """
    workload.require_tasks()
    version = _version(workload)
    if workload.captured is not None and workload.captured[0] == version:
        known = workload.captured[1]
        assert isinstance(known, Captured)
        return known
    found = repeated(_capture(workload, on_task), workload.in_flight)
    workload.captured = (version, found)
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
                "were found, so it cannot be cut into layers; name its list of blocks, "
                "for instance layers='encoder.layers'",
                SpindleWarning,
                stacklevel=4,
            )


def _operators(
    workload: Workload, task: Task, batch: Batch, namer: Namer, memo: Memo
) -> tuple[TracedTask, TaskOperators]:
    """A task traced and its operators; components whose glue has sizes that only data tell are taken whole."""
    whole: dict[str, Exception] = {}
    names = namer.used.copy()
    while True:
        traced = trace(workload, task, batch, whole)
        try:
            return traced, build_operators(workload, traced, partition(traced), batch, namer, memo)
        except DataDependentSize as error:
            if error.component in whole or error.component not in workload.components:
                raise
            whole[error.component] = error
            namer.used = names.copy()


def _capture(workload: Workload, on_task: Callable[[str], object]) -> Captured:
    _warn_of_large_operators(workload)
    namer, memo = Namer(blocks_of(workload)), Memo()
    results, draws = [], {}
    fields: dict[str, FieldSpecs] = {}
    for task in workload.tasks.values():
        on_task(f"tracing {task.name}")
        batch = task.first_batch()
        fields[task.name] = field_specs(batch)
        traced, result = _operators(workload, task, batch, namer, memo)
        draws[task.name] = traced.draws
        results.append(result)
    return Captured(
        graph=TaskGraph(tuple(operator for result in results for operator in result.operators)),
        codes={code.name: code for result in results for code in result.codes},
        aux={code.name: code for result in results for code in result.aux},
        losses={task: result.loss for task, result in zip(workload.tasks, results, strict=True)},
        weights={task.name: task.weight for task in workload.tasks.values()},
        parameters=dict(workload.named_parameters()),
        precision=workload.precision,
        draws=draws,
        fields=fields,
    )
