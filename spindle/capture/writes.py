"""Writes: what tasks write to parameters in; the same out, once it is sure that a plan leaves what one process does.

A planned step writes before all that it computes, or after it. One process writes in the middle: once for each batch of
a task, before the next task of the list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spindle.capture.states import Touch
from spindle.errors import WorkloadError
from spindle.graph import Operator, ParameterWrite
from spindle.record.recording import LeafWrite
from spindle.record.writes import INSTEAD, specs
from spindle.workload import Workload


def checked_writes(
    workload: Workload,
    operators: Sequence[Operator],
    found: Mapping[str, Sequence[LeafWrite]],
    touched: Sequence[Touch],
) -> tuple[ParameterWrite, ...]:
    """The writes of all tasks; `touched`: buffers. Raises WorkloadError naming the line where a plan could not keep
    their order.
    """
    writes = [write for task, own in found.items() for write in specs(task, own)]
    if not writes:
        return ()
    _check_clocks(operators, found, touched)
    users: dict[str, set[str]] = {}
    cut: set[str] = set()
    for operator in operators:
        for parameter in operator.parameters:
            users.setdefault(parameter.name, set()).add(operator.task)
            cut |= {parameter.name} if parameter.pieces > 1 else set()
    order = {task: index for index, task in enumerate(workload.tasks)}
    texts = {(task, write.target): write.text for task, own in found.items() for write in own}
    return tuple(_Check(workload, writes, users, cut, order, texts).checked(write) for write in writes)


def _check_clocks(
    operators: Sequence[Operator], found: Mapping[str, Sequence[LeafWrite]], touched: Sequence[Touch]
) -> None:
    """A clock is changed by the code of the task that writes by it, and by nothing else."""
    task_of = {operator.name: operator.task for operator in operators}
    for touch in (touch for touch in touched if touch.changes):
        for task, own in found.items():
            write = next((write for write in own if touch.buffer in write.clocks), None)
            if write is not None and (touch.inside or task_of[touch.operator] != task):
                other = f"{touch.operator!r} of task {task_of[touch.operator]!r}"
                raise WorkloadError(
                    f"task {task!r}, {write.line} writes to parameter {write.target!r} outside of the optimizer what "
                    f"it reads of buffer {touch.buffer!r}, which {other} changes too; give each task a buffer of its "
                    "own, which its function changes"
                )


class _Check:
    def __init__(
        self,
        workload: Workload,
        writes: Sequence[ParameterWrite],
        users: Mapping[str, set[str]],
        cut: set[str],
        order: Mapping[str, int],
        texts: Mapping[tuple[str, str], str],
    ) -> None:
        self.workload, self.writes, self.users, self.cut, self.order = workload, writes, users, cut, order
        self.texts = texts

    def checked(self, write: ParameterWrite) -> ParameterWrite:
        """The write, with its place in the step decided."""
        others = self.users.get(write.target, set()) - {write.task}
        others |= {other.task for other in self.writes if write.target in other.sources} - {write.task}
        earlier = sorted((t for t in others if self.order[t] < self.order[write.task]), key=self.order.__getitem__)
        later = sorted((t for t in others if self.order[t] > self.order[write.task]), key=self.order.__getitem__)
        self._check_names(write)
        if write.after is None:
            write = replace(write, after=bool(earlier) and not later)
        self._check_other_writes(write)
        if not write.after and earlier and not self._same_earlier(write, earlier):
            raise self._refused(write, f"task {earlier[0]!r} uses it earlier in the step: list that task later")
        if write.after and later:
            raise self._refused(write, f"task {later[0]!r} uses it later in the step: list that task earlier")
        accumulate, in_flight = self.workload.accumulate, self.workload.in_flight
        if in_flight > 1 and (write.after or not write.repeatable):
            raise self._refused(write, f"{in_flight} micro-batches run at once: set in_flight=1")
        if accumulate > 1 and others and (write.after or not write.repeatable):
            raise self._refused(
                write,
                f"each of {accumulate} batches of a step does, and task {min(others)!r} uses it: set accumulate=1",
            )
        return write

    def _check_names(self, write: ParameterWrite) -> None:
        for name in (write.target, *write.sources):
            if name in self.cut:
                raise self._refused(
                    write, f"tensor parallelism cuts {name!r} into pieces: leave its component out of tensor_parallel="
                )
            if name not in self.users:
                raise self._refused(write, f"no task computes with {name!r}, so that no rank holds it")

    def _check_other_writes(self, write: ParameterWrite) -> None:
        for other in self.writes:
            if other is write or other.task == write.task:
                continue
            if other.target in write.sources:
                raise self._refused(write, f"task {other.task!r} writes to {other.target!r}, which is read for it")
            texts = [self.texts[each.task, each.target] for each in (write, other) if each.target == write.target]
            if other.target == write.target and not (write.repeatable and len(set(texts)) == 1 and not write.after):
                raise self._refused(write, f"task {other.task!r} writes to it too: let one of them do it")

    def _same_earlier(self, write: ParameterWrite, earlier: Sequence[str]) -> bool:
        """Whether the first task to use it has written the same."""
        return write.repeatable and any(
            other.task == earlier[0] and other.target == write.target for other in self.writes
        )

    def _refused(self, write: ParameterWrite, why: str) -> WorkloadError:
        line = f", {write.line}" if write.line else ""
        return WorkloadError(
            f"task {write.task!r}{line} writes to parameter {write.target!r} outside of the optimizer, and {why}; or "
            f"{INSTEAD}"
        )
