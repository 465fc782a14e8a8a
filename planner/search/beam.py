"""Beam: a model and an order of waves in, finished schedules out.

Start with the wave LP's targets. In each of `epochs` steps of time, run several heuristics from every kept state, solve
the wave LP of what is left, and keep the states whose projected makespan, time passed plus LP, is shortest. In the
second half each state is also run to its end, twice: the LP does not see how coarse the last layers are.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from spindle.planner.search.device_pool import DevicePool
from spindle.planner.search.heuristics import Heuristics, draw_heuristics
from spindle.planner.search.list_scheduler import Run, State, Stuck, Tracker, runs_of, start_state
from spindle.planner.search.model import Model
from spindle.planner.search.wave_lp import Targets, WaveLp, residual_waves
from spindle.planner.work import Work

ROLLOUTS = 2


@dataclass(frozen=True, slots=True)
class Width:
    """How much a beam tries: states kept, heuristics run from each, steps of time."""

    states: int
    heuristics: int
    epochs: int


@dataclass(frozen=True, slots=True)
class Found:
    """A finished schedule."""

    makespan_s: float
    runs: list[Run]
    model: Model


class Beam:
    """Beam searches of one model; `best` holds the shortest schedules met, shortest first."""

    def __init__(self, model: Model, pool: DevicePool | None, work: Work, keep: int = 6) -> None:
        self.model, self.work = model, work
        self.lp = WaveLp(model, work)
        self.tracker = Tracker(model, pool, work)
        self.pool = pool
        self.keep = keep
        self.best: list[Found] = []

    def search(self, first: list[int], width: Width, seed: int, until: float) -> Iterator[None]:
        """One beam search, a simulation at a time; it ends early when so much work is done."""
        rng = random.Random(seed)
        start = start_state(self.model, self.pool)
        projected = self._project(start, first)
        if projected is None:
            return
        estimate_s, targets = projected
        step_s = estimate_s / width.epochs
        states: list[tuple[float, State, Targets]] = [(estimate_s, start, targets)]
        while states:
            followers: list[tuple[float, int, State, Targets]] = []
            seen: set[tuple[float, tuple[int, ...]]] = set()
            for _, state, targets in states:
                for j in range(width.heuristics):
                    heuristics = draw_heuristics(rng) if j else Heuristics()
                    found = self._follow(state, targets, heuristics, rng, state.t + step_s, first, estimate_s, seen)
                    if found is not None:
                        followers.append((found[0], len(followers), found[1], found[2]))
                    yield
                    if self.work.spent >= until:
                        self._roll_out(state, targets, Heuristics(), rng)
                        return
            followers.sort(key=lambda f: f[:2])
            states = [(value, state, targets) for value, _, state, targets in followers[: width.states]]

    def _follow(
        self,
        state: State,
        targets: Targets,
        heuristics: Heuristics,
        rng: random.Random,
        until_s: float,
        first: list[int],
        estimate_s: float,
        seen: set[tuple[float, tuple[int, ...]]],
    ) -> tuple[float, State, Targets] | None:
        """Run a copy of `state`; its value and targets, or None when it ended, was met before, or cannot win."""
        base_s, state = state.t, state.copy()
        try:
            self.tracker.advance(state, targets, base_s, heuristics, rng, until_s)
        except Stuck:
            return None
        if state.is_done:
            self._finished(state)
            return None
        key = (state.t, tuple(state.left))
        if key in seen:
            return None
        seen.add(key)
        projected = self._project(state, first)
        if projected is None:
            return None
        value_s, targets = projected
        if self.best and value_s >= self.best[0].makespan_s:
            return None
        if state.t > 0.5 * estimate_s:
            best_s = min(
                self._roll_out(state, targets, draw_heuristics(rng) if i else heuristics, rng) for i in range(ROLLOUTS)
            )
            value_s = (value_s + best_s) / 2
        return value_s, state, targets

    def _project(self, state: State, first: list[int]) -> tuple[float, Targets] | None:
        """Time passed plus the LP of what is left, and its targets."""
        model = self.model
        left = [float(n) for n in state.left]
        ready = [not missing for missing in state.missing]
        tail_s = 0.0
        for end_s, m in state.heap:
            time_s = model.times[m][state.current[m]]
            left[m] += min(1.0, max(1e-6, (end_s - state.t) / time_s))
            tail_s = max(tail_s, end_s + state.left[m] * model.fastest_s[m] + model.tail_s[m])
        if not any(left):
            return None
        targets = self.lp.solve(left, residual_waves(model, left, ready, first))
        if targets is None:
            return None
        return max(state.t + targets.ends_s[-1], tail_s), targets

    def _roll_out(self, state: State, targets: Targets, heuristics: Heuristics, rng: random.Random) -> float:
        """Run a copy of `state` to its end; the makespan."""
        base_s, state = state.t, state.copy()
        try:
            self.tracker.advance(state, targets, base_s, heuristics, rng, float("inf"))
        except Stuck:
            return float("inf")
        return self._finished(state)

    def _finished(self, state: State) -> float:
        """Keep a finished state when it is among the best."""
        makespan_s = state.t
        is_among_best = len(self.best) < self.keep or makespan_s < self.best[-1].makespan_s
        if is_among_best and all(abs(makespan_s - f.makespan_s) > 1e-9 * makespan_s for f in self.best):
            self.best.append(Found(makespan_s, runs_of(state.chain), self.model))
            self.best.sort(key=lambda f: f.makespan_s)
            del self.best[self.keep :]
        return makespan_s
