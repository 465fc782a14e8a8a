"""Laws: a Program in, every law that it breaks out, in words. It runs first, and shares no code with what made it.

What these checks find, a network would answer with a hang or a dead process. The simulation is stricter than any
transport: a transfer or reduction goes on only when all its members stand at it.
"""

from collections import Counter
from collections.abc import Collection, Iterator

from spindle.errors import ProgramError
from spindle.runtime.program import Bucket, Instruction, Message, Op, Program, SliceRun, Transfer


def check_program(program: Program) -> None:
    """Raise ProgramError naming the first broken laws, with the stuck ranks where there are any."""
    findings = list(broken_laws(program))
    if findings:
        more = f"\n(and {len(findings) - 5} more)" if len(findings) > 5 else ""
        raise ProgramError(
            "the program breaks the runtime's laws, so it was not started; this is a bug of Spindle unless the program "
            "was edited:\n" + "\n".join(findings[:5]) + more
        )


def broken_laws(program: Program) -> Iterator[str]:
    """Everything wrong with a program, in words."""
    findings = list(_names_resolve(program))
    yield from findings
    if findings:
        return  # the rest looks names up
    places = _places(program)
    yield from _runs_complete(program, places)
    yield from _batches_loaded(program, places)
    yield from _samples_covered(program)
    yield from _transfers_complete(program, places)
    yield from _parameters_reduced(program, places)
    yield from _buffers_sound(program)
    stuck = list(_stuck(program))
    if stuck:
        yield from _different_orders(program)
        yield from stuck


_TABLES_BY_OP = {
    Op.FORWARD: ("slice_by_name",),
    Op.BACKWARD: ("slice_by_name",),
    Op.TRANSFER: ("transfer_by_name",),
    Op.AWAIT: ("transfer_by_name", "bucket_by_name"),
    Op.REDUCE: ("bucket_by_name",),
}

Places = dict[Instruction, dict[int, list[int]]]
"""Where each instruction stands: positions by rank."""


def _places(program: Program) -> Places:
    found: Places = {}
    for rank, instructions in enumerate(program.instructions):
        for position, instruction in enumerate(instructions):
            found.setdefault(instruction, {}).setdefault(rank, []).append(position)
    return found


def _names_resolve(program: Program) -> Iterator[str]:
    """Every name stands for one thing, and whatever is named exists, ranks too."""
    awaited = [*(t.name for t in program.transfers), *(b.name for b in program.buckets)]
    tensors, runs = [t.name for t in program.tensors], [run.name for run in program.slices]
    for what, names in (("tensor", tensors), ("slice run", runs), ("transfer or bucket", awaited)):
        twice = (name for name, count in Counter(names).items() if count > 1)
        yield from (f"{what} {name!r} stands in the program more than once" for name in twice)
    for rank, instructions in enumerate(program.instructions):
        for instruction in instructions:
            tables = _TABLES_BY_OP.get(instruction.op)
            if tables and not any(instruction.target in getattr(program, table) for table in tables):
                yield f"rank {rank}, {instruction}: the program has no {instruction.target!r}"
    for user, used, members in _named(program):
        for tensor in used:
            if tensor not in program.tensor_by_name:
                yield f"{user} names tensor {tensor!r}, which the program does not have"
        if not members or not set(members) <= set(range(program.num_ranks)) or len(set(members)) != len(members):
            yield f"{user} names ranks {list(members)}; name at least one of 0 .. {program.num_ranks - 1}, each once"
    for run in program.slices:
        if len(run.bounds) != len(run.ranks):
            yield f"slice run {run.name!r} has {len(run.bounds)} bounds for {len(run.ranks)} ranks"
    for transfer in program.transfers:
        for name in (transfer.source, transfer.target):
            if name not in program.slice_by_name:
                yield f"transfer {transfer.name!r} names slice run {name!r}, which the program does not have"
    made = {tensor: run.task for run in program.slices for tensor in run.outputs}
    for task, tensor in program.losses:
        if made.get(tensor) != task:
            yield f"the loss of task {task!r} is {tensor!r}, which no slice run of that task gives out"
        if task not in dict(program.weights):
            yield f"the loss of task {task!r} has no weight"
    tasks = dict.fromkeys(run.task for run in program.slices)
    yield from (f"task {task!r} has no loss" for task in tasks if task not in dict(program.losses))


