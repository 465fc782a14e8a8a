"""Tables: every name stands for one thing; runs, batches and parameters are done once, by exactly who holds them."""

from collections import Counter
from collections.abc import Collection, Iterator

from spindle.runtime.laws.places import Places, exactly_once
from spindle.runtime.programs.program import Bucket, Instruction, Op, Program, SliceRun

_TABLES_BY_OP = {
    Op.FORWARD: ("slice_by_name",),
    Op.BACKWARD: ("slice_by_name",),
    Op.TRANSFER: ("transfer_by_name",),
    Op.AWAIT: ("transfer_by_name", "bucket_by_name", "flat_by_name", "flags_by_name"),
    Op.UNSHARD: ("flat_by_name",),
    Op.RESHARD: ("flat_by_name",),
    Op.SCATTER: ("flat_by_name",),
    Op.ADD: ("flat_by_name",),
    Op.REDUCE: ("bucket_by_name", "flags_by_name"),
    Op.GATHER: ("bucket_by_name",),
    Op.TALLY: ("tally_by_name",),
    Op.HAND: ("handover_by_name",),
    Op.WRITE: ("write_by_name",),
}


def names_resolve(program: Program, places: Places) -> Iterator[str]:
    """Every name stands for one thing, and whatever is named exists, ranks too."""
    awaited = [named.name for table in (program.transfers, program.buckets, program.flats) for named in table]
    together = [
        *(t.name for t in program.tallies),
        *(h.name for h in program.handovers),
        *(w.name for w in program.writes),
    ]
    tensors, runs = [t.name for t in program.tensors], [run.name for run in program.slices]
    for what, names in (
        ("tensor", tensors),
        ("slice run", runs),
        ("transfer, bucket or flat", awaited),
        ("tally, handover or write", together),
    ):
        twice = (name for name, count in Counter(names).items() if count > 1)
        yield from (f"{what} {name!r} stands in the program more than once" for name in twice)
    for ranks, instructions in zip(places.kinds, places.lists, strict=True):
        for instruction in instructions:
            tables = _TABLES_BY_OP.get(instruction.op)
            if tables and not any(instruction.target in getattr(program, table) for table in tables):
                yield from (f"rank {r}, {instruction}: the program has no {instruction.target!r}" for r in ranks)
    every = frozenset(range(program.num_ranks))
    for user, used, members in _named(program):
        for tensor in used:
            if tensor not in program.tensor_by_name:
                yield f"{user} names tensor {tensor!r}, which the program does not have"
        if not members or not every.issuperset(members) or len(set(members)) != len(members):
            yield f"{user} names ranks {list(members)}; name at least one of 0 .. {program.num_ranks - 1}, each once"
    for run in program.slices:
        if len(run.bounds) != len(run.ranks):
            yield f"slice run {run.name!r} has {len(run.bounds)} bounds for {len(run.ranks)} ranks"
        for name in run.flats:
            if name not in program.flat_by_name:
                yield f"slice run {run.name!r} names flat {name!r}, which the program does not have"
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
    for flat in program.flats:
        yield f"flat {flat.name!r}", (), flat.ranks
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
        for op, doing in ((Op.FORWARD, run.ranks), (Op.BACKWARD, run.ranks if run.backward else ())):
            yield from exactly_once(Instruction(op, run.name), doing, places)
    yield from exactly_once(Instruction(Op.STEP), range(program.num_ranks), places)
    yield from exactly_once(Instruction(Op.AGREE), range(program.num_ranks if program.num_ranks > 1 else 0), places)
    clipping = range(program.num_ranks if program.max_grad_norm is not None else 0)
    yield from exactly_once(Instruction(Op.CLIP), clipping, places)
    for ranks, instructions in zip(places.kinds, places.lists, strict=True):
        ops = [x.op for x in instructions if x.op is not Op.GATHER]
        if ops[-1:] != [Op.STEP]:
            yield from (f"rank {rank} does not end with STEP" for rank in ranks)
        if Op.CLIP in ops[:-2]:
            yield from (f"rank {rank} clips gradients before the last of them is reduced" for rank in ranks)


