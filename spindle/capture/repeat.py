"""Repeat: a captured workload in, the same with several micro-batches of each task side by side out.

Each micro-batch is a task of its own (`task#0`, `task#1`, ...) that runs the same modules, so the planner may let one
fill the gaps that another leaves.
"""

from dataclasses import replace

from spindle.capture.codes import Captured, OperatorCode, TaskCode
from spindle.graph import Operator, TaskGraph


def repeated(captured: Captured, count: int) -> Captured:
    """`count` copies of every task. Weights stay those of one copy."""
    if count == 1:
        return captured
    numbers = range(count)
    return replace(
        captured,
        graph=TaskGraph(
            tuple(_operator(operator, number) for number in numbers for operator in captured.graph),
            captured.graph.writes,
            captured.graph.lines,
        ),
        codes={c.name: c for number in numbers for c in (_code(code, number) for code in captured.codes.values())},
        tasks={f"{t}#{number}": _task(code, number) for number in numbers for t, code in captured.tasks.items()},
        losses={f"{t}#{n}": _renamed(tensor, "/", n) for n in numbers for t, tensor in captured.losses.items()},
        weights={f"{task}#{n}": weight for n in numbers for task, weight in captured.weights.items()},
    )


def _renamed(name: str, mark: str, number: int) -> str:
    """Names begin with their task: `task.component...` of operators, `task/value` of tensors."""
    task, mark, rest = name.partition(mark)
    return f"{task}#{number}{mark}{rest}"


def _operator(operator: Operator, number: int) -> Operator:
    return replace(
        operator,
        name=_renamed(operator.name, ".", number),
        task=f"{operator.task}#{number}",
        inputs=tuple(_renamed(name, "/", number) for name in operator.inputs),
        outputs=tuple(replace(tensor, name=_renamed(tensor.name, "/", number)) for tensor in operator.outputs),
    )


def _code(code: OperatorCode, number: int) -> OperatorCode:
    return replace(
        code,
        name=_renamed(code.name, ".", number),
        inputs=tuple(_renamed(name, "/", number) for name in code.inputs),
        outputs=tuple(_renamed(name, "/", number) for name in code.outputs),
    )


def _task(code: TaskCode, number: int) -> TaskCode:
    return replace(
        code,
        task=f"{code.task}#{number}",
        glue={key: _renamed(name, ".", number) for key, name in code.glue.items()},
        blocks={scope: _renamed(name, ".", number) for scope, name in code.blocks.items()},
        crossing={_renamed(name, ".", number): sent for name, sent in code.crossing.items()},
        tensors={what: _renamed(name, "/", number) for what, name in code.tensors.items()},
        loss=_renamed(code.loss, "/", number),
        learning=frozenset(_renamed(name, "/", number) for name in code.learning),
        reads={
            _renamed(name, ".", number): tuple(_renamed(tensor, "/", number) for tensor in tensors)
            for name, tensors in code.reads.items()
        },
    )