def _named(program: Program) -> Iterator[tuple[str, Collection[str], Collection[int]]]:
    """Who names which tensors and which ranks."""
    for run in program.slices:
        yield f"slice run {run.name!r}", (*run.inputs, *run.outputs), run.ranks
    for transfer in program.transfers:
        if transfer.messages:
            tensors = {message.tensor for message in transfer.messages}
            yield f"transfer {transfer.name!r}", sorted(tensors), sorted(transfer.members())
    for bucket in program.buckets:
        yield f"bucket {bucket.name!r}", (), bucket.ranks


def _runs_complete(program: Program, places: Places) -> Iterator[str]:
    """Each run goes forward once on each of its ranks, and backward once if it has to; nowhere else."""
    for run in program.slices:
        for op, ranks in ((Op.FORWARD, run.ranks), (Op.BACKWARD, run.ranks if run.backward else ())):
            yield from _exactly_once(Instruction(op, run.name), ranks, places)
    yield from _exactly_once(Instruction(Op.STEP), range(program.num_ranks), places)
    clipping = range(program.num_ranks if program.max_grad_norm is not None else 0)
    yield from _exactly_once(Instruction(Op.CLIP), clipping, places)
    for rank, instructions in enumerate(program.instructions):
        ops = [x.op for x in instructions if x.op is not Op.GATHER]
        if ops[-1:] != [Op.STEP]:
            yield f"rank {rank} does not end with STEP"
        if Op.CLIP in ops[:-2]:
            yield f"rank {rank} clips gradients before the last of them is reduced"


def _batches_loaded(program: Program, places: Places) -> Iterator[str]:
    """A rank loads each task that its runs read fields of once, before the first of them; no other rank does."""
    readers: dict[str, dict[int, int]] = {}
    for run in program.slices:
        for rank in run.ranks if run.loads else ():
            (position, *_) = places.get(Instruction(Op.FORWARD, run.name), {}).get(rank, [0])
            first = readers.setdefault(run.task, {})
            first[rank] = min(position, first.get(rank, position))
    loaded = {i.target for instructions in program.instructions for i in instructions if i.op is Op.LOAD}
    for task in sorted(readers.keys() | loaded):
        load = Instruction(Op.LOAD, task)
        yield from _exactly_once(load, readers.get(task, {}), places)
        for rank, position in readers.get(task, {}).items():
            if places.get(load, {}).get(rank, [position])[0] > position:
                yield f"rank {rank} reads the batch of task {task!r} before LOAD {task}"


def _exactly_once(instruction: Instruction, ranks: Collection[int], places: Places) -> Iterator[str]:
    found = places.get(instruction, {})
    for rank in sorted({*ranks, *found}):
        if len(found.get(rank, ())) != (rank in ranks):
            yield f"rank {rank} does {instruction} {len(found.get(rank, ()))} times, not {int(rank in ranks)}"


def _samples_covered(program: Program) -> Iterator[str]:
    """The ranks of a run hold the batch between them, and are given exactly the samples that they hold."""
    maker = {tensor: run for run in program.slices for tensor in run.outputs}
    received: dict[tuple[str, str, int], list[Message]] = {}
    for transfer in program.transfers:
        if not transfer.backward:
            for message in transfer.messages:
                received.setdefault((message.tensor, transfer.target, message.target), []).append(message)
    for run in program.slices:
        shared, parts = [bounds for _, bounds in run.copies()], run.tensor_parallel
        ends = [0, *(high for _, high in shared)]
        if [low for low, _ in shared] != ends[:-1] or any(low >= high for low, high in shared):
            yield f"slice run {run.name}: bounds {run.bounds} do not divide the batch"
        if list(run.bounds) != [bounds for bounds in shared for _ in range(parts)] or len(run.ranks) % parts:
            yield f"slice run {run.name}: the {parts} ranks of a copy do not hold the same samples"
        for tensor in run.inputs:
            if tensor not in maker:
                yield f"slice run {run.name} reads {tensor!r}, which no run gives out"
                continue
            for rank in run.ranks:
                yield from _covered(
                    program, tensor, maker[tensor], run, rank, received.get((tensor, run.name, rank), [])
                )


