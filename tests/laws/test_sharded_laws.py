"""Laws of programs whose parameters are sharded: gathered when they are used, two runs' at most, and scattered once."""

import random
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spindle.runtime.laws import broken_laws, check_program
from spindle.runtime.programs import text
from spindle.runtime.programs.parts import parts_of
from spindle.runtime.programs.passes import accumulating, restricted, run_passes
from spindle.runtime.programs.program import Instruction, Op, Program
from spindle.values.graph import Operator
from tests.laws.abstract import Abstract, random_sharded_program
from tests.runtime.programs.hand_program import hand_plan, hand_slice, lowered

seeds = st.integers(0, 10**9)
MOVES = (Op.UNSHARD, Op.AWAIT, Op.RESHARD, Op.SCATTER, Op.ADD, Op.REDUCE)


@settings(max_examples=300)
@given(seeds)
def test_every_law_holds_for_every_plan(seed: int) -> None:
    """Random graphs and plans: lowered, checked, printed and read back, run to the end; no more than the flats of two
    runs are there at a time on one set of ranks.
    """
    _, program = random_sharded_program(seed)
    check_program(program)
    assert text.loads(text.dumps(program)) == program
    abstract = Abstract(program)
    abstract.run(random.Random(seed))
    sets = len({flat.ranks for flat in program.flats})
    assert abstract.most_there <= 2 * sets * max((len(run.flats) for run in program.slices), default=0)


@settings(max_examples=100)
@given(seeds)
def test_each_parameter_has_one_home(seed: int) -> None:
    """A trained parameter stands in one bucket or one flat; all that use one of a flat gather it."""
    graph, program = random_sharded_program(seed)
    homes = [name for table in (program.buckets, program.flats) for each in table for name in each.parameters]
    assert len(homes) == len(set(homes))
    trained = {p.name for operator in graph for p in operator.parameters if p.trainable}
    assert trained <= set(homes)
    for flat in program.flats:
        for name in flat.parameters:
            users = [run for run in program.slices for op in run.operators if name in _names(graph.by_name[op])]
            assert all(flat.name in run.flats and set(run.ranks) == set(flat.ranks) for run in users)
            assert all(len(run.operators) == 1 for run in users)


def _names(operator: Operator) -> set[str]:
    return {parameter.name for parameter in operator.parameters}


@settings(max_examples=60)
@given(seeds)
def test_the_laws_hold_when_some_tasks_rest_and_in_rounds(seed: int) -> None:
    """The program of any one task, and a round that only adds, go through too."""
    _, program = random_sharded_program(seed)
    for task, _ in program.losses:
        part = restricted(program, [task])
        check_program(part)
        Abstract(part).run(random.Random(seed))
        assert part.groups == program.groups
    adding = tuple(accumulating(own) for own in program.instructions)
    Abstract(replace(program, instructions=adding)).run(random.Random(seed))


@settings(max_examples=60)
@given(seeds)
def test_a_ranks_part_is_enough(seed: int) -> None:
    """From its part alone a rank gets the instructions that the whole program has for it, whatever tasks rest."""
    _, program = random_sharded_program(seed)
    tasks = [task for task, _ in program.losses]
    for rank, part in enumerate(parts_of(program)):
        assert run_passes(part).instructions[rank] == program.instructions[rank]
        for task in tasks:
            own, whole = restricted(part, [task]), restricted(program, [task])
            assert own.instructions[rank] == whole.instructions[rank]
        for instruction in part.instructions[rank]:
            part.describe(rank, instruction)


def with_rank(program: Program, rank: int, instructions: tuple[Instruction, ...]) -> Program:
    lists = program.instructions
    return replace(program, instructions=(*lists[:rank], instructions, *lists[rank + 1 :]))


@settings(max_examples=200)
@given(seeds, st.data())
def test_no_move_can_be_left_out_doubled_or_changed_in_order(seed: int, data: st.DataObject) -> None:
    """What is done with a flat, or with flags, on any rank: dropped, doubled, or changed with what follows it on that
    rank alone.
    """
    _, program = random_sharded_program(seed)
    places = [
        (rank, place)
        for rank, own in enumerate(program.instructions)
        for place, i in enumerate(own)
        if i.op in MOVES and (i.target in program.flat_by_name or i.target in program.flags_by_name)
    ]
    assume(places)
    rank, place = data.draw(st.sampled_from(places))
    own = program.instructions[rank]
    for faulty in (own[:place] + own[place + 1 :], own[: place + 1] + own[place:]):
        findings = list(broken_laws(with_rank(program, rank, faulty)))
        assert any(f"rank {rank}" in finding for finding in findings), (own[place], findings)
    one, two = own[place], own[place + 1]
    swapped = with_rank(program, rank, (*own[:place], two, one, *own[place + 2 :]))
    together = {Op.UNSHARD, Op.SCATTER} >= {one.op, two.op}
    same = one.target == two.target and {one.op, two.op} != {Op.RESHARD, Op.ADD}
    same |= one.op is Op.AWAIT and two.op in (Op.FORWARD, Op.BACKWARD)
    if together or same:
        assert list(broken_laws(swapped)), (one, two)


