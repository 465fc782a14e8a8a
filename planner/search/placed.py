"""Placed: a draft in, a schedule with devices out: `decode` with islands, switch costs and memory, and reductions.

The same list scheduling; a slice starts when a compact set of devices is free for it (`pool`), lasts as long as its
layers and bringing its input take, and fills the memory of its devices.
"""

from bisect import insort
from dataclasses import dataclass
from heapq import heappop, heappush

from spindle.planner.costing.reduction import Interval, Wanted, reduced_by_device, schedule, stretches
from spindle.planner.search.decode import MOMENTS, Decoded, Draft, Moment
from spindle.planner.search.device_pool import DevicePool, bits_of
from spindle.planner.search.model import Model

_Placed = tuple[int, float, float]
"""Devices of a slice, when the gradients of layer 0 would be ready, and by how much each further layer's are sooner."""
REDUCTION_UNITS, DEVICE_UNITS = 3.0, 0.02  # for each slice, and for each slice and device


@dataclass(frozen=True)
class PlacedDecoder:
    """Makes schedules on a pool, forward in time."""

    model: Model
    pool: DevicePool

    @property
    def slice_units(self) -> float:
        """See Decoder."""
        return self.pool.slice_units

    @property
    def reduction_units(self) -> float:
        """See Decoder."""
        each = REDUCTION_UNITS + DEVICE_UNITS * self.model.num_devices
        return each if self.pool.sharing else 0.0

    def decode(
        self, draft: Draft, limit_s: float, since: Moment | None = None, keep: list[Moment] | None = None
    ) -> Decoded | None:
        """See Decoder."""
        model, pool = self.model, self.pool
        counts, times, after, tails, bound_s = model.counts, model.times, model.after, model.tail_s, model.bound_s
        group_of, arriving = pool.shared, list[int]()
        ready: list[tuple[float, int, int]] = []
        running: list[tuple[float, int, int]] = []
        starts: list[list[float]]
        placed: list[list[int]]
        if since is not None:
            now, free, beyond = since.now, since.free, since.beyond
            missing, at = since.missing[:], since.at[:]
            starts = [of[:begun] for of, begun in zip(since.starts, since.begun, strict=True)]
            placed = [of[:begun] for of, begun in zip(since.placed, since.begun, strict=True)]
            ready, running = since.ready[:], since.running[:]
            done, where, shared = (values[:] for values in since.pool[:3])
            memory = since.pool[3].copy() if since.pool[3] is not None else None
        else:
            now, free, beyond = 0.0, pool.all_devices, 0.0
            missing, at = list(map(len, model.before)), [0] * len(draft)
            starts, placed = [[] for _ in draft], [[] for _ in draft]
            done, where, shared, memory = [0] * len(draft), [0] * len(draft), pool.start_shared(), pool.start_memory()
            arriving = [m for m in range(len(draft)) if not missing[m]]
        turn, every = 0, max(1, sum(map(len, draft)) // MOMENTS)
        while True:
            for m in arriving:
                c, _, rank, release, _ = draft[m][at[m]]
                if release > now:
                    heappush(running, (release, ~m, 0))
                else:
                    insort(ready, (rank, m, counts[m][c]))
            if keep is not None:
                turn += 1
                if turn % every == 0:
                    begun = list(map(len, starts))
                    there = (done[:], where[:], shared[:], memory.copy() if memory is not None else None)
                    keep.append(
                        Moment(now, free, beyond, missing[:], at[:], begun, starts, placed, ready[:], running[:], there)
                    )
            kept: list[tuple[float, int, int]] = []
            room = free.bit_count()
            fails_from = room + 1
            for entry in ready:
                _, m, count = entry
                if count >= fails_from and m not in pool.pins:
                    kept.append(entry)
                    continue
                c, layers, _, _, hint = draft[m][at[m]]
                sources = pool.sources(m, not done[m], where)
                found = pool.choose(
                    m,
                    count,
                    free,
                    sources,
                    hint=hint,
                    shared=shared[group_of[m]],
                    memory=memory,
                    first=done[m],
                    layers=layers,
                )
                if found is None:
                    kept.append(entry)
                    if memory is None and m not in pool.pins:
                        fails_from = count
                    continue
                devices, cost_s = found
                end = now + cost_s + layers * times[m][c]
                if end + tails[m] >= limit_s:
                    return None
                if end > bound_s:
                    beyond += count * (end - bound_s)
                if memory is not None:
                    pool.occupy(m, count, devices, memory, done[m], layers)
                if group_of[m] >= 0:
                    shared[group_of[m]] |= devices
                free &= ~devices
                room -= count
                fails_from = min(fails_from, room + 1)
                where[m] = devices
                heappush(running, (end, m, devices))
                starts[m].append(now)
                placed[m].append(devices)
            ready = kept
            if not running:
                return (now, beyond, starts, placed) if not ready else None
            now, m, devices = heappop(running)
            arriving = []
            while True:
                free |= devices
                if m < 0:
                    insort(ready, (draft[~m][at[~m]][2], ~m, counts[~m][draft[~m][at[~m]][0]]))
                else:
                    done[m] += draft[m][at[m]][1]
                    at[m] += 1
                    if at[m] < len(draft[m]):
                        arriving.append(m)
                    else:
                        for s in after[m]:
                            missing[s] -= 1
                            if not missing[s]:
                                arriving.append(s)
                if not running or running[0][0] > now:
                    break
                _, m, devices = heappop(running)

    def reduction_s(self, draft: Draft, decoded: Decoded) -> float:
        """What gradient reductions add, as `spindle.planner.costing.reduction` has it.

        Backward runs the same slices in reverse: when the slices that started first run, all other gradients are ready.
        """
        problem = self.pool.problem
        _, _, starts, devices = decoded
        wanted: list[Wanted] = []
        for members in self.pool.sharing:
            intervals: list[Interval[_Placed]] = []
            most = 0.0
            for m in members:
                metaop = problem.metaops[m]
                most = max(most, metaop.layer_param_bytes)
                backward = 1 - metaop.forward_fraction
                first = 0
                for part, where, start_s in zip(draft[m], devices[m], starts[m], strict=True):
                    is_cut = metaop.degree_on(self.model.counts[m][part[0]]) > 1
                    layer_s = 0.0 if is_cut else backward * self.model.times[m][part[0]]
                    intervals.append((first, first + part[1], (where, -backward * start_s + layer_s * first, layer_s)))
                    first += part[1]
            for low, high, held in stretches(intervals):
                holders = 0
                for where, _, _ in held:
                    holders |= where
                if holders & (holders - 1):
                    ready_s = [max(at_s - layer * layer_s for _, at_s, layer_s in held) for layer in (high - 1, low)]
                    wanted.append(Wanted(bits_of(holders), (high - low) * most, *ready_s))
        reductions = schedule(problem.cluster, wanted, sharded=problem.metagraph.shard_optimizer)
        return max(reduced_by_device(problem.cluster, reductions).values(), default=0.0)
