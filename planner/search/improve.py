"""Improve: a draft in, a better one out. Simulated annealing over lists of slices.

A move changes one or two MetaOps: a slice takes another count, layers go from a slice to its neighbor, a slice is cut
in two or joined with the next, its rank shifts, two slices that overlap in time trade devices, or a slice prefers other
devices. A move that is worse by d is taken with probability exp(-d / heat), so what it may cost is known before it is
decoded; the heat falls from HOT to COLD of the bound over each run. What counts is the makespan and the reduction
after it, plus half the device time beyond the bound spread over all devices: a schedule whose last slices are few and
narrow is closer to a better one.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log

from spindle.planner.search.decode import Decoded, Decoder, Draft, Moment, Part
from spindle.planner.search.list_scheduler import Stuck
from spindle.planner.work import Work

CROWD = 400  # MetaOps from which on decoding a slice takes longer by the square, since many wait
CHUNK_SLICES = 6000  # decoded between two looks at the budget
HOT, COLD = 5e-4, 3e-5
MOVE_UNITS = 2.0
BEYOND_WEIGHT = 0.5
CLOSE_ENOUGH = 0.0005


@dataclass(slots=True)
class Result:
    """A draft and what its schedule takes."""

    total_s: float  # makespan and reduction
    draft: Draft


class Annealer:
    """Anneals one draft; `run` may be called again and goes on from the best."""

    def __init__(self, decoder: Decoder, draft: Draft, work: Work, seed: int) -> None:
        self.model = decoder.model
        self.decoder, self.work = decoder, work
        self.rng = random.Random(seed)
        decoded = decoder.decode(draft, inf)
        if decoded is None:
            raise Stuck
        reduction_s = decoder.reduction_s(draft, decoded)
        self.draft, self.starts, self.devices = _with_ranks(draft, decoded[2]), decoded[2], decoded[3]
        self.value = self._value(decoded[0] + reduction_s, decoded[1])
        self.best = Result(decoded[0] + reduction_s, draft)
        self.best_value = self.value
        self.moves = self.reductions = self.decoded = 0
        self.moments: list[Moment] = []
        self._keep_moments()

    def _value(self, makespan_s: float, beyond: float) -> float:
        return makespan_s + BEYOND_WEIGHT * beyond / self.model.num_devices

    def run(self, units: float) -> Iterator[None]:
        """Spend so much work, a chunk of moves at a time, from the best draft on."""
        spent, crowd = 0.0, max(1.0, (len(self.draft) / CROWD) ** 2)
        if self.moves:
            self._restart()
        slices = sum(map(len, self.draft))
        while spent < units and self.best.total_s > self.model.bound_s * (1 + CLOSE_ENOUGH):
            heat = HOT * (COLD / HOT) ** (spent / units) * self.model.bound_s
            chunk = max(4, min(64, CHUNK_SLICES // slices))
            for _ in range(chunk):
                self._step(heat)
            done = (
                chunk * MOVE_UNITS
                + self.decoder.slice_units * crowd * self.decoded
                + self.reductions * self.decoder.reduction_units * slices
            )
            self.work.spend(done)
            spent += done
            self.reductions = self.decoded = 0
            slices = sum(map(len, self.draft))
            yield

    def _step(self, heat: float) -> None:
        changed = self._move()
        self.moves += 1
        if changed is not None:
            limit = self.value - heat * log(1.0 - self.rng.random())
            old = [(m, self.draft[m]) for m, _ in changed]
            for m, parts in changed:
                self.draft[m] = parts
            since = self._latest_before([(m, _first_change(parts, self.draft[m])) for m, parts in old])
            self.decoded += sum(map(len, self.draft)) - (since.num_begun if since else 0)
            decoded = self.decoder.decode(self.draft, limit, since)
            value = self._value(decoded[0], decoded[1]) if decoded else inf
            reduction_s = 0.0
            if decoded and value <= limit:
                reduction_s = self.decoder.reduction_s(self.draft, decoded)
                self.reductions += 1
            if decoded and value + reduction_s <= limit:
                self._accept(decoded, value + reduction_s, reduction_s)
            else:
                for m, parts in old:
                    self.draft[m] = parts

    def _accept(self, decoded: Decoded, value: float, reduction_s: float) -> None:
        makespan_s = decoded[0] + reduction_s
        self.value, self.starts, self.devices = value, decoded[2], decoded[3]
        accepted, self.draft = self.draft, _with_ranks(self.draft, decoded[2])  # other ranks: ties may fall otherwise
        self._keep_moments()
        if value < self.best_value * (1 - 1e-9):
            self.best_value = value
        if makespan_s < self.best.total_s * (1 - 1e-12):
            self.best = Result(makespan_s, accepted)

    def _restart(self) -> None:
        """Back to the best draft."""
        decoded = self.decoder.decode(self.best.draft, inf)
        if decoded is None:
            raise AssertionError("the best draft does not decode any more")
        self.draft, self.starts, self.devices = list(self.best.draft), decoded[2], decoded[3]
        self.value = self._value(decoded[0] + self.decoder.reduction_s(self.draft, decoded), decoded[1])
        self._keep_moments()

    def _keep_moments(self) -> None:
        self.moments = []
        self.decoder.decode(self.draft, inf, keep=self.moments)
        self.decoded += sum(map(len, self.draft))

    def _latest_before(self, changes: list[tuple[int, int]]) -> Moment | None:
        """The last moment before any of these (MetaOp, slice) was ready."""
        for moment in reversed(self.moments):
            if all(moment.is_before(m, i) for m, i in changes):
                return moment
        return None

    # ------------------------------------------------------------------------------------------------------ moves

    def _move(self) -> list[tuple[int, list[Part]]] | None:
        """Changed MetaOps with their new parts; None when the draw gave nothing."""
        rng = self.rng
        m = self._pick()
        if self.devices and rng.random() < 0.15:
            return self._send(m)
        dice = rng.random()
        if dice < 0.35:
            return self._trade(m)
        parts = self.draft[m]
        i = int(rng.random() * len(parts))
        if dice < 0.50:
            return self._notch(m, i)
        if dice < 0.70:
            return self._shift_layers(m, i)
        if dice < 0.80:
            return self._cut(m, i)
        if dice < 0.86:
            return self._join(m, i)
        c, layers, rank, _, hint = parts[i]
        moved = rank + (rng.random() - 0.5) * 0.3 * self.model.bound_s
        held = max(moved, 0.0) if rng.random() < 0.2 else 0.0
        return [(m, [*parts[:i], (c, layers, moved, held, hint), *parts[i + 1 :]])]

    def _pick(self) -> int:
        return int(self.rng.random() * len(self.draft))

    def _stepped(self, m: int, c: int) -> int:
        """A neighboring index of count; -1 when there is none that way."""
        c += 1 if self.rng.random() < 0.5 else -1
        return min(c, self.model.useful[m] - 1) if c < len(self.model.counts[m]) else -1

    def _send(self, m: int) -> list[tuple[int, list[Part]]] | None:
        """A slice prefers the devices of what it reads, on as many, or those of another slice of its count, or none."""
        rng, parts = self.rng, self.draft[m]
        i = int(rng.random() * len(parts))
        c, layers, rank, held, hint = parts[i]
        if rng.random() < 0.4:
            before = self.model.before[m]
            if not i and not before:
                return None
            source = self.devices[m][i - 1] if i else self.devices[before[int(rng.random() * len(before))]][-1]
            counts = self.model.counts[m]
            if source == self.devices[m][i] or source.bit_count() not in counts:
                return None
            c = counts.index(source.bit_count())
            return [(m, [*parts[:i], (c, layers, rank, held, source), *parts[i + 1 :]])]
        if hint and rng.random() < 0.3:
            return [(m, [*parts[:i], (c, layers, rank, held, 0), *parts[i + 1 :]])]
        count = self.model.counts[m][c]
        for _ in range(8):
            other = self.devices[int(rng.random() * len(self.devices))]
            wanted = other[int(rng.random() * len(other))]
            if wanted.bit_count() == count and wanted != self.devices[m][i]:
                return [(m, [*parts[:i], (c, layers, rank, held, wanted), *parts[i + 1 :]])]
        return None

    def _notch(self, m: int, i: int) -> list[tuple[int, list[Part]]] | None:
        parts = self.draft[m]
        c, layers, rank, held, _ = parts[i]
        c = self._stepped(m, c)
        return None if c < 0 else [(m, [*parts[:i], (c, layers, rank, held, 0), *parts[i + 1 :]])]

    def _shift_layers(self, m: int, i: int) -> list[tuple[int, list[Part]]] | None:
        parts = self.draft[m]
        if len(parts) < 2:
            return self._cut(m, i)
        j = i + 1 if i + 1 < len(parts) and (i == 0 or self.rng.random() < 0.5) else i - 1
        moved = min(parts[i][1], 1 + int(self.rng.random() * 3))
        changed = parts[:]
        c, layers, rank, held, hint = parts[j]
        changed[j] = (c, layers + moved, rank, held, hint)
        c, layers, rank, held, hint = parts[i]
        changed[i] = (c, layers - moved, rank, held, hint)
        if layers == moved:
            del changed[i]
        return [(m, changed)]

    def _cut(self, m: int, i: int) -> list[tuple[int, list[Part]]] | None:
        parts = self.draft[m]
        c, layers, rank, held, hint = parts[i]
        if layers < 2:
            return None
        first = 1 + int(self.rng.random() * (layers - 1))
        other = c if self.rng.random() < 0.2 else self._stepped(m, c)
        if other < 0:
            return None
        middle = rank + first * self.model.times[m][c]
        if self.rng.random() < 0.5:
            pair = [(c, first, rank, held, hint), (other, layers - first, middle, 0.0, 0)]
        else:
            pair = [(other, first, rank, held, 0), (c, layers - first, middle, 0.0, hint)]
        return [(m, [*parts[:i], *pair, *parts[i + 1 :]])]

    def _join(self, m: int, i: int) -> list[tuple[int, list[Part]]] | None:
        parts = self.draft[m]
        if len(parts) < 2:
            return None
        i = min(i, len(parts) - 2)
        c, _, _, _, hint = parts[i + (self.rng.random() < 0.5)]
        joined = (c, parts[i][1] + parts[i + 1][1], parts[i][2], parts[i][3], hint)
        return [(m, [*parts[:i], joined, *parts[i + 2 :]])]

    def _trade(self, m: int) -> list[tuple[int, list[Part]]] | None:
        """A slice takes a step up or down and one that overlaps it the opposite step."""
        rng, draft, starts = self.rng, self.draft, self.starts
        i = int(rng.random() * len(draft[m]))
        c, layers, rank, held, _ = draft[m][i]
        up = 1 if rng.random() < 0.5 else -1
        if not 0 <= c + up < self.model.useful[m]:
            return None
        start = starts[m][i]
        end = start + layers * self.model.times[m][c]
        for _ in range(8):
            other = self._pick()
            if other == m:
                continue
            j = int(rng.random() * len(draft[other]))
            oc, olayers, orank, oheld, _ = draft[other][j]
            ostart = starts[other][j]
            if ostart < end and start < ostart + olayers * self.model.times[other][oc]:
                if not 0 <= oc - up < self.model.useful[other]:
                    continue
                mine = [*draft[m][:i], (c + up, layers, rank, held, 0), *draft[m][i + 1 :]]
                theirs = [*draft[other][:j], (oc - up, olayers, orank, oheld, 0), *draft[other][j + 1 :]]
                return [(m, mine), (other, theirs)]
        return None


def _first_change(old: list[Part], new: list[Part]) -> int:
    """The first slice that differs."""
    return next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))


def _with_ranks(draft: Draft, starts: list[list[float]]) -> Draft:
    """The draft with its starts as ranks; a hold that did not bind is let go."""
    return [
        [(c, n, start, held if held == start else 0.0, h) for (c, n, _, held, h), start in zip(parts, of, strict=True)]
        for parts, of in zip(draft, starts, strict=True)
    ]
