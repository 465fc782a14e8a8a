"""Writes: what tasks write to parameters in; the same out, and how a plan leaves what one process does.

One process writes once for each batch of a task, before the next batch and the next task of the list. Where nobody
could see a difference, a planned step writes before all that it computes, or after it. Where somebody could, it writes
in turn: the tasks concerned run batch after batch (`runtime.programs.sequences`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spindle.capture.changes.states import Touch
from spindle.errors import WorkloadError
from spindle.record.recording import LeafWrite
from spindle.record.writes import INSTEAD, specs
from spindle.values.graph import Operator, ParameterWrite
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
    learning: dict[str, set[str]] = {}  # tasks whose backward may compute with it
    cut: set[str] = set()
    for operator in operators:
        graded = any(tensor.needs_grad for tensor in operator.outputs)
        for parameter in operator.parameters:
            users.setdefault(parameter.name, set()).add(operator.task)
            learning.setdefault(parameter.name, set()).update((operator.task,) if graded else ())
            cut |= {parameter.name} if parameter.pieces > 1 else set()
    order = {task: index for index, task in enumerate(workload.tasks)}
    texts = {(task, write.target): write.text for task, own in found.items() for write in own}
    check = _Check(workload, writes, users, learning, cut, order, texts)
    return _joined([check.checked(write) for write in writes])


def _joined(writes: Sequence[ParameterWrite]) -> tuple[ParameterWrite, ...]:
    """The writes; with those in turn also all that write to the same, read it, or write what they read."""
    found = list(writes)
    in_turn = [write for write in found if write.in_turn]
    while in_turn:
        write = in_turn.pop()
        for index, other in enumerate(found):
            if not other.in_turn and related(write, other):
                found[index] = replace(other, in_turn=True)
                in_turn.append(found[index])
    return tuple(found)


def related(write: ParameterWrite, other: ParameterWrite) -> bool:
    """Whether the order of two writes counts."""
    return other.target == write.target or other.target in write.sources or write.target in other.sources


def _check_clocks(
    operators: Sequence[Operator], found: Mapping[str, Sequence[LeafWrite]], touched: Sequence[Touch]
) -> None:
    """A clock is changed by the code of the tasks that write by it, and by nothing else."""
    task_of = {operator.name: operator.task for operator in operators}
    for touch in (touch for touch in touched if touch.changes):
        for task, own in found.items():
            write = next((write for write in own if touch.buffer in write.clocks), None)
            if write is None:
                continue
            counting = {
                name
                for name, others in found.items()
                if all(any(_counts_for(w, mine) for w in others) for mine in own if touch.buffer in mine.clocks)
            }  # tasks that write by it to all the same parameters: what each rank counts is theirs together
            if touch.inside or task_of[touch.operator] not in counting:
                other = f"{touch.operator!r} of task {task_of[touch.operator]!r}"
                raise WorkloadError(
                    f"task {task!r}, {write.line} writes to parameter {write.target!r} outside of the optimizer what "
                    f"it reads of buffer {touch.buffer!r}, which {other} changes too; give each task a buffer of its "
                    "own, which its function changes"
                )


def _counts_for(write: LeafWrite, other: LeafWrite) -> bool:
    """Whether a write goes to the same parameter as another, and by the same clocks."""
    return write.target == other.target and set(write.clocks) == set(other.clocks)


class _Check:
    def __init__(
        self,
        workload: Workload,
        writes: Sequence[ParameterWrite],
        users: Mapping[str, set[str]],
        learning: Mapping[str, set[str]],
        cut: set[str],
        order: Mapping[str, int],
        texts: Mapping[tuple[str, str], str],
    ) -> None:
        self.workload, self.writes, self.users, self.cut, self.order = workload, writes, users, cut, order
        self.learning, self.texts = learning, texts

    def checked(self, write: ParameterWrite) -> ParameterWrite:
        """The write, with its place in the step decided."""
        self._check_names(write)
        others = self.users.get(write.target, set()) - {write.task}
        others |= {other.task for other in self.writes if write.target in other.sources} - {write.task}
        earlier = {task for task in others if self.order[task] < self.order[write.task]}
        later = others - earlier
        if write.after is None:
            write = replace(write, after=bool(earlier) and not later)
        return replace(write, in_turn=self._in_turn(write, earlier, later))

    def _in_turn(self, write: ParameterWrite, earlier: set[str], later: set[str]) -> bool:
        """Whether somebody would see it if it were done before all runs of a round, or after them."""
        once = write.repeatable and not write.after  # then how often it is done does not count
        accumulate, in_flight = self.workload.accumulate, self.workload.in_flight
        return (
            (bool(later) if write.after else bool(earlier) and not self._same_earlier(write, earlier))
            or (in_flight > 1 and not once)
            or (accumulate > 1 and bool(earlier or later) and not once)
            or bool(write.after and write.unnoticed and write.task in self.learning.get(write.target, ()))
            or self._meets_another(write)
        )

    def _check_names(self, write: ParameterWrite) -> None:
        for name in (write.target, *write.sources):
            if name in self.cut:
                raise self._refused(
                    write, f"tensor parallelism cuts {name!r} into pieces: leave its component out of tensor_parallel="
                )
            if name not in self.users:
                raise self._refused(
                    write,
                    f"no task computes with {name!r}, so that no rank holds it: for a running average that nothing "
                    "reads in training, give Workload(ema=)",
                )

    def _meets_another(self, write: ParameterWrite) -> bool:
        """Whether another task writes to the same something else, or to what this one reads."""
        for other in self.writes:
            if other is write or other.task == write.task:
                continue
            if other.target in write.sources:
                return True
            texts = {self.texts[each.task, each.target] for each in (write, other)}
            if other.target == write.target and (len(texts) > 1 or write.after or not write.repeatable):
                return True
        return False

    def _same_earlier(self, write: ParameterWrite, earlier: set[str]) -> bool:
        """Whether the first task to use it has written the same."""
        first = min(earlier, key=self.order.__getitem__)
        return write.repeatable and any(other.task == first and other.target == write.target for other in self.writes)

    def _refused(self, write: ParameterWrite, why: str) -> WorkloadError:
        line = f", {write.line}" if write.line else ""
        return WorkloadError(
            f"task {write.task!r}{line} writes to parameter {write.target!r} outside of the optimizer, and {why}; or "
            f"{INSTEAD}"
        )
