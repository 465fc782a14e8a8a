"""Units: how many rows belong to each sample, how a batch is cut by sample and joined again, and what is refused."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spindle
from spindle.errors import WorkloadError
from spindle.inputs.batch import SampledBatch, sampled
from spindle.values.units import SAMPLES, Units, shares
from tests.refusals import Refusal, check_refusal, each


@st.composite
def units(draw: st.DrawFn) -> Units:
    """A batch of 1 to 12 samples with up to two packed fields, samples without a row among them."""
    size = draw(st.integers(1, 12))
    names = draw(st.lists(st.sampled_from(["images", "patches"]), max_size=2, unique=True))
    counts = {name: tuple(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))) for name in names}
    return Units({SAMPLES: (1,) * size, **counts})


# -- shares -----------------------------------------------------------------------------------------------------------


@given(units=units(), count=st.integers(1, 6), data=st.data())
def test_shares_divide_the_batch(units: Units, count: int, data: st.DataObject) -> None:
    """Consecutive, of all samples, as many as are asked for; empty ones come last."""
    size = units.num_samples
    costs = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=size, max_size=size))
    found = shares(units, count, costs)
    assert len(found) == count
    assert (found[0][0], found[-1][1]) == (0, size)
    assert all(low <= high for low, high in found)
    assert all(one[1] == other[0] for one, other in pairwise(found))
    empty = [low == high for low, high in found]
    assert empty == sorted(empty)


@given(units=units(), count=st.integers(1, 6), data=st.data())
def test_a_share_has_a_row_of_every_unit(units: Units, count: int, data: st.DataObject) -> None:
    """Users' code needs an image to work on, so no share is without one, if the batch has any."""
    size = units.num_samples
    costs = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=size, max_size=size))
    for low, high in shares(units, count, costs):
        for unit, counts in units.counts.items():
            assert low == high or units.rows(unit, low, high) or not any(counts)


@given(size=st.integers(1, 40), count=st.integers(1, 8))
def test_shares_of_equal_samples_differ_by_one_at_most(size: int, count: int) -> None:
    """The larger ones first."""
    lengths = [high - low for low, high in shares(Units({SAMPLES: (1,) * size}), count)]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=8), count=st.integers(1, 4))
def test_the_dearest_share_is_as_cheap_as_can_be(costs: list[int], count: int) -> None:
    """No other consecutive shares have a cheaper dearest one."""

    def least(low: int, parts: int) -> int:
        if parts == 1:
            return sum(costs[low:])
        return min(max(sum(costs[low:end]), least(end, parts - 1)) for end in range(low, len(costs) + 1))

    found = shares(Units({SAMPLES: (1,) * len(costs)}), count, costs)
    assert max(sum(costs[low:high]) for low, high in found) == least(0, count)


def test_a_share_without_an_image_takes_samples_of_the_next() -> None:
    images = Units({SAMPLES: (1,) * 6, "images": (0, 0, 0, 0, 2, 1)})
    assert shares(images, 3) == ((0, 5), (5, 6), (6, 6))
    front = Units({SAMPLES: (1,) * 6, "images": (2, 1, 0, 0, 0, 0)})
    assert shares(front, 3) == ((0, 6), (6, 6), (6, 6))


# -- spans, cuts, joins -----------------------------------------------------------------------------------------------


@given(units=units(), count=st.integers(1, 5), scale=st.integers(1, 3), dim=st.integers(0, 1))
def test_what_is_cut_by_sample_joins_to_the_whole(units: Units, count: int, scale: int, dim: int) -> None:
    """Parts of a packed field follow each other without a gap, also where a model makes several entries of each row."""
    for unit, counts in units.counts.items():
        size = scale * sum(counts)
        whole = torch.arange(2 * size).reshape((size, 2) if dim == 0 else (2, size))
        spans = [units.span(unit, size, (0, units.num_samples), bounds) for bounds in shares(units, count)]
        parts = [whole.narrow(dim, start, length) for start, length in spans]
        assert torch.equal(torch.cat(parts, dim), whole)
        assert [length for _, length in spans] == [scale * units.rows(unit, *b) for b in shares(units, count)]


