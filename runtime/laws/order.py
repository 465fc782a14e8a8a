"""Order: buffers are there when they are read and freed once; all ranks, stepped together, reach the end.

The simulation is stricter than any transport: a transfer or reduction goes on only when all its members stand at it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from spindle.runtime.laws.places import Places
from spindle.runtime.programs.program import Instruction, Op, Program, SliceRun

_TOGETHER = (
    Op.AGREE,
    Op.TRANSFER,
    Op.REDUCE,
    Op.CLIP,
    Op.GATHER,
    Op.UNSHARD,
    Op.SCATTER,
    Op.TALLY,
    Op.HAND,
    Op.WRITE,
)
"""What several ranks do at once."""


def buffers_sound(program: Program, places: Places) -> Iterator[str]:
    """Each buffer is freed once, after it was made; nothing reads it afterwards, and nothing is left over."""
    effects, known = _Effects(program), dict[tuple[int, ...], list[str]]()
    for rank, kind in enumerate(places.kind_of):
        reads = effects.reads.get(rank, [])
        key = (kind, *map(id, reads))
        if key not in known:
            known[key] = list(_unsound(places.lists[kind], effects, reads))
        yield from (f"rank {rank}{what}" for what in known[key])


def _unsound(instructions: Sequence[Instruction], effects: "_Effects", reads: "Sequence[_Read]") -> Iterator[str]:
    """What is wrong on ranks with these instructions, which read these buffers of others."""
    taken: dict[tuple[Op, str], set[str]] = {}
    for op, name, buffer in reads:
        taken.setdefault((op, name), set()).add(buffer)
    live: set[str] = set()
    gone: set[str] = set()
    for instruction in instructions:
        if instruction.op is Op.FREE:
            if instruction.target not in live:
                why = "it was freed before" if instruction.target in gone else "it was never made"
                yield f", {instruction}: {why}"
            live.discard(instruction.target)
            gone.add(instruction.target)
            continue
        read = taken.get((instruction.op, instruction.target), set())
        if instruction.op is Op.BACKWARD:
            read = read | {f"activations:{instruction.target}"}
        yield from (f", {instruction}: reads {buffer}, which is not there" for buffer in sorted(read - live))
        live.update(effects.made(instruction))
    yield from (f" never frees {buffer}" for buffer in sorted(live))


_Read = tuple[Op, str, str]
"""What is done, with which run or transfer, and a buffer that it reads."""


class _Effects:
    """Buffers that instructions make, and by rank the buffers that they read of other runs and of transfers. Equal
    reads are one value.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.reads: dict[int, list[_Read]] = {}
        maker = {tensor: run for run in program.slices for tensor in run.outputs}
        for run in program.slices:
            for name in dict.fromkeys(maker[tensor].name for tensor in run.inputs if tensor in maker):
                pair = _Pair.of(program, program.slice_by_name[name], run)
                both = [rank for rank in run.ranks if rank in pair.source.place]
                alike = (pair.source.ranks, pair.source.bounds) == (run.ranks, run.bounds)
                passing = both if alike and pair.cut else filter(pair.passes, both)
                returning = both if alike and pair.cut_back else filter(pair.returns, both)
                self._add(passing, (Op.FORWARD, run.name, f"activations:{name}"))
                self._add(returning, (Op.BACKWARD, name, f"gradients:{run.name}"))
        for transfer in program.transfers:
            op, kept = (Op.BACKWARD, "gradients") if transfer.backward else (Op.FORWARD, "activations")
            self._add(transfer.receiving(), (op, transfer.target, f"arrivals:{transfer.name}"))
            self._add(transfer.sending(), (Op.TRANSFER, transfer.name, f"{kept}:{transfer.source}"))
        graded = {tensor.name for tensor in program.tensors if tensor.needs_grad}
        self._giving = {run.name for run in program.slices if graded.intersection(run.inputs)}

    def _add(self, ranks: Iterable[int], read: _Read) -> None:
        for rank in ranks:
            self.reads.setdefault(rank, []).append(read)

    def made(self, instruction: Instruction) -> Iterator[str]:
        """Buffers that an instruction makes."""
        name = instruction.target
        if instruction.op is Op.FORWARD:
            yield f"activations:{name}"
        elif instruction.op is Op.BACKWARD and name in self._giving:
            yield f"gradients:{name}"
        elif instruction.op is Op.AWAIT and name in self.program.transfer_by_name:
            yield f"arrivals:{name}"


