"""Lowering: plans of the workload in the head, and what each rank's tables must then say."""

from dataclasses import replace

import pytest

from spindle.errors import PlanError
from spindle.runtime.laws import check_program
from spindle.runtime.programs.lower import lower, split_samples
from spindle.runtime.programs.program import Message, Program
from spindle.values.contract import contract
from spindle.values.graph import TaskGraph
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Slice
from spindle.values.units import SAMPLES
from tests.random_plans import random_plan
from tests.runtime.programs.hand_program import hand_graph, hand_plan, hand_slice, lowered
from tests.task_graphs import random_task_graph

LOSS = hand_slice("t.loss", 0, 1, (0,), 9.0)


def messages(program: Program, transfer: str) -> list[tuple[int, int, int, int]]:
    found: tuple[Message, ...] = program.transfer_by_name[transfer].messages
    return [(m.source, m.target, m.low, m.high) for m in found]


@pytest.mark.parametrize(
    ("batch_size", "parts", "bounds"),
    [
        (4, 1, ((0, 4),)),
        (4, 2, ((0, 2), (2, 4))),
        (5, 2, ((0, 3), (3, 5))),
        (7, 3, ((0, 3), (3, 5), (5, 7))),
        (3, 3, ((0, 1), (1, 2), (2, 3))),
    ],
)
def test_shares_of_a_batch(batch_size: int, parts: int, bounds: tuple[tuple[int, int], ...]) -> None:
    """As even as can be, the larger ones first."""
    assert split_samples(batch_size, parts) == bounds


@pytest.mark.parametrize(
    ("first", "second", "sent"),
    [
        ((0,), (0,), []),
        ((0,), (1,), [(0, 1, 0, 5)]),
        ((0, 1), (0, 1), []),
        ((0,), (0, 1), [(0, 1, 3, 5)]),
        ((0, 1), (1,), [(0, 1, 0, 3)]),
        ((0, 1), (1, 2), [(0, 1, 0, 3), (1, 2, 3, 5)]),
        ((0, 1, 2), (0, 1), [(1, 0, 2, 3), (2, 1, 4, 5)]),  # 0:2 2:4 4:5 into 0:3 3:5
        ((2, 1), (1, 2), [(2, 1, 0, 3), (1, 2, 3, 5)]),
    ],
)
def test_samples_move_between_device_sets(
    first: tuple[int, ...], second: tuple[int, ...], sent: list[tuple[int, int, int, int]]
) -> None:
    """Five samples from n ranks to m: what a rank has itself is no message; gradients go back the same way."""
    slices = (hand_slice("t.a", 0, 1, first, 0.0), hand_slice("t.a", 1, 1, second, 1.0), LOSS)
    program = lowered(hand_plan(*slices, num_devices=3))
    check_program(program)
    there = messages(program, "s0>s1") if sent else []
    assert there == sent
    assert ("s0>s1" in program.transfer_by_name) is bool(sent)
    back = messages(program, "s0<s1") if sent else []
    assert back == [(target, source, low, high) for source, target, low, high in sent]


def test_a_parameter_of_two_slices_is_reduced_over_the_ranks_of_both() -> None:
    """A layer on ranks 0 and 1, another on 2: each bucket has exactly the ranks of its own layer."""
    slices = (hand_slice("t.a", 0, 1, (0, 1), 0.0), hand_slice("t.a", 1, 1, (2,), 1.0), LOSS)
    program = lowered(hand_plan(*slices, num_devices=3))
    assert {b.ranks: b.parameters for b in program.buckets} == {
        (0,): ("scale",),
        (0, 1): ("a.0.w",),
        (2,): ("a.1.w",),
    }


def test_what_is_ready_first_is_reduced_first() -> None:
    """Buckets are filled from the last layer on, and cut where they are large enough."""
    slices = (hand_slice("t.a", 0, 1, (0, 1), 0.0), hand_slice("t.a", 1, 1, (0, 1), 1.0), LOSS)
    assert [b.parameters for b in lowered(hand_plan(*slices)).buckets] == [("scale",), ("a.1.w", "a.0.w")]
    small = replace(hand_plan(*slices), bucket_bytes=16)
    assert [b.parameters for b in lowered(small).buckets] == [("scale",), ("a.1.w",), ("a.0.w",)]


def test_slices_stand_in_the_order_of_dependence_before_that_of_time() -> None:
    """Rounded times may say otherwise; a slice never stands before what it needs."""
    slices = (hand_slice("t.a", 0, 1, (0,), 0.5), hand_slice("t.a", 1, 1, (0,), 0.0), LOSS)
    assert [run.operators for run in lowered(hand_plan(*slices)).slices] == [("t.a.0",), ("t.a.1",), ("t.loss",)]


