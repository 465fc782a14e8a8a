"""Passes: a Program's tables in, its instruction lists out, one concern at a time.

Compute and transfers come from the one global order of slice runs; loads and frees are then put in rank by rank.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from spindle.runtime.programs.flats import flat_moves
from spindle.runtime.programs.program import (
    Bucket,
    Handover,
    Instruction,
    Op,
    Program,
    SliceRun,
    Transfer,
    activations,
    arrivals,
    gradients,
)
from spindle.runtime.programs.states import make_handovers
from spindle.values.graph import TensorSpec, base_task

MoveT = TypeVar("MoveT", Transfer, Handover)
Lists = tuple[tuple[Instruction, ...], ...]


def run_passes(program: Program) -> Program:
    """Fill in the instruction lists."""
    for add in (add_compute, add_step, add_loads, add_frees):
        program = replace(program, instructions=add(program))
    return program


def restricted(program: Program, tasks: Collection[str]) -> Program:
    """The program of a step in which only these tasks take part. Buckets, tallies and states stay: a rank that holds
    what changes is the same in every step.
    """
    slices = tuple(run for run in program.slices if run.task in tasks)
    kept, bases = {run.name for run in slices}, {base_task(task) for task in tasks}
    return run_passes(
        replace(
            program,
            slices=slices,
            transfers=tuple(t for t in program.transfers if t.source in kept and t.target in kept),
            losses=tuple((task, tensor) for task, tensor in program.losses if task in tasks),
            handovers=tuple(make_handovers(program.states, slices)),
            writes=tuple(write for write in program.writes if base_task(write.task) in bases),
            instructions=((),) * program.num_ranks,
        )
    )


def accumulating(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """A rank's instructions for a round that only adds to the gradients: no reduction, tally, clipping or step."""
    ends = (Op.REDUCE, Op.TALLY, Op.CLIP, Op.STEP, Op.GATHER)
    reduced = {i.target for i in instructions if i.op is Op.REDUCE}
    return tuple(i for i in instructions if i.op not in ends and not (i.op is Op.AWAIT and i.target in reduced))


def add_compute(program: Program) -> Lists:
    """Turn after turn: forward in the global order, backward in its reverse. Each reduction stands right after the last
    run that adds to its bucket, since it may start while that run computes (`runtime.reductions`); then each transfer
    that carries from a run; each handover right before the run that it is for, at the same place of the order on all
    ranks. What is done with flats stands around the runs that use them.
    """
    lists: list[list[Instruction]] = [[] for _ in range(program.num_ranks)]
    complete, hands = _completed_buckets(program), _grouped(program.handovers, "before")
    moves = flat_moves(program)
    _add_writes(program, lists, None, "before")
    ends = {}
    for backward in (False, True):
        transfers = [t for t in program.transfers if t.backward is backward]
        ends[backward] = _grouped(transfers, "target"), _grouped(transfers, "source")
    for turn, runs, backward in ((*each, backward) for each in _turns(program) for backward in (False, True)):
        incoming, outgoing = ends[backward]
        _add_writes(program, lists, turn, "within" if backward else "before")
        for run in reversed(runs) if backward else runs:
            if backward and not run.backward:
                continue
            if not backward:
                _add_handovers(program, hands.get(run.name, ()), lists)
            brings = _awaits(program, incoming.get(run.name, ()))
            compute = Instruction(Op.BACKWARD if backward else Op.FORWARD, run.name)
            key = compute.op, run.name
            for rank in program.here(run.ranks):
                lists[rank] += (*brings.get(rank, ()), *moves.before.get(key, ()), compute)
            for bucket in complete.get(run.name, ()) if backward else ():
                _add(program, lists, bucket.ranks, Instruction(Op.REDUCE, bucket.name))
            for transfer in outgoing.get(run.name, ()):
                _add(program, lists, transfer.members(), Instruction(Op.TRANSFER, transfer.name))
            for move in moves.after.get(key, ()):
                _add(program, lists, run.ranks, move)
        if backward:
            _add_writes(program, lists, turn, "after")
    for ranks, move in moves.ending:
        _add(program, lists, ranks, move)
    _add_handovers(program, hands.get("", ()), lists)
    _add_writes(program, lists, None, "after")
    counted = {layer for run in program.slices for layer in run.statistics}
    for tally in program.tallies:
        if counted & set(tally.layers):
            _add(program, lists, tally.ranks, Instruction(Op.TALLY, tally.name))
    known: dict[tuple[int, ...], tuple[Instruction, ...]] = {}  # equal lists are one value; here they are of one object
    return tuple(known.setdefault(tuple(map(id, own)), tuple(own)) for own in lists)