SHARDED = lowered(
    hand_plan(*(hand_slice("t.a", n, 1, (0, 1), float(n)) for n in (0, 1)), hand_slice("t.loss", 0, 1, (0,), 2.0)),
    shard_parameters=("a",),
)
WRITTEN = text.dumps(SHARDED)

FAULTS = {
    "a flat that is not waited for": (
        "  AWAIT f0\n  UNSHARD f1\n  FORWARD s0\n",
        "  UNSHARD f1\n  FORWARD s0\n",
        "rank 0, FORWARD s0: flat f0 is not there",
    ),
    "a flat that is used after it was released": (
        "  FORWARD s0\n  RESHARD f0\n",
        "  RESHARD f0\n  FORWARD s0\n",
        "rank 0, FORWARD s0: flat f0 is not there",
    ),
    "a flat that stays over the update": (
        "  BACKWARD s0\n  FREE activations:s0\n  FREE gradients:s1\n  ADD f1\n  SCATTER f0\n  RESHARD f0\n",
        "  BACKWARD s0\n  FREE activations:s0\n  FREE gradients:s1\n  ADD f1\n  SCATTER f0\n",
        "rank 0, STEP: flat f0 is there from before the update",
    ),
    "gradients that nobody sums": ("  SCATTER f0\n", "", "rank 0, STEP: gradients of flat f0 are not summed yet"),
    "gradients that are not waited for": ("  ADD f0\n", "", "rank 0, STEP: gradients of flat f0 are not summed yet"),
    "flags that nobody sums": ("  REDUCE flags:f0\n", "", "rank 0 does REDUCE flags:f0 0 times, not 1"),
    "flags that are not waited for": ("  AWAIT flags:f0\n", "", "rank 0 does AWAIT flags:f0 0 times, not 1"),
    "flags that are summed too early": (
        "  SCATTER f1\n",
        "  SCATTER f1\n  REDUCE flags:f0\n",
        "rank 0 sums flags:f0 before BACKWARD s0, which adds to their parameters",
    ),
    "flags of no flat": ("  REDUCE flags:f0\n", "  REDUCE flags:f1\n", "the program has no 'flags:f1'"),
    "a flat of other ranks": ("flat f0 float32 ranks 0 1", "flat f0 float32 ranks 0", "slice run s0 on ranks (0, 1)"),
    "a frozen flat that is trained": ("ranks 0 1\n  a.1.w", "ranks 0 1 frozen\n  a.1.w", "f1, which is frozen"),
    "a parameter in two places": ("  a.1.w\n", "  a.1.w\n  a.0.w\n", "parameter 'a.0.w' stands in 2 flats"),
    "a flat that does not exist": ("  flats f0\n", "  flats f7\n", "slice run 's0' names flat 'f7'"),
}


def test_two_layers_of_two_ranks_as_text() -> None:
    """The next layer is gathered while one computes, and stays where backward begins with it."""
    assert list(broken_laws(SHARDED)) == []
    assert "flat f0 float32 ranks 0 1\n  a.0.w\n" in WRITTEN
    moves = [f"{i.op} {i.target}" for i in SHARDED.instructions[1] if i.op in (*MOVES, Op.FORWARD, Op.BACKWARD)]
    told = [move for move in moves if "s1>" not in move and "s2" not in move]
    assert told == [
        "UNSHARD f0",
        "AWAIT f0",
        "UNSHARD f1",
        "FORWARD s0",
        "RESHARD f0",
        "AWAIT f1",
        "FORWARD s1",
        "UNSHARD f0",
        "BACKWARD s1",
        "SCATTER f1",
        "RESHARD f1",
        "AWAIT f0",
        "BACKWARD s0",
        "ADD f1",
        "SCATTER f0",
        "RESHARD f0",
        "REDUCE flags:f0",
        "ADD f0",
        "AWAIT flags:f0",
    ]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault: tuple[str, str, str]) -> None:
    old, new, message = fault
    assert old in WRITTEN, WRITTEN
    findings = list(broken_laws(text.loads(WRITTEN.replace(old, new, 1))))
    assert any(message in finding for finding in findings), findings


def test_one_rank_has_nothing_to_shard() -> None:
    """Parameters of a single rank are in buckets as ever."""
    slices = [hand_slice("t.a", 0, 2, (0,), 0.0), hand_slice("t.loss", 0, 1, (0,), 2.0)]
    alone = lowered(hand_plan(*slices, num_devices=1), shard_parameters=("a",))
    assert (alone.flats, [bucket.parameters for bucket in alone.buckets]) == ((), [("scale", "a.1.w", "a.0.w")])