def batches_loaded(program: Program, places: Places) -> Iterator[str]:
    """A rank loads each task that its runs read fields of once, before the first of them; no other rank does."""
    readers: dict[str, set[int]] = {}
    first: dict[str, dict[int, int]] = {}  # where a kind of ranks first reads a task
    for run in (run for run in program.slices if run.loads):
        readers.setdefault(run.task, set()).update(run.ranks)
        for kind, (position, *_) in places.at(Instruction(Op.FORWARD, run.name)).items():
            own = first.setdefault(run.task, {})
            own[kind] = min(position, own.get(kind, position))
    loaded = {i.target for instructions in places.lists for i in instructions if i.op is Op.LOAD}
    for ranks, instructions in zip(places.kinds, places.lists, strict=True):
        ops = [x.op for x in instructions]
        if Op.AGREE in ops and Op.LOAD in ops[ops.index(Op.AGREE) :]:
            yield from (f"rank {rank} loads a batch after the ranks have agreed on theirs" for rank in ranks)
        if Op.AGREE in ops and set(ops[: ops.index(Op.AGREE)]) - {Op.LOAD}:
            yield from (f"rank {rank} begins before the ranks have agreed on their batches" for rank in ranks)
    for task in sorted(readers.keys() | loaded):
        load = Instruction(Op.LOAD, task)
        yield from exactly_once(load, readers.get(task, ()), places)
        for kind, position in first.get(task, {}).items():
            if places.at(load).get(kind, [position])[0] > position:
                yield from (
                    f"rank {rank} reads the batch of task {task!r} before LOAD {task}" for rank in places.kinds[kind]
                )


def parameters_reduced(program: Program, places: Places) -> Iterator[str]:
    """Each bucket is reduced once by exactly its ranks, after the last backward that adds to it, and waited for."""
    seen: Counter[str] = Counter(name for bucket in program.buckets for name in bucket.parameters)
    yield from (f"parameter {name!r} stands in {count} buckets" for name, count in seen.items() if count > 1)
    flats = {flat.name: frozenset(flat.parameters) for flat in program.flats}
    trained = ((name, run) for run in program.slices for name in run.trained if name not in seen)
    yield from dict.fromkeys(
        f"parameter {name!r}, which {run.name} trains, stands in no bucket and in no flat of the run: it would be "
        "neither reduced nor updated"
        for name, run in trained
        if not any(name in flats[flat] for flat in run.flats)
    )
    runs_of = _runs_by_bucket(program)
    for bucket in program.buckets:
        reduce, wait = Instruction(Op.REDUCE, bucket.name), Instruction(Op.AWAIT, bucket.name)
        runs, held, holders = runs_of[bucket.name], frozenset(bucket.parameters), frozenset(bucket.ranks)
        members = bucket.ranks if len(bucket.ranks) > 1 and runs else ()
        yield from (
            f"{run.name} on rank {rank} trains parameters of bucket {bucket.name}, which rank {rank} does not hold"
            for run in runs
            for rank in (() if holders.issuperset(run.ranks) else run.ranks)
            if rank not in holders and held.intersection(run.trained_on(rank))
        )
        yield from exactly_once(reduce, members, places)
        yield from exactly_once(wait, members, places)
        yield from _updates_shared(program, bucket, members, places)
        at = places.at(reduce)
        for run in runs:
            for kind, (last, *_) in places.at(Instruction(Op.BACKWARD, run.name)).items():
                if at.get(kind, [last])[0] < last:
                    what = f"reduces bucket {bucket.name} before BACKWARD {run.name}, which adds to it"
                    yield from (f"rank {rank} {what}" for rank in places.kinds[kind])
        for kind, (position, *_) in at.items():
            if places.at(wait).get(kind, [position])[0] < position:
                what = f"waits for bucket {bucket.name} before it reduces it"
                yield from (f"rank {rank} {what}" for rank in places.kinds[kind])


def _runs_by_bucket(program: Program) -> dict[str, list[SliceRun]]:
    """For each bucket the runs that train some of its parameters."""
    homes: dict[str, list[str]] = {}
    for bucket in program.buckets:
        for name in bucket.parameters:
            homes.setdefault(name, []).append(bucket.name)
    found: dict[str, list[SliceRun]] = {bucket.name: [] for bucket in program.buckets}
    for run in program.slices:
        for name in dict.fromkeys(home for parameter in run.trained for home in homes.get(parameter, ())):
            found[name].append(run)
    return found


def _updates_shared(program: Program, bucket: Bucket, members: Collection[int], places: Places) -> Iterator[str]:
    """What one rank updates for others they take from it once, after the step."""
    gather, step = Instruction(Op.GATHER, bucket.name), places.at(Instruction(Op.STEP))
    yield from exactly_once(gather, members if bucket.owner is not None else (), places)
    if bucket.owner is not None and bucket.owner not in bucket.ranks:
        yield f"bucket {bucket.name} is owned by rank {bucket.owner}, which does not hold it"
    for kind, (position, *_) in places.at(gather).items():
        if position < step.get(kind, [-1])[0]:
            what = f"takes the parameters of bucket {bucket.name} before they are updated"
            yield from (f"rank {rank} {what}" for rank in places.kinds[kind])
