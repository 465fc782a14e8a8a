"""Places: where each instruction of a program stands."""

from collections.abc import Collection, Iterator

from spindle.runtime.programs.program import Instruction, Program

Places = dict[Instruction, dict[int, list[int]]]
"""Where each instruction stands: positions by rank."""


def places_of(program: Program) -> Places:
    """Of all instructions."""
    found: Places = {}
    for rank, instructions in enumerate(program.instructions):
        for position, instruction in enumerate(instructions):
            found.setdefault(instruction, {}).setdefault(rank, []).append(position)
    return found


def exactly_once(instruction: Instruction, ranks: Collection[int], places: Places) -> Iterator[str]:
    """What is wrong unless exactly `ranks` do `instruction`, each once."""
    found = places.get(instruction, {})
    for rank in sorted({*ranks, *found}):
        if len(found.get(rank, ())) != (rank in ranks):
            yield f"rank {rank} does {instruction} {len(found.get(rank, ()))} times, not {int(rank in ranks)}"
