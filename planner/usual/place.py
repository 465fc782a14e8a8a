"""Place: waves of pieces in, slices on devices with start times out (paper, section 3.5).

- Islands are nodes. A piece takes as few nodes as its count allows: the tightest node that holds it, or whole nodes and
  the rest on one more. Only strict waves may spill over more nodes, since there a piece cannot wait for its neighbors.
- Among such sets the one that costs least to bring the input to wins (the devices the MetaOp or its producers ran on
  cost nothing), then the one that already holds the parameters, then the one with most free memory.
- Pieces of a wave that bring most bytes choose first.
- When memory runs out, earlier choices are made again by memory instead of traffic: the last 1, 2, 4, ... of them, up
  to all. Then the piece that found no room is cut in half, then widened; after MAX_TRIES the input is infeasible.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import chain, islice
from typing import Literal, get_args

from spindle.errors import InfeasibleError
from spindle.plan import Slice
from spindle.planner.problem import Problem
from spindle.planner.traffic import Devices, transfer_s
from spindle.planner.usual.waves import Piece, Waves

Order = Literal["staying", "earliest", "widest"]
"""Which pieces of a wave choose first: those that can stay where they are, that ended earliest, on most devices."""
ORDERS: tuple[Order, ...] = get_args(Order)
MAX_TRIES = 64
MAX_SETS = 8  # device sets that one choice compares: nearest and tightest nodes come first, so more rarely differ


class _NoRoom(Exception):
    """Memory ran out: `piece` finds no devices though all are idle; `choice` is the number of the failed choice."""

    def __init__(self, piece: Piece, choice: int, free_bytes: float) -> None:
        super().__init__(piece, choice)
        self.piece, self.choice, self.free_bytes = piece, choice, free_bytes


@dataclass(frozen=True, slots=True)
class _Placed:
    piece: Piece
    devices: Devices
    start_s: float
    end_s: float


def place(problem: Problem, waves: Waves, *, aligned: bool, in_order: Order | None = None) -> tuple[Slice, ...]:
    """Choose devices and times. `aligned` keeps a barrier after every wave; otherwise a piece starts as soon as its
    data and its devices are there, earlier waves first. `in_order`: without a barrier, but each device runs its pieces
    in the order of their waves, and so the pieces of a wave choose. Raises InfeasibleError when memory cannot hold the
    pieces.
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
        metaop=problem.metaops[placed.piece.op].name,
        first_layer=placed.piece.first_layer,
        num_layers=placed.piece.num_layers,
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
        for piece in sorted(wave, key=placer.incoming_bytes, reverse=True):
            devices = placer.choose(piece, spill=True)
            if devices is None:
                raise placer.no_room(piece)
            started.append(placer.start(piece, devices, now_s))
        now_s = max(p.end_s for p in started)
        placed += started
    return placed


def _place_in_order(placer: "_Placer", waves: Waves, order: Order) -> list[_Placed]:
    """Wave by wave as with barriers, but a piece starts when its data and its devices are there."""
    placed: list[_Placed] = []
    for wave in waves:
        placer.free_all()
        for piece in sorted(wave, key=lambda piece: placer.rank(piece, order)):
            devices = placer.choose(piece, spill=True, early=True)
            if devices is None:
                raise placer.no_room(piece)
            placed.append(placer.start(piece, devices, placer.ready_s(piece, devices)))
    return placed