def _add(program: Program, lists: list[list[Instruction]], ranks: Collection[int], instruction: Instruction) -> None:
    """Put one instruction, the same value, at the end of the lists of some ranks."""
    for rank in program.here(ranks):
        lists[rank].append(instruction)


def _awaits(program: Program, transfers: Iterable[Transfer]) -> dict[int, list[Instruction]]:
    """For each rank the waits for what some transfers bring to it, in their order."""
    found: dict[int, list[Instruction]] = {}
    for transfer in transfers:
        instruction = Instruction(Op.AWAIT, transfer.name)
        for rank in program.here(transfer.receiving()):
            found.setdefault(rank, []).append(instruction)
    return found


def _add_handovers(program: Program, hands: Iterable[Handover], lists: list[list[Instruction]]) -> None:
    for hand in hands:
        _add(program, lists, hand.members(), Instruction(Op.HAND, hand.name))


def _turns(program: Program) -> Iterator[tuple[int, tuple[SliceRun, ...]]]:
    """The turns in which something is computed or written, and the runs of each in forward order."""
    runs = {own[0].turn: own for own in program.runs_by_turn}
    for turn in sorted({*runs, *(write.turn for write in program.writes if write.turn is not None)}):
        yield turn, runs.get(turn, ())


def _add_writes(program: Program, lists: list[list[Instruction]], turn: int | None, when: str) -> None:
    """The writes of a turn, or those of a whole round, "before" its runs, "after" them, or "within"."""
    for write in program.writes:
        place = "within" if write.within else "after" if write.after else "before"
        if write.turn == turn and place == when:
            _add(program, lists, write.members(), Instruction(Op.WRITE, write.name))


def _completed_buckets(program: Program) -> dict[str, list[Bucket]]:
    """Buckets of several ranks by the run whose backward is the last to add to them: of the last turn the first in
    forward order.
    """
    turns = {run.name: run.turn for run in program.slices}
    found: dict[str, list[Bucket]] = {}
    for bucket in program.buckets:
        runs = program.runs_by_bucket[bucket.name]
        if len(bucket.ranks) > 1 and runs:
            found.setdefault(max(runs, key=turns.__getitem__), []).append(bucket)
    return found


def add_step(program: Program) -> Lists:
    """Wait for all reductions, in the order in which they were started; clip together; step; share what one updated."""
    clip = () if program.max_grad_norm is None else (Instruction(Op.CLIP),)
    waits = {name: Instruction(Op.AWAIT, name) for name in (*program.bucket_by_name, *program.flags_by_name)}
    gathers = {b.name: Instruction(Op.GATHER, b.name) for b in program.buckets if b.owner is not None}

    def ended(instructions: Sequence[Instruction]) -> Iterator[Instruction]:
        reduced = [i.target for i in instructions if i.op is Op.REDUCE]
        yield from instructions
        yield from (waits[name] for name in reduced)
        yield from (*clip, Instruction(Op.STEP))
        yield from (gathers[name] for name in reduced if name in gathers)

    return _by_list(program, ended)


def add_loads(program: Program) -> Lists:
    """Fetch the batches of the tasks of which the rank has runs, then see with all ranks whether they agree on them."""
    agree = (Instruction(Op.AGREE),) if program.num_ranks > 1 else ()
    loads = {run.task: Instruction(Op.LOAD, run.task) for run in program.slices}

    def begun(instructions: Sequence[Instruction]) -> Iterator[Instruction]:
        runs = (program.slice_by_name[i.target] for i in instructions if i.op is Op.FORWARD)
        yield from (loads[task] for task in dict.fromkeys(run.task for run in runs if run.loads))
        yield from (*agree, *instructions)

    return _by_list(program, begun)


def _by_list(program: Program, made: Callable[[Sequence[Instruction]], Iterable[Instruction]]) -> Lists:
    """Lists made of the instructions of the program; most ranks have the same as others, and made once."""
    own = {*program.here(range(program.num_ranks))}
    known = {id(program.instructions[rank]): program.instructions[rank] for rank in own}
    found = {key: tuple(made(instructions)) for key, instructions in known.items()}
    return tuple(found[id(own_list)] if rank in own else () for rank, own_list in enumerate(program.instructions))


def add_frees(program: Program) -> Lists:
    """Free every buffer right after the last instruction of its rank that touches it."""
    buffers, known = _Buffers(program), dict[tuple[int, ...], tuple[Instruction, ...]]()
    lists: list[tuple[Instruction, ...]] = [()] * program.num_ranks
    for rank in program.here(range(program.num_ranks)):
        taken = buffers.taken.get(rank, [])
        key = (id(program.instructions[rank]), *map(id, taken))
        if key not in known:
            known[key] = tuple(_with_frees(program.instructions[rank], buffers.touched(taken)))
        lists[rank] = known[key]
    return tuple(lists)