def _covered(
    program: Program, tensor: str, source: SliceRun, target: SliceRun, rank: int, messages: list[Message]
) -> Iterator[str]:
    spec = program.tensor_by_name[tensor]
    where = f"{tensor!r} for {target.name} on rank {rank}"
    if not spec.rows:
        copies = len(messages) + (rank == source.ranks[0])
        if copies != 1:
            yield f"{where}: {copies} copies arrive, not 1"
        return
    pieces = [(message.low, message.high) for message in messages]
    for message in messages:
        held = source.bounds_of(message.source) if message.source in source.ranks else (0, 0)
        if not held[0] <= message.low < message.high <= held[1]:
            yield f"{where}: rank {message.source} sends samples {message.low}..{message.high} but holds {held}"
    low, high = target.bounds_of(rank)
    if rank in source.ranks:
        first, last = source.bounds_of(rank)
        if max(low, first) < min(high, last):
            pieces.append((max(low, first), min(high, last)))
    position = low
    for begin, end in sorted(pieces):
        if begin != position:
            break
        position = end
    if position != high or sum(end - begin for begin, end in pieces) != high - low:
        yield f"{where}: pieces {sorted(pieces)} do not make up samples {low}..{high}"


def _transfers_complete(program: Program, places: Places) -> Iterator[str]:
    """Both sides start each transfer once; who receives waits for it once, afterwards; no rank sends to itself."""
    for transfer in program.transfers:
        for message in transfer.messages:
            if message.source == message.target:
                yield f"transfer {transfer.name}: rank {message.source} sends {message.tensor!r} to itself"
        start, wait = Instruction(Op.TRANSFER, transfer.name), Instruction(Op.AWAIT, transfer.name)
        yield from _exactly_once(start, transfer.members(), places)
        yield from _exactly_once(wait, {message.target for message in transfer.messages}, places)
        for rank, positions in places.get(wait, {}).items():
            if positions[0] < places.get(start, {}).get(rank, [-1])[0]:
                yield f"rank {rank} waits for transfer {transfer.name} before it starts it"
    for transfer in program.transfers:
        yield from _ends_agree(program, transfer)
    yield from _gradients_return(program)
    yield from _shares_return(program)


def _ends_agree(program: Program, transfer: Transfer) -> Iterator[str]:
    """A transfer carries what its source makes and its target takes, between ranks of theirs."""
    source, target = program.slice_by_name[transfer.source], program.slice_by_name[transfer.target]
    makes, takes = (source.inputs, target.outputs) if transfer.backward else (source.outputs, target.inputs)
    for m in transfer.messages:
        what = f"transfer {transfer.name}: {m.tensor!r} goes from rank {m.source} to rank {m.target}"
        if m.tensor not in makes or m.tensor not in takes:
            yield f"{what}, but it does not pass from {source.name} to {target.name}"
        if m.source not in source.ranks or m.target not in target.ranks:
            yield f"{what}, but {source.name} is on ranks {source.ranks}, {target.name} on {target.ranks}"


