"""Parts: a whole Program in, what each rank has to know of it out; the laws have judged the whole before.

A rank's part is a Program too, which its executor, its batches and `restricted` work from with the same results. It has
the rank's own instructions, and of the tables

- the runs that are on the rank, and those with which it exchanges messages, of which only the rank's own stay
- the buckets, flats, tallies, states and writes that it takes part in, and the runs that train, count or touch what
  they hold: where their instructions stand, and in which order tallies and states take runs, follows from these

So it grows with what the rank does. Tuples of ranks and of bounds are as long as the groups of the rank are large; each
stands once in what is sent, and equal ones are one value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from spindle.runtime.programs.program import (
    Bucket,
    Flat,
    Handover,
    Instruction,
    Message,
    Program,
    SliceRun,
    State,
    Tally,
    Transfer,
    Write,
)


@dataclass
class _Part:
    """What one rank touches, in the order of the whole program; runs by their number."""

    runs: set[int] = field(default_factory=set)
    tensors: dict[str, None] = field(default_factory=dict)
    transfers: list[Transfer] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    handovers: list[Handover] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    flats: list[Flat] = field(default_factory=list)


def parts_of(program: Program) -> Iterator[Program]:
    """The part of each rank, in order. One pass over the tables; then time by the size of the parts."""
    parts = [_Part() for _ in range(program.num_ranks)]
    _add_runs(program, parts)
    _add_transfers(program, parts)
    _add_shared(program, parts)
    for rank, part in enumerate(parts):
        lists: list[tuple[Instruction, ...]] = [()] * program.num_ranks
        lists[rank] = program.instructions[rank]
        yield replace(
            program,
            tensors=tuple(program.tensor_by_name[name] for name in part.tensors),
            slices=tuple(program.slices[index] for index in sorted(part.runs)),
            transfers=tuple(part.transfers),
            buckets=tuple(part.buckets),
            tallies=tuple(part.tallies),
            states=tuple(part.states),
            handovers=tuple(part.handovers),
            writes=tuple(part.writes),
            flats=tuple(part.flats),
            instructions=tuple(lists),
            part_of=rank,
        )


def _add_runs(program: Program, parts: Sequence[_Part]) -> None:
    for index, run in enumerate(program.slices):
        for rank in run.ranks:
            parts[rank].runs.add(index)
            parts[rank].tensors.update(dict.fromkeys((*run.inputs, *run.outputs)))


def _add_transfers(program: Program, parts: Sequence[_Part]) -> None:
    """Transfers with the messages of a rank alone, their two ends, and what passes between these."""
    number = {run.name: index for index, run in enumerate(program.slices)}
    for transfer in program.transfers:
        ends = [program.slice_by_name[name] for name in (transfer.source, transfer.target)]
        source, target = reversed(ends) if transfer.backward else ends
        passing = dict.fromkeys(name for name in target.inputs if name in {*source.outputs})
        messages: dict[int, list[Message]] = {}
        for message in transfer.messages:
            for rank in {message.source, message.target}:
                messages.setdefault(rank, []).append(message)
        for rank in transfer.members():
            part = parts[rank]
            part.transfers.append(replace(transfer, messages=tuple(messages.get(rank, ()))))
            part.runs.update((number[source.name], number[target.name]))
            part.tensors.update(passing)


def _add_shared(program: Program, parts: Sequence[_Part]) -> None:
    """What several ranks hold, and the runs that do something to it."""
    number = {run.name: index for index, run in enumerate(program.slices)}
    training = program.runs_by_bucket
    counting, touching = (_users(program.slices, kind) for kind in ("statistics", "states"))
    for bucket in program.buckets:
        for rank in bucket.ranks:
            parts[rank].buckets.append(bucket)
            parts[rank].runs.update(number[name] for name in training[bucket.name])
    for tally in program.tallies:
        users = {index for layer in tally.layers for index in counting.get(layer, ())}
        for rank in tally.ranks:
            parts[rank].tallies.append(tally)
            parts[rank].runs.update(users)
    for state in program.states:
        users = {index for buffer in state.buffers for index in touching.get(buffer, ())}
        for rank in state.ranks:
            parts[rank].states.append(state)
            parts[rank].runs.update(users)
    for hand in program.handovers:
        for rank in hand.members():
            parts[rank].handovers.append(hand)
    for flat in program.flats:  # whose runs are all on the same ranks
        for rank in flat.ranks:
            parts[rank].flats.append(flat)
    for write in program.writes:
        for rank in write.members():
            parts[rank].writes.append(write)


def _users(runs: Sequence[SliceRun], kind: str) -> Mapping[str, list[int]]:
    """Numbers of the runs that count statistics or touch states, by layer or buffer."""
    found: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        for name in getattr(run, kind):
            found.setdefault(name, []).append(index)
    return found