@given(units=units(), low=st.integers(0, 11), high=st.integers(1, 12))
def test_a_part_of_a_part_lies_where_the_whole_has_it(units: Units, low: int, high: int) -> None:
    """A span counts from the samples that are held."""
    size = units.num_samples
    low, high = min(low, size - 1), min(high, size)
    if low >= high:
        return
    for unit in units.counts:
        start, length = units.span(unit, units.rows(unit, 0, size), (0, size), (low, high))
        for sample in range(low, high):
            own = units.span(unit, length, (low, high), (sample, sample + 1))
            first = units.rows(unit, 0, sample)
            assert own[1] == 0 or (start + own[0], own[1]) == (first, units.counts[unit][sample])


def test_entries_that_do_not_divide_are_no_span() -> None:
    pairs = Units({SAMPLES: (1, 1), "images": (1, 2)})
    with pytest.raises(ValueError, match=r"4 entries do not divide among 3 rows of 'images'"):
        pairs.span("images", 4, (0, 2), (0, 1))


@given(units=units(), count=st.integers(1, 4))
def test_parts_of_a_batch_hold_their_own_rows(units: Units, count: int) -> None:
    """Fields of samples, packed ones, lists, and those that belong to the batch as a whole."""
    size = units.num_samples
    fields: dict[str, Any] = {"ids": torch.arange(3 * size).reshape(size, 3), "names": list(range(size)), "width": 7}
    fields |= {unit: torch.arange(sum(c)) for unit, c in units.counts.items() if unit != SAMPLES}
    packed = {unit: list(counts) for unit, counts in units.counts.items() if unit != SAMPLES}
    batch = sampled("t", fields, packed, size)
    parts = [batch.part(*bounds) for bounds in shares(units, count)]
    assert all(part["width"] == 7 for part in parts)
    assert [name for part in parts for name in part["names"]] == fields["names"]
    for name in ("ids", *packed):
        assert torch.equal(torch.cat([part[name] for part in parts]), fields[name])


# -- batches ----------------------------------------------------------------------------------------------------------


def test_places_of_fields() -> None:
    """One row a sample without being told; packed along the dimension that rows= gives; the rest as a whole."""
    fields = {
        "ids": torch.zeros(3, 5),
        "patches": torch.zeros(6, 2),
        "tokens": torch.zeros(1, 9),
        "names": ["a", "b", "c"],
        "scale": torch.tensor(2.0),
        "setting": "bicubic",
        "pair": (1, 2),
    }
    rows = {"patches": torch.tensor([1, 2, 3]), "tokens": (-1, [4, 0, 5]), "images": [1, 1, 0]}
    batch = sampled("task 't'", fields, rows, 3)
    assert batch.places == {
        "ids": (SAMPLES, 0),
        "patches": ("patches", 0),
        "tokens": ("tokens", 1),
        "names": (SAMPLES, 0),
    }
    assert batch.units.counts["images"] == (1, 1, 0)
    assert len(set(batch.units.counts["patches"])) > 1
    part = batch.part(1, 3)
    assert (part["patches"].shape, part["tokens"].shape, part["names"]) == ((5, 2), (1, 5), ["b", "c"])
    assert (part["scale"], part["setting"], part["pair"]) == (fields["scale"], "bicubic", (1, 2))


def test_a_whole_batch_is_not_cut() -> None:
    """Its tensors are the loader's own."""
    field = torch.zeros(3, 5)
    assert sampled("t", {"x": field}, {}, 3).part(0, 3)["x"] is field


def test_the_number_of_samples_may_differ_from_the_task_s() -> None:
    """The last batch of a loader is often smaller."""
    assert sampled("t", {"x": torch.zeros(2, 5), "y": torch.zeros(2)}, {}, 8).units.num_samples == 2


def test_a_batch_of_packed_fields_alone() -> None:
    """Two texts in one row: rows= tells how many samples there are."""
    batch = sampled("t", {"ids": torch.zeros(1, 7)}, {"ids": (1, [3, 4])}, 8)
    assert batch.units.num_samples == 2
    assert batch.part(1, 2)["ids"].shape == (1, 4)


