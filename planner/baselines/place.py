"""Place: waves of items in, slices on devices with start times out (paper, section 3.5).

- Islands are nodes. A item takes as few nodes as its count allows: the tightest node that holds it, or whole nodes and
  the rest on one more. Only strict waves may spill over more nodes, since there a item cannot wait for its neighbors.
- Among such sets the one that costs least to bring the input to wins (the devices the MetaOp or its producers ran on
  cost nothing), then the one that already holds the parameters, then the one with most free memory.
- Slices of a wave that bring most bytes choose first.
- When memory runs out, earlier choices are made again by memory instead of traffic: the last 1, 2, 4, ... of them, up
  to all. Then the item that found no room is cut in half, then widened; after MAX_TRIES the input is infeasible.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import chain, islice
from typing import Literal, get_args

from spindle.errors import InfeasibleError
from spindle.planner.baselines.waves import Waves, WaveSlice
from spindle.planner.costing.traffic import Devices, transfer_s
from spindle.planner.problem import Problem
from spindle.values.plan import Slice

Order = Literal["staying", "earliest", "widest"]
"""Which items of a wave choose first: items that can stay where they are, that ended earliest, on most devices."""
ORDERS: tuple[Order, ...] = get_args(Order)
MAX_TRIES = 64
MAX_SETS = 8  # device sets that one choice compares: nearest and tightest nodes come first, so more rarely differ


class _NoRoom(Exception):
    """Memory ran out: `item` finds no devices though all are idle; `choice` is the number of the failed choice."""

    def __init__(self, item: WaveSlice, choice: int, free_bytes: float) -> None:
        super().__init__(item, choice)
        self.item, self.choice, self.free_bytes = item, choice, free_bytes


@dataclass(frozen=True, slots=True)
class _Placed:
    item: WaveSlice
    devices: Devices
    start_s: float
    end_s: float


def place(problem: Problem, waves: Waves, *, aligned: bool, in_order: Order | None = None) -> tuple[Slice, ...]:
    """Choose devices and times. `aligned` keeps a barrier after every wave; otherwise a item starts as soon as its
    data and its devices are there, earlier waves first. `in_order`: without a barrier, but each device runs its items
    in the order of their waves, and so the items of a wave choose. Raises InfeasibleError when memory cannot hold the
    items.
    """
    balance_from = sum(map(len, waves)) + 1
    last: _NoRoom | None = None
    for attempt in range(MAX_TRIES):
        placer = _Placer(problem, balance_from)
        try:
            if in_order is not None:
                placed = _place_in_order(placer, waves, in_order)
            else:
                placed = _place_aligned(placer, waves) if aligned else _place_freely(placer, waves)
        except _NoRoom as full:
            if balance_from > 0:
                balance_from = max(0, full.choice - 2**attempt)
            else:
                waves = _relieve(problem, waves, full)
            last = full
        else:
            slices = (_slice(problem, p) for p in placed)
            return tuple(slices) if aligned else join(slices)
    raise _infeasible(problem, last) if last else AssertionError("placement ended without a result")


def join(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """Make one of slices of a MetaOp that follow each other on the same devices without a pause."""
    joined: list[Slice] = []
    last_of: dict[str, int] = {}
    for s in sorted(slices, key=lambda s: (s.start_s, s.devices, s.metaop)):
        at = last_of.get(s.metaop)
        if at is not None and joined[at].devices == s.devices and joined[at].end_s == s.start_s:
            joined[at] = replace(joined[at], num_layers=joined[at].num_layers + s.num_layers, end_s=s.end_s)
        else:
            last_of[s.metaop] = len(joined)
            joined.append(s)
    return tuple(joined)


def _slice(problem: Problem, placed: _Placed) -> Slice:
    return Slice(
        metaop=problem.metaops[placed.item.op].name,
        first_layer=placed.item.first_layer,
        num_layers=placed.item.num_layers,
        devices=placed.devices,
        start_s=placed.start_s,
        end_s=placed.end_s,
    )


def _place_aligned(placer: "_Placer", waves: Waves) -> list[_Placed]:
    now_s = 0.0
    placed: list[_Placed] = []
    for wave in waves:
        placer.free_all()
        started = []
        for item in sorted(wave, key=placer.incoming_bytes, reverse=True):
            devices = placer.choose(item, spill=True)
            if devices is None:
                raise placer.no_room(item)
            started.append(placer.start(item, devices, now_s))
        now_s = max(p.end_s for p in started)
        placed += started
    return placed


def _place_in_order(placer: "_Placer", waves: Waves, order: Order) -> list[_Placed]:
    """Wave by wave as with barriers, but a item starts when its data and its devices are there."""
    placed: list[_Placed] = []
    for wave in waves:
        placer.free_all()
        for item in sorted(wave, key=lambda item: placer.rank(item, order)):
            devices = placer.choose(item, spill=True, early=True)
            if devices is None:
                raise placer.no_room(item)
            placed.append(placer.start(item, devices, placer.ready_s(item, devices)))
    return placed


def _place_freely(placer: "_Placer", waves: Waves) -> list[_Placed]:
    """List scheduling: at each moment the items that are ready start in the order of their waves, if they fit."""
    problem = placer.problem
    queues = _queues(problem, waves)
    missing = [len(before) for before in problem.predecessors]
    ready = [(rank, item) for op, (rank, item) in ((op, q[-1]) for op, q in enumerate(queues)) if not missing[op]]
    running: list[tuple[float, int, _Placed]] = []
    placed: list[_Placed] = []
    now_s = 0.0
    while ready or running:
        ready.sort(key=lambda r: (r[0], -placer.incoming_bytes(r[1])))
        waiting = []
        for rank, item in ready:
            devices = placer.choose(item, spill=False)
            if devices is None:
                waiting.append((rank, item))
                continue
            placed.append(placer.start(item, devices, now_s))
            heappush(running, (placed[-1].end_s, len(placed), placed[-1]))
        if not running:
            raise placer.no_room(waiting[0][1])
        ready = waiting
        now_s = running[0][0]
        while running and running[0][0] == now_s:
            ready += _finish(problem, placer, heappop(running)[2], queues, missing)
    return placed


def _queues(problem: Problem, waves: Waves) -> list[list[tuple[int, WaveSlice]]]:
    """Slices of each MetaOp with the number of their wave, last layer first."""
    queues: list[list[tuple[int, WaveSlice]]] = [[] for _ in range(len(problem))]
    for rank, wave in enumerate(waves):
        for item in wave:
            queues[item.op].append((rank, item))
    for queue in queues:
        queue.sort(key=lambda entry: -entry[1].first_layer)
    return queues


def _finish(
    problem: Problem, placer: "_Placer", done: _Placed, queues: list[list[tuple[int, WaveSlice]]], missing: list[int]
) -> list[tuple[int, WaveSlice]]:
    """Stop `done`; returns the items that became ready."""
    placer.stop(done)
    op = done.item.op
    queues[op].pop()
    if queues[op]:
        return [queues[op][-1]]
    ready = []
    for follower in problem.successors[op]:
        missing[follower] -= 1
        if not missing[follower]:
            ready.append(queues[follower][-1])
    return ready


class _Placer:
    """Which devices are free, what each holds, and where each MetaOp ran last."""

    def __init__(self, problem: Problem, balance_from: int) -> None:
        self.problem = problem
        self.cluster = problem.cluster
        self.balance_from = balance_from
        self.choices = 0
        self.with_memory = problem.has_memory
        self.used_bytes = [0.0] * problem.num_devices
        self.last: list[Devices] = [()] * len(problem)
        # layers of each parameter set that each device holds, as bits
        self.held: list[dict[str, int]] = [{} for _ in range(problem.num_devices)]
        self.layer_bytes: dict[tuple[int, int], float] = {}
        self.busy_until_s = [0.0] * problem.num_devices
        self.ended_s = [0.0] * len(problem)
        self.free_all()

    def free_all(self) -> None:
        """Every device becomes free."""
        self.free = [True] * self.problem.num_devices
        self.free_in_node = [self.cluster.devices_per_node] * self.cluster.nodes

    def _mark(self, devices: Devices, *, free: bool) -> None:
        for device in devices:
            self.free[device] = free
            self.free_in_node[self.cluster.node_of(device)] += 1 if free else -1

    def stop(self, placed: _Placed) -> None:
        """The devices of a slice become free."""
        self._mark(placed.devices, free=True)

    def incoming_bytes(self, item: WaveSlice) -> float:
        """Bytes that must reach the item's devices, if they are other ones."""
        return sum(num_bytes for num_bytes, _ in self._sources(item))

    def rank(self, item: WaveSlice, order: Order) -> tuple[float, float]:
        """Slices of a wave choose by this, then by the bytes that one device takes or sends when their input moves."""
        sources = self._sources(item)
        share = max((b / min(len(source), item.count) for b, source in sources if source), default=0.0)
        if order == "staying":
            return float(not item.first_layer or len(self.last[item.op]) != item.count), -share
        return (self.ended_s[item.op] if order == "earliest" else -float(item.count)), -share

    def ready_s(self, item: WaveSlice, devices: Devices) -> float:
        """When the item can start on `devices`: its data and they are there."""
        before = (item.op,) if item.first_layer else self.problem.predecessors[item.op]
        return max(chain((self.ended_s[op] for op in before), (self.busy_until_s[d] for d in devices)))

    def no_room(self, item: WaveSlice) -> _NoRoom:
        """What to raise when `item` fits nowhere though all devices are idle."""
        used = sorted(self.used_bytes)[: item.count]
        return _NoRoom(item, self.choices, self.problem.room_bytes - used[-1])

    def _sources(self, item: WaveSlice) -> list[tuple[float, Devices]]:
        """What the item receives: (bytes, devices that hold it)."""
        op = item.op
        if item.first_layer:
            return [(self.problem.metaops[op].output_bytes, self.last[op])]
        flow_bytes = self.problem.flow_bytes
        return [(flow_bytes[before, op], self.last[before]) for before in self.problem.predecessors[op]]

    def _received_s(self, item: WaveSlice, devices: Devices) -> float:
        """Seconds to receive the item's input, and in backward to send its gradient."""
        return sum(2 * transfer_s(self.cluster, b, source, devices) for b, source in self._sources(item))

    def _added_bytes(self, item: WaveSlice, device: int) -> float:
        """Memory that the item takes on `device`, less what the device shares with it already."""
        if not self.with_memory:
            return 0.0
        op, count = item.op, item.count
        if (op, count) not in self.layer_bytes:
            self.layer_bytes[op, count] = self.problem.layer_memory_bytes(op, count)
        own = self.layer_bytes[op, count] * item.num_layers
        key = self.problem.metaops[op].parameters
        held = self.held[device].get(key, 0) if key else 0
        if not held:
            return own
        return own - (held & _layer_bits(item)).bit_count() * self.problem.saved_bytes[key]

    def start(self, item: WaveSlice, devices: Devices, now_s: float) -> _Placed:
        """Put the item on `devices` from now on."""
        end_s = now_s + self._received_s(item, devices) + item.num_layers * self.problem.time(item.op, item.count)
        key, bits = self.problem.metaops[item.op].parameters, _layer_bits(item)
        for device in devices if self.with_memory else ():
            self.used_bytes[device] += self._added_bytes(item, device)
            if key:
                self.held[device][key] = self.held[device].get(key, 0) | bits
        self._mark(devices, free=False)
        for device in devices:
            self.busy_until_s[device] = end_s
        self.last[item.op], self.ended_s[item.op] = devices, end_s
        self.choices += 1
        return _Placed(item, devices, now_s, end_s)

    def choose(self, item: WaveSlice, *, spill: bool, early: bool = False) -> Devices | None:
        """The best devices for the item among the free ones with room; None when there are none.

        `early`: devices that become idle at different times; where the item gets its input first is best.
        """
        if item.devices:
            return item.devices if all(self.free[d] and self._fits(item, d) for d in item.devices) else None
        if sum(self.free_in_node) < item.count:
            return None
        balance = self.choices >= self.balance_from
        near = set(chain.from_iterable(source for _, source in self._sources(item)))
        sets = list(islice(self._compact_sets(item, near, balance), MAX_SETS))
        if early:
            sets += islice(self._compact_sets(item, near, balance, early=True), MAX_SETS)
        repeat = self.last[item.op]
        if len(repeat) == item.count and all(self.free[d] and self._fits(item, d) for d in repeat):
            sets.append(repeat)
        if not sets:
            return self._spilled(item, near, balance) if spill else None
        if early and not balance:
            return min(sets, key=lambda devices: (self._got_s(item, devices), self._cost(item, devices, balance)))
        return min(sets, key=lambda devices: self._cost(item, devices, balance))

    def _got_s(self, item: WaveSlice, devices: Devices) -> float:
        """When the item has its input on `devices`."""
        return self.ready_s(item, devices) + self._received_s(item, devices)

    def _fits(self, item: WaveSlice, device: int) -> bool:
        capacity = self.problem.room_bytes
        return not self.with_memory or self.used_bytes[device] + self._added_bytes(item, device) <= capacity

    def _usable(self, item: WaveSlice, node: int, near: set[int], balance: bool, early: bool = False) -> list[int]:
        """Devices of a node that are free and have room, preferred ones first."""
        size = self.cluster.devices_per_node
        if early:
            there = (d for d in range(node * size, (node + 1) * size) if self.free[d] and self._fits(item, d))
            return sorted(there, key=lambda d: (self.busy_until_s[d], d not in near))
        if not self.with_memory:
            return sorted(
                (d for d in range(node * size, (node + 1) * size) if self.free[d]), key=lambda d: d not in near
            )
        usable = [d for d in range(node * size, (node + 1) * size) if self.free[d] and self._fits(item, d)]
        if balance:
            return sorted(usable, key=lambda d: (self.used_bytes[d] + self._added_bytes(item, d), d not in near, d))
        return sorted(usable, key=lambda d: (d not in near, self._added_bytes(item, d), self.used_bytes[d], d))

    def _nodes(self, least_free: int, near: set[int], balance: bool) -> list[int]:
        """Nodes with enough free devices: emptiest memory first to balance, else near the input, then tightest."""
        free_in_node, size = self.free_in_node, self.cluster.devices_per_node
        nodes = [node for node in range(self.cluster.nodes) if free_in_node[node] >= least_free]
        if balance:
            return sorted(nodes, key=lambda node: sum(self.used_bytes[node * size : (node + 1) * size]))
        near_nodes = {self.cluster.node_of(d) for d in near}
        return sorted(nodes, key=lambda node: (node not in near_nodes, free_in_node[node]))

    def _compact_sets(
        self, item: WaveSlice, near: set[int], balance: bool, *, early: bool = False
    ) -> Iterator[Devices]:
        """Device sets over as few nodes as the count allows: in one node, or whole nodes and a rest in one more."""
        size, count = self.cluster.devices_per_node, item.count
        full, rest = divmod(count, size) if count > size else (0, count)
        chosen: list[int] = []
        whole: list[int] = []
        for node in self._nodes(size, near, balance) if full else ():
            if len(whole) < full and len(devices := self._usable(item, node, near, balance, early)) == size:
                whole.append(node)
                chosen += devices
        if len(whole) < full:
            return
        if not rest:
            yield tuple(sorted(chosen))
            return
        for node in self._nodes(rest, near, balance):
            if node not in whole and len(devices := self._usable(item, node, near, balance, early)) >= rest:
                yield tuple(sorted((*chosen, *devices[:rest])))

    def _spilled(self, item: WaveSlice, near: set[int], balance: bool) -> Devices | None:
        """Any devices with room, those of the freest nodes first."""
        by_node = [self._usable(item, node, near, balance) for node in range(self.cluster.nodes)]
        devices = [device for usable in sorted(by_node, key=len, reverse=True) for device in usable]
        return tuple(sorted(devices[: item.count])) if len(devices) >= item.count else None

    def _cost(self, item: WaveSlice, devices: Devices, balance: bool) -> tuple[float, ...]:
        """Received seconds, bytes newly held, free devices left over in the nodes used, fullest device."""
        received_s = self._received_s(item, devices)
        added = [self._added_bytes(item, d) for d in devices]
        fullest = max(self.used_bytes[d] + b for d, b in zip(devices, added, strict=True))
        nodes = {self.cluster.node_of(d) for d in devices}
        left = sum(self.free_in_node[node] for node in nodes) - len(devices)
        if balance:
            return (fullest, received_s, left, devices[0])
        return (received_s, sum(added), left, fullest, devices[0])


