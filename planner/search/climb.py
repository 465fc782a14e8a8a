"""Climb: schedules in, better ones out: annealing of the most promising, in epochs without end.

An epoch takes as much work as all before it. It begins with the best of the former ones and with new schedules; each
gets a little work, the better half goes on, until one is left with the rest (successive halving).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from spindle.planner.search.beam import Found
from spindle.planner.search.finish import runs_of_draft
from spindle.planner.search.improve import Annealer, Result
from spindle.planner.search.list_scheduler import Stuck

FIRST_UNITS = 2e4  # of the first epoch
TRIAL_SHARE = 0.35  # of what is left of an epoch, for all that are tried
KEPT = 2  # annealers that go on in the next epoch


@dataclass
class Climb:
    """Annealers of schedules.

    starts      schedules so far, the most promising first
    make        an annealer of a schedule, given a seed; raises Stuck where memory does not allow it
    most        schedules that an epoch begins with
    """

    starts: Callable[[], list[Found]]
    make: Callable[[Found, int], Annealer]
    most: int
    seed: int
    annealers: list[Annealer] = field(default_factory=list)
    _begun: dict[int, Found] = field(default_factory=dict)
    _read: dict[int, tuple[Result, Found]] = field(default_factory=dict)

    def steps(self) -> Iterator[None]:
        """Anneal; whoever iterates decides when it is enough."""
        done = 0.0
        while True:
            self._begin()
            if not self.annealers:
                yield
                continue
            units = left = max(FIRST_UNITS, done)
            trying = self.annealers
            while len(trying) > 1:
                for annealer in trying:
                    yield from annealer.run(TRIAL_SHARE * left / len(trying))
                left *= 1 - TRIAL_SHARE
                trying = _sorted(trying)[: len(trying) // 2]
            yield from trying[0].run(left)
            self.annealers = _sorted(self.annealers)[:KEPT]
            done += units
            yield

    def _begin(self) -> None:
        """Annealers of those of the most promising schedules that have none."""
        for f in self.starts()[: self.most]:
            if id(f) not in self._begun:
                self._begun[id(f)] = f
                try:
                    self.annealers = [*self.annealers, self.make(f, self.seed + len(self._begun))]
                except Stuck:
                    continue
        self.annealers = _sorted(self.annealers)

    def best(self, most: int) -> list[Found]:
        """The best schedules of the best annealers; `makespan_s` with the reductions."""
        found = []
        for annealer in _sorted(self.annealers)[:most]:
            result = annealer.best
            if id(result) not in self._read:
                decoded = annealer.decoder.decode(result.draft, float("inf"))
                if decoded is None:
                    raise AssertionError("the best draft does not decode any more")
                runs = runs_of_draft(annealer.model, result.draft, decoded)
                self._read[id(result)] = result, Found(result.total_s, runs, annealer.model)
            found.append(self._read[id(result)][1])
        return found


def _sorted(annealers: list[Annealer]) -> list[Annealer]:
    return sorted(annealers, key=lambda annealer: annealer.best.total_s)