def _place_freely(placer: "_Placer", waves: Waves) -> list[_Placed]:
    """List scheduling: at each moment the pieces that are ready start in the order of their waves, if they fit."""
    problem = placer.problem
    queues = _queues(problem, waves)
    missing = [len(before) for before in problem.predecessors]
    ready = [(rank, piece) for op, (rank, piece) in ((op, q[-1]) for op, q in enumerate(queues)) if not missing[op]]
    running: list[tuple[float, int, _Placed]] = []
    placed: list[_Placed] = []
    now_s = 0.0
    while ready or running:
        ready.sort(key=lambda r: (r[0], -placer.incoming_bytes(r[1])))
        waiting = []
        for rank, piece in ready:
            devices = placer.choose(piece, spill=False)
            if devices is None:
                waiting.append((rank, piece))
                continue
            placed.append(placer.start(piece, devices, now_s))
            heappush(running, (placed[-1].end_s, len(placed), placed[-1]))
        if not running:
            raise placer.no_room(waiting[0][1])
        ready = waiting
        now_s = running[0][0]
        while running and running[0][0] == now_s:
            ready += _finish(problem, placer, heappop(running)[2], queues, missing)
    return placed


def _queues(problem: Problem, waves: Waves) -> list[list[tuple[int, Piece]]]:
    """Pieces of each MetaOp with the number of their wave, last layer first."""
    queues: list[list[tuple[int, Piece]]] = [[] for _ in range(len(problem))]
    for rank, wave in enumerate(waves):
        for piece in wave:
            queues[piece.op].append((rank, piece))
    for queue in queues:
        queue.sort(key=lambda entry: -entry[1].first_layer)
    return queues


