"""States: what runs change besides gradients follows one process, on every rank that holds it."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from spindle.runtime.laws.places import Places, exactly_once
from spindle.runtime.programs.program import Handover, Instruction, Op, Program, SliceRun, State, Write
from spindle.values.graph import base_task, micro_batch


def statistics_tallied(program: Program, places: Places) -> Iterator[str]:
    """Running statistics that several ranks or tasks change are tallied once, by all that hold them, after backward."""
    users: dict[str, list[SliceRun]] = {}
    for run in program.slices:
        for layer in run.statistics:
            users.setdefault(layer, []).append(run)
    home = {layer: tally for tally in program.tallies for layer in tally.layers}
    if len(home) != sum(len(tally.layers) for tally in program.tallies):
        yield "a norm layer stands in more than one tally"
    for layer, runs in users.items():
        ranks = {rank for run in runs for rank in run.ranks}
        spread = len(ranks) > 1 or len({run.task for run in runs}) > 1
        if spread and layer not in home:
            yield f"runs of several ranks or tasks change the statistics of {layer!r}, which stands in no tally"
        if layer in home and not ranks.issubset(home[layer].ranks):
            yield f"tally {home[layer].name} is of ranks {home[layer].ranks}, but ranks {sorted(ranks)} hold {layer!r}"
    for tally in program.tallies:
        runs = [run for layer in tally.layers for run in users.get(layer, ())]
        instruction = Instruction(Op.TALLY, tally.name)
        yield from exactly_once(instruction, tally.ranks if runs else (), places)
        at = places.at(instruction)
        for name in dict.fromkeys(run.name for run in runs):
            for op in (Op.FORWARD, Op.BACKWARD):
                for kind, (last, *_) in places.at(Instruction(op, name)).items():
                    if at.get(kind, [last])[0] < last:
                        what = f"tallies {tally.name} before {op} {name}, which adds to it"
                        yield from (f"rank {rank} {what}" for rank in places.kinds[kind])


def parameters_written(program: Program, places: Places) -> Iterator[str]:
    """All that hold a parameter write to it once: before all runs or after all of them, or at its place in a turn."""
    tasks = {base_task(task) for task, _ in program.losses}
    computing: dict[int, list[int]] = {}  # where a kind of ranks computes
    turns = {run.name: run.turn for run in program.slices}
    for write in program.writes:
        instruction = Instruction(Op.WRITE, write.name)
        yield from exactly_once(instruction, write.members(), places)
        if base_task(write.task) not in tasks:
            yield f"write {write.name} is of task {write.task!r}, which takes no part"
        held = {bucket.ranks for bucket in program.buckets if set(bucket.parameters) & set(write.parameters)}
        yield from (f"ranks {ranks} hold what write {write.name} changes" for ranks in held if ranks != write.ranks)
        for fetch in write.fetches:
            if not set(fetch.targets) <= set(write.ranks) or fetch.source in fetch.targets:
                yield f"write {write.name} fetches {fetch.parameter!r} for ranks {fetch.targets}, not its writers"
        for kind, (position, *_) in places.at(instruction).items():
            if kind not in computing:
                own = enumerate(places.lists[kind])
                computing[kind] = [at for at, other in own if other.op in (Op.FORWARD, Op.BACKWARD)]
            for at in computing[kind]:
                other = places.lists[kind][at]
                if (at > position) == _comes_first(write, other, turns[other.target]):
                    what = f"does {instruction} {'before' if at > position else 'after'} {other}"
                    yield from (f"rank {rank} {what}" for rank in places.kinds[kind])
                    break
    yield from _written_in_turn(program)


def _comes_first(write: Write, computes: Instruction, turn: int) -> bool:
    """Whether what a run computes comes before a write."""
    if write.turn is None or write.turn == turn:
        return computes.op is Op.FORWARD if write.within else write.after
    return turn < write.turn


def _written_in_turn(program: Program) -> Iterator[str]:
    """A write in a turn is of a batch that runs in it; and whatever is written in turns is written so by all."""
    turns = {run.task: run.turn for run in program.slices}
    in_turn: dict[str, bool] = {}
    for write in program.writes:
        for parameter in write.parameters:
            if in_turn.setdefault(parameter, write.turn is not None) != (write.turn is not None):
                yield f"parameter {parameter!r} is written in a turn, and by write {write.name} in the whole round"
        if write.turn is not None and turns.get(write.task, write.turn) != write.turn:
            yield f"write {write.name} is in turn {write.turn}, but task {write.task!r} runs in {turns[write.task]}"


def states_in_order(program: Program, places: Places) -> Iterator[str]:
    """Runs touch a state in the order of one process; each run has it as the one before left it."""
    for handover in program.handovers:
        yield from exactly_once(Instruction(Op.HAND, handover.name), handover.members(), places)
    tasks = list(dict.fromkeys(base_task(task) for task, _ in program.losses))
    held: dict[str, set[int]] = {}
    for run in program.slices:
        for buffer in run.states:
            held.setdefault(buffer, set()).update(run.ranks)
    home = {buffer: state for state in program.states for buffer in state.buffers}
    for buffer, ranks in held.items():
        own = [run for run in program.slices if buffer in run.states]
        turns = [(tasks.index(base_task(run.task)), micro_batch(run.task)) for run in own]
        if turns != sorted(turns):
            yield f"buffer {buffer!r} is touched by runs {[run.name for run in own]}, not in the order of one process"
        if len(ranks) > 1 and buffer not in home:
            yield f"ranks {sorted(ranks)} hold buffer {buffer!r}, which runs change and no state holds"
        if buffer in home:
            yield from _handed(program, home[buffer], buffer, own, places)


def _handed(program: Program, state: State, buffer: str, own: Sequence[SliceRun], places: Places) -> Iterator[str]:
    hands = [hand for hand in program.handovers if hand.state == state.name]
    for before, run in pairwise(own):
        missing = set(run.ranks) - {before.ranks[0]}
        matching = [hand for hand in hands if hand.before == run.name]
        if missing - {rank for hand in matching for rank in hand.targets}:
            yield f"rank {min(missing)} runs {run.name} without buffer {buffer!r} as {before.name} leaves it"
        for hand in matching:
            yield from _stands(hand, before, run, places)
    missing = set(state.ranks) - {own[-1].ranks[0]}
    last = [hand for hand in hands if not hand.before]
    if missing - {rank for hand in last for rank in hand.targets}:
        yield f"rank {min(missing)} never gets buffer {buffer!r} as {own[-1].name} leaves it"
    for hand in last:
        yield from _stands(hand, own[-1], None, places)


def _stands(hand: Handover, before: SliceRun, run: SliceRun | None, places: Places) -> Iterator[str]:
    """The source has run what comes before; targets have not yet run what comes after."""
    handed = Instruction(Op.HAND, hand.name)
    if hand.source != before.ranks[0]:
        yield f"handover {hand.name} comes from rank {hand.source}, but {before.name} leaves it on {before.ranks[0]}"
    made = (places.on(hand.source, Instruction(Op.FORWARD, before.name)) or [-1])[0]
    if (places.on(hand.source, handed) or [made])[0] < made:
        yield f"rank {hand.source} hands {hand.name} on before FORWARD {before.name}"
    for rank in hand.targets if run is not None else ():
        used = (places.on(rank, Instruction(Op.FORWARD, run.name if run else "")) or [-1])[0]
        if used < (places.on(rank, handed) or [used])[0]:
            yield f"rank {rank} does FORWARD {run.name if run else ''} before it has {hand.name}"
