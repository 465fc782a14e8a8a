"""Batch shards: tensors small enough to write down, cut by samples and put together again."""

import pytest
import torch
from torch import Tensor

from spindle.runtime.programs.program import Message
from spindle.runtime.steps.batch_shards import BatchShard, cut, joined, message_bytes, shard_shape, summed
from spindle.values.graph import TensorSpec
from spindle.values.units import SAMPLES, Bounds, Units

PLAIN = TensorSpec(name="x", shape=(5, 2), dtype="float32")
PATCHES = TensorSpec(name="x", shape=(15,), dtype="float32", rows=3)  # three rows a sample
SECOND = TensorSpec(name="x", shape=(2, 5), dtype="bfloat16", row_dim=1)
WHOLE = TensorSpec(name="x", shape=(7,), dtype="float64", rows=0, unit="")
PACKED = TensorSpec(name="x", shape=(10, 1), dtype="float32", rows=2, unit="patches")  # two entries a patch
UNITS = Units({SAMPLES: (1,) * 5, "patches": (1, 0, 2, 1, 1)})


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (PLAIN, numbered(3, 2), [[2.0, 3.0]]),  # holds samples 2..4; sample 3 is its second row
        (PATCHES, numbered(9), [3.0, 4.0, 5.0]),
        (SECOND, numbered(2, 3), [[1.0], [4.0]]),
        (WHOLE, numbered(7), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        (PACKED, numbered(8, 1), [[4.0], [5.0]]),  # sample 2 has two patches, 3 and 4 one each
    ],
)
def test_cutting_out_one_sample(spec: TensorSpec, value: Tensor, expected: list[object]) -> None:
    piece = cut(value, spec, UNITS, (2, 5), 3, 4)
    assert piece.tolist() == expected
    assert shard_shape(tuple(value.shape), spec, UNITS, (2, 5), 3, 4) == piece.shape


def test_a_sample_without_rows_is_an_empty_piece() -> None:
    """Sample 1 has no patches; what is held of it is nothing, and so is what is cut from that."""
    assert cut(numbered(2, 1), PACKED, UNITS, (0, 2), 1, 2).shape == (0, 1)
    assert cut(numbered(0, 1), PACKED, UNITS, (1, 2), 1, 2).shape == (0, 1)
    assert shard_shape((2, 1), PACKED, UNITS, (0, 2), 1, 2) == (0, 1)
    assert joined([(1, 2, numbered(0, 1)), (0, 1, numbered(2, 1))], PACKED).tolist() == [[0.0], [1.0]]


def test_sizes_of_other_dimensions_are_those_of_the_value() -> None:
    """A batch that is padded to another length than the one that was captured is cut all the same."""
    assert cut(numbered(3, 4), PLAIN, UNITS, (2, 5), 3, 4).tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert shard_shape((3, 4), PLAIN, UNITS, (2, 5), 3, 4) == (1, 4)


def test_a_cut_is_a_view() -> None:
    """Nothing is copied; what is held whole is given as it is."""
    value = numbered(3, 2)
    cut(value, PLAIN, UNITS, (2, 5), 3, 4).zero_()
    assert value.tolist() == [[0.0, 1.0], [0.0, 0.0], [4.0, 5.0]]
    assert cut(value, PLAIN, UNITS, (2, 5), 2, 5) is value


@pytest.mark.parametrize(
    ("spec", "first", "second", "expected"),
    [
        (PLAIN, numbered(1, 2), numbered(1, 2) + 9, [[0.0, 1.0], [9.0, 10.0]]),
        (SECOND, numbered(2, 1), numbered(2, 1) + 9, [[0.0, 9.0], [1.0, 10.0]]),
    ],
)
def test_joining_follows_the_samples(spec: TensorSpec, first: Tensor, second: Tensor, expected: list[object]) -> None:
    """Whatever order the pieces arrive in."""
    assert joined([(1, 2, second), (0, 1, first)], spec).tolist() == expected
    assert joined([(0, 1, first)], spec) is first


def added(pieces: list[BatchShard], spec: TensorSpec, units: Units, held: Bounds, like: Tensor) -> Tensor:
    found = summed(pieces, spec, units, held, like)
    assert found is not None
    return found


def test_gradients_of_several_readers_add_up() -> None:
    """Two readers read sample 0, one read sample 1, nobody read sample 2."""
    ones = torch.ones(1, 2)
    pieces = [(0, 1, ones), (0, 2, torch.full((2, 2), 10.0))]
    assert added(pieces, PLAIN, UNITS, (0, 3), torch.empty(3, 2)).tolist() == [[11.0, 11.0], [10.0, 10.0], [0.0, 0.0]]


def test_gradients_of_packed_rows_add_up_where_they_lie() -> None:
    """Samples 0..2 have one patch, none and two, of two entries each; a reader of sample 2 adds to the last four."""
    pieces = [(0, 3, torch.ones(6, 1)), (2, 3, torch.full((4, 1), 10.0))]
    found = added(pieces, PACKED, UNITS, (0, 3), torch.empty(6, 1))
    assert found.flatten().tolist() == [1.0, 1.0, 11.0, 11.0, 11.0, 11.0]


def test_what_nobody_read_has_no_gradient() -> None:
    assert summed([], PLAIN, UNITS, (0, 2), torch.full((2, 2), 7.0)) is None


def test_a_single_gradient_is_not_copied_unless_a_part_is_missing() -> None:
    part = torch.ones(1, 2)
    assert summed([(0, 1, part)], PLAIN, UNITS, (0, 1), torch.empty(1, 2)) is part
    assert added([(0, 1, part)], PLAIN, UNITS, (0, 2), torch.empty(2, 2)).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    whole = torch.ones(7)
    assert summed([(0, 0, whole)], WHOLE, UNITS, (0, 5), torch.empty(7)) is whole


def test_gradients_of_what_cannot_be_cut_add_up_whole() -> None:
    assert added([(0, 0, torch.ones(7))] * 3, WHOLE, UNITS, (0, 5), torch.empty(7)).tolist() == [3.0] * 7


@pytest.mark.parametrize(
    ("spec", "num_bytes"), [(PLAIN, 2 * 2 * 4), (PATCHES, 2 * 3 * 4), (SECOND, 2 * 2 * 2), (WHOLE, 7 * 8)]
)
def test_bytes_of_a_message_of_two_samples(spec: TensorSpec, num_bytes: int) -> None:
    assert message_bytes(spec, Message(tensor="x", source=0, target=1, low=1, high=3)) == num_bytes