def _finish(
    problem: Problem, placer: "_Placer", done: _Placed, queues: list[list[tuple[int, Piece]]], missing: list[int]
) -> list[tuple[int, Piece]]:
    """Stop `done`; returns the pieces that became ready."""
    placer.stop(done)
    op = done.piece.op
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

    def incoming_bytes(self, piece: Piece) -> float:
        """Bytes that must reach the piece's devices, if they are other ones."""
        return sum(num_bytes for num_bytes, _ in self._sources(piece))

    def rank(self, piece: Piece, order: Order) -> tuple[float, float]:
        """Pieces of a wave choose by this, then by the bytes that one device takes or sends when their input moves."""
        sources = self._sources(piece)
        share = max((b / min(len(source), piece.count) for b, source in sources if source), default=0.0)
        if order == "staying":
            return float(not piece.first_layer or len(self.last[piece.op]) != piece.count), -share
        return (self.ended_s[piece.op] if order == "earliest" else -float(piece.count)), -share

    def ready_s(self, piece: Piece, devices: Devices) -> float:
        """When the piece can start on `devices`: its data and they are there."""
        before = (piece.op,) if piece.first_layer else self.problem.predecessors[piece.op]
        return max(chain((self.ended_s[op] for op in before), (self.busy_until_s[d] for d in devices)))

    def no_room(self, piece: Piece) -> _NoRoom:
        """What to raise when `piece` fits nowhere though all devices are idle."""
        used = sorted(self.used_bytes)[: piece.count]
        return _NoRoom(piece, self.choices, self.problem.room_bytes - used[-1])

    def _sources(self, piece: Piece) -> list[tuple[float, Devices]]:
        """What the piece receives: (bytes, devices that hold it)."""
        op = piece.op
        if piece.first_layer:
            return [(self.problem.metaops[op].output_bytes, self.last[op])]
        flow_bytes = self.problem.flow_bytes
        return [(flow_bytes[before, op], self.last[before]) for before in self.problem.predecessors[op]]

    def _received_s(self, piece: Piece, devices: Devices) -> float:
        """Seconds to receive the piece's input, and in backward to send its gradient."""
        return sum(2 * transfer_s(self.cluster, b, source, devices) for b, source in self._sources(piece))

    def _added_bytes(self, piece: Piece, device: int) -> float:
        """Memory that the piece takes on `device`, less what the device shares with it already."""
        if not self.with_memory:
            return 0.0
        op, count = piece.op, piece.count
        if (op, count) not in self.layer_bytes:
            self.layer_bytes[op, count] = self.problem.layer_memory_bytes(op, count)
        own = self.layer_bytes[op, count] * piece.num_layers
        key = self.problem.metaops[op].parameters
        held = self.held[device].get(key, 0) if key else 0
        if not held:
            return own
        return own - (held & _layer_bits(piece)).bit_count() * self.problem.saved_bytes[key]

    def start(self, piece: Piece, devices: Devices, now_s: float) -> _Placed:
        """Put the piece on `devices` from now on."""
        end_s = now_s + self._received_s(piece, devices) + piece.num_layers * self.problem.time(piece.op, piece.count)
        key, bits = self.problem.metaops[piece.op].parameters, _layer_bits(piece)
        for device in devices if self.with_memory else ():
            self.used_bytes[device] += self._added_bytes(piece, device)
            if key:
                self.held[device][key] = self.held[device].get(key, 0) | bits
        self._mark(devices, free=False)
        for device in devices:
            self.busy_until_s[device] = end_s
        self.last[piece.op], self.ended_s[piece.op] = devices, end_s
        self.choices += 1
        return _Placed(piece, devices, now_s, end_s)

    def choose(self, piece: Piece, *, spill: bool, early: bool = False) -> Devices | None:
        """The best devices for the piece among those that are free and have room; None when there are none.

        `early`: devices that become idle at different times; where the piece gets its input first is best.
        """
        if piece.devices:
            return piece.devices if all(self.free[d] and self._fits(piece, d) for d in piece.devices) else None
        if sum(self.free_in_node) < piece.count:
            return None
        balance = self.choices >= self.balance_from
        near = set(chain.from_iterable(source for _, source in self._sources(piece)))
        sets = list(islice(self._compact_sets(piece, near, balance), MAX_SETS))
        if early:
            sets += islice(self._compact_sets(piece, near, balance, early=True), MAX_SETS)
        repeat = self.last[piece.op]
        if len(repeat) == piece.count and all(self.free[d] and self._fits(piece, d) for d in repeat):
            sets.append(repeat)
        if not sets:
            return self._spilled(piece, near, balance) if spill else None
        if early and not balance:
            return min(sets, key=lambda devices: (self._got_s(piece, devices), self._cost(piece, devices, balance)))
        return min(sets, key=lambda devices: self._cost(piece, devices, balance))

    def _got_s(self, piece: Piece, devices: Devices) -> float:
        """When the piece has its input on `devices`."""
        return self.ready_s(piece, devices) + self._received_s(piece, devices)

    def _fits(self, piece: Piece, device: int) -> bool:
        capacity = self.problem.room_bytes
        return not self.with_memory or self.used_bytes[device] + self._added_bytes(piece, device) <= capacity

    def _usable(self, piece: Piece, node: int, near: set[int], balance: bool, early: bool = False) -> list[int]:
        """Devices of a node that are free and have room, preferred ones first."""
        size = self.cluster.devices_per_node
        if early:
            there = (d for d in range(node * size, (node + 1) * size) if self.free[d] and self._fits(piece, d))
            return sorted(there, key=lambda d: (self.busy_until_s[d], d not in near))
        if not self.with_memory:
            return sorted(
                (d for d in range(node * size, (node + 1) * size) if self.free[d]), key=lambda d: d not in near
            )
        usable = [d for d in range(node * size, (node + 1) * size) if self.free[d] and self._fits(piece, d)]
        if balance:
            return sorted(usable, key=lambda d: (self.used_bytes[d] + self._added_bytes(piece, d), d not in near, d))
        return sorted(usable, key=lambda d: (d not in near, self._added_bytes(piece, d), self.used_bytes[d], d))

    def _nodes(self, least_free: int, near: set[int], balance: bool) -> list[int]:
        """Nodes with enough free devices: emptiest memory first to balance, else near the input, then tightest."""
        free_in_node, size = self.free_in_node, self.cluster.devices_per_node
        nodes = [node for node in range(self.cluster.nodes) if free_in_node[node] >= least_free]
        if balance:
            return sorted(nodes, key=lambda node: sum(self.used_bytes[node * size : (node + 1) * size]))
        near_nodes = {self.cluster.node_of(d) for d in near}
        return sorted(nodes, key=lambda node: (node not in near_nodes, free_in_node[node]))

    def _compact_sets(self, piece: Piece, near: set[int], balance: bool, *, early: bool = False) -> Iterator[Devices]:
        """Device sets over as few nodes as the count allows: in one node, or whole nodes and a rest in one more."""
        size, count = self.cluster.devices_per_node, piece.count
        full, rest = divmod(count, size) if count > size else (0, count)
        chosen: list[int] = []
        whole: list[int] = []
        for node in self._nodes(size, near, balance) if full else ():
            if len(whole) < full and len(devices := self._usable(piece, node, near, balance, early)) == size:
                whole.append(node)
                chosen += devices
        if len(whole) < full:
            return
        if not rest:
            yield tuple(sorted(chosen))
            return
        for node in self._nodes(rest, near, balance):
            if node not in whole and len(devices := self._usable(piece, node, near, balance, early)) >= rest:
                yield tuple(sorted((*chosen, *devices[:rest])))

    def _spilled(self, piece: Piece, near: set[int], balance: bool) -> Devices | None:
        """Any devices with room, those of the freest nodes first."""
        by_node = [self._usable(piece, node, near, balance) for node in range(self.cluster.nodes)]
        devices = [device for usable in sorted(by_node, key=len, reverse=True) for device in usable]
        return tuple(sorted(devices[: piece.count])) if len(devices) >= piece.count else None

    def _cost(self, piece: Piece, devices: Devices, balance: bool) -> tuple[float, ...]:
        """Received seconds, bytes newly held, free devices left over in the nodes used, fullest device."""
        received_s = self._received_s(piece, devices)
        added = [self._added_bytes(piece, d) for d in devices]
        fullest = max(self.used_bytes[d] + b for d, b in zip(devices, added, strict=True))
        nodes = {self.cluster.node_of(d) for d in devices}
        left = sum(self.free_in_node[node] for node in nodes) - len(devices)
        if balance:
            return (fullest, received_s, left, devices[0])
        return (received_s, sum(added), left, fullest, devices[0])


