"""Flats: sharded parameters are there when a run computes with them, and are not kept; each backward's gradients are
summed once, before the step. So are the flags that say which parameters of flats a step has reached.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from spindle.runtime.laws.places import Places, exactly_once
from spindle.runtime.programs.program import Instruction, Op, Program, SliceRun

MOST_RUNS = 2  # whose flats are there at a time on one set of ranks


def flats_sound(program: Program, places: Places) -> Iterator[str]:
    """Tables of flats, and what each kind of ranks does with them."""
    yield from _tables(program)
    yield from _flags_summed(program, places)
    most = MOST_RUNS * _most_flats(program)
    for ranks, instructions in zip(places.kinds, places.lists, strict=True) if program.flats else ():
        for what in _unsound(program, most, instructions):
            yield from (f"rank {rank}{what}" for rank in ranks)
        for name in dict.fromkeys(i.target for i in instructions if i.target in program.flat_by_name):
            strangers = set(ranks).difference(program.flat_by_name[name].ranks)
            yield from (f"rank {rank} does something with flat {name}, of which it keeps nothing" for rank in strangers)


def _tables(program: Program) -> Iterator[str]:
    homes = Counter(name for flat in program.flats for name in flat.parameters)
    yield from (f"parameter {name!r} stands in {count} flats" for name, count in homes.items() if count > 1)
    in_buckets = {name for bucket in program.buckets for name in bucket.parameters}
    yield from (f"parameter {name!r} stands in a flat and in a bucket" for name in homes if name in in_buckets)
    for run in program.slices:
        for name in run.flats:
            flat = program.flat_by_name[name]
            if set(run.ranks) != set(flat.ranks) or run.tensor_parallel > 1:
                yield (
                    f"slice run {run.name} on ranks {run.ranks} uses flat {name}, of which ranks {flat.ranks} keep a "
                    "range each"
                )
            if not flat.trained and not set(run.trained).isdisjoint(flat.parameters):
                yield f"slice run {run.name} trains parameters of flat {name}, which is frozen"


def _flags_summed(program: Program, places: Places) -> Iterator[str]:
    """The ranks of flats that a backward adds to sum their flags once, after the last one, and wait for them."""
    for flags in program.flags_by_name.values():
        reached = frozenset(flags.parameters)
        runs = [run for run in program.slices if run.backward and not reached.isdisjoint(run.trained)]
        start, wait = Instruction(Op.REDUCE, flags.name), Instruction(Op.AWAIT, flags.name)
        yield from exactly_once(start, flags.ranks if runs else (), places)
        yield from exactly_once(wait, flags.ranks if runs else (), places)
        for kind, (position, *_) in places.at(start).items():
            wrong = [
                f"sums {flags.name} before BACKWARD {run.name}, which adds to their parameters"
                for run in runs
                if places.at(Instruction(Op.BACKWARD, run.name)).get(kind, [-1])[-1] > position
            ]
            if places.at(wait).get(kind, [position])[0] < position:
                wrong.append(f"waits for {flags.name} before it sums them")
            yield from (f"rank {rank} {what}" for what in wrong for rank in places.kinds[kind])


@dataclass
class _Held:
    """Where the flats of a rank stand."""

    gathering: set[str] = field(default_factory=set)
    there: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)  # gradients of a backward that are not scattered yet
    summing: set[str] = field(default_factory=set)


def _unsound(program: Program, most: int, instructions: Sequence[Instruction]) -> Iterator[str]:
    held = _Held()
    for instruction in instructions:
        yield from (f", {instruction}: {why}" for why in _wrong(program, most, held, instruction))
        _carry_out(program, held, instruction)
    for what, left in (("released", held.gathering | held.there), ("added", held.given | held.summing)):
        yield from (f": flat {name} is never {what}" for name in sorted(left))


def _wrong(program: Program, most: int, held: _Held, instruction: Instruction) -> Iterator[str]:
    op, name = instruction.op, instruction.target
    if op in (Op.FORWARD, Op.BACKWARD):
        run = program.slice_by_name[name]
        yield from (f"flat {flat} is not there" for flat in run.flats if flat not in held.there)
        giving = _trained(program, run) if op is Op.BACKWARD else set[str]()
        yield from (f"gradients of flat {flat} are not scattered yet" for flat in sorted(giving & held.given))
    elif op in (Op.CLIP, Op.STEP):
        yield from (f"flat {flat} is there from before the update" for flat in sorted(held.gathering | held.there))
        yield from (f"gradients of flat {flat} are not summed yet" for flat in sorted(held.given | held.summing))
    if name not in program.flat_by_name:
        return
    if op is Op.UNSHARD:
        if name in held.gathering | held.there:
            yield "it is gathered already"
        if len(held.gathering) + len(held.there) >= most:
            yield f"more flats would be there than {MOST_RUNS} runs use"
    elif op is Op.AWAIT and name not in held.gathering:
        yield "nobody gathers it"
    elif op is Op.RESHARD and name not in held.there:
        yield "it is not there"
    elif op is Op.RESHARD and name in held.given:
        yield "its gradients are not scattered yet"
    elif op is Op.SCATTER and (name not in held.given or name in held.summing):
        yield "the sum before is not added yet" if name in held.summing else "no backward has given gradients of it"
    elif op is Op.ADD and name not in held.summing:
        yield "nobody sums its gradients"


def _carry_out(program: Program, held: _Held, instruction: Instruction) -> None:
    op, name = instruction.op, instruction.target
    if op is Op.BACKWARD:
        held.given |= _trained(program, program.slice_by_name[name])
    elif op is Op.UNSHARD:
        held.gathering.add(name)
    elif op is Op.AWAIT and name in held.gathering:
        held.gathering.discard(name)
        held.there.add(name)
    elif op is Op.RESHARD:
        held.there.discard(name)
    elif op is Op.SCATTER:
        held.given.discard(name)
        held.summing.add(name)
    elif op is Op.ADD:
        held.summing.discard(name)


def _trained(program: Program, run: SliceRun) -> set[str]:
    """Flats to whose gradients the backward of a run adds."""
    return {name for name in run.flats if not set(run.trained).isdisjoint(program.flat_by_name[name].parameters)}


def _most_flats(program: Program) -> int:
    """Flats that one run uses at most, times the sets of ranks that have some."""
    sets = {flat.ranks for flat in program.flats}
    return len(sets) * max((len(run.flats) for run in program.slices), default=0)
