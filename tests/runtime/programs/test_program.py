"""Program: its look-up tables, and how an instruction is described in messages."""

from dataclasses import replace

import pytest

from spindle.errors import ProgramError
from spindle.runtime.programs.program import (
    Bucket,
    Instruction,
    Message,
    Op,
    Transfer,
    activations,
    arrivals,
    gradients,
)
from tests.runtime.programs.hand_program import lowered


def test_an_instruction_in_full() -> None:
    """Rank, wave, layers and peers: all that a person needs to find the place."""
    program = lowered()
    described = [program.describe(1, i) for i in program.instructions[1] if i.op not in (Op.FREE, Op.AWAIT)]
    assert program.describe(0, Instruction(Op.CLIP)) == "rank 0, CLIP (with all ranks)"
    assert described == [
        "rank 1, LOAD t",
        "rank 1, AGREE (with all ranks)",
        "rank 1, wave 0, FORWARD s0 (t.a.0 .. t.a.1)",
        "rank 1, wave 1, TRANSFER s0>s1 (with rank 0)",
        "rank 1, wave 1, FORWARD s1 (t.loss)",
        "rank 1, wave 1, BACKWARD s1 (t.loss)",
        "rank 1, wave 0, TRANSFER s0<s1 (with rank 0)",
        "rank 1, wave 0, BACKWARD s0 (t.a.0 .. t.a.1)",
        "rank 1, REDUCE b0 (with ranks 0, 1)",
        "rank 1, STEP",
    ]


def test_who_holds_which_samples() -> None:
    run = lowered().slice_by_name["s0"]
    assert [run.bounds_of(rank) for rank in (0, 1)] == [(0, 3), (3, 5)]


def test_members_of_a_transfer_send_or_receive() -> None:
    messages = tuple(Message(tensor="x", source=s, target=t, low=0, high=1) for s, t in ((0, 3), (0, 4)))
    assert Transfer(name="a>b", source="a", target="b", backward=False, messages=messages).members() == {0, 3, 4}


def test_ranks_that_may_send_are_members_too() -> None:
    """Where bounds vary the messages are those of evenly shared samples; in other steps others send and receive."""
    message = Message(tensor="x", source=0, target=3, low=0, high=1)
    transfer = Transfer(
        name="a>b", source="a", target="b", backward=False, messages=(message,), senders=(0, 1), receivers=(2, 3)
    )
    assert (transfer.sending(), transfer.receiving()) == (frozenset((0, 1)), frozenset((2, 3)))
    assert transfer.members() == {0, 1, 2, 3}
    fixed = replace(transfer, senders=(), receivers=())
    assert (fixed.sending(), fixed.receiving()) == (frozenset((0,)), frozenset((3,)))


def test_groups_are_made_of_several_ranks_once_in_one_order() -> None:
    """Equal groups are one, single ranks need none, and the order does not depend on that of the buckets."""
    ranks = ((1, 2), (0,), (0, 1, 2), (1, 2), (0, 2))
    buckets = tuple(Bucket(name=f"b{i}", dtype="float32", ranks=r, parameters=()) for i, r in enumerate(ranks))
    assert replace(lowered(), buckets=buckets).groups == ((0, 1, 2), (0, 2), (1, 2))


def test_operators_of_a_rank_come_once() -> None:
    program = lowered()
    assert program.operators_of(0) == ("t.a.0", "t.a.1")
    assert program.operators_of(1) == ("t.a.0", "t.a.1", "t.loss")


def test_which_runs_add_to_a_bucket() -> None:
    """Runs come in forward order; a bucket whose parameters nobody trains in this step has none."""
    program = lowered()
    assert program.runs_by_bucket == {"b0": ("s0",), "b1": ("s1",)}
    resting = tuple(replace(run, trained=()) for run in program.slices)
    assert replace(program, slices=resting).runs_by_bucket == {"b0": (), "b1": ()}


def test_names_of_buffers() -> None:
    assert [activations("s0"), gradients("s0"), arrivals("s0>s1")] == [
        "activations:s0",
        "gradients:s0",
        "arrivals:s0>s1",
    ]


@pytest.mark.parametrize(
    ("num_ranks", "lists", "words"),
    [(0, 0, "the program is for 0 ranks"), (2, 1, "the program has 1 instruction lists for 2 ranks")],
)
def test_every_rank_has_a_list(num_ranks: int, lists: int, words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        replace(lowered(), num_ranks=num_ranks, instructions=((Instruction(Op.STEP),),) * lists)