def _layer_bits(piece: Piece) -> int:
    return ((1 << piece.num_layers) - 1) << piece.first_layer


def _relieve(problem: Problem, waves: Waves, full: _NoRoom) -> Waves:
    """Change the piece that found no room: cut it in half, or run a single layer on more devices."""
    piece = full.piece
    half = piece.num_layers // 2
    wider = next((n for n in problem.curves[piece.op].counts if n > piece.count), None)
    if piece.devices or not (half or wider):
        raise _infeasible(problem, full)
    if half:
        first = replace(piece, num_layers=half)
        second = replace(piece, first_layer=piece.first_layer + half, num_layers=piece.num_layers - half)
        return _swapped(waves, piece, (first,), (second,))
    return _swapped(waves, piece, (), (replace(piece, count=wider or piece.count),))


def _swapped(waves: Waves, old: Piece, here: tuple[Piece, ...], after: tuple[Piece, ...]) -> Waves:
    """The waves with `old` replaced by `here` in its wave and by `after` in a wave of its own behind it."""
    swapped: list[tuple[Piece, ...]] = []
    for wave in waves:
        if any(piece is old for piece in wave):
            swapped += [tuple(piece for piece in wave if piece is not old) + here, after]
        else:
            swapped.append(wave)
    return tuple(wave for wave in swapped if wave)


def _infeasible(problem: Problem, full: _NoRoom) -> InfeasibleError:
    piece, gib = full.piece, 2**30
    metaop = problem.metaops[piece.op]
    need = problem.layer_memory_bytes(piece.op, piece.count) * piece.num_layers
    last = piece.first_layer + piece.num_layers - 1
    return InfeasibleError(
        f"MetaOp {metaop.name!r}: layers {piece.first_layer}..{last} need {need / gib:.2f} GiB on each of "
        f"{piece.count} devices but the emptiest {piece.count} have {max(0.0, full.free_bytes) / gib:.2f} GiB left; "
        "use more devices, recompute activations, shard the optimizer, or a smaller batch"
    )
