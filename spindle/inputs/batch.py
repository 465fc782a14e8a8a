"""Batches: fields in; which of their rows belong to which sample, and the fields of some samples, out.

- Most fields hold one row a sample, along their first dimension: their unit is SAMPLES.
- A packed field holds any number of rows a sample: image patches, tokens of several texts in one row. A task declares
  these by `rows=`: field -> rows of each sample, or (dimension, rows of each sample). A name that is no field only
  defines a unit, which values of the model may belong to.
- Fields may stand inside of others (`nested`); NumPy's arrays count as tensors do.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spindle.errors import WorkloadError
from spindle.inputs.nested import InnerName, flat
from spindle.values.units import SAMPLES, Bounds, Place, Units


def per_sample(values: Tensor, counts: Tensor) -> Tensor:
    """Sum `values`, of which each sample has `counts[i]` that follow each other, by sample; whole numbers, shape [B].

    Patches of each sample, from the patches of each image: `per_sample(grid.prod(1), images)`.
    """
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts.cpu().long())
    if len(owner) != len(values):
        raise WorkloadError(f"per_sample: counts add up to {len(owner)}, but there are {len(values)} values")
    return torch.zeros(len(counts), dtype=torch.long).index_add(0, owner, values.cpu().long())


@dataclass(frozen=True)
class SampledBatch:
    """A batch whose samples are known: `places` tells for each field that is cut by sample its unit and dimension.

    Fields without a place (single numbers, names, settings) belong to the batch as a whole.
    """

    fields: Mapping[str, Any]
    units: Units
    places: Mapping[str, Place]

    def part(self, low: int, high: int) -> dict[str, Any]:
        """The fields of samples low..high-1."""
        whole = self.units.whole
        if (low, high) == whole:
            return dict(self.fields)
        found = dict(self.fields)
        for name, (unit, dim) in self.places.items():
            found[name] = cut_value(found[name], dim, *self._span(name, unit, dim, whole, (low, high)))
        return found

    def without(self, names: Collection[str]) -> "SampledBatch":
        """The batch without some fields, and without rows of the units of these names."""
        counts = {u: (0,) * len(rows) if u in names else rows for u, rows in self.units.counts.items()}
        places = {name: place for name, place in self.places.items() if name not in names}
        fields = {name: value for name, value in self.fields.items() if name not in names}
        return SampledBatch(fields, Units(counts), places)

    def _span(self, name: str, unit: str, dim: int, whole: Bounds, wanted: Bounds) -> tuple[int, int]:
        value = self.fields[name]
        size = value.shape[dim] if isinstance(value, Tensor | np.ndarray) else len(value)
        return self.units.span(unit, size, whole, wanted)

    @cached_property
    def held(self) -> frozenset[str]:
        """Names of fields and units of which the batch has anything."""
        fields = {name for name, value in self.fields.items() if value is not None}
        empty = {unit for unit, rows in self.units.counts.items() if not any(rows)}
        return frozenset((fields | self.units.counts.keys()) - empty)

    @cached_property
    def entries(self) -> dict[str, int]:
        """Entries of each tensor of the batch, and its samples."""
        sizes = {name: value.numel() for name, value in self.fields.items() if isinstance(value, Tensor)}
        return {SAMPLES: self.units.num_samples, **sizes}

    @cached_property
    def shapes(self) -> tuple[object, ...]:
        """What must be equal on all ranks and says how messages are cut: fields, shapes, types, rows of each sample."""
        fields = tuple(
            (name, tuple(v.shape), str(v.dtype)) if isinstance(v, Tensor | np.ndarray) else (name, type(v).__name__)
            for name, v in self.fields.items()
        )
        return fields, tuple(sorted(self.units.counts.items()))


def with_own_tensors(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with copies of their tensors, which code may write to; also of those in lists, tuples and dicts."""
    return {name: _own(value) for name, value in fields.items()}


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(map(_own, value))
    return {key: _own(each) for key, each in value.items()} if type(value) is dict else value


def cut_value(value: Any, dim: int, start: int, length: int) -> Any:
    """Entries start..start+length-1 of a tensor's or an array's dimension, or of a list."""
    if isinstance(value, Tensor):
        return value.narrow(dim, start, length)
    if isinstance(value, np.ndarray):
        return value[(slice(None),) * dim + (slice(start, start + length),)]
    return value[start : start + length]


