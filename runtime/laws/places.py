"""Places: where each instruction of a program stands.

Ranks whose instruction lists are one value are of a kind: what is said of the list is said of all of them, and looked
at once. Ranks whose lists are equal but not one value are kinds of their own, which costs time and nothing else.
"""

from collections.abc import Collection, Iterator, Mapping

from spindle.runtime.programs.program import Instruction, Program


class Places:
    """`kinds`: the ranks of each kind; `lists`: their instructions; `kind_of` each rank."""

    def __init__(self, program: Program) -> None:
        numbers: dict[int, int] = {}
        self.kind_of = [numbers.setdefault(id(own), len(numbers)) for own in program.instructions]
        self.kinds: list[list[int]] = [[] for _ in numbers]
        for rank, kind in enumerate(self.kind_of):
            self.kinds[kind].append(rank)
        self.lists = [program.instructions[ranks[0]] for ranks in self.kinds]
        self._at: dict[Instruction, dict[int, list[int]]] = {}
        for kind, instructions in enumerate(self.lists):
            for position, instruction in enumerate(instructions):
                self._at.setdefault(instruction, {}).setdefault(kind, []).append(position)

    def at(self, instruction: Instruction) -> Mapping[int, list[int]]:
        """Positions by kind."""
        return self._at.get(instruction, {})

    def by_rank(self, instruction: Instruction) -> dict[int, list[int]]:
        """Positions by rank."""
        return {rank: at for kind, at in self.at(instruction).items() for rank in self.kinds[kind]}

    def on(self, rank: int, instruction: Instruction) -> list[int]:
        """Positions on a rank."""
        return self.at(instruction).get(self.kind_of[rank], [])


def exactly_once(instruction: Instruction, ranks: Collection[int], places: Places) -> Iterator[str]:
    """What is wrong unless exactly `ranks` do `instruction`, each once."""
    found, wanted = places.at(instruction), frozenset(ranks)
    kinds = [places.kinds[kind] for kind, at in found.items() if len(at) == 1]
    if len(kinds) == len(found) and sum(map(len, kinds)) == len(wanted) and all(map(wanted.issuperset, kinds)):
        return
    positions = places.by_rank(instruction)
    for rank in sorted({*wanted, *positions}):
        if len(positions.get(rank, ())) != (rank in wanted):
            yield f"rank {rank} does {instruction} {len(positions.get(rank, ()))} times, not {int(rank in wanted)}"