def test_only_a_component_that_asks_for_it_is_recomputed() -> None:
    program = lowered(recompute=("a",))
    assert [(run.recompute, len(run.operators)) for run in program.slices] == [(True, 1), (True, 1), (False, 1)]


def test_a_run_without_gradients_has_no_backward_and_keeps_nothing_to_recompute() -> None:
    """Everything frozen: forward alone."""

    def frozen(graph: TaskGraph) -> TaskGraph:
        return TaskGraph(
            tuple(
                replace(
                    op,
                    outputs=tuple(replace(t, needs_grad=False) for t in op.outputs),
                    parameters=tuple(replace(p, trainable=False) for p in op.parameters),
                )
                for op in graph
            )
        )

    graph = frozen(hand_graph())
    program = lower(hand_plan(), contract(graph), graph, losses={"t": "t/loss"}, weights={"t": 1.0}, recompute=("a",))
    check_program(program)
    assert [(run.backward, run.recompute, run.trained) for run in program.slices] == [(False, False, ())] * 2
    assert program.buckets == ()
    assert [t.name for t in program.transfers] == ["s0>s1"]


def test_bounds_vary_where_several_ranks_share_what_samples_hold() -> None:
    """By rows of what the run makes, packed ones first; a run on one rank has all samples, whatever they hold."""

    def packed(graph: TaskGraph, *names: str) -> TaskGraph:
        return TaskGraph(
            tuple(
                replace(op, outputs=tuple(replace(t, unit="patches") if t.name in names else t for t in op.outputs))
                for op in graph
            )
        )

    slices = (hand_slice("t.a", 0, 1, (0, 1), 0.0), hand_slice("t.a", 1, 1, (0, 1), 1.0), LOSS)
    graph = packed(hand_graph(), "t/x")
    options = {"losses": {"t": "t/loss"}, "weights": {"t": 1.0}}
    program = lower(hand_plan(*slices), contract(graph), graph, varying={"t"}, **options)  # type: ignore[arg-type]
    check_program(program)
    assert [(run.varies, run.weigh_by) for run in program.slices] == [
        (True, "patches"),
        (True, SAMPLES),
        (False, SAMPLES),
    ]
    assert (program.transfer_by_name["s0>s1"].senders, program.transfer_by_name["s0<s1"].senders) == ((0, 1), (0, 1))
    assert program.transfer_by_name["s0>s1"].messages == ()  # of evenly shared samples none moves
    assert not any(run.varies for run in lowered(hand_plan(*slices), varying={"u"}).slices)


WRONG_PLANS: dict[str, tuple[tuple[Slice, ...], str]] = {
    "an unknown MetaOp": (
        (hand_slice("t.b", 0, 1, (0,), 0.0), LOSS),
        "runs MetaOp 't.b', which this workload",
    ),
    "a layer too many": ((hand_slice("t.a", 0, 3, (0,), 0.0), LOSS), r"layers 0\.\.2, but the MetaOp has 2 operators"),
    "a layer left out": ((hand_slice("t.a", 0, 1, (0,), 0.0), LOSS), "leaves out operator 't.a.1'; plan this workload"),
    "a task left out": ((LOSS,), "leaves out operator 't.a.0' and 1 more"),
    "a layer twice": (
        (hand_slice("t.a", 0, 2, (0,), 0.0), hand_slice("t.a", 1, 1, (1,), 2.0), LOSS),
        "runs operator 't.a.1' twice; each layer runs exactly once",
    ),
    "more devices than samples": (
        (hand_slice("t.a", 0, 2, tuple(range(6)), 0.0), LOSS),
        "slice of 't.a' shares 5 samples among 6 devices; each needs at least one",
    ),
    "a device that is not there": (
        (hand_slice("t.a", 0, 2, (0, 6), 0.0), LOSS),
        "slice of 't.a' runs on device 6, but the plan has 6 devices, counted from 0",
    ),
    "what mixes samples on two devices": (
        (hand_slice("t.a", 0, 2, (0,), 0.0), hand_slice("t.loss", 0, 1, (0, 1), 9.0)),
        "slice of 't.loss' runs on 2 devices, but it mixes samples and runs on one",
    ),
}


@pytest.mark.parametrize("case", WRONG_PLANS.values(), ids=WRONG_PLANS)
def test_plans_of_another_workload_are_refused(case: tuple[tuple[Slice, ...], str]) -> None:
    slices, words = case
    with pytest.raises(PlanError, match=words):
        lowered(hand_plan(*slices, num_devices=6))


def test_lowering_is_a_function() -> None:
    """The same plan gives the same program, to the last name."""
    sample = random_task_graph(7)
    metagraph: MetaGraph = contract(sample.graph)
    made = [
        lower(random_plan(metagraph, 4, 7), metagraph, sample.graph, losses=sample.losses, weights=sample.weights)
        for _ in range(2)
    ]
    assert made[0] == made[1]