def sampled(where: str, batch: Mapping[str, Any], rows: Mapping[str, Any], batch_size: int) -> SampledBatch:
    """The batch with its samples: `rows` is what the task's `rows=` gave for it, `where` names the task in errors.

    Raises WorkloadError for fields that have other rows than the samples, and `rows` that do not fit their fields.
    """
    counts: dict[str, tuple[int, ...]] = {}
    places: dict[str, Place] = {}
    batch = flat(where, batch)
    for name, given in rows.items():
        dim, counts[name] = _counts(where, name, given)
        if name in batch and (batch[name] is not None or any(counts[name])):  # None: a batch without any
            _check_packed(where, name, batch[name], dim, sum(counts[name]))
            places[name] = (name, dim % batch[name].ndim if isinstance(batch[name], Tensor | np.ndarray) else 0)
    sizes = {name: _length(value) for name, value in batch.items() if name not in rows}
    num_samples = _num_samples(where, sizes, counts, batch_size)
    for name, size in sizes.items():
        if size == num_samples:
            places[name] = (SAMPLES, 0)
        elif isinstance(batch[name], Tensor) and size is not None and not isinstance(name, InnerName):
            raise WorkloadError(
                f"{where}: batch[{name!r}] has {size} rows for {num_samples} samples; where it is packed, give "
                "rows= (how many belong to each sample, see docs/packed.md); where it is the same for all samples, "
                "let the task hold it and not the batch"
            )
    wrong = next((name for name, numbers in counts.items() if len(numbers) != num_samples), None)
    if wrong is not None:
        raise WorkloadError(
            f"{where}: rows= counts {wrong!r} for {len(counts[wrong])} samples, but the batch has {num_samples}; give "
            "a number for each sample"
        )
    return SampledBatch(dict(batch), Units({SAMPLES: (1,) * num_samples, **counts}), places)


def _counts(where: str, name: str, given: Any) -> tuple[int, tuple[int, ...]]:
    """Dimension and rows of each sample, as `rows=` gave them for one name."""
    pair = isinstance(given, tuple) and len(given) == 2 and not isinstance(given[1], int)
    dim, numbers = given if pair else (0, given)
    values = numbers.tolist() if isinstance(numbers, Tensor) else numbers
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise WorkloadError(
            f"{where}: rows= counts {name!r} by a {type(values).__name__}; give a number for each sample, or a "
            "dimension and such numbers"
        )
    found = tuple(int(n) for n in values)
    if min(found, default=0) < 0:
        raise WorkloadError(f"{where}: rows= counts {min(found)} rows of {name!r} for a sample; correct rows=")
    return dim, found


def _check_packed(where: str, name: str, value: Any, dim: int, total: int) -> None:
    if isinstance(value, Tensor | np.ndarray) and value.ndim and not -value.ndim <= dim < value.ndim:
        raise WorkloadError(
            f"{where}: rows= counts {name!r} along dimension {dim}, but it has {value.ndim} dimensions; correct rows="
        )
    size = value.shape[dim] if isinstance(value, Tensor | np.ndarray) and value.ndim else _length(value)
    if size != total:
        raise WorkloadError(
            f"{where}: rows= counts {total} rows of {name!r}, which has {size}; correct rows=, see docs/packed.md"
        )


def _length(value: Any) -> int | None:
    """Entries of a field along its first dimension; None where it has none."""
    if isinstance(value, Tensor | np.ndarray):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, list | tuple) else None


def _num_samples(
    where: str, sizes: Mapping[str, int | None], counts: Mapping[str, Sequence[int]], batch_size: int
) -> int:
    """Samples of a batch: the rows that its fields share, or the numbers that `rows=` gave where all are packed."""
    seen: Iterable[int] = {size for size in sizes.values() if size is not None}
    packed = {len(numbers) for numbers in counts.values()}
    candidates = packed or set(seen)
    if len(candidates) == 1:
        (found,) = candidates
    elif batch_size in candidates:
        found = batch_size
    else:
        here = ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None) or "none"
        raise WorkloadError(
            f"{where}: its fields do not share a number of samples (rows of each: {here}); the first dimension of each "
            f"must be the batch size {batch_size}, or rows= must count it, see docs/packed.md"
        )
    if found < 1:
        raise WorkloadError(f"{where}: a batch has no samples; leave empty batches out")
    return found
