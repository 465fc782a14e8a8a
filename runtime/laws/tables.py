"""Tables: every name stands for one thing; runs, batches and parameters are done once, by exactly who holds them."""

from collections import Counter
from collections.abc import Collection, Iterator

from spindle.runtime.laws.places import Places, exactly_once
from spindle.runtime.programs.program import Bucket, Instruction, Op, Program

_TABLES_BY_OP = {
    Op.FORWARD: ("slice_by_name",),
    Op.BACKWARD: ("slice_by_name",),
    Op.TRANSFER: ("transfer_by_name",),
    Op.AWAIT: ("transfer_by_name", "bucket_by_name"),
    Op.REDUCE: ("bucket_by_name",),
    Op.GATHER: ("bucket_by_name",),
    Op.TALLY: ("tally_by_name",),
    Op.HAND: ("handover_by_name",),
    Op.WRITE: ("write_by_name",),
}


def names_resolve(program: Program) -> Iterator[str]:
    """Every name stands for one thing, and whatever is named exists, ranks too."""
    awaited = [*(t.name for t in program.transfers), *(b.name for b in program.buckets)]
    together = [
        *(t.name for t in program.tallies),
        *(h.name for h in program.handovers),
        *(w.name for w in program.writes),
    ]
    tensors, runs = [t.name for t in program.tensors], [run.name for run in program.slices]
    for what, names in (
        ("tensor", tensors),
        ("slice run", runs),
        ("transfer or bucket", awaited),
        ("tally, handover or write", together),
    ):
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
    for hand in program.handovers:
        if hand.state not in program.state_by_name or hand.before not in ("", *runs):
            yield f"handover {hand.name!r} is of {hand.state!r} before {hand.before!r}, which the program does not have"
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
        if transfer.members():
            tensors = {message.tensor for message in transfer.messages}
            yield f"transfer {transfer.name!r}", sorted(tensors), sorted(transfer.members())
    for bucket in program.buckets:
        yield f"bucket {bucket.name!r}", (), bucket.ranks
    for tally in program.tallies:
        yield f"tally {tally.name!r}", (), tally.ranks
    for state in program.states:
        yield f"state {state.name!r}", (), state.ranks
    for hand in program.handovers:
        yield f"handover {hand.name!r}", (), (hand.source, *hand.targets)
    for write in program.writes:
        yield f"write {write.name!r}", (), write.ranks
        for fetch in write.fetches:
            yield f"write {write.name!r}", (), (fetch.source, *fetch.targets)


def runs_complete(program: Program, places: Places) -> Iterator[str]:
    """Each run goes forward once on each of its ranks, and backward once if it has to; nowhere else."""
    for run in program.slices:
        for op, ranks in ((Op.FORWARD, run.ranks), (Op.BACKWARD, run.ranks if run.backward else ())):
            yield from exactly_once(Instruction(op, run.name), ranks, places)
    yield from exactly_once(Instruction(Op.STEP), range(program.num_ranks), places)
    yield from exactly_once(Instruction(Op.AGREE), range(program.num_ranks if program.num_ranks > 1 else 0), places)
    clipping = range(program.num_ranks if program.max_grad_norm is not None else 0)
    yield from exactly_once(Instruction(Op.CLIP), clipping, places)
    for rank, instructions in enumerate(program.instructions):
        ops = [x.op for x in instructions if x.op is not Op.GATHER]
        if ops[-1:] != [Op.STEP]:
            yield f"rank {rank} does not end with STEP"
        if Op.CLIP in ops[:-2]:
            yield f"rank {rank} clips gradients before the last of them is reduced"


def batches_loaded(program: Program, places: Places) -> Iterator[str]:
    """A rank loads each task that its runs read fields of once, before the first of them; no other rank does."""
    readers: dict[str, dict[int, int]] = {}
    for run in program.slices:
        for rank in run.ranks if run.loads else ():
            (position, *_) = places.get(Instruction(Op.FORWARD, run.name), {}).get(rank, [0])
            first = readers.setdefault(run.task, {})
            first[rank] = min(position, first.get(rank, position))
    loaded = {i.target for instructions in program.instructions for i in instructions if i.op is Op.LOAD}
    for rank, instructions in enumerate(program.instructions):
        ops = [x.op for x in instructions]
        if Op.AGREE in ops and Op.LOAD in ops[ops.index(Op.AGREE) :]:
            yield f"rank {rank} loads a batch after the ranks have agreed on theirs"
        if Op.AGREE in ops and set(ops[: ops.index(Op.AGREE)]) - {Op.LOAD}:
            yield f"rank {rank} begins before the ranks have agreed on their batches"
    for task in sorted(readers.keys() | loaded):
        load = Instruction(Op.LOAD, task)
        yield from exactly_once(load, readers.get(task, {}), places)
        for rank, position in readers.get(task, {}).items():
            if places.get(load, {}).get(rank, [position])[0] > position:
                yield f"rank {rank} reads the batch of task {task!r} before LOAD {task}"


def parameters_reduced(program: Program, places: Places) -> Iterator[str]:
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
        yield from exactly_once(reduce, members, places)
        yield from exactly_once(wait, members, places)
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
    yield from exactly_once(gather, members if bucket.owner is not None else (), places)
    if bucket.owner is not None and bucket.owner not in bucket.ranks:
        yield f"bucket {bucket.name} is owned by rank {bucket.owner}, which does not hold it"
    for rank, (position, *_) in places.get(gather, {}).items():
        if position < step.get(rank, [-1])[0]:
            yield f"rank {rank} takes the parameters of bucket {bucket.name} before they are updated"
