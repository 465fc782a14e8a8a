"""Memory on the timeline: a plan and a step in, the bytes that the plan expects on each device over time out.

An estimate from the MetaGraph, laid over the times of whichever trace is shown: weights and their gradients of all that
a device holds stay for the whole step, the rest of a slice's memory comes with its forward and goes with its backward.
The highest point of a device is the peak that the plan states for it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from spindle.timeline.items import Item, Kind
from spindle.values.metagraph import MetaOp
from spindle.values.plan import Plan

STATE_COPIES = 2.0  # weight and gradient, as the planner counts what sharing saves
Level = tuple[float, float]
"""(seconds, bytes from then on)."""


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that stay on each device, what each of its slices adds between forward and backward, and in which turn."""

    fixed_bytes: tuple[float, ...]
    passing_bytes: tuple[dict[int, float], ...]  # by device: slice index -> bytes
    turns: tuple[int, ...]  # by slice index

    def levels(self, device: int, row: Sequence[Item]) -> tuple[Level, ...]:
        """Bytes on a device over the time of one step, as steps; the first stands at 0 s."""
        changes: dict[float, float] = defaultdict(float)
        passing = self.passing_bytes[device]
        turn, in_turn = 0, 0.0
        for item in row:
            added = passing.get(item.what.slice, 0.0)
            if item.what.kind is Kind.WORK and self.turns[item.what.slice] > turn:  # forward and backward are over
                changes[item.start_s] -= in_turn
                turn, in_turn = self.turns[item.what.slice], 0.0
            if item.what.kind in (Kind.FORWARD, Kind.WORK):
                changes[item.start_s] += added
                in_turn += added
            elif item.what.kind is Kind.BACKWARD:
                changes[item.end_s] -= added
        level = self.fixed_bytes[device] + changes.pop(0.0, 0.0)
        found = [(0.0, level)]
        for at_s, change in sorted(changes.items()):
            level += change
            found.append((at_s, level))
        return tuple(found)


def memory_model(plan: Plan) -> MemoryModel | None:
    """The memory model of a plan; None when its MetaGraph says nothing of memory."""
    if plan.metagraph is None or not any(metaop.memory_bytes for metaop in plan.metagraph):
        return None
    fixed = [0.0] * plan.num_devices
    passing: list[dict[int, float]] = [{} for _ in range(plan.num_devices)]
    held: list[set[tuple[str, int]]] = [set() for _ in range(plan.num_devices)]
    for index, s in enumerate(plan.slices):
        metaop = plan.metagraph[s.metaop]
        own = _chain_bytes(metaop, len(s.devices)) / metaop.layers
        state = min(own, STATE_COPIES * metaop.layer_param_bytes)
        layers = {(metaop.parameters or f"{metaop.name} (alone)", s.first_layer + i) for i in range(s.num_layers)}
        for device in s.devices:
            fixed[device] += state * len(layers - held[device])
            held[device] |= layers
            passing[device][index] = (own - state) * s.num_layers
    turns = tuple(plan.turn_by_task.get(plan.metagraph[s.metaop].task, 0) for s in plan.slices)
    return MemoryModel(*_fitted(plan, fixed, passing, turns), turns)


def _chain_bytes(metaop: MetaOp, count: int) -> float:
    """Bytes per device of the whole chain on `count` devices; of the next smaller count given when it has none."""
    values = [num_bytes for n, num_bytes in metaop.memory_bytes if n <= count]
    return values[-1] if values else metaop.memory_bytes[0][1] if metaop.memory_bytes else 0.0


def _fitted(
    plan: Plan, fixed: Sequence[float], passing: Sequence[dict[int, float]], turns: Sequence[int]
) -> tuple[tuple[float, ...], tuple[dict[int, float], ...]]:
    """Both parts scaled so that the highest point of each device is the plan's own peak."""
    peaks = plan.memory.peak_bytes_per_device
    factors = []
    for device in range(plan.num_devices):
        together: dict[int, float] = defaultdict(float)
        for index, num_bytes in passing[device].items():
            together[turns[index]] += num_bytes
        whole = fixed[device] + max(together.values(), default=0.0)
        known = device < len(peaks) and whole > 0 and peaks[device] > 0
        factors.append(peaks[device] / whole if known else 1.0)
    scaled = ({i: b * f for i, b in slices.items()} for slices, f in zip(passing, factors, strict=True))
    return tuple(b * f for b, f in zip(fixed, factors, strict=True)), tuple(scaled)
