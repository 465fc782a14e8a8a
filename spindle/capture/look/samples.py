"""Samples: which batches of a task are looked at, and which samples of them, whole and in parts.

Several batches are looked at, and ones whose entries are moved about, since real ones can hide mixing (equal lengths,
masks of ones).
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spindle.inputs.batch import SampledBatch
from spindle.values.units import SAMPLES, Bounds, Units, shares
from spindle.workload import Task

PROBE_SAMPLES = 5
MOST_CUTS = 6  # in two that are tried of some samples
SHORT, LONG = 16, 64  # positions that are kept of texts, where these have more
FAR = 1000  # from other numbers of a field
LOOKED_AT, TRIALS = 8, 3  # batches of a list that are read, and batches of different shapes that are used


def first_batches(task: Task) -> list[SampledBatch]:
    """The first batch of a task; of a list also others of different shapes, which show how sizes vary. First comes one
    that lacks the least: the others may lack a modality of it.

    Raises WorkloadError when the loader raises, or gives what a task cannot take.
    """
    if type(task.data) not in (list, tuple):
        return _read_on(task, task.sampled(task.first_batch()))
    found: dict[str, SampledBatch] = {}
    others: dict[str, SampledBatch] = {}  # that say another number, such as one of rounds
    for batch in itertools.islice(task.data, LOOKED_AT):  # type: ignore[arg-type]
        one = task.sampled(batch)
        found.setdefault(repr((one.shapes, flags(one))), one)
        others.setdefault(repr([value for value in one.fields.values() if isinstance(value, int | float)]), one)
    most = sorted(found.values(), key=lambda one: sum(bool(value) for _, value in flags(one)), reverse=True)
    most += [one for one in others.values() if all(one is not other for other in most)]
    return _fullest_first(most[:TRIALS]) or [task.sampled(task.first_batch())]


def flags(batch: SampledBatch) -> list[tuple[str, object]]:
    """What a batch says for all its samples, by which a task may go one way or another."""
    return [(name, value) for name, value in batch.fields.items() if isinstance(value, bool | str | None)]


def _fullest_first(batches: list[SampledBatch]) -> list[SampledBatch]:
    return sorted(batches, key=lambda batch: len(batch.held), reverse=True)


def _read_on(task: Task, first: SampledBatch) -> list[SampledBatch]:
    """The first batch, and, where it cannot tell packed fields apart (one image in each sample, say), some that can;
    where it has flags, some with others.
    """
    found = [first]
    pairs = set(itertools.combinations(first.units.counts, 2))
    alike = {pair for pair in _pairs(first.units) if not _are_distinct(first.units, pair)}
    equal = pairs - set(_pairs(first.units))  # by chance, or as ids and labels are
    with suppress(Exception):  # a loader that breaks later says so when it gets there
        flagged = bool(flags(first))
        for number, batch in enumerate(itertools.islice(task.batches(), 1, LOOKED_AT if alike or flagged else 1)):
            other = task.sampled(batch)
            apart = {pair for pair in alike | equal if _are_distinct(other.units, pair)}
            if apart or (len(found) < TRIALS and all(flags(other) != flags(one) for one in found)):
                found.append(other)
                alike, equal = alike - apart, equal - apart
            if not flagged and not alike and (not equal or number + 1 >= TRIALS):
                break
    return _fullest_first(found)


def _pairs(units: Units) -> list[tuple[str, str]]:
    """Units that a value may belong to, either of them; fields that lie side by side, as ids and labels of packed
    texts, do.
    """
    counts = units.counts
    return [(a, b) for a, b in itertools.combinations(counts, 2) if SAMPLES in (a, b) or counts[a] != counts[b]]


def _are_distinct(units: Units, pair: tuple[str, str]) -> bool:
    """Whether some part of a batch has another share of the rows of one unit than of the other, and not all of them."""
    size = units.num_samples
    return any(_differs(units, pair, size, cut) and _is_shared(units, size, cut) for cut in range(1, size))


def _is_shared(units: Units, count: int, cut: int) -> bool:
    """Whether samples before and after `cut` both have rows of each unit of which the batch has any."""
    return all(0 < offsets[cut] < offsets[count] for offsets in units.offsets.values() if offsets[-1])


def _differs(units: Units, pair: tuple[str, str], count: int, cut: int) -> bool:
    none = [0] * (units.num_samples + 1)  # a batch may lack a unit
    a, b = (units.offsets.get(unit, none) for unit in pair)
    return a[cut] * b[count] != b[cut] * a[count]


def modalities(batch: SampledBatch) -> list[frozenset[str]]:
    """Packed fields that a batch may lack together: those of which the same samples have rows; and all of them."""
    by_samples: dict[tuple[bool, ...], set[str]] = {}
    for name, (unit, _) in batch.places.items():
        if unit != SAMPLES:
            by_samples.setdefault(tuple(map(bool, batch.units.counts[unit])), set()).add(name)
    found = [frozenset(names) for names in by_samples.values()]
    return found if len(found) < 2 else [*found, frozenset().union(*found)]


def twice(batch: SampledBatch, bounds: Bounds, seed: int = 0) -> SampledBatch:
    """Some samples, and the same again with noise on their numbers."""
    generator = torch.Generator().manual_seed(seed)
    fields = batch.part(*bounds)
    for name, (_, dim) in batch.places.items():
        value = fields[name]
        if isinstance(value, Tensor):
            fields[name] = torch.cat([value, disturbed(value, generator, masks=False)], dim)
        elif isinstance(value, np.ndarray):
            fields[name] = np.concatenate([value, disturbed(value, generator, masks=False)], dim)
        else:
            fields[name] = value + value
    counts = {unit: rows[bounds[0] : bounds[1]] * 2 for unit, rows in batch.units.counts.items()}
    return SampledBatch(fields, Units(counts), batch.places)


def shortened(batch: SampledBatch) -> Iterator[SampledBatch]:
    """The batch with some positions of its texts only: such as are spread over them, so that padding stays in
    proportion; or the first ones. A text is a field of whole numbers with more than LONG to a sample; other fields are
    cut where they have as many. Of texts of several lengths each has a length of its own.
    """
    fields = {name: batch.fields[name] for name in batch.places if isinstance(batch.fields[name], Tensor)}
    texts = [value for value in fields.values() if not value.is_floating_point()]
    lengths = sorted({size for text in texts for size in text.shape[1:] if size > LONG}, reverse=True)
    for spread in (True, False) if lengths else ():
        kept = {
            size: torch.linspace(0, size - 1, SHORT - n).round().long() if spread else torch.arange(SHORT - n)
            for n, size in enumerate(lengths[: SHORT // 2])
        }
        short = {name: _positions(value, kept) for name, value in fields.items()}
        yield SampledBatch({**batch.fields, **short}, batch.units, batch.places)


def _positions(value: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for dim in range(1, value.ndim):
        if value.shape[dim] in kept:
            value = value.index_select(dim, kept[value.shape[dim]])
    return value


def singly(units: Units) -> list[Bounds]:
    """As many parts of a batch as can be of which each has rows of every unit: chance may hide what passes from one
    sample to the next at some place, but hardly at all of them.
    """
    return [(low, high) for low, high in shares(units, units.num_samples) if low < high]


def few_of(units: Units) -> tuple[Bounds, tuple[Bounds, ...]]:
    """A few samples of a batch, and uneven parts of them, so that a mean of means differs from the mean; each part has
    rows of every unit that the batch has, and other shares of them where units differ. One part where no two have.
    """
    size = units.num_samples
    pairs = [pair for pair in _pairs(units) if _are_distinct(units, pair)]
    best = -1
    found: tuple[Bounds, tuple[Bounds, ...]] = ((0, size), ((0, size),))
    for count in range(min(PROBE_SAMPLES, size), size + 1):
        for cut in sorted(range(1, count), key=lambda end: abs(end - (count - 1) // 2)):
            number = sum(_differs(units, pair, count, cut) for pair in pairs)
            if number > best and _is_shared(units, count, cut):
                best, found = number, ((0, count), ((0, cut), (cut, count)))
        if best == len(pairs):
            break
    return found


def other_few(units: Units) -> Iterator[tuple[Bounds, tuple[Bounds, ...]]]:
    """Other samples of a batch, and parts of them, for code that cannot take those of `few_of`: numbers of samples that
    divide the batch's, as the parts that plans make do.
    """
    size = units.num_samples
    divisors = [count for count in range(2, size + 1) if size % count == 0]
    for count in sorted(divisors, key=lambda count: (count < PROBE_SAMPLES - 1, count)):
        for cut in sorted(range(1, count), key=lambda end: (count % end != 0, abs(end - (count - 1) // 2)))[:MOST_CUTS]:
            if _is_shared(units, count, cut):
                yield (0, count), ((0, cut), (cut, count))


def _is_array(value: Any) -> bool:
    """Whether a field is an array of NumPy that torch has a type for."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8


