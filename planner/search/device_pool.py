"""Device pool: a wanted count in, the devices to take and what bringing the input there costs out.

- Sets of devices are the bits of an int.
- A slice takes as few nodes as its count allows: one node, or whole nodes and the rest on one more. If no such set is
  free it waits.
- Among such sets, the one the input already lies on costs nothing; else one in the same node; else one where layers of
  the same parameters ran, which makes gradient reductions small; else the tightest node, so that whole nodes stay free.
- With memory, only devices with room are taken. What a device holds it keeps until the step ends; layers that share
  parameters count once (`spindle.planner.costing.memory`).
- Costs are those of `spindle.planner.costing.traffic`: activation forward, gradient back, charged to the slice that
  receives. Under reversed time the slice that starts pays as well; the forward decoding of the result then charges the
  right one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from spindle.planner.problem import Problem

Sources = Sequence[tuple[int, float]]
"""(devices that hold it, bytes) of each input."""


class Memory:
    """Bytes that each device has in use, and the layers of each parameter set it holds, as bits."""

    __slots__ = ("fullest", "held", "used")

    def __init__(self, num_devices: int) -> None:
        self.used = [0.0] * num_devices
        self.held: dict[str, list[int]] = {}
        self.fullest = 0.0

    def copy(self) -> "Memory":
        """An independent copy."""
        other = Memory(0)
        other.used, other.fullest = self.used[:], self.fullest
        other.held = {key: held[:] for key, held in self.held.items()}
        return other


@dataclass(frozen=True)
class DevicePool:
    """Devices of a cluster, and the bytes that MetaOps send each other.

    flows[m]    (p, bytes) of each flow into m, by predecessor; own[m]: bytes between layers of m
    """

    problem: Problem
    flows: tuple[tuple[tuple[int, float], ...], ...]
    own: tuple[float, ...]
    with_memory: bool

    @cached_property
    def matters(self) -> bool:
        """Whether it makes a difference which devices a slice takes."""
        return self.with_memory or self.problem.has_traffic or bool(self.pins)

    @cached_property
    def pins(self) -> dict[int, int]:
        """Devices of pinned MetaOps."""
        return {m: sum(1 << d for d in devices) for m, devices in self.problem.pins.items()}

    @property
    def simulation_factor(self) -> float:
        """Work of a simulation with devices in units of one that counts them."""
        return 2.2 if self.with_memory else 1.4

    @property
    def slice_units(self) -> float:
        """Work of decoding one slice."""
        return (2.0 + 0.04 * self.problem.cluster.nodes) * (1.8 if self.with_memory else 1.0)

    @cached_property
    def size(self) -> int:
        """Devices in a node."""
        return self.problem.cluster.devices_per_node

    @cached_property
    def all_devices(self) -> int:
        """Every device."""
        return (1 << self.problem.num_devices) - 1

    @cached_property
    def node_masks(self) -> tuple[int, ...]:
        """Devices of each node."""
        full = (1 << self.size) - 1
        return tuple(full << (i * self.size) for i in range(self.problem.cluster.nodes))

    @cached_property
    def firsts(self) -> int:
        """The first device of each node."""
        return sum(1 << (i * self.size) for i in range(self.problem.cluster.nodes))

    @cached_property
    def sharing(self) -> tuple[tuple[int, ...], ...]:
        """MetaOps with gradients to reduce, those with the same parameters together."""
        groups: dict[str, list[int]] = {}
        for m, metaop in enumerate(self.problem.metaops):
            if metaop.layer_param_bytes:
                groups.setdefault(metaop.parameters or f"{metaop.name} (alone)", []).append(m)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """For each MetaOp the number of MetaOps that share its parameters; -1 where none does."""
        shared = [members for members in self.sharing if len(members) > 1]
        group = {m: i for i, members in enumerate(shared) for m in members}
        return tuple(group.get(m, -1) for m in range(len(self.problem)))

    def start_shared(self) -> list[int]:
        """Devices on which each group of `shared` has run: none yet. Its last entry is that of MetaOps
        without a group.
        """
        return [0] * (max(self.shared, default=-1) + 2)

    @cached_property
    def _links(self) -> tuple[float, float, float, float, float]:
        """Twice the latency and twice the seconds of a byte: inside a node, between nodes; and of one through ports
        that a node's devices share.
        """
        inside, across = self.problem.cluster.intra_node, self.problem.cluster.inter_node
        port_byte_s = 2 / across.node_bytes_per_s if across.node_bytes_per_s else 0.0
        return 2 * inside.latency_s, 2 / inside.bytes_per_s, 2 * across.latency_s, 2 / across.bytes_per_s, port_byte_s

    @cached_property
    def reversed(self) -> "DevicePool":
        """The pool of the reversed model: flows turned around."""
        flows: list[list[tuple[int, float]]] = [[] for _ in self.flows]
        for m, sources in enumerate(self.flows):
            for p, num_bytes in sources:
                flows[p].append((m, num_bytes))
        return DevicePool(self.problem, tuple(map(tuple, flows)), self.own, self.with_memory)

    def start_memory(self) -> Memory | None:
        """Empty devices; None when memory does not matter."""
        return Memory(self.problem.num_devices) if self.with_memory else None

    def sources(self, m: int, is_first: bool, where: Sequence[int]) -> list[tuple[int, float]]:
        """What a slice of m receives: its own last devices, or those of its predecessors."""
        if not is_first:
            return [(where[m], self.own[m])]
        return [(where[p], num_bytes) for p, num_bytes in self.flows[m]]

    def cost_s(self, devices: int, count: int, sources: Sources) -> float:
        """Seconds, both directions, to bring the input of a slice to `devices`."""
        total = 0.0
        inside_s, inside_byte_s, across_s, across_byte_s, port_byte_s = self._links
        for source, num_bytes in sources:
            if num_bytes and source != devices:
                width = min(count, source.bit_count())
                both = source | devices
                first = (both & -both).bit_length() - 1
                if both & ~self.node_masks[first // self.size]:
                    each_s = max(across_byte_s, port_byte_s * min(width, self.size))
                    total += across_s + num_bytes * each_s / width
                else:
                    total += inside_s + num_bytes * inside_byte_s / width
        return total

    def choose(
        self,
        m: int,
        count: int,
        free: int,
        sources: Sources,
        *,
        hint: int = 0,
        shared: int = 0,
        memory: Memory | None = None,
        first: int = 0,
        layers: int = 1,
    ) -> tuple[int, float] | None:
        """(devices, cost) for layers of m on `count` of the `free` devices; None when it has to wait.

        `shared`: devices where layers of the same parameters ran.
        """
        if memory is not None:
            free = self.with_room(m, count, free, memory, first, layers)
        if m in self.pins:
            hint = self.pins[m]
            return (hint, self.cost_s(hint, count, sources)) if hint & free == hint else None
        if hint and hint & free == hint and hint.bit_count() == count:
            return hint, self.cost_s(hint, count, sources)
        best, best_s = 0, float("inf")
        near = 0
        for source, _ in sources:
            near |= source
            if source & free == source and source.bit_count() == count:
                cost_s = self.cost_s(source, count, sources)
                if cost_s < best_s:
                    best, best_s = source, cost_s
        if best and not best_s:
            return best, 0.0
        compact = self._compact(count, free, near, shared)
        if compact:
            cost_s = self.cost_s(compact, count, sources)
            if cost_s < best_s:
                best, best_s = compact, cost_s
        return (best, best_s) if best else None

    def _compact(self, count: int, free: int, near: int, shared: int) -> int:
        """Free devices over as few nodes as the count allows, near `near` where possible, else where `shared` is; 0
        when there are none."""
        size = self.size
        if count <= size:
            return self._in_one_node(count, free, near, shared)
        whole, rest = divmod(count, size)
        empty = free
        for shift in range(1, size):
            empty &= free >> shift
        empty &= self.firsts
        if empty.bit_count() < whole:
            return 0
        chosen = 0
        close = known = 0
        for mask in self.node_masks:
            if mask & free == mask:
                if mask & near:
                    close |= mask & -mask
                elif mask & shared:
                    known |= mask & -mask
        for pool in (close & empty, known & empty, empty & ~(close | known)):
            while pool and whole:
                bit = pool & -pool
                pool ^= bit
                chosen |= bit
                whole -= 1
        chosen *= (1 << size) - 1
        if not rest:
            return chosen
        last = self._in_one_node(rest, free & ~chosen, near, shared)
        return chosen | last if last else 0

    def _in_one_node(self, count: int, free: int, near: int, shared: int) -> int:
        best, best_key = 0, (4, 0)
        for mask in self.node_masks:
            there = free & mask
            if there:
                spare = there.bit_count() - count
                if spare >= 0:
                    key = ((0 if near & mask else 2) + (0 if shared & mask else 1), spare)
                    if key < best_key:
                        best, best_key = there, key
                        if key == (0, 0) or (not near and not shared and not spare):
                            break
        if not best:
            return 0
        return lowest(
            (best & near & shared, best & near & ~shared, best & shared & ~near, best & ~(near | shared)), count
        )

    # -------------------------------------------------------------------------------------------------- memory

    @cached_property
    def _capacity(self) -> float:
        return self.problem.room_bytes

    @cached_property
    def _layer_bytes(self) -> tuple[dict[int, float], ...]:
        problem = self.problem
        return tuple(
            {n: problem.layer_memory_bytes(m, n) for n in problem.curves[m].time_by_count} for m in range(len(problem))
        )

    def with_room(self, m: int, count: int, free: int, memory: Memory, first: int, layers: int) -> int:
        """Those of the free devices that have room for layers of m on `count` devices."""
        own = self._layer_bytes[m][count] * layers
        capacity = self._capacity
        if memory.fullest + own <= capacity:
            return free
        key = self.problem.metaops[m].parameters
        saved = self.problem.saved_bytes.get(key, 0.0)
        held = memory.held.get(key) if saved else None
        bits = ((1 << layers) - 1) << first
        room, pool, used = 0, free, memory.used
        while pool:
            bit = pool & -pool
            pool ^= bit
            device = bit.bit_length() - 1
            need = used[device] + own
            if need > capacity and held:
                need -= saved * (held[device] & bits).bit_count()
            if need <= capacity:
                room |= bit
        return room

    def occupy(self, m: int, count: int, devices: int, memory: Memory, first: int, layers: int) -> None:
        """Put layers of m on devices for good."""
        own = self._layer_bytes[m][count] * layers
        key = self.problem.metaops[m].parameters
        saved = self.problem.saved_bytes.get(key, 0.0)
        bits = ((1 << layers) - 1) << first
        held = memory.held.setdefault(key, [0] * len(memory.used)) if saved else None
        used = memory.used
        for device in bits_of(devices):
            used[device] += own
            if held is not None:
                used[device] -= saved * (held[device] & bits).bit_count()
                held[device] |= bits
            if used[device] > memory.fullest:
                memory.fullest = used[device]


def make_device_pool(problem: Problem) -> DevicePool:
    """The pool of a Problem."""
    flows: list[list[tuple[int, float]]] = [[] for _ in range(len(problem))]
    for (p, m), num_bytes in sorted(problem.flow_bytes.items()):
        flows[m].append((p, num_bytes))
    return DevicePool(
        problem=problem,
        flows=tuple(map(tuple, flows)),
        own=tuple(metaop.output_bytes for metaop in problem.metaops),
        with_memory=_memory_matters(problem),
    )


def _memory_matters(problem: Problem) -> bool:
    """Whether some plan could overflow a device: all MetaOps at the count that takes most."""
    if not problem.has_memory:
        return False
    most = sum(
        layers * max(problem.layer_memory_bytes(m, n) for n in problem.curves[m].time_by_count)
        for m, layers in enumerate(problem.layers)
    )
    return most > problem.room_bytes


def lowest(pools: Sequence[int], count: int) -> int:
    """`count` lowest bits of the first of `pools`, then of those behind it."""
    chosen = 0
    for pool in pools:
        while pool and count:
            bit = pool & -pool
            pool ^= bit
            chosen |= bit
            count -= 1
    return chosen


@lru_cache(maxsize=65536)
def bits_of(devices: int) -> tuple[int, ...]:
    """Device numbers of a set."""
    found = []
    while devices:
        bit = devices & -devices
        found.append(bit.bit_length() - 1)
        devices ^= bit
    return tuple(found)
