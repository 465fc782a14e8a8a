"""Laws: a Program in, every law that it breaks out, in words. It runs first, and shares no code with what made it.

What these checks find, a network would answer with a hang or a dead process.

places    where each instruction stands, and how often it should; ranks that do the same are looked at once
tables    names, runs, batches, parameters
flow      samples and their gradients: all of them, once, from who has them
flats     sharded parameters, gathered when they are used and scattered once
states    what runs change besides gradients, in the order of one process
order     buffers, and who waits for whom
turns     one after another, as in one process
"""

from collections.abc import Iterator

from spindle.errors import ProgramError
from spindle.runtime.laws.flats import flats_sound
from spindle.runtime.laws.flow import samples_covered, transfers_complete
from spindle.runtime.laws.order import buffers_sound, different_orders, stuck_ranks
from spindle.runtime.laws.places import Places
from spindle.runtime.laws.states import parameters_written, states_in_order, statistics_tallied
from spindle.runtime.laws.tables import batches_loaded, names_resolve, parameters_reduced, runs_complete
from spindle.runtime.laws.turns import turns_in_order
from spindle.runtime.programs.program import Program

__all__ = ["broken_laws", "check_program"]


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
    places = Places(program)
    findings = list(names_resolve(program, places))
    yield from findings
    if findings:
        return  # the rest looks names up
    yield from runs_complete(program, places)
    yield from batches_loaded(program, places)
    yield from samples_covered(program)
    yield from transfers_complete(program, places)
    yield from parameters_reduced(program, places)
    yield from flats_sound(program, places)
    yield from statistics_tallied(program, places)
    yield from states_in_order(program, places)
    yield from turns_in_order(program, places)
    yield from parameters_written(program, places)
    yield from buffers_sound(program, places)
    stuck = list(stuck_ranks(program, places))
    if stuck:
        yield from different_orders(program)
        yield from stuck
