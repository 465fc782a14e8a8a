"""Turns: the runs of a turn go forward and backward before any of the next; what counts there follows one process."""

from collections.abc import Iterator
from itertools import pairwise

from spindle.runtime.laws.places import Places
from spindle.runtime.programs.program import Instruction, Op, Program, SliceRun
from spindle.values.graph import base_task, micro_batch


def turns_in_order(program: Program, places: Places) -> Iterator[str]:
    """On each rank the last instruction of a turn stands before the first of the next; none reads another's tensors."""
    by_turn: dict[int, list[SliceRun]] = {}
    for run in program.slices:
        by_turn.setdefault(run.turn, []).append(run)
    for earlier, later in pairwise(sorted(by_turn)):
        yield from _apart(program, by_turn[earlier], by_turn[later], places)
    turn_by_tensor = {tensor: run.turn for run in program.slices for tensor in run.outputs}
    for run in program.slices:
        for tensor in run.inputs:
            source = turn_by_tensor.get(tensor, run.turn)
            if source != run.turn:
                yield f"slice run {run.name} of turn {run.turn} reads {tensor!r}, which is made in turn {source}"
    yield from _as_one_process(program, by_turn)


def _apart(program: Program, earlier: list[SliceRun], later: list[SliceRun], places: Places) -> Iterator[str]:
    """No rank begins a run of the later turn before it has ended those of the earlier one."""
    first: dict[int, tuple[int, Instruction]] = {}  # by kind of ranks
    for run in later:
        for op in (Op.FORWARD, Op.BACKWARD):
            instruction = Instruction(op, run.name)
            for kind, (position, *_) in places.at(instruction).items():
                first[kind] = min((position, instruction), first.get(kind, (position, instruction)), key=_position)
    for run in earlier:
        for op in (Op.FORWARD, Op.BACKWARD):
            for kind, positions in places.at(Instruction(op, run.name)).items():
                if kind in first and positions[-1] > first[kind][0]:
                    what = f"does {op} {run.name} of turn {run.turn} after {first[kind][1]} of turn {later[0].turn}"
                    yield from (f"rank {rank} {what}" for rank in places.kinds[kind])


def _position(place: tuple[int, Instruction]) -> int:
    return place[0]


def _as_one_process(program: Program, by_turn: dict[int, list[SliceRun]]) -> Iterator[str]:
    """Of each task one batch after another, each in one turn; and tasks that touch a state in their order."""
    tasks = list(dict.fromkeys(base_task(task) for task, _ in program.losses))
    before: dict[str, tuple[tuple[int, int], str]] = {}  # the last batch in the turns so far, by task or state
    for number, runs in sorted(by_turn.items()):
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for run in runs:
            for kind in (f"task {base_task(run.task)}", *run.states):
                found.setdefault(kind, {})[run.task] = tasks.index(base_task(run.task)), micro_batch(run.task)
        late: dict[str, str] = {}
        for kind, places in found.items():
            first, last = (choose(places, key=places.__getitem__) for choose in (min, max))
            if kind in before and places[first] <= before[kind][0]:
                late[first] = before[kind][1]
            before[kind] = places[last], last
        for task, other in late.items():
            yield f"task {task!r} runs in turn {number}, after {other!r}, which follows it in one process"
