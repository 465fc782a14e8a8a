"""Climb: schedules in, better ones out: annealing of the most promising.

Each gets a little work, the better half goes on, until one is left with most of the work (successive halving). The best
of this and of all former climbs has the rest: where annealing ends depends on where it began more than on how long it
takes, so each climb begins anew.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from spindle.planner.search.beam import Found
from spindle.planner.search.finish import runs_of_draft
from spindle.planner.search.improve import Annealer, Result
from spindle.planner.search.list_scheduler import Stuck
from spindle.planner.work import Work

TRIAL_SHARE = 0.35  # of what is left, for all that are tried
NEW_SHARE = 0.75  # of a climb, for what begins anew
KEPT = 2  # annealers that are remembered


@dataclass
class Climb:
    """Annealers of schedules.

    starts      schedules so far, the most promising first
    make        an annealer of a schedule, given a seed; raises Stuck where memory does not allow it
    most        schedules to begin with
    """

    starts: Callable[[], list[Found]]
    make: Callable[[Found, int], Annealer]
    most: int
    seed: int
    work: Work
    annealers: list[Annealer] = field(default_factory=list)
    _read: dict[int, tuple[Result, Found]] = field(default_factory=dict)

    def steps(self, until: float) -> Iterator[None]:
        """Anneal until so much work is done."""
        trying, begun = self._begun(), self.work.spent
        self.annealers = _best([*self.annealers, *trying])
        middle = begun + NEW_SHARE * (until - begun)
        while trying and self.work.spent < middle:
            left = middle - self.work.spent
            share = TRIAL_SHARE / len(trying) if len(trying) > 1 else 1.0
            for annealer in trying:
                yield from annealer.run(share * left)
            if len(trying) == 1:
                break
            trying = _best(trying)[: len(trying) // 2]
        self.annealers = _best(self.annealers)
        if self.annealers and self.work.spent < until:
            yield from self.annealers[0].run(until - self.work.spent)
        self.annealers = _best(self.annealers)[:KEPT]

    def _begun(self) -> list[Annealer]:
        """Annealers of the most promising schedules."""
        made = []
        for f in self.starts()[: self.most]:
            self.seed += 1
            try:
                made.append(self.make(f, self.seed))
            except Stuck:
                continue
        return made

    def best(self, most: int) -> list[Found]:
        """The best schedules of the best annealers; `makespan_s` with the reductions."""
        found = []
        for annealer in _best(self.annealers)[:most]:
            result = annealer.best
            if id(result) not in self._read:
                decoded = annealer.decoder.decode(result.draft, float("inf"))
                if decoded is None:
                    raise AssertionError("the best draft does not decode any more")
                runs = runs_of_draft(annealer.model, result.draft, decoded)
                self._read[id(result)] = result, Found(result.total_s, runs, annealer.model)
            found.append(self._read[id(result)][1])
        return found


def _best(annealers: list[Annealer]) -> list[Annealer]:
    return sorted(annealers, key=lambda annealer: annealer.best.total_s)
