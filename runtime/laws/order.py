"""Order: buffers are there when they are read and freed once; all ranks, stepped together, reach the end.

The simulation is stricter than any transport: a transfer or reduction goes on only when all its members stand at it.
"""

from collections.abc import Iterator

from spindle.runtime.programs.program import Instruction, Op, Program, SliceRun, Transfer

_TOGETHER = (Op.AGREE, Op.TRANSFER, Op.REDUCE, Op.CLIP, Op.GATHER, Op.TALLY, Op.HAND, Op.WRITE)
"""What several ranks do at once."""


def buffers_sound(program: Program) -> Iterator[str]:
    """Each buffer is freed once, after it was made; nothing reads it afterwards, and nothing is left over."""
    effects = _Effects(program)
    for rank, instructions in enumerate(program.instructions):
        live: set[str] = set()
        gone: set[str] = set()
        for instruction in instructions:
            where = f"rank {rank}, {instruction}"
            if instruction.op is Op.FREE:
                if instruction.target not in live:
                    yield f"{where}: {'it was freed before' if instruction.target in gone else 'it was never made'}"
                live.discard(instruction.target)
                gone.add(instruction.target)
                continue
            made, read = effects.of(rank, instruction)
            yield from (f"{where}: reads {buffer}, which is not there" for buffer in sorted(read - live))
            live |= made
        yield from (f"rank {rank} never frees {buffer}" for buffer in sorted(live))


class _Effects:
    """Buffers that an instruction makes and reads on a rank."""

    def __init__(self, program: Program) -> None:
        self.program = program
        maker = {tensor: run for run in program.slices for tensor in run.outputs}
        self.sources: dict[str, list[SliceRun]] = {run.name: [] for run in program.slices}
        self.targets: dict[str, list[SliceRun]] = {run.name: [] for run in program.slices}
        self.transfers: dict[str, list[Transfer]] = {run.name: [] for run in program.slices}
        for run in program.slices:
            for source in {maker[tensor].name for tensor in run.inputs if tensor in maker}:
                self.sources[run.name].append(program.slice_by_name[source])
                self.targets[source].append(run)
        for transfer in program.transfers:
            self.transfers[transfer.target].append(transfer)

    def of(self, rank: int, instruction: Instruction) -> tuple[set[str], set[str]]:
        name = instruction.target
        if instruction.op is Op.AWAIT:
            return ({f"arrivals:{name}"} if name in self.program.transfer_by_name else set()), set()
        if instruction.op is Op.TRANSFER:
            transfer = self.program.transfer_by_name[name]
            sends = rank in transfer.sending()
            return set(), {
                f"{'gradients' if transfer.backward else 'activations'}:{transfer.source}"
            } if sends else set()
        if instruction.op is Op.FORWARD:
            return {f"activations:{name}"}, self._read(rank, name, backward=False)
        if instruction.op is Op.BACKWARD:
            inputs = self.program.slice_by_name[name].inputs
            gives = any(self.program.tensor_by_name[tensor].needs_grad for tensor in inputs)
            return {f"gradients:{name}"} if gives else set(), self._read(rank, name, backward=True)
        return set(), set()

    def _read(self, rank: int, name: str, *, backward: bool) -> set[str]:
        run = self.program.slice_by_name[name]
        read = {f"activations:{name}"} if backward else set()
        for transfer in self.transfers[name]:
            if transfer.backward is backward and rank in transfer.receiving():
                read.add(f"arrivals:{transfer.name}")
        for other in self.targets[name] if backward else self.sources[name]:
            source, target = (run, other) if backward else (other, run)
            if _passes_locally(self.program, source, target, rank, gradient=backward):
                read.add(f"{'gradients' if backward else 'activations'}:{other.name}")
        return read


def _passes_locally(program: Program, source: SliceRun, target: SliceRun, rank: int, *, gradient: bool) -> bool:
    if rank not in source.ranks or rank not in target.ranks or (gradient and not target.backward):
        return False
    (low, high), (first, last) = source.bounds_of(rank), target.bounds_of(rank)
    overlap = source.varies or target.varies or max(low, first) < min(high, last)
    for name in set(source.outputs) & set(target.inputs):
        tensor = program.tensor_by_name[name]
        whole = rank == source.ranks[0] and (not gradient or rank == target.copy_of(rank)[0])
        if (overlap if tensor.rows else whole) and (tensor.needs_grad or not gradient):
            return True
    return False


def _members(program: Program) -> dict[str, frozenset[int]]:
    """Ranks that take part in each transfer, reduction, and in what all do together (which has no target)."""
    everyone = {"": frozenset(range(program.num_ranks))}
    transfers = {transfer.name: transfer.members() for transfer in program.transfers}
    tallies = {tally.name: frozenset(tally.ranks) for tally in program.tallies}
    hands = {hand.name: hand.members() for hand in program.handovers}
    writes = {write.name: write.members() for write in program.writes}
    return (
        everyone
        | transfers
        | tallies
        | hands
        | writes
        | {bucket.name: frozenset(bucket.ranks) for bucket in program.buckets}
    )


def different_orders(program: Program) -> Iterator[str]:
    """Pairs of ranks that meet what they do together in different orders."""
    members = _members(program)
    together = [[i.target for i in instructions if i.op in _TOGETHER] for instructions in program.instructions]
    for a in range(program.num_ranks):
        for b in range(a + 1, program.num_ranks):
            of_a, of_b = ([name for name in together[r] if {a, b} <= members[name]] for r in (a, b))
            for name_a, name_b in zip(of_a, of_b, strict=False):
                if name_a != name_b:
                    yield f"ranks {a} and {b} meet in different orders: {a} is at {name_a!r} when {b} is at {name_b!r}"
                    break


def stuck_ranks(program: Program) -> Iterator[str]:
    """Step all ranks together; name the instruction at which each stuck rank stands."""
    members = _members(program)
    position = [0] * program.num_ranks

    def meeting(rank: int, instruction: Instruction) -> frozenset[int]:
        run = program.slice_by_name.get(instruction.target)
        if run is not None and run.tensor_parallel > 1 and rank in run.ranks:
            return frozenset(run.copy_of(rank))
        return members[instruction.target] if instruction.op in _TOGETHER else frozenset()

    def at(rank: int) -> Instruction | None:
        instructions = program.instructions[rank]
        return instructions[position[rank]] if position[rank] < len(instructions) else None

    moved = True
    while moved:
        moved = False
        for rank in range(program.num_ranks):
            while (instruction := at(rank)) is not None:
                peers = meeting(rank, instruction)
                if any(at(peer) != instruction for peer in peers):
                    break
                for peer in peers | {rank}:
                    position[peer] += 1
                moved = True
    for rank in range(program.num_ranks):
        stuck = at(rank)
        if stuck is not None:
            yield f"stuck: {program.describe(rank, stuck)}"