def disturbed(value: Any, generator: torch.Generator, *, masks: bool = True) -> Any:
    """A field with noise on its numbers; a mask of ones cut short. Whole numbers stay: a model may demand their
    order.
    """
    if _is_array(value):
        return disturbed(torch.from_numpy(value), generator, masks=masks).numpy()
    if not isinstance(value, Tensor) or not value.numel():
        return value
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.dtype)
        return value + noise * (float(value.double().std(correction=0)) or 1.0)
    if masks and value.ndim > 1 and bool((value == 1).all()):
        lengths = torch.randint(1, value.shape[-1] + 1, value.shape[:-1], generator=generator)
        return value * (torch.arange(value.shape[-1]) < lengths[..., None]).to(value.dtype)
    return value


def moved(value: Any) -> Any:
    """A field whose numbers are larger than any other's."""
    if _is_array(value):
        return moved(torch.from_numpy(value)).numpy()
    return value + FAR if isinstance(value, Tensor) and value.is_floating_point() else value


def one_apart(value: Any, dim: int) -> Any:
    """A field in which all samples are alike, with other numbers in the first one, so that what code asks of a whole
    batch (is a mask full, how long is the longest, how many kinds are there) differs between its parts.
    """
    if _is_array(value):
        return one_apart(torch.from_numpy(value), dim).numpy()
    if not isinstance(value, Tensor) or not value.numel() or value.is_floating_point() or value.is_complex():
        return value
    first = value.narrow(dim, 0, 1)
    if not bool((value == first).all()):
        return value
    other = ~first if value.dtype == torch.bool else first + 1
    if value.ndim > 1 and bool((first == 1).all()):  # a mask, whose first positions stay
        other, size = first.clone(), first.shape[-1]
        other.narrow(-1, (size + 1) // 2, size // 2).zero_()
    return torch.cat([other, value.narrow(dim, 1, value.shape[dim] - 1)], dim)


def far_apart(value: Any, unit: str, dim: int) -> Iterator[Any]:
    """A field with numbers in its first sample that are far from those of all others, so that what code asks of a whole
    batch (whether any text is long, where the longest ends) differs between its parts.

    Larger whole numbers come in fields of one to a sample alone: those of several may be sizes of images, which code
    would make.
    """
    if _is_array(value):
        yield from (each.numpy() for each in far_apart(torch.from_numpy(value), unit, dim))
        return
    if not isinstance(value, Tensor) or not value.numel() or value.is_complex():
        return
    size = value.shape[dim]
    first, others = value.narrow(dim, 0, 1), value.narrow(dim, 1, size - 1)
    if value.dtype == torch.bool:
        yield torch.cat([~first, others], dim)
        return
    if value.is_floating_point() or (unit == SAMPLES and value.ndim == 1):
        yield torch.cat([first + FAR, others], dim)
    yield torch.cat([first, torch.ones_like(others)], dim)