def _gradients_return(program: Program) -> Iterator[str]:
    """For each message with a gradient to come, the same samples go back the same way, once; no others do."""
    due: Counter[tuple[str, str, str, int, int, int, int]] = Counter()
    for transfer in program.transfers:
        if any(program.slice_by_name[run].tensor_parallel > 1 for run in (transfer.source, transfer.target)):
            continue  # copies of several ranks: see _shares_return
        for m in transfer.messages:
            if transfer.backward:
                due[m.tensor, transfer.target, transfer.source, m.target, m.source, m.low, m.high] -= 1
            elif program.slice_by_name[transfer.target].backward and program.tensor_by_name[m.tensor].needs_grad:
                due[m.tensor, transfer.source, transfer.target, m.source, m.target, m.low, m.high] += 1
    for (tensor, source, target, sender, receiver, low, high), count in due.items():
        way = f"from {target} on rank {receiver} to {source} on rank {sender}"
        what = f"gradient of {tensor!r}, samples {low}..{high}, {way}"
        if count > 0:
            yield f"{what}: never goes back"
        elif count < 0:
            yield f"{what}: goes back where it never came from"


def _shares_return(program: Program) -> Iterator[str]:
    """Where a run is tensor parallel: each rank of a source gets each of its samples' gradients once a reader."""
    maker = {tensor: run for run in program.slices for tensor in run.outputs}
    sent: dict[tuple[str, str, str, int], list[Message]] = {}
    for transfer in (t for t in program.transfers if t.backward):
        for m in transfer.messages:
            sent.setdefault((m.tensor, transfer.source, transfer.target, m.target), []).append(m)
    for reader in (run for run in program.slices if run.backward):
        for tensor in (name for name in reader.inputs if program.tensor_by_name[name].needs_grad and name in maker):
            source = maker[tensor]
            if max(source.tensor_parallel, reader.tensor_parallel) == 1:
                continue
            for rank in source.ranks:
                messages = sent.get((tensor, reader.name, source.name, rank), [])
                yield from _returned(program, tensor, source, reader, rank, messages)


def _returned(
    program: Program, tensor: str, source: SliceRun, reader: SliceRun, rank: int, messages: list[Message]
) -> Iterator[str]:
    where = f"gradient of {tensor!r} from {reader.name} for {source.name} on rank {rank}"
    if not program.tensor_by_name[tensor].rows:
        leaders = {ranks[0] for ranks, _ in reader.copies()} if rank == source.ranks[0] else set()
        if sorted(m.source for m in messages) != sorted(leaders - {rank}):
            yield f"{where}: comes from ranks {sorted(m.source for m in messages)}, not {sorted(leaders - {rank})}"
        return
    pieces = [(m.low, m.high) for m in messages]
    (low, high) = source.bounds_of(rank)
    if rank in reader.ranks:
        first, last = reader.bounds_of(rank)
        if max(low, first) < min(high, last):
            pieces.append((max(low, first), min(high, last)))
    for m in messages:
        held = reader.bounds_of(m.source) if m.source in reader.ranks else (0, 0)
        if not held[0] <= m.low < m.high <= held[1]:
            yield f"{where}: rank {m.source} sends samples {m.low}..{m.high} but holds {held}"
    ends = [low, *(end for _, end in sorted(pieces))]
    if [begin for begin, _ in sorted(pieces)] != ends[:-1] or ends[-1] != high:
        yield f"{where}: pieces {sorted(pieces)} do not make up samples {low}..{high}"


def _parameters_reduced(program: Program, places: Places) -> Iterator[str]:
    """Each bucket is reduced once by exactly its ranks, after the last backward that adds to it, and waited for."""
    seen: Counter[str] = Counter(name for bucket in program.buckets for name in bucket.parameters)
    yield from (f"parameter {name!r} stands in {count} buckets" for name, count in seen.items() if count > 1)
    trained = dict.fromkeys((name, run.name) for run in program.slices for name in run.trained)
    yield from (
        f"parameter {name!r}, which {run} trains, stands in no bucket: it would be neither reduced nor updated"
        for name, run in trained
        if name not in seen
    )
    for bucket in program.buckets:
        reduce, wait = Instruction(Op.REDUCE, bucket.name), Instruction(Op.AWAIT, bucket.name)
        runs = [run for run in program.slices if set(run.trained) & set(bucket.parameters)]
        members = bucket.ranks if len(bucket.ranks) > 1 and runs else ()
        yield from (
            f"{run.name} on rank {rank} trains parameters of bucket {bucket.name}, which rank {rank} does not hold"
            for run in runs
            for rank in run.ranks
            if rank not in bucket.ranks and set(run.trained_on(rank)) & set(bucket.parameters)
        )
        yield from _exactly_once(reduce, members, places)
        yield from _exactly_once(wait, members, places)
        yield from _updates_shared(program, bucket, members, places)
        for rank, (position, *_) in places.get(reduce, {}).items():
            for run in runs:
                (last, *_) = places.get(Instruction(Op.BACKWARD, run.name), {}).get(rank, [-1])
                if position < last:
                    yield f"rank {rank} reduces bucket {bucket.name} before BACKWARD {run.name}, which adds to it"
            if places.get(wait, {}).get(rank, [position])[0] < position:
                yield f"rank {rank} waits for bucket {bucket.name} before it reduces it"


