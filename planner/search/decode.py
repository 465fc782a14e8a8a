"""Decode: lists of slices in, a schedule out. Event-driven list scheduling, the inner loop of the local search.

A Draft holds for each MetaOp its slices, each with a rank; whoever is ready starts in order of rank as soon as enough
devices are free, later ranks overtaking those that do not fit. O(slices * (ready + log running)).
"""

from bisect import insort
from heapq import heappop, heappush

from spindle.planner.search.model import Model
from spindle.planner.search.track import Run

SLICE_UNITS = 0.75

Part = tuple[int, int, float]
"""(index of count, layers, rank) of one slice."""
Draft = list[list[Part]]
"""The slices of each MetaOp, first layer first."""


def draft_of(model: Model, runs: list[Run]) -> Draft:
    """The draft of a schedule; ranks are the starts."""
    draft: Draft = [[] for _ in range(len(model))]
    for m, c, layers, start, _, _ in runs:
        draft[m].append((c, layers, start))
    return draft


def decode(model: Model, draft: Draft, limit_s: float) -> tuple[float, float, list[list[float]]] | None:
    """(makespan, device-seconds beyond the bound, starts by MetaOp); None as soon as it must end after `limit_s`."""
    counts, times, after, tails = model.counts, model.times, model.after, model.tail_s
    bound_s = model.bound_s
    free = model.num_devices
    missing = list(map(len, model.before))
    at = [0] * len(draft)
    starts: list[list[float]] = [[] for _ in draft]
    ready: list[tuple[float, int, int, float]] = []
    for m, parts in enumerate(draft):
        if not missing[m]:
            c, layers, rank = parts[0]
            ready.append((rank, m, counts[m][c], layers * times[m][c]))
    ready.sort()
    running: list[tuple[float, int, int]] = []
    now = beyond = 0.0
    while True:
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
            return now, beyond, starts
        now, m, n = heappop(running)
        while True:
            free += n
            at[m] += 1
            parts = draft[m]
            if at[m] < len(parts):
                c, layers, rank = parts[at[m]]
                insort(ready, (rank, m, counts[m][c], layers * times[m][c]))
            else:
                for s in after[m]:
                    missing[s] -= 1
                    if not missing[s]:
                        c, layers, rank = draft[s][0]
                        insort(ready, (rank, s, counts[s][c], layers * times[s][c]))
            if not running or running[0][0] > now:
                break
            _, m, n = heappop(running)
