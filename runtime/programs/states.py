"""States: which runs change what besides gradients in; tallies, states, handovers and writes out. Pure Python.

- One process runs task after task, and of each task batch after batch. Operators that touch a state keep that order,
  whatever devices they run on; the state goes with them.
- Running statistics need no order while a step lasts: what each run adds is folded in at its end.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from spindle.errors import PlanError
from spindle.runtime.programs.program import Fetch, Handover, SliceRun, State, Tally, Write
from spindle.values.graph import Operator, ParameterWrite, TaskGraph, base_task, micro_batch


def orders(graph: TaskGraph, rounds: int) -> dict[str, set[str]]:
    """Operators that each operator must come after, since both touch a state, or count batches of a task in one layer.

    Raises PlanError where the micro-batches of a step come in rounds, in which tasks would take turns.
    """
    users: dict[str, list[Operator]] = {}
    for operator in _in_one_process(graph):
        for state in operator.states:
            users.setdefault(state, []).append(operator)
        for layer in operator.statistics:
            users.setdefault(f"{operator.task}: {layer}", []).append(operator)
    for state, found in users.items():
        tasks = list(dict.fromkeys(base_task(operator.task) for operator in found))
        if rounds > 1 and len(tasks) > 1:
            raise PlanError(
                f"tasks {tasks[0]!r} and {tasks[1]!r} both read or change {graph.named(state)}; one process runs all "
                f"batches of a step of the one before those of the other, but {rounds} rounds of micro-batches would "
                "let them take turns: set accumulate=1, or in_flight to the same number as accumulate"
            )
    waits: dict[str, set[str]] = {}
    for found in users.values():
        for before, after in pairwise(found):
            waits.setdefault(after.name, set()).add(before.name)
    return waits


def _in_one_process(graph: TaskGraph) -> list[Operator]:
    tasks = list(dict.fromkeys(base_task(operator.task) for operator in graph))
    return sorted(graph, key=lambda op: (tasks.index(base_task(op.task)), micro_batch(op.task)))


def refuse_circle(left: Sequence[str], waits: Mapping[str, set[str]], graph: TaskGraph) -> PlanError:
    """What to say of operators that wait for each other in a circle, since slices of several layers touch states."""
    name = next((name for name in left if waits.get(name)), left[0])
    states = graph.by_name[name].states or graph.by_name[name].statistics
    return PlanError(
        f"operators {', '.join(sorted(left)[:3])} wait for each other, since they change {graph.named(states[0])} in "
        "an order that this plan's slices cannot keep; cut them apart, or plan again"
        if states
        else f"slices of {', '.join(sorted(left)[:3])} wait for each other in a circle; plan again"
    )


def make_tallies(runs: Sequence[SliceRun]) -> list[Tally]:
    """Norm layers whose running statistics several ranks change, or runs of several tasks; by the ranks that hold them.

    Those of one task on one rank are as one process leaves them by themselves.
    """
    users: dict[str, list[SliceRun]] = {}
    for run in runs:
        for layer in run.statistics:
            users.setdefault(layer, []).append(run)
    found: dict[tuple[int, ...], list[str]] = {}
    for layer, own in users.items():
        ranks = tuple(sorted({rank for run in own for rank in run.ranks}))
        if len(ranks) > 1 or len({run.task for run in own}) > 1:
            found.setdefault(ranks, []).append(layer)
    return [
        Tally(name=f"n{index}", ranks=ranks, layers=tuple(layers))
        for index, (ranks, layers) in enumerate(sorted(found.items()))
    ]


def make_states(runs: Sequence[SliceRun]) -> list[State]:
    """States that several ranks hold, by the runs that touch them."""
    users: dict[str, list[SliceRun]] = {}
    for run in runs:
        for buffer in run.states:
            users.setdefault(buffer, []).append(run)
    found: dict[tuple[str, ...], list[str]] = {}
    for buffer, own in users.items():
        found.setdefault(tuple(run.name for run in own), []).append(buffer)
    held = {run.name: run.ranks for run in runs}
    states = [
        (tuple(sorted({rank for name in names for rank in held[name]})), tuple(buffers))
        for names, buffers in found.items()
    ]
    shared = (pair for pair in states if len(pair[0]) > 1)
    return [State(name=f"h{i}", ranks=ranks, buffers=buffers) for i, (ranks, buffers) in enumerate(shared)]


def make_handovers(states: Sequence[State], runs: Sequence[SliceRun]) -> list[Handover]:
    """How states go from run to run. Of the ranks of a run the first is sure to have samples, so that it has the state
    as it stands; after backward all that hold it take it.
    """
    return [handover for state in states for handover in _handovers(state, runs)]


def _handovers(state: State, runs: Sequence[SliceRun]) -> Iterator[Handover]:
    source = None
    for run in (run for run in runs if state.buffers[0] in run.states):
        if source is not None and (targets := tuple(rank for rank in run.ranks if rank != source)):
            yield Handover(
                name=f"{state.name}>{run.name}", state=state.name, source=source, targets=targets, before=run.name
            )
        source = run.ranks[0]
    if source is not None:
        others = tuple(rank for rank in state.ranks if rank != source)
        yield Handover(name=f"{state.name}>", state=state.name, source=source, targets=others)


def make_writes(graph: TaskGraph, runs: Sequence[SliceRun]) -> list[Write]:
    """Writes to parameters outside of the optimizer: all ranks that hold one write to it, and take what they lack for
    it from the first rank that holds that. Those of a task with the same ranks on both sides are one instruction; those
    in turn are one for each batch. Raises PlanError where backward could not compute with what was written.
    """
    if not graph.writes:
        return []
    holders: dict[str, set[int]] = {}
    for run in runs:
        for name in {p.name for op in run.operators for p in graph.by_name[op].parameters}:
            holders.setdefault(name, set()).update(run.ranks)
    turns = {run.task: run.turn for run in runs}
    found: dict[tuple[object, ...], list[tuple[str, list[Fetch]]]] = {}
    for write in graph.writes:
        ranks = tuple(sorted(holders[write.target]))
        fetches = [
            Fetch(parameter=name, source=min(holders[name]), targets=lacking)
            for name in write.sources
            if (lacking := tuple(rank for rank in ranks if rank not in holders[name]))
        ]
        ends = tuple((fetch.source, fetch.targets) for fetch in fetches)
        within = bool(write.in_turn and write.after and write.unnoticed)
        _check_not_again(write, within, graph, runs)
        batches = [task for task in turns if base_task(task) == write.task] if write.in_turn else [write.task]
        for task in batches:
            turn = turns[task] if write.in_turn else None
            found.setdefault((task, bool(write.after), ranks, ends, turn, within), []).append((write.target, fetches))
    return [
        Write(
            name=f"w{index}",
            task=str(task),
            after=bool(after),
            ranks=tuple(ranks),  # type: ignore[arg-type]
            parameters=tuple(target for target, _ in members),
            fetches=tuple(fetch for _, fetches in members for fetch in fetches),
            turn=turn,  # type: ignore[arg-type]
            within=bool(within),
        )
        for index, ((task, after, ranks, _, turn, within), members) in enumerate(found.items())
    ]


def _check_not_again(write: ParameterWrite, within: bool, graph: TaskGraph, runs: Sequence[SliceRun]) -> None:
    """What a write within a turn changes is in no run whose backward computes its forward again."""
    for run in runs if within else ():
        used = {p.name for op in run.operators for p in graph.by_name[op].parameters}
        if run.recompute and base_task(run.task) == write.task and write.target in used:
            raise PlanError(
                f"task {write.task!r}, {write.line} writes to parameter {write.target!r} through .data after "
                f"{run.component!r} has used it, and that computes its activations again in backward, with what "
                "was written; write before it is used, or leave its component out of recompute="
            )
