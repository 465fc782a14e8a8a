"""Flats: sharded parameters in; which of them lie in one row, and when a row is gathered, released and scattered, out.

- Parameters that the same runs use are one flat: those of a layer. So a component's layers are runs of their own.
- Runs of one set of ranks stand in one order, which all of these ranks follow. Right before each of them the flats of
  the next one begin to be gathered, beside its computation; flats that the next one does not use are released after it.
  So no more than the flats of two runs are there at a time.
- What a backward gives is scattered at once, and added when the next run of the set is through: gradients of two runs
  at most are whole at a time, whatever the number of tasks and micro-batches.
- After the last backward of a set of ranks its flags are summed, and waited for with the buckets before the step.
- A parameter that operators of other components use too stays whole, and goes with the buckets.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from spindle.errors import PlanError
from spindle.runtime.programs.program import Flat, Instruction, Op, Program, SliceRun
from spindle.values.graph import Parameter, TaskGraph

Ranks = tuple[int, ...]


def make_flats(
    runs: Sequence[SliceRun], graph: TaskGraph, components: Collection[str]
) -> tuple[list[Flat], list[SliceRun]]:
    """The flats of components whose parameters are sharded, and the runs with the flats of each. A parameter of a
    single rank stays as it is.

    Raises PlanError where the runs of one are not all on the same ranks, it is tensor parallel, or a task writes to it.
    """
    users = _users(runs, graph, components) if components else {}
    _refuse_writes(graph, users)
    groups: dict[tuple[tuple[int, ...], str, bool], list[Parameter]] = {}
    trained = {name for run in runs for name in run.trained}
    for parameter, places in users.values():
        groups.setdefault((tuple(places), parameter.dtype, parameter.name in trained), []).append(parameter)
    flats: list[Flat] = []
    used: dict[int, list[str]] = {}
    for (found, dtype, is_trained), parameters in groups.items():
        ranks = _ranks_of([runs[place] for place in found], parameters[0])
        if len(ranks) < 2:
            continue
        names = tuple(parameter.name for parameter in parameters)
        flats.append(Flat(name=f"f{len(flats)}", dtype=dtype, ranks=ranks, parameters=names, trained=is_trained))
        for place in found:
            used.setdefault(place, []).append(flats[-1].name)
    return flats, [replace(run, flats=tuple(used[i])) if i in used else run for i, run in enumerate(runs)]


def _users(
    runs: Sequence[SliceRun], graph: TaskGraph, components: Collection[str]
) -> dict[str, tuple[Parameter, list[int]]]:
    """Parameters of some components that these alone use, and the places of the runs that do, in the order of use."""
    found: dict[str, tuple[Parameter, list[int]]] = {}
    elsewhere: set[str] = set()
    for place, run in enumerate(runs):
        for name in run.operators:
            operator = graph.by_name[name]
            for parameter in operator.parameters:
                owner = parameter.name.partition(".")[0]
                if owner in components and operator.component == owner:
                    places = found.setdefault(parameter.name, (parameter, []))[1]
                    places += [place] if places[-1:] != [place] else ()
                else:
                    elsewhere.add(parameter.name)
    return {name: row for name, row in found.items() if name not in elsewhere}


def _ranks_of(runs: Sequence[SliceRun], parameter: Parameter) -> Ranks:
    component = parameter.name.partition(".")[0]
    if parameter.pieces > 1:
        raise PlanError(
            f"component {component!r} is registered with tensor_parallel=, which cuts {parameter.name!r}, and the plan "
            "shards its parameters; leave one of both out"
        )
    sets = {tuple(sorted(run.ranks)): run for run in runs}
    if len(sets) > 1:
        (one, first), (two, second) = list(sets.items())[:2]
        raise PlanError(
            f"the parameters of component {component!r} are sharded, but {parameter.name!r} is used on devices "
            f"{list(one)} by {first.metaop!r} and on {list(two)} by {second.metaop!r}; all slices of such a component "
            "run on the same devices, plan again"
        )
    return next(iter(sets))


def _refuse_writes(graph: TaskGraph, users: Mapping[str, object]) -> None:
    for write in graph.writes:
        for name in (write.target, *write.sources):
            if name in users:
                verb = "writes to" if name == write.target else "reads"
                where = f", in {write.line}," if write.line else ""
                raise PlanError(
                    f"task {write.task!r} {verb} {name!r} outside of the optimizer{where} and the parameters of "
                    f"component {name.partition('.')[0]!r} are sharded, so that no device has it; register the "
                    "component with shard='nothing', and plan again"
                )


# -- when --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moves:
    """What ranks do with flats before and after they compute a run in one direction, and at the end of backward."""

    before: Mapping[tuple[Op, str], Sequence[Instruction]]
    after: Mapping[tuple[Op, str], Sequence[Instruction]]
    ending: Sequence[tuple[Ranks, Instruction]]


def flat_moves(program: Program) -> Moves:
    """What is done with the flats of a program."""
    rows: dict[Ranks, list[tuple[Op, SliceRun]]] = {}
    for op, run in _computed(program) if program.flats else ():
        if run.flats:
            rows.setdefault(tuple(sorted(run.ranks)), []).append((op, run))
    before: dict[tuple[Op, str], list[Instruction]] = {}
    after: dict[tuple[Op, str], list[Instruction]] = {}
    ending: list[tuple[Ranks, Instruction]] = []
    flags = {each.ranks: each.name for each in program.flags_by_name.values()}
    for ranks, row in rows.items():
        there: list[str] = []
        coming: list[str] = []
        scattered: list[str] = []
        for index, (op, run) in enumerate(row):
            first, last = before.setdefault((op, run.name), []), after.setdefault((op, run.name), [])
            following = row[index + 1][1].flats if index + 1 < len(row) else ()
            late = [name for name in run.flats if name not in (*there, *coming)]
            first += [Instruction(Op.UNSHARD, name) for name in late]
            first += [Instruction(Op.AWAIT, name) for name in run.flats if name not in there]
            coming = [name for name in following if name not in (*there, *run.flats)]
            first += [Instruction(Op.UNSHARD, name) for name in coming]
            last += [Instruction(Op.ADD, name) for name in scattered]
            scattered = _trained_by(program, run) if op is Op.BACKWARD else []
            last += [Instruction(Op.SCATTER, name) for name in scattered]
            last += [Instruction(Op.RESHARD, name) for name in run.flats if name not in following]
            there = [name for name in run.flats if name in following]
        ending += [(ranks, Instruction(Op.ADD, name)) for name in scattered]
        training = [run.name for op, run in row if op is Op.BACKWARD and _trained_by(program, run)]
        if training:
            after[Op.BACKWARD, training[-1]].append(Instruction(Op.REDUCE, flags[ranks]))
    return Moves(before, after, ending)


def _computed(program: Program) -> Iterator[tuple[Op, SliceRun]]:
    """What is computed, in the global order."""
    for runs in program.runs_by_turn:
        yield from ((Op.FORWARD, run) for run in runs)
        yield from ((Op.BACKWARD, run) for run in reversed(runs) if run.backward)


def _trained_by(program: Program, run: SliceRun) -> list[str]:
    """Flats to whose gradients a run adds."""
    return [name for name in run.flats if not set(run.trained).isdisjoint(program.flat_by_name[name].parameters)]