def test_batches_of_other_rows_are_told_apart() -> None:
    """Ranks compare these before a message depends on them."""

    def shapes(counts: list[int], dtype: torch.dtype = torch.float32) -> object:
        return sampled("t", {"x": torch.zeros(2, 3), "p": torch.zeros(4, dtype=dtype)}, {"p": counts}, 2).shapes

    assert shapes([1, 3]) == shapes([1, 3])
    assert len({shapes([1, 3]), shapes([2, 2]), shapes([1, 3], torch.float64)}) == 3


def test_per_sample_sums_by_sample() -> None:
    """Patches of each sample from those of each image; a sample without an image has none."""
    found = spindle.per_sample(torch.tensor([4, 6, 8]), torch.tensor([2, 0, 1]))
    assert found.tolist() == [10, 0, 8]


def batch_of(fields: dict[str, Any], rows: dict[str, Any] | None = None, size: int = 4) -> SampledBatch:
    return sampled("task 'vqa'", fields, rows or {}, size)


IDS = torch.zeros(4, 6)

REFUSED: dict[str, Refusal] = {
    "packed and not declared": (
        lambda: batch_of({"ids": IDS, "pixels": torch.zeros(64, 3)}),
        "batch['pixels'] has 64 rows for 4 samples",
        "where it is packed, give rows= (how many belong to each sample, see docs/packed.md)",
        "where it is the same for all samples, let the task hold it",
    ),
    "counted wrong": (
        lambda: batch_of({"ids": IDS, "pixels": torch.zeros(64, 3)}, {"pixels": [15, 15, 15, 15]}),
        "counts 60 rows of 'pixels'",
        "which has 64",
        "correct rows=",
    ),
    "counted along another dimension": (
        lambda: batch_of({"ids": IDS, "t": torch.zeros(1, 8)}, {"t": [2, 2, 2, 2]}),
        "counts 8 rows of 't'",
        "which has 1",
        "correct rows=",
    ),
    "counted along a dimension that it has not": (
        lambda: batch_of({"ids": IDS, "t": torch.zeros(8, 2)}, {"t": (5, [2, 2, 2, 2])}),
        "'t'",
        "dimension 5",
        "correct rows=",
    ),
    "counted for other samples": (
        lambda: batch_of({"ids": IDS, "pixels": torch.zeros(6, 3)}, {"pixels": [3, 3]}),
        "batch['ids'] has 4 rows for 2 samples",
        "it is packed",
        "give rows=",
    ),
    "counted for other samples than another field": (
        lambda: batch_of({"a": torch.zeros(6, 3), "b": torch.zeros(6)}, {"a": [1, 2, 3, 0], "b": [3, 3]}),
        "counts 'b' for 2 samples",
        "the batch has 4",
        "give a number for each sample",
    ),
    "counted as one number": (
        lambda: batch_of({"ids": IDS, "pixels": torch.zeros(6, 3)}, {"pixels": 6}),
        "'pixels'",
        "int",
        "give a number for each sample",
    ),
    "counted below nothing": (
        lambda: batch_of({"ids": IDS, "pixels": torch.zeros(6, 3)}, {"pixels": [7, -1, 0, 0]}),
        "'pixels'",
        "-1",
        "correct rows=",
    ),
    "no samples in common": (
        lambda: batch_of({"a": torch.zeros(3, 2), "b": torch.zeros(5, 2)}),
        "rows of each: a 3, b 5",
        "the first dimension of each must be the batch size 4",
        "or rows= must count it",
    ),
    "nothing with samples": (
        lambda: batch_of({"scale": torch.tensor(1.0), "name": "x"}),
        "rows of each: none",
        "must be the batch size 4",
        "rows= must count it",
    ),
    "empty": (
        lambda: batch_of({"a": torch.zeros(0, 2)}),
        "a batch has no samples",
        "no samples",
        "leave empty batches out",
    ),
    "counts that do not add up": (
        lambda: spindle.per_sample(torch.tensor([4, 6, 8]), torch.tensor([2, 2])),
        "counts add up to 4",
        "but there are 3 values",
        "per_sample",
    ),
}


@each(REFUSED)
def test_a_refused_batch_says_value_rule_and_remedy(refusal: Refusal) -> None:
    check_refusal(refusal, WorkloadError)
