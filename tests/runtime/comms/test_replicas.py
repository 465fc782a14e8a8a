"""Checksums of replicas, and which ranks hold what alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spindle
from spindle.runtime.controller import prepare
from spindle.runtime.faults.replicas import checksum, replica_sets, sets_of
from spindle.runtime.rank_spec import make_rank_specs
from tests.parity.test_sharded_parameters import light
from tests.random_plans import random_plan, widest_plan

TYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


def values(dtype: torch.dtype, size: int, seed: int = 0) -> torch.Tensor:
    """Numbers of any type."""
    floats = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10
    if dtype.is_complex:
        return torch.complex(floats, floats.flip(0)).to(dtype)
    return (floats > 0) if dtype is torch.bool else floats.abs().to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@given(size=st.integers(1, 20), place=st.integers(0, 10**6), bit=st.integers(0, 10**6))
def test_any_flipped_bit_changes_the_checksum(dtype: torch.dtype, size: int, place: int, bit: int) -> None:
    """Of a tensor of any type and size, one of no size and no dimension too; equal tensors have equal ones."""
    value = values(dtype, size)
    before = int(checksum(value))
    assert before == int(checksum(value.clone()))
    raw = value.view(torch.uint8) if not dtype.is_complex else torch.view_as_real(value).view(torch.uint8)
    flat = raw.reshape(-1)
    flat[place % len(flat)] ^= 1 << (bit % (8 if dtype is not torch.bool else 1))
    assert before != int(checksum(value))
    flat[place % len(flat)] ^= 1 << (bit % (8 if dtype is not torch.bool else 1))
    assert before == int(checksum(value))


def test_the_checksum_does_not_depend_on_where_numbers_lie() -> None:
    """Views at odd places, other strides, channels last."""
    value = values(torch.float32, 24).view(2, 3, 2, 2)
    row = torch.zeros(30)
    for start in range(4):
        row[start : start + 24] = value.flatten()
        assert int(checksum(row[start : start + 24].view(2, 3, 2, 2))) == int(checksum(value))
    assert int(checksum(value.to(memory_format=torch.channels_last))) == int(checksum(value))
    assert int(checksum(value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))) == int(checksum(value))
    assert int(checksum(torch.zeros(0))) == 0
    assert int(checksum(torch.tensor(1.0))) != 0


@pytest.mark.parametrize("seed", range(6))
def test_what_ranks_hold_alike(seed: int) -> None:
    """Each parameter of several holders is in the set of exactly these ranks, once; sharded ones are in none. A rank
    knows all sets, and the items of its own.
    """
    made = light()
    sharded = seed % 2 == 0
    plan = random_plan(spindle.make_metagraph(made), 3, seed, on_all=("lm",) if sharded else ())
    found = prepare(made, plan)
    specs = make_rank_specs(found.program, found.captured, made, check_replicas_every=1)
    holders: dict[str, set[int]] = {}
    for spec in specs:
        for code in spec.codes.values():
            for _, name in (*code.parameters, *code.buffers):
                holders.setdefault(name, set()).add(spec.rank)
    expected = {
        (name, tuple(sorted(ranks)))
        for name, ranks in holders.items()
        if len(ranks) > 1 and not (sharded and name.startswith("lm."))
    }
    items = [(name, each.ranks) for spec in specs for each in spec.replicas for kind, name in each.items
             if kind == "parameter" and spec.rank == each.ranks[0]]  # fmt: skip
    assert len(items) == len(set(items))
    assert set(items) == expected
    for spec in specs:
        assert [(s.ranks, s.count) for s in spec.replicas] == [(s.ranks, s.count) for s in specs[0].replicas]
        assert all(len(s.items) == (s.count if spec.rank in s.ranks else 0) for s in spec.replicas)


def test_states_are_alike_where_all_holders_step() -> None:
    """Not where one of them owns them (ZeRO-1)."""
    made = light()
    for shard in (False, True):
        again = light(shard_optimizer=shard)
        found = prepare(again, widest_plan(spindle.make_metagraph(made), 2))
        held = [[name for name, _ in again.named_parameters()]] * 2
        kinds = {kind for each in replica_sets(found.program, held) for kind, _ in each.items}
        assert kinds == ({"parameter"} if shard else {"parameter", "states"})
        assert sets_of(replica_sets(found.program, held), 5)[0].items == ()
