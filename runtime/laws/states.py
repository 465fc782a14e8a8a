"""States: what runs change besides gradients follows one process, on every rank that holds it."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from spindle.graph import base_task, micro_batch
from spindle.runtime.laws.places import Places, exactly_once
from spindle.runtime.programs.program import Handover, Instruction, Op, Program, SliceRun, State


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
        if layer in home and not ranks <= set(home[layer].ranks):
            yield f"tally {home[layer].name} is of ranks {home[layer].ranks}, but ranks {sorted(ranks)} hold {layer!r}"
    for tally in program.tallies:
        runs = [run for layer in tally.layers for run in users.get(layer, ())]
        instruction = Instruction(Op.TALLY, tally.name)
        yield from exactly_once(instruction, tally.ranks if runs else (), places)
        for rank, (position, *_) in places.get(instruction, {}).items():
            for run in runs:
                for op in (Op.FORWARD, Op.BACKWARD):
                    (last, *_) = places.get(Instruction(op, run.name), {}).get(rank, [-1])
                    if position < last:
                        yield f"rank {rank} tallies {tally.name} before {op} {run.name}, which adds to it"


def parameters_written(program: Program, places: Places) -> Iterator[str]:
    """All that hold a parameter write to it once, before all runs or after all of them, with what they read for it."""
    tasks = {base_task(task) for task, _ in program.losses}
    for write in program.writes:
        instruction = Instruction(Op.WRITE, write.name)
        yield from exactly_once(instruction, write.members(), places)
        if write.task not in tasks:
            yield f"write {write.name} is of task {write.task!r}, which takes no part"
        held = {bucket.ranks for bucket in program.buckets if set(bucket.parameters) & set(write.parameters)}
        yield from (f"ranks {ranks} hold what write {write.name} changes" for ranks in held if ranks != write.ranks)
        for fetch in write.fetches:
            if not set(fetch.targets) <= set(write.ranks) or fetch.source in fetch.targets:
                yield f"write {write.name} fetches {fetch.parameter!r} for ranks {fetch.targets}, not those that write"
        for rank, (position, *_) in places.get(instruction, {}).items():
            runs = [
                at
                for at, other in enumerate(program.instructions[rank])
                if other.op in (Op.FORWARD, Op.BACKWARD) and (at > position if write.after else at < position)
            ]
            if runs:
                other = program.instructions[rank][runs[0]]
                yield f"rank {rank} does {instruction} {'before' if write.after else 'after'} {other}"


def states_in_order(program: Program, places: Places) -> Iterator[str]:
    """Runs touch a state in the order of one process; whoever touches it next has it as the last one left it."""
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
    at = places.get(Instruction(Op.HAND, hand.name), {})
    if hand.source != before.ranks[0]:
        yield f"handover {hand.name} comes from rank {hand.source}, but {before.name} leaves it on {before.ranks[0]}"
    made = places.get(Instruction(Op.FORWARD, before.name), {}).get(hand.source, [-1])[0]
    if at.get(hand.source, [made])[0] < made:
        yield f"rank {hand.source} hands {hand.name} on before FORWARD {before.name}"
    for rank in hand.targets if run is not None else ():
        used = places.get(Instruction(Op.FORWARD, run.name if run else ""), {}).get(rank, [-1])[0]
        if used < at.get(rank, [used])[0]:
            yield f"rank {rank} does FORWARD {run.name if run else ''} before it has {hand.name}"
