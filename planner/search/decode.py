"""Decode: lists of slices in, a schedule out. Event-driven list scheduling, the inner loop of the local search.

A Draft holds for each MetaOp its slices, each with a rank; ready slices start in order of rank as soon as enough
devices are free, later ranks overtaking slices that do not fit. A slice may also be held: it does not start before its
release, so that devices stay idle for what comes soon. O(slices * (ready + log running)).

Drafts that differ in one slice have the same schedule until that slice is ready. Moments of a schedule may be kept, and
another draft's decoded from there on.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Protocol

from spindle.planner.search.list_scheduler import Run
from spindle.planner.search.model import Model

SLICE_UNITS = 0.75

Part = tuple[int, int, float, float, int]
"""(index of count, layers, rank, release, hint) of one slice; release 0: not held; hint: devices to prefer, as bits."""
Draft = list[list[Part]]
"""The slices of each MetaOp, first layer first."""


Decoded = tuple[float, float, list[list[float]], list[list[int]]]
"""(makespan, device-seconds beyond the bound, starts by MetaOp, devices by MetaOp where there is a pool)."""

HOLDING_PASSES = 12
MOMENTS = 8  # kept of a schedule: more save little decoding, and each takes time


@dataclass(frozen=True, slots=True)
class Moment:
    """A schedule when some slices have just ended and nothing was started for it yet.

    at, begun   slices of each MetaOp that have ended, and that have started
    starts, placed      of the whole schedule; at this moment only the first `begun` of each
    """

    now: float
    free: int
    beyond: float
    missing: list[int]
    at: list[int]
    begun: list[int]
    starts: list[list[float]]
    placed: list[list[int]]
    ready: list[Any]
    running: list[tuple[float, int, int]]
    pool: Any = None  # what a decoder on a pool wants to know besides

    @property
    def num_begun(self) -> int:
        """Slices that have started."""
        return sum(self.begun)

    def is_before(self, m: int, i: int) -> bool:
        """Whether slice i of MetaOp m was not ready yet."""
        return self.at[m] < i or self.missing[m] > 0


class Decoder(Protocol):
    """Makes schedules of drafts of one model."""

    @property
    def model(self) -> Model:
        """What is scheduled."""

    @property
    def slice_units(self) -> float:
        """Work of decoding one slice."""

    @property
    def reduction_units(self) -> float:
        """Work of reducing the gradients of one slice."""

    def decode(
        self, draft: Draft, limit_s: float, since: Moment | None = None, keep: list[Moment] | None = None
    ) -> Decoded | None:
        """The schedule; None as soon as it must end after `limit_s`, or when memory is full.

        since   a moment of the schedule of another draft, before any slice that differs was ready
        keep    takes moments of this schedule, earliest first
        """

    def reduction_s(self, draft: Draft, decoded: Decoded) -> float:
        """Seconds that gradient reductions add to the schedule."""


def draft_of(decoder: Decoder, runs: Sequence[Run]) -> Draft:
    """The draft of a schedule: ranks are the starts, and what would start earlier, to the harm of others, is held."""
    draft: Draft = [[] for _ in range(len(decoder.model))]
    for m, c, layers, start, _, devices in runs:
        draft[m].append((c, layers, start, 0.0, devices))
    makespan_s = max(end for _, _, _, _, end, _ in runs)
    for _ in range(HOLDING_PASSES):
        decoded = decoder.decode(draft, float("inf"))
        if decoded is None or decoded[0] <= makespan_s * (1 + 1e-9):
            return draft
        draft = [
            [_held(part, start) for part, start in zip(parts, of, strict=True)]
            for parts, of in zip(draft, decoded[2], strict=True)
        ]
    return draft


def _held(part: Part, start: float) -> Part:
    c, layers, rank, release, hint = part
    return (c, layers, rank, rank if start < rank * (1 - 1e-9) else release, hint)


@dataclass(frozen=True)
class FlatDecoder:
    """Counts devices only: which ones a slice takes does not matter, since nothing is transferred."""

    model: Model
    slice_units: float = SLICE_UNITS
    reduction_units: float = 0.0

    def decode(
        self, draft: Draft, limit_s: float, since: Moment | None = None, keep: list[Moment] | None = None
    ) -> Decoded | None:
        """See Decoder."""
        return decode(self.model, draft, limit_s, since, keep)

    def reduction_s(self, draft: Draft, decoded: Decoded) -> float:
        """Nothing is reduced."""
        return 0.0


def decode(
    model: Model, draft: Draft, limit_s: float, since: Moment | None = None, keep: list[Moment] | None = None
) -> Decoded | None:
    """See Decoder."""
    counts, times, after, tails = model.counts, model.times, model.after, model.tail_s
    bound_s = model.bound_s
    ready: list[tuple[float, int, int, float]] = []
    running: list[tuple[float, int, int]] = []
    starts: list[list[float]]
    if since is not None:
        now, free, beyond = since.now, since.free, since.beyond
        missing, at = since.missing[:], since.at[:]
        starts = [of[:begun] for of, begun in zip(since.starts, since.begun, strict=True)]
        ready, running = since.ready[:], since.running[:]
    else:
        now, free, beyond = 0.0, model.num_devices, 0.0
        missing, at = list(map(len, model.before)), [0] * len(draft)
        starts = [[] for _ in draft]
        for m, parts in enumerate(draft):
            if not missing[m]:
                c, layers, rank, release, _ = parts[0]
                if release > 0:
                    heappush(running, (release, ~m, 0))
                else:
                    ready.append((rank, m, counts[m][c], layers * times[m][c]))
        ready.sort()
    turn, every = 0, max(1, sum(map(len, draft)) // MOMENTS)
    while True:
        if keep is not None:
            turn += 1
            if turn % every == 0:
                begun = list(map(len, starts))
                moment = Moment(now, free, beyond, missing[:], at[:], begun, starts, [], ready[:], running[:])
                keep.append(moment)
        if free and ready:
            kept = []
            for i, entry in enumerate(ready):
                n = entry[2]
                if n <= free:
                    m = entry[1]
                    free -= n
                    end = now + entry[3]
                    if end + tails[m] >= limit_s:
                        return None
                    if end > bound_s:
                        beyond += n * (end - bound_s)
                    heappush(running, (end, m, n))
                    starts[m].append(now)
                    if not free:
                        kept += ready[i + 1 :]
                        break
                else:
                    kept.append(entry)
            ready = kept
        if not running:
            return now, beyond, starts, []
        now, m, n = heappop(running)
        while True:
            free += n
            if m < 0:
                m = ~m
                c, layers, rank, _, _ = draft[m][at[m]]
                insort(ready, (rank, m, counts[m][c], layers * times[m][c]))
            else:
                at[m] += 1
                for s in (m,) if at[m] < len(draft[m]) else after[m]:
                    if s != m:
                        missing[s] -= 1
                        if missing[s]:
                            continue
                    c, layers, rank, release, _ = draft[s][at[s]]
                    if release > now:
                        heappush(running, (release, ~s, 0))
                    else:
                        insort(ready, (rank, s, counts[s][c], layers * times[s][c]))
            if not running or running[0][0] > now:
                break
            _, m, n = heappop(running)
