"""Units: how many rows of each kind belong to each sample of a batch, and how ranks share its samples.

Rows are whole numbers, so that every rank finds the same bounds without a message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

SAMPLES = "samples"
"""The unit of which each sample of a batch has one row."""

Place = tuple[str, int]
"""A unit, and the dimension of a tensor along which its rows lie."""

Bounds = tuple[int, int]
"""Samples low..high-1 of a batch."""


@dataclass(frozen=True)
class Units:
    """Rows of each unit that belong to each sample of one batch; SAMPLES is always among them."""

    counts: Mapping[str, tuple[int, ...]]

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""
        return len(self.counts[SAMPLES])

    @property
    def whole(self) -> Bounds:
        """All samples of the batch."""
        return 0, self.num_samples

    @cached_property
    def offsets(self) -> dict[str, list[int]]:
        """Rows of each unit before each sample, and all of them at the end."""
        return {unit: [0, *accumulate(counts)] for unit, counts in self.counts.items()}

    def rows(self, unit: str, low: int, high: int) -> int:
        """Rows that belong to samples low..high-1."""
        offsets = self.offsets.get(unit)  # a batch that counts none of a unit has none
        return offsets[high] - offsets[low] if offsets else 0

    def span(self, unit: str, size: int, held: Bounds, wanted: Bounds) -> tuple[int, int]:
        """Where samples `wanted` lie in a dimension of `size` entries that holds samples `held`: first entry, number.

        Raises ValueError when the entries do not divide evenly among the rows.
        """
        rows = self.rows(unit, *held)
        if rows == 0:
            return 0, 0
        offsets = self.offsets[unit]
        first = offsets[held[0]]
        start, end = (offsets[wanted[0]] - first) * size, (offsets[wanted[1]] - first) * size
        if start % rows or end % rows:
            raise ValueError(f"{size} entries do not divide among {rows} rows of {unit!r}")
        return start // rows, (end - start) // rows

    def shares(self, unit: str, parts: int) -> tuple[Bounds, ...]:
        """Consecutive bounds of `parts` shares of the batch, by its rows of a unit."""
        return shares(self, parts, None if unit == SAMPLES else self.counts.get(unit))

    def first_share(self, unit: str, parts: int) -> Bounds:
        """The first of `parts` shares of the batch."""
        return self.shares(unit, parts)[0]

    def slowest(self, unit: str, parts: int) -> float:
        """Rows of the largest of `parts` shares of the batch over the mean share; 1 where all are equal."""
        if parts == 1:
            return 1.0
        key = (unit, parts)
        if key not in self._slowest:
            rows = [self.rows(unit, *share) for share in self.shares(unit, parts)]
            self._slowest[key] = max(rows) * parts / sum(rows) if any(rows) else 1.0
        return self._slowest[key]

    @cached_property
    def _slowest(self) -> dict[tuple[str, int], float]:
        return {}


def shares(units: Units, count: int, costs: Sequence[int] | None = None) -> tuple[Bounds, ...]:
    """Consecutive bounds of `count` shares of a batch: by number of samples, the larger ones first, or by `costs`.

    A share that is not empty has a row of every unit of which the batch has any, since code of users needs an image to
    work on; empty shares come last. Whole numbers alone decide, so every rank finds the same.
    """
    size = units.num_samples
    ends = _ends_by_cost(costs, count) if costs is not None and any(costs) else _ends_by_count(size, count)
    needed = [offsets for offsets in units.offsets.values() if offsets[-1] and 0 in _steps(offsets)]
    found: list[Bounds] = []
    low = 0
    for end in ends:
        high = max(end, low)
        while low < high < size and any(offsets[high] == offsets[low] for offsets in needed):
            high += 1
        if high > low:
            found.append((low, high))
            low = high
    if found and any(offsets[found[-1][1]] == offsets[found[-1][0]] for offsets in needed):
        last = found.pop()
        found[-1] = (found[-1][0], last[1])
    return (*found, *((size, size),) * (count - len(found)))


def _steps(offsets: Sequence[int]) -> set[int]:
    return {b - a for a, b in pairwise(offsets)}


def _ends_by_count(size: int, count: int) -> list[int]:
    share, rest = divmod(size, count)
    return [(index + 1) * share + min(index + 1, rest) for index in range(count)]


def _ends_by_cost(costs: Sequence[int], count: int) -> list[int]:
    """Ends of consecutive shares whose largest cost is as small as can be."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(costs, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    ends = _filled(costs, low)
    return ends + [len(costs)] * (count - len(ends))


def _filled(costs: Sequence[int], most: int) -> list[int]:
    """Ends of shares that are filled one after the other up to a cost of `most`."""
    ends: list[int] = []
    total = 0
    for index, cost in enumerate(costs):
        if total + cost > most and total:
            ends.append(index)
            total = 0
        total += cost
    return [*ends, len(costs)]
