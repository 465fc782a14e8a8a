"""Presence: how often each task takes part in a step, in; the sets of tasks that steps have, with their shares, out.

A task takes part in every k-th step, the first included, in each step with a probability, or in steps that a mixture
draws it for. Up to `MOST_SETS` sets are
listed exactly; beyond that as many steps are drawn.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm, prod

from spindle.mixtures import Mixture, mixtures_of

MOST_SETS = 256
MOST_STEPS = 100_000  # of a period that is counted through


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A task takes part in every `every`-th step, in each step with `probability`, or when its `mixture` draws it."""

    task: str
    probability: float = 1.0
    every: int = 1
    mixture: Mixture | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the task takes part in every step."""
        return self.every == 1 and self.probability >= 1 and self.mixture is None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """Tasks that take part in a step together, and the share of steps that have exactly these."""

    share: float
    tasks: tuple[str, ...]


def task_sets(presences: Sequence[Presence]) -> tuple[TaskSet, ...]:
    """All sets of tasks that steps may have, the most frequent first; a set without tasks is among them.

    >>> for found in task_sets([Presence(task="a"), Presence(task="b", every=4)]):
    ...     print(found.share, found.tasks)
    0.75 ('a',)
    0.25 ('a', 'b')
    """
    random_ones = [p for p in presences if p.every == 1 and p.probability < 1]
    period = lcm(*(p.every for p in presences))
    mixed = [mixture.sets() for mixture in mixtures_of([p.mixture for p in presences])]
    listed = [sets for sets in mixed if sets is not None]
    if 2 ** len(random_ones) * prod(map(len, listed)) > MOST_SETS or period > MOST_STEPS or len(listed) < len(mixed):
        shares = _drawn(presences)
    else:
        shares = _exact(presences, random_ones, period, listed)
        if len(shares) > MOST_SETS:
            shares = _drawn(presences)
    return tuple(
        TaskSet(share=share, tasks=tasks) for tasks, share in sorted(shares.items(), key=lambda found: -found[1])
    )


def _exact(
    presences: Sequence[Presence],
    random_ones: Sequence[Presence],
    period: int,
    mixed: Sequence[Mapping[frozenset[str], float]],
) -> dict[tuple[str, ...], float]:
    turns = Counter(tuple(step % p.every == 0 for p in presences) for step in range(period))
    shares: dict[tuple[str, ...], float] = {}
    for here, drawn in product(product((True, False), repeat=len(random_ones)), product(*(m.items() for m in mixed))):
        chance = prod(p.probability if yes else 1 - p.probability for p, yes in zip(random_ones, here, strict=True))
        chance *= prod(share for _, share in drawn)
        chosen = frozenset[str]().union(*(tasks for tasks, _ in drawn))
        absent = {p.task for p, yes in zip(random_ones, here, strict=True) if not yes}
        absent |= {p.task for p in presences if p.mixture is not None and p.task not in chosen}
        for turn, count in turns.items():
            tasks = tuple(p.task for p, yes in zip(presences, turn, strict=True) if yes and p.task not in absent)
            shares[tasks] = shares.get(tasks, 0.0) + chance * count / period
    return shares


def _drawn(presences: Sequence[Presence]) -> dict[tuple[str, ...], float]:
    source = random.Random("task sets")
    mixtures = list(mixtures_of([p.mixture for p in presences]))
    counts = Counter[tuple[str, ...]]()
    for _ in range(MOST_SETS):
        step = source.randrange(MOST_STEPS * MOST_SETS)
        chosen = frozenset[str]().union(*(mixture.by_chance(source) for mixture in mixtures))
        counts[
            tuple(
                p.task
                for p in presences
                if step % p.every == 0 and source.random() < p.probability and (p.mixture is None or p.task in chosen)
            )
        ] += 1
    return {tasks: count / MOST_SETS for tasks, count in counts.items()}
