"""Turns of a program: tasks t and u, each two layers and a loss on ranks 0 and 1, which share all parameters."""

from dataclasses import replace

import pytest

from spindle.errors import PlanError
from spindle.runtime.laws import broken_laws
from spindle.runtime.programs import text
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.passes import restricted
from spindle.runtime.programs.program import Op, Program
from spindle.values.contract import contract
from spindle.values.graph import Operator, TaskGraph
from spindle.values.plan import Plan
from spindle.values.turns import Turns
from tests.runtime.programs.hand_program import hand_graph, hand_plan, hand_slice

TURNS: Turns = (("t",), ("u",))


def both_tasks(*, crossing: bool = False) -> TaskGraph:
    """`crossing`: the loss of u reads what t's layers make."""

    def of_u(operator: Operator) -> Operator:
        outputs = tuple(replace(out, name=f"u{out.name[1:]}") for out in operator.outputs)
        inputs = tuple(f"u{name[1:]}" for name in operator.inputs)
        if crossing and operator.component == "loss":
            inputs += ("t/y",)
        return replace(operator, name=f"u{operator.name[1:]}", task="u", inputs=inputs, outputs=outputs)

    operators = tuple(hand_graph())
    return TaskGraph((*operators, *map(of_u, operators)))


def both_plan(turns: Turns = TURNS) -> Plan:
    """The layers of both tasks first, then both losses."""
    ranks = (0, 1)
    layers = (hand_slice("t.a", 0, 2, ranks, 0.0), hand_slice("u.a", 0, 2, ranks, 1.0))
    losses = (hand_slice("t.loss", 0, 1, (1,), 2.0), hand_slice("u.loss", 0, 1, (1,), 3.0))
    return replace(hand_plan(*layers, *losses), turns=turns)


def lowered(plan: Plan, graph: TaskGraph | None = None) -> Program:
    found = graph or both_tasks()
    losses, weights = {"t": "t/loss", "u": "u/loss"}, {"t": 1.0, "u": 1.0}
    return lower(plan, contract(found), found, losses=losses, weights=weights)


def runs_on(program: Program, rank: int) -> list[str]:
    kept = (Op.FORWARD, Op.BACKWARD, Op.REDUCE)
    return [f"{i.op} {i.target}" for i in program.instructions[rank] if i.op in kept]


def test_a_turn_goes_forward_and_backward_before_the_next() -> None:
    """And what both turns train is reduced once, after the second."""
    program = lowered(both_plan())
    assert [(run.name, run.metaop, run.turn) for run in program.slices] == [
        ("s0", "t.a", 0),
        ("s1", "t.loss", 0),
        ("s2", "u.a", 1),
        ("s3", "u.loss", 1),
    ]
    assert runs_on(program, 1) == [
        *("FORWARD s0", "FORWARD s1", "BACKWARD s1", "BACKWARD s0"),
        *("FORWARD s2", "FORWARD s3", "BACKWARD s3", "BACKWARD s2", "REDUCE b0"),
    ]
    assert list(broken_laws(program)) == []
    at_once = runs_on(lowered(both_plan(turns=())), 1)
    assert at_once[:4] == ["FORWARD s0", "FORWARD s1", "FORWARD s2", "FORWARD s3"]


def most_held(program: Program, rank: int) -> int:
    """Activations that a rank holds at a time."""
    held, most = 0, 0
    for instruction in program.instructions[rank]:
        held += instruction.op is Op.FORWARD
        held -= instruction.op is Op.FREE and instruction.target.startswith("activations:")
        most = max(most, held)
    return most


def test_only_one_turn_is_held() -> None:
    assert [most_held(lowered(both_plan(turns)), 1) for turns in ((), TURNS)] == [4, 2]


def test_what_is_ready_after_the_first_turn_is_reduced_then() -> None:
    """Where u's layers are its own, those of t are reduced before u begins; a bucket here holds two parameters."""
    own = (replace(op, parameters=tuple(replace(p, name=f"u.{p.name}") for p in op.parameters)) for op in both_tasks())
    graph = TaskGraph(tuple(op if op.task == "u" else before for op, before in zip(own, both_tasks(), strict=True)))
    program = lowered(replace(both_plan(), bucket_bytes=32), graph)
    order = runs_on(program, 0)
    first, last = (b.name for b in program.buckets if len(b.ranks) == 2)
    assert program.bucket_by_name[first].parameters == ("a.1.w", "a.0.w")
    assert order.index("BACKWARD s0") < order.index(f"REDUCE {first}") < order.index("FORWARD s2")
    assert order[-1] == f"REDUCE {last}"
    assert list(broken_laws(program)) == []


def test_a_step_without_a_task_keeps_the_turns_of_others() -> None:
    program = restricted(lowered(both_plan()), ["u"])
    assert [run.turn for run in program.slices] == [1, 1]
    assert runs_on(program, 0) == ["FORWARD s2", "BACKWARD s2", "REDUCE b0"]
    assert list(broken_laws(program)) == []


def test_turns_stand_in_the_text() -> None:
    program = lowered(both_plan())
    assert "slice s2 u.a task u component a wave 1 loads backward turn:1\n" in text.dumps(program)
    assert text.loads(text.dumps(program)) == program


def test_a_program_whose_turns_overlap_is_found() -> None:
    """The runs of a program at once, said to be of two turns."""
    at_once = lowered(both_plan(turns=()))
    turned = replace(at_once, slices=tuple(replace(r, turn=int(r.task == "u")) for r in at_once.slices))
    assert "rank 1 does BACKWARD s0 of turn 0 after FORWARD s1 of turn 1" in list(broken_laws(turned))
    backwards = replace(at_once, slices=tuple(replace(r, turn=int(r.task == "t")) for r in at_once.slices))
    assert "task 'u' runs in turn 0" not in "".join(broken_laws(turned))
    late = "task 't' runs in turn 1, after 'u', which follows it in one process"
    assert late not in list(broken_laws(backwards))  # nobody could tell
    shared = replace(backwards, slices=tuple(replace(r, states=("queue",)) for r in backwards.slices))
    assert late in list(broken_laws(shared))


def test_runs_of_a_turn_that_read_from_another_are_found() -> None:
    whole = lowered(both_plan(turns=()))
    split = replace(whole, slices=tuple(replace(r, turn=int(r.metaop == "u.loss")) for r in whole.slices))
    assert "slice run s3 of turn 1 reads 'u/y', which is made in turn 0" in list(broken_laws(split))


@pytest.mark.parametrize(
    ("turns", "crossing", "reason"),
    [
        ((("u",), ("t",)), False, "turns run tasks u, t, but one process runs t, u in this order; plan this workload"),
        ((("t",), ("w",)), False, "turns run tasks t, w, but one process runs t, u in this order"),
        (TURNS, True, "task 'u' reads 't/y' of task 't', but the plan runs them in turns 1 and 0; put them in one"),
    ],
)
def test_turns_that_no_process_has_are_refused(turns: Turns, crossing: bool, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        lowered(both_plan(turns), both_tasks(crossing=crossing))
