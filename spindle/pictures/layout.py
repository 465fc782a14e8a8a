"""Layout: boxes in levels and the edges between them in, their places out.

- Each task has a lane of its own, one below the other; levels are columns.
- An edge over several levels passes through a gap in each column between, so that it crosses no box.
- Within a lane the order of a column follows the means of neighbors' places; places are then as close to these means as
  the order and the gaps allow (least squares).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

GAP = 16.0
SWEEPS = 6

Point = tuple[int, float]
"""(level, y)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Something to place: its lane (an index), its level and its height in pixels."""

    name: str
    lane: int
    level: int
    height: float


@dataclass(frozen=True, slots=True)
class Places:
    """y of each box's middle; y from and to of each lane; for each edge the points in columns that it passes."""

    middle: Mapping[str, float]
    lanes: tuple[tuple[float, float], ...]
    bends: Mapping[tuple[str, str], tuple[Point, ...]]


def place(boxes: Sequence[Box], edges: Iterable[tuple[str, str]], *, top: float, head: float) -> Places:
    """Places below `top`, with `head` pixels for the heading of each lane."""
    by_name = {box.name: box for box in boxes}
    chains = {(a, b): _bends(by_name[a], by_name[b]) for a, b in edges}
    every = [*boxes, *(bend for bends in chains.values() for bend in bends)]
    neighbors: dict[str, list[str]] = {box.name: [] for box in every}
    for (source, target), bends in chains.items():
        for one, other in pairwise([source, *(bend.name for bend in bends), target]):
            neighbors[one].append(other)
            neighbors[other].append(one)
    middle: dict[str, float] = {}
    lanes = []
    for lane in range(1 + max(box.lane for box in boxes)):
        inside = [box for box in every if box.lane == lane]
        found = _lane(inside, neighbors)
        shift = top + head - min(found[box.name] - box.height / 2 for box in inside)
        middle.update({name: y + shift for name, y in found.items()})
        bottom = max(middle[box.name] + box.height / 2 for box in inside)
        lanes.append((top, bottom + GAP))
        top = bottom + GAP
    points = {ends: tuple((b.level, middle[b.name]) for b in bends) for ends, bends in chains.items()}
    return Places(middle, tuple(lanes), points)


def _bends(source: Box, target: Box) -> list[Box]:
    """What stands for an edge in the columns between its ends."""
    name = f"{source.name}\0{target.name}\0"  # names have no control characters
    between = range(source.level + 1, target.level)
    return [Box(name=f"{name}{level}", lane=target.lane, level=level, height=4.0) for level in between]


def _lane(boxes: Sequence[Box], neighbors: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Middles of one lane's boxes, from any y."""
    columns: dict[int, list[Box]] = {}
    for box in boxes:
        columns.setdefault(box.level, []).append(box)
    middle: dict[str, float] = {}
    for column in columns.values():
        middle.update(zip((box.name for box in column), _settled([0.0] * len(column), column), strict=True))
    order = sorted(columns)
    for sweep in range(SWEEPS):
        for level in order if sweep % 2 else reversed(order):
            column = columns[level]
            wanted = {box.name: _mean([middle[n] for n in neighbors[box.name] if n in middle]) for box in column}
            goals = {name: middle[name] if y is None else y for name, y in wanted.items()}
            column.sort(key=lambda box: goals[box.name])
            places = _settled([goals[box.name] for box in column], column)
            middle.update(zip((box.name for box in column), places, strict=True))
    return middle


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _settled(wanted: Sequence[float], column: Sequence[Box]) -> list[float]:
    """Middles in this order, GAP between the boxes, with the least squared distance from where they are wanted.

    Less the room that those before take, middles need only not fall: neighbors that would are pooled at their mean.
    """
    room = [0.0]
    for above, below in pairwise(column):
        room.append(room[-1] + (above.height + below.height) / 2 + GAP)
    pools: list[tuple[float, int]] = []  # (mean, number)
    for goal, before in zip(wanted, room, strict=True):
        mean, number = goal - before, 1
        while pools and pools[-1][0] > mean:
            last, count = pools.pop()
            mean, number = (mean * number + last * count) / (number + count), number + count
        pools.append((mean, number))
    level = [mean for mean, number in pools for _ in range(number)]
    return [base + before for base, before in zip(level, room, strict=True)]
