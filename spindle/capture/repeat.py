"""Repeat: a captured workload in, the same with several micro-batches of each task out.

Each micro-batch is a task of its own (`task#0`, `task#1`, ...) that runs the same modules, so the planner may let one
fill the gaps that another leaves.
"""

from dataclasses import replace

from spindle.capture.codes import Captured, OperatorCode, TaskCode
from spindle.values.graph import Operator, TaskGraph, base_task, micro_batch, num_micro_batches


def repeated(captured: Captured, count: int) -> Captured:
    """`count` copies of every task, or of the first one of each where there are copies. Weights stay those of one."""
    if count == num_micro_batches(captured.tasks):
        return captured
    captured, numbers = _first(captured), range(count)
    return replace(
        captured,
        graph=TaskGraph(
            tuple(_operator(operator, number) for number in numbers for operator in captured.graph),
            captured.graph.writes,
            captured.graph.lines,
        ),
        codes={c.name: c for number in numbers for c in (_code(code, number) for code in captured.codes.values())},
        tasks={f"{t}#{number}": _task(code, number) for number in numbers for t, code in captured.tasks.items()},
        losses={f"{t}#{n}": renamed(tensor, "/", n) for n in numbers for t, tensor in captured.losses.items()},
        weights={f"{task}#{n}": weight for n in numbers for task, weight in captured.weights.items()},
    )


def _first(captured: Captured) -> Captured:
    """What is of the first copy."""
    tasks = {task: code for task, code in captured.tasks.items() if not micro_batch(task)}
    operators = tuple(operator for operator in captured.graph if operator.task in tasks)
    names = {operator.name for operator in operators}
    return replace(
        captured,
        graph=replace(captured.graph, operators=operators),
        codes={name: code for name, code in captured.codes.items() if name in names},
        tasks={base_task(task): code for task, code in tasks.items()},
        losses={base_task(task): loss for task, loss in captured.losses.items() if task in tasks},
        weights={base_task(task): weight for task, weight in captured.weights.items() if task in tasks},
    )


def renamed(name: str, mark: str, number: int) -> str:
    """The name of the same in copy `number`. Names begin with their task: `task.component...` of operators,
    `task/value` of tensors.

    >>> renamed("clip.vision.0", ".", 2), renamed("clip#0/loss", "/", 2)
    ('clip#2.vision.0', 'clip#2/loss')
    """
    task, mark, rest = name.partition(mark)
    return f"{base_task(task)}#{number}{mark}{rest}"


def _operator(operator: Operator, number: int) -> Operator:
    return replace(
        operator,
        name=renamed(operator.name, ".", number),
        task=f"{base_task(operator.task)}#{number}",
        inputs=tuple(renamed(name, "/", number) for name in operator.inputs),
        outputs=tuple(replace(tensor, name=renamed(tensor.name, "/", number)) for tensor in operator.outputs),
    )


def _code(code: OperatorCode, number: int) -> OperatorCode:
    return replace(
        code,
        name=renamed(code.name, ".", number),
        inputs=tuple(renamed(name, "/", number) for name in code.inputs),
        outputs=tuple(renamed(name, "/", number) for name in code.outputs),
    )


def _task(code: TaskCode, number: int) -> TaskCode:
    return replace(
        code,
        task=f"{base_task(code.task)}#{number}",
        glue={key: renamed(name, ".", number) for key, name in code.glue.items()},
        blocks={scope: renamed(name, ".", number) for scope, name in code.blocks.items()},
        crossing={renamed(name, ".", number): sent for name, sent in code.crossing.items()},
        tensors={what: renamed(name, "/", number) for what, name in code.tensors.items()},
        loss=renamed(code.loss, "/", number),
        learning=frozenset(renamed(name, "/", number) for name in code.learning),
        reads={
            renamed(name, ".", number): tuple(renamed(tensor, "/", number) for tensor in tensors)
            for name, tensors in code.reads.items()
        },
    )
