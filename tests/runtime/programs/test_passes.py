"""Passes: tables of a program in, instruction lists out; each pass on programs that fit in the head."""

from dataclasses import replace

from spindle.runtime.laws import broken_laws
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.passes import accumulating, add_compute, add_frees, add_loads, add_step, restricted
from spindle.runtime.programs.program import Bucket, Program
from spindle.values.contract import contract
from tests.random_plans import widest_plan
from tests.runtime.programs.hand_program import hand_plan, hand_slice, lowered
from tests.task_graphs import random_task_graph


def bare(program: Program) -> Program:
    return replace(program, instructions=((),) * program.num_ranks)


def words(lists: tuple[tuple[object, ...], ...], rank: int) -> str:
    return ", ".join(map(str, lists[rank]))


def test_compute_and_transfers() -> None:
    """A wait stands right before its reader, a transfer right after its maker, a reduction after the last gradient."""
    lists = add_compute(bare(lowered()))
    assert words(lists, 0) == "FORWARD s0, TRANSFER s0>s1, TRANSFER s0<s1, AWAIT s0<s1, BACKWARD s0, REDUCE b0"
    assert words(lists, 1) == (
        "FORWARD s0, TRANSFER s0>s1, AWAIT s0>s1, FORWARD s1, BACKWARD s1, TRANSFER s0<s1, BACKWARD s0, REDUCE b0"
    )


def test_a_reduction_starts_before_the_rest_of_backward() -> None:
    """The second layer's gradients are complete, and on their way, while the first layer's are computed."""
    slices = [hand_slice("t.a", 0, 1, (0,), 0.0), hand_slice("t.a", 1, 1, (0, 1), 1.0)]
    program = lowered(hand_plan(*slices, hand_slice("t.loss", 0, 1, (0,), 2.0)))
    shared = next(b.name for b in program.buckets if b.ranks == (0, 1))
    order = [str(i) for i in program.instructions[0]]
    assert order.index("BACKWARD s1") < order.index(f"REDUCE {shared}") < order.index("BACKWARD s0")
    assert order.index(f"AWAIT {shared}") > order.index("BACKWARD s0")


def test_the_end_of_a_step() -> None:
    """Reductions are awaited in the order in which they started, then all clip together, then each steps."""
    program = replace(bare(lowered()), instructions=add_compute(bare(lowered())))
    assert words(add_step(program), 0).endswith("REDUCE b0, AWAIT b0, STEP")
    assert words(add_step(replace(program, max_grad_norm=1.0)), 0).endswith("REDUCE b0, AWAIT b0, CLIP, STEP")


def test_a_rank_loads_first_and_only_tasks_of_its_own() -> None:
    """Every run needs the batch, if only to know the shapes of what it is sent. A rank without runs agrees all the
    same: all ranks take part in that.
    """
    slices = [hand_slice("t.a", 0, 1, (0, 1), 0.0), hand_slice("t.a", 1, 1, (1,), 1.0)]
    program = lowered(hand_plan(*slices, hand_slice("t.loss", 0, 1, (2,), 2.0), num_devices=4))
    lists = add_loads(replace(program, instructions=add_compute(bare(program))))
    assert [[str(i) for i in rank].count("LOAD t") for rank in lists] == [1, 1, 1, 0]
    assert words(lists, 1).startswith("LOAD t, AGREE, FORWARD s0")
    assert words(lists, 2).startswith("LOAD t, AGREE, TRANSFER s1>s2")
    assert words(lists, 3) == "AGREE"


def test_a_rank_alone_has_nobody_to_agree_with() -> None:
    slices = (hand_slice("t.a", 0, 2, (0,), 0.0), hand_slice("t.loss", 0, 1, (0,), 1.0))
    program = lowered(hand_plan(*slices, num_devices=1))
    assert words(program.instructions, 0).startswith("LOAD t, FORWARD s0")


def test_a_run_that_reads_nothing_loads_nothing() -> None:
    """Rank 2 computes a loss from what it is sent alone."""
    slices = [hand_slice("t.a", 0, 1, (0, 1), 0.0), hand_slice("t.a", 1, 1, (1,), 1.0)]
    program = lowered(hand_plan(*slices, hand_slice("t.loss", 0, 1, (2,), 2.0), num_devices=3))
    both = replace(program, slices=tuple(replace(run, loads=run.component == "a") for run in program.slices))
    lists = add_loads(replace(both, instructions=add_compute(bare(both))))
    assert [[str(i) for i in rank].count("LOAD t") for rank in lists] == [1, 1, 0]
    assert words(lists, 1).startswith("LOAD t, AGREE, FORWARD s0")


def test_a_buffer_is_freed_after_its_last_reader() -> None:
    """What backward needs stays until backward; what was only sent on goes as soon as it is sent."""
    program = lowered()
    compute = replace(program, instructions=add_compute(bare(program)))
    assert words(add_frees(compute), 0) == (
        "FORWARD s0, TRANSFER s0>s1, TRANSFER s0<s1, AWAIT s0<s1, BACKWARD s0, FREE activations:s0, "
        "FREE arrivals:s0<s1, REDUCE b0"
    )
    frozen = replace(
        compute, slices=tuple(replace(run, backward=False) for run in program.slices), transfers=compute.transfers[:1]
    )
    forward = replace(frozen, instructions=add_compute(bare(frozen)))
    assert words(add_frees(forward), 0) == "FORWARD s0, TRANSFER s0>s1, FREE activations:s0"


def test_a_rank_that_takes_no_part_agrees_and_steps() -> None:
    """Idle devices of a plan have a program too."""
    program = lowered(hand_plan(num_devices=3))
    assert words(program.instructions, 2) == "AGREE, STEP"
    assert list(broken_laws(program)) == []


def test_a_step_without_tasks_runs_nothing() -> None:
    """When every task rests the ranks agree that there is nothing, and buckets stay where they lay."""
    program = lowered()
    resting = restricted(program, [])
    assert [words(resting.instructions, rank) for rank in (0, 1)] == ["AGREE, STEP", "AGREE, STEP"]
    assert (resting.buckets, resting.losses) == (program.buckets, ())
    assert list(broken_laws(resting)) == []


def test_a_round_that_only_adds() -> None:
    """No reduction, no wait for one, no clipping, no step; transfers stay."""
    program = lowered(max_grad_norm=1.0)
    kept = accumulating(program.instructions[0])
    assert words((kept,), 0) == (
        "LOAD t, AGREE, FORWARD s0, TRANSFER s0>s1, TRANSFER s0<s1, AWAIT s0<s1, BACKWARD s0, FREE activations:s0, "
        "FREE arrivals:s0<s1"
    )


def test_a_bucket_of_one_rank_is_never_reduced() -> None:
    program = lowered()
    alone = tuple(Bucket(name=b.name, dtype=b.dtype, ranks=(1,), parameters=b.parameters) for b in program.buckets)
    assert "REDUCE" not in words(add_compute(bare(replace(program, buckets=alone))), 1)


def test_ranks_that_do_the_same_have_one_list() -> None:
    """Lowering and laws go by what there is to do, not by how many do it."""
    sample = random_task_graph(3)
    metagraph = contract(sample.graph)
    plan = widest_plan(metagraph, 4)
    program = lower(plan, metagraph, sample.graph, losses=sample.losses, weights=sample.weights)
    assert len({id(own) for own in program.instructions}) == len(set(program.instructions)) < 4