def _updates_shared(program: Program, bucket: Bucket, members: Collection[int], places: Places) -> Iterator[str]:
    """What one rank updates for others they take from it once, after the step."""
    gather, step = Instruction(Op.GATHER, bucket.name), places.get(Instruction(Op.STEP), {})
    yield from _exactly_once(gather, members if bucket.owner is not None else (), places)
    if bucket.owner is not None and bucket.owner not in bucket.ranks:
        yield f"bucket {bucket.name} is owned by rank {bucket.owner}, which does not hold it"
    for rank, (position, *_) in places.get(gather, {}).items():
        if position < step.get(rank, [-1])[0]:
            yield f"rank {rank} takes the parameters of bucket {bucket.name} before they are updated"


def _buffers_sound(program: Program) -> Iterator[str]:
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
            sends = any(message.source == rank for message in transfer.messages)
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
            if transfer.backward is backward and any(message.target == rank for message in transfer.messages):
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
    overlap = max(low, first) < min(high, last)
    for name in set(source.outputs) & set(target.inputs):
        tensor = program.tensor_by_name[name]
        whole = rank == source.ranks[0] and (not gradient or rank == target.copy_of(rank)[0])
        if (overlap if tensor.rows else whole) and (tensor.needs_grad or not gradient):
            return True
    return False


def _members(program: Program) -> dict[str, frozenset[int]]:
    """Ranks that take part in each transfer, reduction, and in the clipping (whose target is empty)."""
    everyone = {"": frozenset(range(program.num_ranks))}
    transfers = {transfer.name: transfer.members() for transfer in program.transfers}
    return everyone | transfers | {bucket.name: frozenset(bucket.ranks) for bucket in program.buckets}


def _different_orders(program: Program) -> Iterator[str]:
    """Pairs of ranks that meet what they do together in different orders."""
    members = _members(program)
    together = [
        [i.target for i in instructions if i.op in (Op.TRANSFER, Op.REDUCE, Op.CLIP, Op.GATHER)]
        for instructions in program.instructions
    ]
    for a in range(program.num_ranks):
        for b in range(a + 1, program.num_ranks):
            of_a, of_b = ([name for name in together[r] if {a, b} <= members[name]] for r in (a, b))
            for name_a, name_b in zip(of_a, of_b, strict=False):
                if name_a != name_b:
                    yield f"ranks {a} and {b} meet in different orders: {a} is at {name_a!r} when {b} is at {name_b!r}"
                    break


def _stuck(program: Program) -> Iterator[str]:
    """Step all ranks together; name the instruction at which each stuck rank stands."""
    members = _members(program)
    together = (Op.TRANSFER, Op.REDUCE, Op.CLIP, Op.GATHER)
    position = [0] * program.num_ranks

    def meeting(rank: int, instruction: Instruction) -> frozenset[int]:
        run = program.slice_by_name.get(instruction.target)
        if run is not None and run.tensor_parallel > 1 and rank in run.ranks:
            return frozenset(run.copy_of(rank))
        return members[instruction.target] if instruction.op in together else frozenset()

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
