"""Passes: a Program's tables in, its instruction lists out, one concern at a time.

Compute and transfers come from the one global order of slice runs; loads and frees are then put in rank by rank.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from spindle.graph import base_task
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

MoveT = TypeVar("MoveT", Transfer, Handover)
Lists = tuple[tuple[Instruction, ...], ...]


def run_passes(program: Program) -> Program:
    """Fill in the instruction lists."""
    for add in (add_compute, add_step, add_loads, add_frees):
        program = replace(program, instructions=add(program))
    return program


def restricted(program: Program, tasks: Collection[str]) -> Program:
    """The program of a step in which only these tasks take part. Buckets, tallies and states stay: whoever holds what
    changes is the same in every step.
    """
    slices = tuple(run for run in program.slices if run.task in tasks)
    kept = {run.name for run in slices}
    return run_passes(
        replace(
            program,
            slices=slices,
            transfers=tuple(t for t in program.transfers if t.source in kept and t.target in kept),
            losses=tuple((task, tensor) for task, tensor in program.losses if task in tasks),
            handovers=tuple(make_handovers(program.states, slices)),
            writes=tuple(write for write in program.writes if write.task in {base_task(task) for task in tasks}),
            instructions=((),) * program.num_ranks,
        )
    )


def accumulating(instructions: Sequence[Instruction], buckets: Collection[str]) -> tuple[Instruction, ...]:
    """A rank's instructions for a round that only adds to the gradients: no reduction, tally, clipping or step."""
    ends = (Op.REDUCE, Op.TALLY, Op.CLIP, Op.STEP, Op.GATHER)
    return tuple(i for i in instructions if i.op not in ends and not (i.op is Op.AWAIT and i.target in buckets))


def add_compute(program: Program) -> Lists:
    """Forward in the global order, backward in its reverse. Each transfer stands right after the run that it carries
    from, each reduction right after the last run that adds to its bucket, each handover right before the run that it is
    for, at the same place of the order on all ranks.
    """
    lists: list[list[Instruction]] = [[] for _ in range(program.num_ranks)]
    complete, hands = _completed_buckets(program), _grouped(program.handovers, "before")
    _add_writes(program, lists, after=False)
    for backward in (False, True):
        transfers = [t for t in program.transfers if t.backward is backward]
        incoming, outgoing = _grouped(transfers, "target"), _grouped(transfers, "source")
        for run in reversed(program.slices) if backward else program.slices:
            if backward and not run.backward:
                continue
            _add_handovers(() if backward else hands.get(run.name, ()), lists)
            for rank in run.ranks:
                brings = [t for t in incoming.get(run.name, ()) if rank in t.receiving()]
                lists[rank] += [Instruction(Op.AWAIT, t.name) for t in brings]
                lists[rank].append(Instruction(Op.BACKWARD if backward else Op.FORWARD, run.name))
            for transfer in outgoing.get(run.name, ()):
                for rank in sorted(transfer.members()):
                    lists[rank].append(Instruction(Op.TRANSFER, transfer.name))
            for bucket in complete.get(run.name, ()) if backward else ():
                for rank in bucket.ranks:
                    lists[rank].append(Instruction(Op.REDUCE, bucket.name))
    _add_handovers(hands.get("", ()), lists)
    _add_writes(program, lists, after=True)
    counted = {layer for run in program.slices for layer in run.statistics}
    for tally in program.tallies:
        for rank in tally.ranks if counted & set(tally.layers) else ():
            lists[rank].append(Instruction(Op.TALLY, tally.name))
    return tuple(map(tuple, lists))


def _add_handovers(hands: Iterable[Handover], lists: list[list[Instruction]]) -> None:
    for hand in hands:
        for rank in sorted(hand.members()):
            lists[rank].append(Instruction(Op.HAND, hand.name))


def _add_writes(program: Program, lists: list[list[Instruction]], *, after: bool) -> None:
    for write in program.writes:
        for rank in sorted(write.members()) if write.after is after else ():
            lists[rank].append(Instruction(Op.WRITE, write.name))


def _completed_buckets(program: Program) -> dict[str, list[Bucket]]:
    """Buckets of several ranks by the run whose backward is the last to add to them: the first in forward order."""
    found: dict[str, list[Bucket]] = {}
    for bucket in program.buckets:
        runs = program.runs_by_bucket[bucket.name]
        if len(bucket.ranks) > 1 and runs:
            found.setdefault(runs[0], []).append(bucket)
    return found


def add_step(program: Program) -> Lists:
    """Wait for all reductions, in the order in which they were started; clip together; step; share what one updated."""
    clip = () if program.max_grad_norm is None else (Instruction(Op.CLIP),)
    return tuple(
        (
            *instructions,
            *(Instruction(Op.AWAIT, i.target) for i in instructions if i.op is Op.REDUCE),
            *clip,
            Instruction(Op.STEP),
            *(
                Instruction(Op.GATHER, i.target)
                for i in instructions
                if i.op is Op.REDUCE and program.bucket_by_name[i.target].owner is not None
            ),
        )
        for instructions in program.instructions
    )