def _with_frees(
    instructions: Sequence[Instruction], touched: Mapping[tuple[Op, str], Collection[str]]
) -> Iterator[Instruction]:
    last: dict[str, int] = {}
    for index, instruction in enumerate(instructions):
        last.update(dict.fromkeys(touched.get((instruction.op, instruction.target), ()), index))
    ending: dict[int, list[str]] = {}
    for buffer, index in last.items():
        ending.setdefault(index, []).append(buffer)
    for index, instruction in enumerate(instructions):
        yield instruction
        yield from (Instruction(Op.FREE, buffer) for buffer in sorted(ending.get(index, ())))


_Touch = tuple[Op, str, str]
"""What is done, with which run or transfer, and a buffer that it touches."""


class _Buffers:
    """Which buffers instructions touch: those of their own run on all of its ranks, and by rank those `taken` from
    others. Equal ones are one value, by which ranks that do the same are known.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.taken: dict[int, list[_Touch]] = {}
        maker = {tensor: run for run in program.slices for tensor in run.outputs}
        for target in program.slices:
            passing: dict[str, list[TensorSpec]] = {}
            here = program.here(target.ranks)
            for name in (name for name in target.inputs if name in maker):
                if not maker[name].place.keys().isdisjoint(here):
                    passing.setdefault(maker[name].name, []).append(program.tensor_by_name[name])
            for name, specs in passing.items():
                self._add_staying(specs, program.slice_by_name[name], target)
        for transfer in program.transfers:
            op, kept = (Op.BACKWARD, gradients) if transfer.backward else (Op.FORWARD, activations)
            self._add(transfer.receiving(), (op, transfer.target, arrivals(transfer.name)))
            self._add(transfer.sending(), (Op.TRANSFER, transfer.name, kept(transfer.source)))

    def _add(self, ranks: Collection[int], touch: _Touch) -> None:
        for rank in self.program.here(ranks):
            self.taken.setdefault(rank, []).append(touch)

    def _add_staying(self, specs: Sequence[TensorSpec], source: SliceRun, target: SliceRun) -> None:
        """A run takes tensors from another on the ranks that both have, and the other their gradients."""
        shared = [rank for rank in self.program.here(target.ranks) if rank in source.place]
        back = [spec for spec in specs if spec.needs_grad and target.backward]
        alike = (source.ranks, source.bounds) == (target.ranks, target.bounds)  # then what is cut stays everywhere
        taking, giving = shared, shared
        if not (alike and any(spec.rows for spec in specs)):
            taking = [rank for rank in shared if any(_stays(spec, source, target, rank) for spec in specs)]
        if not (alike and any(spec.rows for spec in back)):
            giving = [rank for rank in shared if any(_returns(spec, source, target, rank) for spec in back)]
        self._add(taking, (Op.FORWARD, target.name, activations(source.name)))
        self._add(giving, (Op.BACKWARD, source.name, gradients(target.name)))

    @cached_property
    def _own(self) -> dict[tuple[Op, str], list[str]]:
        graded = {tensor.name for tensor in self.program.tensors if tensor.needs_grad}
        found: dict[tuple[Op, str], list[str]] = {}
        for run in self.program.slices:
            made = [gradients(run.name)] if graded.intersection(run.inputs) else []
            found[Op.FORWARD, run.name] = [activations(run.name)]
            found[Op.BACKWARD, run.name] = [activations(run.name), *made]
        return found

    def touched(self, taken: Sequence[_Touch]) -> dict[tuple[Op, str], list[str]]:
        """Buffers that each instruction of a rank touches, of which these are taken from others."""
        found = dict(self._own)
        for op, name, buffer in taken:
            found[op, name] = [*found.get((op, name), ()), buffer]
        return found


def _stays(spec: TensorSpec, source: SliceRun, target: SliceRun, rank: int) -> bool:
    """Whether part of a tensor passes between two runs that both are on a rank, without leaving it."""
    if not spec.rows:
        return source.ranks[0] == rank
    (low, high), (first, last) = source.bounds_of(rank), target.bounds_of(rank)
    return source.varies or target.varies or max(low, first) < min(high, last)


def _returns(spec: TensorSpec, source: SliceRun, target: SliceRun, rank: int) -> bool:
    """Whether a gradient of a tensor comes back from the target on the rank itself."""
    return _stays(spec, source, target, rank) and (spec.rows > 0 or target.copy_of(rank)[0] == rank)


def _grouped(moves: Iterable[MoveT], end: str) -> dict[str, list[MoveT]]:
    """Transfers or handovers by the run at one end of them."""
    found: dict[str, list[MoveT]] = {}
    for move in moves:
        found.setdefault(getattr(move, end), []).append(move)
    return found
