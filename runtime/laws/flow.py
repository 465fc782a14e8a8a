"""Flow: each rank is given exactly the samples that it works on, and their gradients go back the way they came."""

from collections import Counter
from collections.abc import Iterator

from spindle.runtime.laws.places import Places, exactly_once
from spindle.runtime.programs.program import Instruction, Message, Op, Program, SliceRun, Transfer


def samples_covered(program: Program) -> Iterator[str]:
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
            source, cut = maker[tensor], program.tensor_by_name[tensor].rows > 0
            alike = cut and (source.ranks, source.bounds) == (run.ranks, run.bounds)
            for rank in run.ranks:
                if alike and (tensor, run.name, rank) not in received:
                    continue  # it has exactly the samples that it needs
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
        held = source.bounds_of(message.source) if message.source in source.place else (0, 0)
        if not held[0] <= message.low < message.high <= held[1]:
            yield f"{where}: rank {message.source} sends samples {message.low}..{message.high} but holds {held}"
    low, high = target.bounds_of(rank)
    if rank in source.place:
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


def transfers_complete(program: Program, places: Places) -> Iterator[str]:
    """Both sides start each transfer once; who receives waits for it once, afterwards; no rank sends to itself."""
    for transfer in program.transfers:
        for message in transfer.messages:
            if message.source == message.target:
                yield f"transfer {transfer.name}: rank {message.source} sends {message.tensor!r} to itself"
        start, wait = Instruction(Op.TRANSFER, transfer.name), Instruction(Op.AWAIT, transfer.name)
        yield from exactly_once(start, transfer.members(), places)
        yield from exactly_once(wait, transfer.receiving(), places)
        for kind, positions in places.at(wait).items():
            if positions[0] < places.at(start).get(kind, [-1])[0]:
                what = f"waits for transfer {transfer.name} before it starts it"
                yield from (f"rank {rank} {what}" for rank in places.kinds[kind])
    for transfer in program.transfers:
        yield from _ends_agree(program, transfer)
    yield from _ends_suffice(program)
    yield from _gradients_return(program)
    yield from _shares_return(program)


def _ends_agree(program: Program, transfer: Transfer) -> Iterator[str]:
    """A transfer carries what its source makes and its target takes, between ranks of theirs."""
    source, target = program.slice_by_name[transfer.source], program.slice_by_name[transfer.target]
    ends = (source.inputs, target.outputs) if transfer.backward else (source.outputs, target.inputs)
    makes, takes = map(frozenset, ends)
    for m in transfer.messages:
        what = f"transfer {transfer.name}: {m.tensor!r} goes from rank {m.source} to rank {m.target}"
        if m.tensor not in makes or m.tensor not in takes:
            yield f"{what}, but it does not pass from {source.name} to {target.name}"
        if m.source not in source.place or m.target not in target.place:
            yield f"{what}, but {source.name} is on ranks {source.ranks}, {target.name} on {target.ranks}"


def _ends_suffice(program: Program) -> Iterator[str]:
    """Where the bounds of a run vary, every rank that may then hold samples of a tensor can send and receive them."""
    can: dict[tuple[str, str, bool], tuple[set[int], set[int]]] = {}
    for transfer in program.transfers:
        senders, receivers = can.setdefault((transfer.source, transfer.target, transfer.backward), (set(), set()))
        senders.update(transfer.sending())
        receivers.update(transfer.receiving())
    maker = {tensor: run for run in program.slices for tensor in run.outputs}
    for target in program.slices:
        for tensor in (name for name in target.inputs if name in maker):
            source, spec = maker[tensor], program.tensor_by_name[tensor]
            makers, readers = _ends(source, target, is_cut=spec.rows > 0)
            for backward in (False, True) if target.backward and spec.needs_grad else (False,):
                first, second = (target, source) if backward else (source, target)
                needed = (readers, makers) if backward else (makers, readers)
                found = can.get((first.name, second.name, backward), (set(), set()))
                for ranks, others, verb in zip(needed, found, ("send", "receive"), strict=True):
                    if missing := sorted(ranks - others):
                        what = f"{'gradient of ' if backward else ''}{tensor!r} from {first.name} to {second.name}"
                        yield f"{what}: bounds vary, so ranks {missing} may have to {verb} it, but no transfer says so"


def _ends(source: SliceRun, target: SliceRun, *, is_cut: bool) -> tuple[set[int], set[int]]:
    """Ranks that may send a tensor to others and that may receive it, where bounds vary; none where they do not."""
    alike = all(
        getattr(source, name) == getattr(target, name) for name in ("ranks", "tensor_parallel", "varies", "weigh_by")
    )
    if not (source.varies or target.varies) or (is_cut and alike):
        return set(), set()
    makers, readers = {*(source.ranks if is_cut else source.ranks[:1])}, {*target.ranks}
    return _with_others(makers, readers), _with_others(readers, makers)


def _with_others(ranks: set[int], others: set[int]) -> set[int]:
    """Those of `ranks` that are not all of `others`."""
    return ranks if len(others) > 1 else {rank for rank in ranks if others - {rank}}


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
        leaders = {*reader.ranks[:: reader.tensor_parallel]} if rank == source.ranks[0] else set[int]()
        if sorted(m.source for m in messages) != sorted(leaders - {rank}):
            yield f"{where}: comes from ranks {sorted(m.source for m in messages)}, not {sorted(leaders - {rank})}"
        return
    pieces = [(m.low, m.high) for m in messages]
    (low, high) = source.bounds_of(rank)
    if rank in reader.place:
        first, last = reader.bounds_of(rank)
        if max(low, first) < min(high, last):
            pieces.append((max(low, first), min(high, last)))
    for m in messages:
        held = reader.bounds_of(m.source) if m.source in reader.place else (0, 0)
        if not held[0] <= m.low < m.high <= held[1]:
            yield f"{where}: rank {m.source} sends samples {m.low}..{m.high} but holds {held}"
    ends = [low, *(end for _, end in sorted(pieces))]
    if [begin for begin, _ in sorted(pieces)] != ends[:-1] or ends[-1] != high:
        yield f"{where}: pieces {sorted(pieces)} do not make up samples {low}..{high}"