def add_loads(program: Program) -> Lists:
    """Fetch the batches of the tasks of which the rank has runs, then see with all ranks whether they agree on them."""
    agree = (Instruction(Op.AGREE),) if program.num_ranks > 1 else ()
    return tuple((*_loads(program, own), *agree, *own) for own in program.instructions)


def _loads(program: Program, instructions: Iterable[Instruction]) -> Iterator[Instruction]:
    runs = (program.slice_by_name[i.target] for i in instructions if i.op is Op.FORWARD)
    return (Instruction(Op.LOAD, task) for task in dict.fromkeys(run.task for run in runs if run.loads))


def add_frees(program: Program) -> Lists:
    """Free every buffer right after the last instruction of its rank that touches it."""
    return tuple(
        tuple(_with_frees(instructions, _Buffers.of(program, rank)))
        for rank, instructions in enumerate(program.instructions)
    )


def _with_frees(instructions: Sequence[Instruction], buffers: "_Buffers") -> Iterator[Instruction]:
    last = {buffer: index for index, instruction in enumerate(instructions) for buffer in buffers.touched(instruction)}
    ending: dict[int, list[str]] = {}
    for buffer, index in last.items():
        ending.setdefault(index, []).append(buffer)
    for index, instruction in enumerate(instructions):
        yield instruction
        yield from (Instruction(Op.FREE, buffer) for buffer in sorted(ending.get(index, ())))


@dataclass(frozen=True)
class _Buffers:
    """Which buffers an instruction touches on one rank."""

    program: Program
    rank: int
    local_sources: Mapping[str, frozenset[str]]  # runs from which a run takes tensors on this rank itself
    local_targets: Mapping[str, frozenset[str]]  # runs from which it takes their gradients on this rank itself
    arriving: Mapping[tuple[str, bool], frozenset[str]]  # buffers that transfers fill for a run, forward or backward

    @classmethod
    def of(cls, program: Program, rank: int) -> "_Buffers":
        maker = {tensor: run for run in program.slices for tensor in run.outputs}
        sources: dict[str, set[str]] = {}
        targets: dict[str, set[str]] = {}
        for target in program.slices:
            for name in target.inputs:
                source = maker[name]
                if _stays(program, name, source, target, rank):
                    sources.setdefault(target.name, set()).add(source.name)
                    leads = program.tensor_by_name[name].rows or target.copy_of(rank)[0] == rank
                    if program.tensor_by_name[name].needs_grad and target.backward and leads:
                        targets.setdefault(source.name, set()).add(target.name)
        arriving: dict[tuple[str, bool], set[str]] = {}
        for transfer in program.transfers:
            if rank in transfer.receiving():
                arriving.setdefault((transfer.target, transfer.backward), set()).add(arrivals(transfer.name))
        return cls(
            program,
            rank,
            {name: frozenset(found) for name, found in sources.items()},
            {name: frozenset(found) for name, found in targets.items()},
            {key: frozenset(found) for key, found in arriving.items()},
        )

    def touched(self, instruction: Instruction) -> set[str]:
        name = instruction.target
        if instruction.op is Op.FORWARD:
            taken = {activations(source) for source in self.local_sources.get(name, ())}
            return {activations(name)} | taken | self.arriving.get((name, False), set())
        if instruction.op is Op.BACKWARD:
            made = {gradients(name)} if self._has_gradients(name) else set()
            taken = {gradients(target) for target in self.local_targets.get(name, ())}
            return {activations(name)} | made | taken | self.arriving.get((name, True), set())
        if instruction.op is Op.TRANSFER:
            transfer = self.program.transfer_by_name[name]
            if self.rank in transfer.sending():
                return {gradients(transfer.source) if transfer.backward else activations(transfer.source)}
        return set()

    def _has_gradients(self, run: str) -> bool:
        inputs = self.program.slice_by_name[run].inputs
        return any(self.program.tensor_by_name[name].needs_grad for name in inputs)


def _stays(program: Program, tensor: str, source: SliceRun, target: SliceRun, rank: int) -> bool:
    """Whether part of a tensor passes between two runs without leaving the rank."""
    if rank not in source.ranks or rank not in target.ranks:
        return False
    if not program.tensor_by_name[tensor].rows:
        return source.ranks[0] == rank
    (low, high), (first, last) = source.bounds_of(rank), target.bounds_of(rank)
    return source.varies or target.varies or max(low, first) < min(high, last)


def _grouped(moves: Iterable[MoveT], end: str) -> dict[str, list[MoveT]]:
    """Transfers or handovers by the run at one end of them."""
    found: dict[str, list[MoveT]] = {}
    for move in moves:
        found.setdefault(getattr(move, end), []).append(move)
    return found
