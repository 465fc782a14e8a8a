"""Sequences: which batches follow each other, in which turn, and where their writes stand in a program."""

from dataclasses import replace

import pytest

from spindle.runtime.laws import broken_laws
from spindle.runtime.programs import text
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.passes import restricted
from spindle.runtime.programs.program import Op, Program
from spindle.runtime.programs.sequences import in_words, sequences, turns_of
from spindle.values.contract import contract
from spindle.values.graph import ParameterWrite, TaskGraph
from spindle.values.plan import Plan
from tests.runtime.programs.hand_program import hand_plan, hand_slice
from tests.runtime.test_states import graph

MOVES = ParameterWrite(task="u", target="teacher", sources=("scale",), in_turn=True)
CLAMPS = ParameterWrite(task="t", target="scale", after=True, in_turn=True)


def several(*, states: dict[str, tuple[str, ...]], writes: tuple[ParameterWrite, ...] = ()) -> TaskGraph:
    """Tasks with one operator each, which touch some states; no parameters."""
    (operator, _) = graph()
    operators = tuple(
        replace(operator, name=f"{task}.loss", task=task, parameters=(), states=own,
                outputs=(replace(operator.outputs[0], name=f"{task}/loss"),))
        for task, own in states.items()
    )  # fmt: skip
    return TaskGraph(operators, writes)


@pytest.mark.parametrize(
    ("states", "rounds", "expected"),
    [
        ({"a": ("q",), "b": ("q",), "c": ()}, 2, (("a", "b"),)),
        ({"a": ("q",), "b": ("q",), "c": ()}, 1, ()),  # in one round, orders of operators suffice
        ({"a": ("q",), "b": ("p",), "c": ("q", "p")}, 2, (("a", "b", "c"),)),
        ({"a": ("q",), "b": ("p",), "c": ("q",), "d": ("p",)}, 3, (("a", "c"), ("b", "d"))),
        ({"a": ("q",), "b": ("p",)}, 4, ()),
    ],
)
def test_tasks_with_one_state_are_a_sequence(
    states: dict[str, tuple[str, ...]], rounds: int, expected: tuple[tuple[str, ...], ...]
) -> None:
    assert sequences(several(states=states), rounds) == expected


def test_tasks_with_writes_in_turn_are_a_sequence() -> None:
    """With all that use what is written, or write what is read for it; and then with those of their states."""
    found = graph(states=())
    assert sequences(found, 4) == ()
    assert sequences(replace(found, writes=(MOVES,)), 1) == (("u",),)
    assert sequences(replace(found, writes=(MOVES, CLAMPS)), 1) == (("t", "u"),)
    assert sequences(replace(graph(), writes=(MOVES,)), 1) == (("t", "u"),)  # they share a queue


def test_the_turn_of_each_batch() -> None:
    """As in the picture of the module: others run a round beside each of the first turns."""
    tasks = [f"{task}#{number}" for number in range(4) for task in ("teacher", "clip", "student")]
    turns = turns_of([("teacher", "student")], hand_plan(), tasks, 4, 2)
    assert [turns[f"teacher#{n}"] for n in range(4)] == [0, 1, 2, 3]
    assert [turns[f"student#{n}"] for n in range(4)] == [4, 5, 6, 7]
    assert [turns[f"clip#{n}"] for n in range(4)] == [0, 0, 1, 1]
    assert "('teacher' then 'student'): their 4 batches" in in_words([("teacher", "student")], 4)


def test_a_plan_in_turns_keeps_them_in_each_round() -> None:
    plan = replace(hand_plan(), turns=(("a",), ("b",)))
    tasks = [f"{task}#{number}" for number in range(2) for task in ("a", "b", "c", "d")]
    turns = turns_of([("c", "d")], plan, tasks, 2, 1)
    assert [turns[f"{task}#{n}"] for n in range(2) for task in ("a", "b")] == [0, 1, 3, 4]
    assert [turns[f"{task}#{n}"] for task in ("c", "d") for n in range(2)] == [2, 5, 8, 11]


def plan_of_both() -> Plan:
    return hand_plan(hand_slice("t.loss", 0, 1, (0,), 0.5), hand_slice("u.loss", 0, 1, (1,), 0.0))


def program(*writes: ParameterWrite) -> Program:
    """Both tasks, one after the other; rank 0 holds the scale, rank 1 the teacher."""
    found = replace(graph(states=()), writes=writes)
    return lower(
        plan_of_both(),
        contract(found),
        found,
        losses={"t": "t/loss", "u": "u/loss"},
        weights={"t": 1.0, "u": 1.0},
        turns={"t": 0, "u": 1},
    )


def order_on(made: Program, rank: int) -> list[str]:
    kept = (Op.FORWARD, Op.BACKWARD, Op.WRITE)
    return [f"{i.op} {i.target}" for i in made.instructions[rank] if i.op in kept]


def test_writes_stand_in_the_turn_of_their_batch() -> None:
    """The teacher follows the scale as task t leaves it."""
    made = program(MOVES, CLAMPS)
    assert order_on(made, 0) == ["FORWARD s0", "BACKWARD s0", "WRITE w1", "WRITE w0"]
    assert order_on(made, 1) == ["WRITE w0", "FORWARD s1", "BACKWARD s1"]
    assert "write w1 task t after turn:0 ranks 0\n" in text.dumps(made)
    assert text.loads(text.dumps(made)) == made
    assert list(broken_laws(made)) == []
    unnoticed = program(MOVES, replace(CLAMPS, unnoticed=True))
    assert order_on(unnoticed, 0) == ["FORWARD s0", "WRITE w1", "BACKWARD s0", "WRITE w0"]
    assert "write w1 task t within turn:0 ranks 0\n" in text.dumps(unnoticed)
    assert text.loads(text.dumps(unnoticed)) == unnoticed
    assert list(broken_laws(unnoticed)) == []


def test_a_step_without_a_task_keeps_the_writes_of_others() -> None:
    made = program(replace(MOVES), CLAMPS)
    assert [write.name for write in restricted(made, ["t"]).writes] == ["w1"]
    assert list(broken_laws(restricted(made, ["t"]))) == []


FAULTS = {
    "too early": ("  FORWARD s0\n  BACKWARD s0\n  FREE activations:s0\n  WRITE w1\n",
                  "  WRITE w1\n  FORWARD s0\n  BACKWARD s0\n  FREE activations:s0\n",
                  "rank 0 does WRITE w1 before FORWARD s0"),
    "in the turn of another": ("write w1 task t after turn:0", "write w1 task t after turn:1",
                               "write w1 is in turn 1, but task 't' runs in 0"),
    "once a round and in a turn": ("write w1 task t after turn:0 ranks 0\n  scale",
                                   "write w1 task t after ranks 0\n  teacher",
                                   "parameter 'teacher' is written in a turn, and by write w1 in the whole round"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault(fault: tuple[str, str, str]) -> None:
    old, new, message = fault
    whole = text.dumps(program(MOVES, CLAMPS))
    assert whole.count(old) == 1
    found = list(broken_laws(text.loads(whole.replace(old, new))))
    assert any(message in finding for finding in found), found
