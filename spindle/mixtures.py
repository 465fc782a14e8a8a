"""Mixtures: some tasks and their weights in; which of them a step draws, the same in every process, out."""

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from math import perm

from spindle.errors import WorkloadError
from spindle.words.whole_numbers import is_whole

MOST_DRAWS = 5040


@dataclass(frozen=True, slots=True)
class Mixture:
    """Of `tasks` each step draws `count` different ones, one after the other, by their `weights`.

    A draw is a function of the run's seed and of the step, so that it comes out alike on all ranks and after a resume.
    """

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    count: int = 1

    def __post_init__(self) -> None:
        wrong = next(
            (pair for pair in zip(self.tasks, self.weights, strict=True) if not 0 < pair[1] < float("inf")), None
        )
        if wrong is not None:
            raise WorkloadError(f"a mixture gives task {wrong[0]!r} the weight {wrong[1]!r}; give a positive number")
        if not is_whole(self.count, 1) or self.count >= len(self.tasks):
            raise WorkloadError(
                f"a mixture of {len(self.tasks)} tasks draws {self.count!r} in each step; draw at least one, and fewer "
                "than there are"
            )

    @classmethod
    def tempered(cls, weights: Mapping[str, float], temperature: float, count: int) -> "Mixture":
        """The mixture in which a task's share grows as its weight to the power of 1 / temperature: as the weights at 1,
        ever more alike above. Raises WorkloadError for weights or a temperature that are not positive.

        >>> Mixture.tempered({"web": 16.0, "books": 1.0}, 4.0, 1).weights
        (0.6666666666666666, 0.3333333333333333)
        """
        if not 0 < temperature < float("inf"):
            raise WorkloadError(
                f"a mixture has temperature {temperature!r}; give a positive number (1: by the weights)"
            )
        given = cls(tuple(weights), tuple(float(weight) for weight in weights.values()), count)
        most = max(given.weights)
        powers = [(weight / most) ** (1 / temperature) for weight in given.weights]
        return cls(given.tasks, tuple(power / sum(powers) for power in powers), count)

    def drawn(self, step: int, seed: int) -> frozenset[str]:
        """The tasks of a step.

        >>> Mixture(("a", "b", "c"), (1, 1, 8)).drawn(3, 0) == Mixture(("a", "b", "c"), (1, 1, 8)).drawn(3, 0)
        True
        """
        source = random.Random(f"{seed}/{step}/{'/'.join(self.tasks)}")
        left = dict(zip(self.tasks, self.weights, strict=True))
        found: list[str] = []
        for _ in range(self.count):
            (name,) = source.choices(list(left), list(left.values()))
            del left[name]
            found.append(name)
        return frozenset(found)

    def only(self, tasks: Collection[str]) -> "Mixture | None":
        """The mixture of those of its tasks that are left; None where a step has all of these."""
        left = [(name, weight) for name, weight in zip(self.tasks, self.weights, strict=True) if name in tasks]
        if len(left) <= self.count:
            return None
        return Mixture(tuple(name for name, _ in left), tuple(weight for _, weight in left), self.count)

    def sets(self) -> dict[frozenset[str], float] | None:
        """How likely each set of tasks is; None where there are too many orders to count through."""
        if perm(len(self.tasks), self.count) > MOST_DRAWS:
            return None
        weights = dict(zip(self.tasks, self.weights, strict=True))
        shares: dict[frozenset[str], float] = {}
        for order in permutations(self.tasks, self.count):
            share, left = 1.0, sum(self.weights)
            for name in order:
                share *= weights[name] / left
                left -= weights[name]
            shares[frozenset(order)] = shares.get(frozenset(order), 0.0) + share
        return shares

    def by_chance(self, source: random.Random) -> frozenset[str]:
        """The tasks of some step."""
        return self.drawn(source.randrange(2**62), 0)


def mixtures_of(given: Collection["Mixture | None"]) -> Iterator[Mixture]:
    """The mixtures among these, each once."""
    yield from dict.fromkeys(mixture for mixture in given if mixture is not None)