def _layer_bits(item: WaveSlice) -> int:
    return ((1 << item.num_layers) - 1) << item.first_layer


def _relieve(problem: Problem, waves: Waves, full: _NoRoom) -> Waves:
    """Change the item that found no room: cut it in half, or run a single layer on more devices."""
    item = full.item
    half = item.num_layers // 2
    wider = next((n for n in problem.curves[item.op].counts if n > item.count), None)
    if item.devices or not (half or wider):
        raise _infeasible(problem, full)
    if half:
        first = replace(item, num_layers=half)
        second = replace(item, first_layer=item.first_layer + half, num_layers=item.num_layers - half)
        return _swapped(waves, item, (first,), (second,))
    return _swapped(waves, item, (), (replace(item, count=wider or item.count),))


def _swapped(waves: Waves, old: WaveSlice, here: tuple[WaveSlice, ...], after: tuple[WaveSlice, ...]) -> Waves:
    """The waves with `old` replaced by `here` in its wave and by `after` in a wave of its own behind it."""
    swapped: list[tuple[WaveSlice, ...]] = []
    for wave in waves:
        if any(item is old for item in wave):
            swapped += [tuple(item for item in wave if item is not old) + here, after]
        else:
            swapped.append(wave)
    return tuple(wave for wave in swapped if wave)


def _infeasible(problem: Problem, full: _NoRoom) -> InfeasibleError:
    item, gib = full.item, 2**30
    metaop = problem.metaops[item.op]
    need = problem.layer_memory_bytes(item.op, item.count) * item.num_layers
    last = item.first_layer + item.num_layers - 1
    return InfeasibleError(
        f"MetaOp {metaop.name!r}: layers {item.first_layer}..{last} need {need / gib:.2f} GiB on each of "
        f"{item.count} devices but the emptiest {item.count} have {max(0.0, full.free_bytes) / gib:.2f} GiB left; "
        "use more devices, recompute activations, shard the optimizer, or a smaller batch"
    )