@dataclass(frozen=True, slots=True)
class _Pair:
    """A run that reads what another makes: whether tensors that are cut pass, and whole ones; the same of gradients.

    It is asked of ranks that both are on.
    """

    source: SliceRun
    target: SliceRun
    cut: bool
    whole: bool
    cut_back: bool
    whole_back: bool

    @classmethod
    def of(cls, program: Program, source: SliceRun, target: SliceRun) -> "_Pair":
        passing = [program.tensor_by_name[name] for name in {*source.outputs} & {*target.inputs}]
        graded = [tensor for tensor in passing if tensor.needs_grad and target.backward]
        return cls(
            source, target, *(any((t.rows > 0) is c for t in ts) for ts in (passing, graded) for c in (True, False))
        )

    def passes(self, rank: int) -> bool:
        """Whether some of it stays on a rank."""
        return (self.cut and self._overlaps(rank)) or (self.whole and self._leads(rank))

    def returns(self, rank: int) -> bool:
        """Whether a gradient of it stays on a rank."""
        if self.cut_back and self._overlaps(rank):
            return True
        return self.whole_back and self._leads(rank) and rank == self.target.copy_of(rank)[0]

    def _overlaps(self, rank: int) -> bool:
        source, target = self.source, self.target
        (low, high), (first, last) = source.bounds_of(rank), target.bounds_of(rank)
        return source.varies or target.varies or max(low, first) < min(high, last)

    def _leads(self, rank: int) -> bool:
        return rank == self.source.ranks[0]


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
        | {flat.name: frozenset(flat.ranks) for flat in program.flats}
        | {flags.name: frozenset(flags.ranks) for flags in program.flags_by_name.values()}
    )


def different_orders(program: Program) -> Iterator[str]:
    """Pairs of ranks that meet what they do together in different orders; the first of ranks that do the same."""
    members = _members(program)
    doing: dict[tuple[str, ...], int] = {}
    for rank, instructions in enumerate(program.instructions):
        own = tuple(i.target for i in instructions if i.op in _TOGETHER and rank in members[i.target])
        doing.setdefault(own, rank)
    for (names_a, a), (names_b, b) in combinations(doing.items(), 2):
        shared = {*names_a} & {*names_b}
        of_a, of_b = ([name for name in names if name in shared] for names in (names_a, names_b))
        for name_a, name_b in zip(of_a, of_b, strict=False):
            if name_a != name_b:
                yield f"ranks {a} and {b} meet in different orders: {a} is at {name_a!r} when {b} is at {name_b!r}"
                break


_Peers = frozenset[int] | tuple[int, ...]


def stuck_ranks(program: Program, places: Places) -> Iterator[str]:
    """Step all ranks together; name the instruction at which each stuck rank stands.

    First ranks of a kind go side by side, waiting for whom any of them waits: what ends so ends however they go. Where
    it does not, each rank goes for itself.
    """
    members = _members(program)
    if _kinds_end(program, places, members):
        return

    def meeting(rank: int, instruction: Instruction) -> _Peers:
        run = program.slice_by_name.get(instruction.target)
        if run is not None and run.tensor_parallel > 1 and rank in run.place:
            return run.copy_of(rank)
        return members[instruction.target] if instruction.op in _TOGETHER else ()

    for rank, position in enumerate(_ends(program.instructions, meeting)):
        if position < len(program.instructions[rank]):
            yield f"stuck: {program.describe(rank, program.instructions[rank][position])}"


def _kinds_end(program: Program, places: Places, members: Mapping[str, frozenset[int]]) -> bool:
    """Whether all kinds of ranks reach the end side by side; not said where one does what only some of it have to."""
    meetings: dict[Instruction, dict[int, _Peers]] = {}
    for instruction in {instruction for own in places.lists for instruction in own}:
        run, doing = program.slice_by_name.get(instruction.target), places.at(instruction)
        if run is not None and run.tensor_parallel > 1:
            groups, allowed = [ranks for ranks, _ in run.copies()], frozenset(run.ranks)
        elif instruction.op in _TOGETHER:
            groups, allowed = [tuple(members[instruction.target])], members[instruction.target]
        else:
            continue
        if not all(allowed.issuperset(places.kinds[kind]) for kind in doing):
            return False
        meetings[instruction] = _linked([{places.kind_of[rank] for rank in ranks} for ranks in groups])
    ends = _ends(places.lists, lambda kind, instruction: meetings.get(instruction, {}).get(kind, ()))
    return ends == list(map(len, places.lists))


def _linked(groups: Iterable[set[int]]) -> dict[int, _Peers]:
    """Kinds that meet directly or by way of others, for each kind."""
    found: list[set[int]] = []
    for group in groups:
        apart = [other for other in found if other.isdisjoint(group)]
        found = [*apart, group.union(*(other for other in found if not other.isdisjoint(group)))]
    return {kind: frozenset(group) for group in found for kind in group}


def _ends(lists: Sequence[Sequence[Instruction]], meeting: Callable[[int, Instruction], _Peers]) -> list[int]:
    """How far each list comes when all are stepped together; `meeting`: the ranks that have to be at an instruction.

    Each goes on until it has to meet others; the last of them to come lets all go on.
    """
    position = [0] * len(lists)
    standing: dict[tuple[Instruction, _Peers], set[int]] = {}
    going = deque(range(len(lists)))
    while going:
        own = going.popleft()
        while position[own] < len(lists[own]):
            instruction = lists[own][position[own]]
            peers = meeting(own, instruction)
            if peers:
                here = standing.setdefault((instruction, peers), set())
                here.add(own)
                if len(here) < len(peers) or not here.issuperset(peers):
                    break
                del standing[instruction, peers]
                for other in here - {own}:
                    position[other] += 1
                    going.append(other)
            position[own] += 1
    return position
