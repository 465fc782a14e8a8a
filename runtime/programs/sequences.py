"""Sequences: tasks whose batches must follow each other in; the turn of each batch, and a plan of all of them, out.

One process runs all batches of a step of one task, then those of the next. Where tasks change what others read, a
planned step does so too: the batches of such a sequence of tasks have a turn each, and only they wait for each other.
What a plan runs once a round, `in_flight` batches of each task, is then laid out for the whole step: other tasks run a
round beside each of the first turns.

    accumulate=4, in_flight=2; teacher and student are a sequence, clip and vqa are none
    turn      0             1             2          3          4          5          6          7
    sequence  teacher#0     teacher#1     teacher#2  teacher#3  student#0  student#1  student#2  student#3
    others    clip,vqa#0,1  clip,vqa#2,3
"""

from collections.abc import Iterable
from dataclasses import replace

from spindle.capture.changes.writes import related
from spindle.capture.codes import Captured
from spindle.capture.repeat import renamed, repeated
from spindle.values.contract import contract
from spindle.values.graph import TaskGraph, base_task, micro_batch, num_micro_batches
from spindle.values.plan import Plan, Slice, make_waves

Sequence = tuple[str, ...]
"""Tasks of which each runs all its batches of a step before the next one begins."""


def sequences(graph: TaskGraph, rounds: int) -> tuple[Sequence, ...]:
    """The sequences of a workload; none where nobody could see in which order batches run. `rounds`: of a step."""
    users: dict[str, set[str]] = {}
    states: dict[str, set[str]] = {}
    for operator in graph:
        for parameter in operator.parameters:
            users.setdefault(parameter.name, set()).add(base_task(operator.task))
        for state in operator.states:
            states.setdefault(state, set()).add(base_task(operator.task))
    sharing = [tasks for tasks in states.values() if len(tasks) > 1]
    needed = list(sharing) if rounds > 1 else []  # a round by itself keeps the order of states, unless it has turns
    for write in (write for write in graph.writes if write.in_turn):
        others = {other.task for other in graph.writes if related(write, other)}
        needed.append({write.task, *users.get(write.target, ()), *others})
    order = list(dict.fromkeys(base_task(operator.task) for operator in graph))
    groups = [group for group in _joined([*needed, *sharing]) if any(group & tasks for tasks in needed)]
    return tuple(tuple(sorted(group, key=order.index)) for group in groups)


def _joined(groups: Iterable[set[str]]) -> list[set[str]]:
    """Sequences that have something in common, as one."""
    found: list[set[str]] = []
    for group in groups:
        apart = [other for other in found if not other & group]
        found = [*apart, group.union(*(other for other in found if other & group))]
    return found


def turns_of(
    found: Iterable[Sequence], plan: Plan, tasks: Iterable[str], accumulate: int, in_flight: int
) -> dict[str, int]:
    """The turn of each batch among `tasks`, all of a step. Where the plan has turns, its rounds keep them."""
    place = {task: index for own in found for index, task in enumerate(own)}
    own_turns = max(plan.turn_by_task.values(), default=0) + 1
    stride = own_turns + 1 if own_turns > 1 else 1
    turns: dict[str, int] = {}
    for task in tasks:
        base, number = base_task(task), micro_batch(task)
        if base in place:
            turns[task] = (place[base] * accumulate + number) * stride + stride - 1
        else:
            name = f"{base}#{number % in_flight}" if in_flight > 1 else base
            turns[task] = number // in_flight * stride + plan.turn_by_task.get(name, 0)
    return turns


def whole_step(captured: Captured, plan: Plan, accumulate: int) -> tuple[Captured, Plan]:
    """All batches of a step as micro-batches of one round, each where the plan runs such a one. What tasks write once a
    round they write in turn then.
    """
    in_flight = num_micro_batches(captured.tasks)
    if in_flight == accumulate:
        return captured, plan
    wide = repeated(captured, accumulate)
    writes = tuple(replace(write, in_turn=True) for write in wide.graph.writes)
    wide = replace(wide, graph=replace(wide.graph, writes=writes))
    names = {metaop.operators[0].name: metaop.name for metaop in contract(wide.graph)}
    first = {metaop.name: metaop.operators[0] for metaop in contract(captured.graph)}
    slices: list[Slice] = []
    for number in range(accumulate // in_flight):
        for slice_ in (slice_ for slice_ in plan if slice_.metaop in first):
            operator = first[slice_.metaop]
            copy = renamed(operator.name, ".", number * in_flight + micro_batch(operator.task))
            later_s = number * plan.makespan_s
            slices.append(
                replace(
                    slice_,
                    metaop=names[copy],
                    start_s=slice_.start_s + later_s,
                    end_s=slice_.end_s + later_s,
                )
            )
    unknown = [slice_ for slice_ in plan if slice_.metaop not in first]  # which lowering names
    return wide, replace(plan, waves=make_waves([*slices, *unknown]), turns=(), metagraph=None)


def in_words(found: Iterable[Sequence], accumulate: int) -> str:
    """What sequences do to a run, in one sentence."""
    listed = "; ".join(" then ".join(map(repr, own)) for own in found)
    batches = f"their {accumulate} batches of a step" if accumulate > 1 else "their batches"
    return (
        f"tasks change what others, or other batches, read ({listed}): {batches} run one after another, as in one "
        "process, which the plan's times do not count in"
    )
