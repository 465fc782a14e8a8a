"""List scheduler: a half-run cluster and targets in, the cluster some time later out. Each MetaOp runs layer by layer.

- At each layer boundary all idle MetaOps choose their numbers of devices jointly: each wants the smallest that brings
  it to its target in time, the most urgent choose first, and devices left over go to the MetaOp that gains most.
- So layers stay whole and numbers of devices valid by construction. Growing never waits: a MetaOp that cannot grow runs
  one more layer as it is. Shrinking frees devices at once.
"""

import random
from heapq import heappop, heappush

from spindle.planner.search.device_pool import DevicePool, Memory, Sources
from spindle.planner.search.heuristics import Heuristics
from spindle.planner.search.model import Model
from spindle.planner.search.wave_lp import Targets
from spindle.planner.work import Work

MOST_DECIDING = 128
DECISION_UNITS = 1.8
EVENT_UNITS = 1.4

Chain = tuple[int, int, float, float, int, "Chain"] | None
"""What was started: (MetaOp, index of count, start, end, devices, what came before). One entry for each layer."""


class Stuck(Exception):
    """Nothing runs and nothing fits: memory is full."""


class State:
    """A cluster at a moment of decision. `left` counts layers that were not started yet."""

    __slots__ = ("chain", "current", "free", "heap", "idle", "left", "memory", "missing", "shared", "t", "where")

    t: float
    left: list[int]
    heap: list[tuple[float, int]]
    idle: list[int]
    free: int  # devices, or their bits when there is a pool
    missing: list[int]
    current: list[int]
    where: list[int]
    shared: list[int]
    chain: Chain
    memory: Memory | None

    def copy(self) -> "State":
        """An independent copy."""
        other = State.__new__(State)
        other.t, other.free, other.chain = self.t, self.free, self.chain
        other.left, other.heap, other.idle = self.left[:], self.heap[:], self.idle[:]
        other.missing, other.current, other.where = self.missing[:], self.current[:], self.where[:]
        other.shared = self.shared[:]
        other.memory = self.memory.copy() if self.memory is not None else None
        return other

    @property
    def is_done(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.heap and not self.idle


def start_state(model: Model, pool: DevicePool | None) -> State:
    """Nothing has run."""
    state = State.__new__(State)
    state.t, state.chain = 0.0, None
    state.free = pool.all_devices if pool else model.num_devices
    state.left, state.heap = list(model.layers), []
    state.missing = [len(before) for before in model.before]
    state.idle = [m for m in range(len(model)) if not state.missing[m]]
    state.current, state.where = [-1] * len(model), [0] * len(model)
    state.shared = pool.start_shared() if pool else []
    state.memory = pool.start_memory() if pool else None
    return state


class Tracker:
    """Runs states of one model towards targets."""

    def __init__(self, model: Model, pool: DevicePool | None, work: Work) -> None:
        self.model, self.pool, self.work = model, pool, work

    def advance(
        self, state: State, targets: Targets, base_s: float, heuristics: Heuristics, rng: random.Random, until_s: float
    ) -> None:
        """Run `state` in place until the first moment of decision at or after `until_s`, or to the end."""
        decisions = events = 0
        while not state.is_done:
            if state.idle:
                if state.t >= until_s:
                    break
                decisions += min(MOST_DECIDING, len(state.idle))
                events += 1
                self._decide(state, targets, base_s, heuristics, rng)
            self._next(state)
        factor = self.pool.simulation_factor if self.pool else 1.0
        self.work.spend(factor * (DECISION_UNITS * decisions + EVENT_UNITS * events))

    def _next(self, state: State) -> None:
        """To the next end of a layer."""
        heap, idle, left, current = state.heap, state.idle, state.left, state.current
        model, pool = self.model, self.pool
        now = heap[0][0]
        state.t = now
        until = now * (1 + 1e-12)
        while heap and heap[0][0] <= until:
            m = heappop(heap)[1]
            state.free += state.where[m] if pool else model.counts[m][current[m]]
            if left[m]:
                idle.append(m)
                continue
            current[m] = -1
            for s in model.after[m]:
                state.missing[s] -= 1
                if not state.missing[s]:
                    idle.append(s)

    def _decide(
        self, state: State, targets: Targets, base_s: float, heuristics: Heuristics, rng: random.Random
    ) -> None:
        wants = self._wants(state, targets, base_s, heuristics, rng)
        wants.sort()
        chosen = self._share(state, wants, heuristics)
        if self.pool:
            self._start_placed(state, chosen, heuristics)
        else:
            self._start(state, chosen)

    def _wants(
        self, state: State, targets: Targets, base_s: float, heuristics: Heuristics, rng: random.Random
    ) -> list[tuple[float, float, int, int, int]]:
        """(urgency, urgency, MetaOp, wanted index, least index) of all that decide."""
        model, left, now = self.model, state.left, state.t
        ends, slack, rule, late, stretch = (
            targets.ends_s,
            heuristics.slack,
            heuristics.rule,
            heuristics.late,
            1 + heuristics.early,
        )
        wants = []
        deciding = state.idle if len(state.idle) <= MOST_DECIDING else _foremost(state)
        for m in deciding:
            times, layers = model.times[m], left[m]
            rests = targets.rest[m]
            k = 0
            for rest in rests:
                if layers - rest > slack:
                    break
                k += 1
            else:
                k -= 1
            need = layers - rests[k]
            span = (base_s + ends[k] - now) * stretch
            widest = targets.widest[m][k]
            most = model.useful[m] - 1
            top = min(most, widest + late)
            want = 0
            while want < top and (need - slack) * times[want] > span:
                want += 1
            if heuristics.noise and rng.random() < heuristics.noise:
                want = min(most, max(0, want + (1 if rng.random() < 0.5 else -1)))
            needed_s = need * times[widest]
            if rule == 0:
                key, second = (span - needed_s) / needed_s, 0.0
            elif rule == 1:
                key, second = float(k), -model.counts[m][widest] * needed_s
            elif rule == 2:
                key, second = span - needed_s, 0.0
            elif rule == 3:
                key, second = float(k), -needed_s
            elif rule == 4:
                key, second = float(k), -model.counts[m][want] * times[want]
            else:
                key, second = -(model.tail_s[m] + layers * model.fastest_s[m]), 0.0
            wants.append((key, second, m, want, min(want, targets.narrowest[m][k])))
        return wants

    def _share(
        self, state: State, wants: list[tuple[float, float, int, int, int]], heuristics: Heuristics
    ) -> list[tuple[int, int]]:
        """(MetaOp, index of count) of all that may start now."""
        model = self.model
        free = state.free.bit_count() if self.pool else state.free
        chosen: list[tuple[int, int]] = []
        given: dict[int, int] = {}
        for _, _, m, want, least in wants:
            counts = model.counts[m]
            c = least if heuristics.two_pass else want
            while c >= 0 and counts[c] > free:
                c -= 1
            if c < 0 or (counts[c] < heuristics.patience * counts[want] and state.current[m] != c):
                continue
            given[m] = c
            free -= counts[c]
        if not given and not state.heap:
            m, counts = wants[0][2], model.counts[wants[0][2]]
            given[m] = max(c for c in range(model.useful[m]) if counts[c] <= free)
            free -= counts[given[m]]
        if free and heuristics.two_pass:
            for _, _, m, want, _ in wants:
                if m in given and want > given[m]:
                    counts, c = model.counts[m], want
                    while counts[c] - counts[given[m]] > free:
                        c -= 1
                    free -= counts[c] - counts[given[m]]
                    given[m] = c
        if free and heuristics.grow < 1:
            self._grow(given, free, heuristics.grow)
        chosen = [(m, given[m]) for _, _, m, _, _ in wants if m in given]
        return chosen

    def _grow(self, given: dict[int, int], free: int, least_gain: float) -> None:
        """Gives idle devices to the slices that gain, best first, one step each time."""
        model = self.model
        while free:
            best, best_gain = -1, least_gain
            for m, c in given.items():
                counts, times = model.counts[m], model.times[m]
                if c + 1 < model.useful[m] and counts[c + 1] - counts[c] <= free:
                    gain = (times[c] / times[c + 1] - 1) / (counts[c + 1] / counts[c] - 1)
                    if gain > best_gain:
                        best, best_gain = m, gain
            if best < 0:
                return
            counts = model.counts[best]
            free -= counts[given[best] + 1] - counts[given[best]]
            given[best] += 1

    def _start(self, state: State, chosen: list[tuple[int, int]]) -> None:
        model, now = self.model, state.t
        for m, c in chosen:
            end = now + model.times[m][c]
            state.free -= model.counts[m][c]
            state.left[m] -= 1
            state.current[m] = c
            state.chain = (m, c, now, end, 0, state.chain)
            heappush(state.heap, (end, m))
        started = {m for m, _ in chosen}
        state.idle = [m for m in state.idle if m not in started]

    def _start_placed(self, state: State, chosen: list[tuple[int, int]], heuristics: Heuristics) -> None:
        """Who keeps its count keeps its devices; then the widest choose first, narrower if they must."""
        started = set()
        changed = []
        for m, c in chosen:
            if state.current[m] == c and self._placed(state, m, c, state.where[m]):
                started.add(m)
            else:
                changed.append((-self.model.counts[m][c], m, c))
        changed.sort()
        for _, m, c in changed:
            if self._try_counts(state, m, c, heuristics):
                started.add(m)
        if not state.heap:
            for m in state.idle:
                if m not in started and self._try_counts(state, m, self.model.useful[m] - 1, Heuristics()):
                    started.add(m)
                    break
        state.idle = [m for m in state.idle if m not in started]
        if not state.heap:
            raise Stuck

    def _try_counts(self, state: State, m: int, c: int, heuristics: Heuristics) -> bool:
        """Start m on c, on what it had, or on less; a change must bring back more than it costs."""
        pool, model = self.pool, self.model
        assert pool is not None
        had, counts = state.current[m], model.counts[m]
        least = heuristics.patience * counts[c] if had < 0 else 0.0
        sources = pool.sources(m, state.left[m] == model.layers[m], state.where)
        first, shared = self._next_layer(state, m), state.shared[pool.shared[m]]
        wanted = c
        while c >= 0 and counts[c] >= least:
            found = pool.choose(m, counts[c], state.free, sources, shared=shared, memory=state.memory, first=first)
            if found is not None:
                if had < 0 and c == wanted and self._begin_where_input_is(state, m, c, found, sources):
                    return True
                devices, cost_s = found
                if had < 0 or cost_s <= heuristics.stick * self._gain_s(state, m, had, c):
                    self._begin(state, m, c, devices, cost_s)
                    return True
            if had >= 0 and (found is not None or had < c) and self._placed(state, m, had, state.where[m]):
                return True
            if found is not None:
                self._begin(state, m, c, devices, cost_s)
                return True
            c -= 1
        return False

    def _begin_where_input_is(self, state: State, m: int, c: int, found: tuple[int, float], sources: Sources) -> bool:
        """Start m on the devices of one of its sources, when that saves device time and m ends no later for it.

        `found`: the devices it would start on otherwise, and what it costs to bring its input there.
        """
        pool, model = self.pool, self.model
        assert pool is not None
        counts, times, layers = model.counts[m], model.times[m], state.left[m]
        if not found[1] or m in pool.pins:
            return False
        span_s = found[1] + layers * times[c]
        best = (counts[c] * span_s, span_s, c, found)
        for devices, _ in sources:
            count = devices.bit_count()
            if devices & state.free == devices and count in counts:
                cost_s = pool.cost_s(devices, count, sources)
                there = counts.index(count)
                span_s = cost_s + layers * times[there]
                if span_s <= best[1] and count * span_s < best[0]:
                    best = (count * span_s, span_s, there, (devices, cost_s))
        _, _, there, (devices, cost_s) = best
        first = self._next_layer(state, m)
        if state.memory and pool.with_room(m, counts[there], devices, state.memory, first, 1) != devices:
            return False
        self._begin(state, m, there, devices, cost_s)
        return True

    def _gain_s(self, state: State, m: int, had: int, c: int) -> float:
        """What a change of count saves over the layers left: seconds when wider, device time when narrower."""
        times, counts = self.model.times[m], self.model.counts[m]
        if counts[c] > counts[had]:
            return state.left[m] * (times[had] - times[c])
        return state.left[m] * (counts[had] * times[had] - counts[c] * times[c]) / counts[c]

    def _next_layer(self, state: State, m: int) -> int:
        done = self.model.layers[m] - state.left[m]
        return self.model.layers[m] - 1 - done if self.model.is_reversed else done

    def _placed(self, state: State, m: int, c: int, devices: int) -> bool:
        """Go on with m on the devices it has, if they are free and have room."""
        pool = self.pool
        assert pool is not None
        if devices & state.free != devices:
            return False
        if state.memory is not None:
            count = self.model.counts[m][c]
            first = self._next_layer(state, m)
            if pool.with_room(m, count, devices, state.memory, first, 1) != devices:
                return False
        self._begin(state, m, c, devices, 0.0)
        return True

    def _begin(self, state: State, m: int, c: int, devices: int, cost_s: float) -> None:
        assert self.pool is not None
        end = state.t + cost_s + self.model.times[m][c]
        if self.pool.shared[m] >= 0:
            state.shared[self.pool.shared[m]] |= devices
        if state.memory is not None:
            first = self._next_layer(state, m)
            self.pool.occupy(m, self.model.counts[m][c], devices, state.memory, first, 1)
        state.free &= ~devices
        state.left[m] -= 1
        state.current[m] = c
        state.where[m] = devices
        state.chain = (m, c, state.t, end, devices, state.chain)
        heappush(state.heap, (end, m))


def _foremost(state: State) -> list[int]:
    """All that are at the end of a layer, and the first and last of the waiting ones: else each decision takes as long
    as there are MetaOps."""
    running = [m for m in state.idle if state.current[m] >= 0]
    waiting = [m for m in state.idle if state.current[m] < 0]
    half = max(1, (MOST_DECIDING - len(running)) // 2)
    return running + (waiting if len(waiting) <= 2 * half else waiting[:half] + waiting[-half:])


Run = tuple[int, int, int, float, float, int]
"""(MetaOp, index of count, layers, start, end, devices): a slice in numbers."""


def runs_of(chain: Chain) -> list[Run]:
    """The slices of a finished simulation in order of start: layers that follow each other are joined."""
    entries = []
    while chain is not None:
        entries.append(chain)
        chain = chain[5]
    runs: list[Run] = []
    last: dict[int, int] = {}
    for m, c, start, end, devices, _ in reversed(entries):
        at = last.get(m, -1)
        if at >= 0 and runs[at][1] == c and runs[at][5] == devices and start <= runs[at][4] * (1 + 1e-12):
            before = runs[at]
            runs[at] = (m, c, before[2] + 1, before[3], end, devices)
        else:
            last[m] = len(runs)
            runs.append((m, c, 1, start, end, devices))
    return runs
