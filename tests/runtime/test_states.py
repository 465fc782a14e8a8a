"""Programs whose runs change more than gradients: as literal text, and every fault that can be planted in them.

Tasks t and u have one operator each, on ranks 0 and 1: it counts a batch in norm layer n and moves buffer queue. Task u
lets a teacher, which rank 1 holds, follow the scale of task t, which rank 0 holds.
"""

from dataclasses import replace

import pytest

from spindle.errors import PlanError
from spindle.runtime.laws import broken_laws
from spindle.runtime.programs import text
from spindle.runtime.programs.lower import lower
from spindle.runtime.programs.passes import accumulating, restricted
from spindle.runtime.programs.program import Op, Program
from spindle.values.contract import contract
from spindle.values.graph import Operator, Parameter, ParameterWrite, TaskGraph, TensorSpec
from tests.runtime.programs.hand_program import hand_plan, hand_slice

TABLES = """\
tally n0 ranks 0 1
  n
state h0 ranks 0 1
  queue
handover h0>s1 of h0 from 0 to 1 before s1
handover h0> of h0 from 1 to 0
write w0 task u before ranks 1
  teacher
  scale 0 -> 1
"""
RANK_0 = """\
rank 0
  LOAD t
  AGREE
  WRITE w0
  FORWARD s0
  HAND h0>s1
  BACKWARD s0
  FREE activations:s0
  HAND h0>
  TALLY n0
  STEP
"""
RANK_1 = """\
rank 1
  LOAD u
  AGREE
  WRITE w0
  HAND h0>s1
  FORWARD s1
  BACKWARD s1
  FREE activations:s1
  HAND h0>
  TALLY n0
  STEP
"""


def graph(*, states: tuple[str, ...] = ("queue",)) -> TaskGraph:
    """Two tasks, and a write."""

    def operator(task: str, parameters: tuple[Parameter, ...]) -> Operator:
        return Operator(
            name=f"{task}.loss",
            task=task,
            component="loss",
            kind="loss",
            batch_size=4,
            outputs=(TensorSpec(name=f"{task}/loss", shape=(), dtype="float32", rows=0, unit=""),),
            parameters=parameters,
            splittable=False,
            statistics=("n",),
            states=states,
        )

    scale = Parameter(name="scale", shape=(), dtype="float32")
    teacher = Parameter(name="teacher", shape=(), dtype="float32", trainable=False)
    head = Parameter(name="head", shape=(), dtype="float32")
    return TaskGraph(
        (operator("t", (scale,)), operator("u", (teacher, head))),
        (ParameterWrite(task="u", target="teacher", sources=("scale",)),),
    )


def program(u_starts_s: float = 0.0, *, rounds: int = 1, states: tuple[str, ...] = ("queue",)) -> Program:
    """Both tasks, side by side or one before the other."""
    found = graph(states=states)
    slices = (hand_slice("t.loss", 0, 1, (0,), 0.5), hand_slice("u.loss", 0, 1, (1,), u_starts_s))
    losses = {"t": "t/loss", "u": "u/loss"}
    weights = {"t": 1.0, "u": 1.0}
    return lower(hand_plan(*slices), contract(found), found, losses=losses, weights=weights, rounds=rounds)


def edited(old: str, new: str) -> Program:
    """The program with one edit in its text."""
    whole = text.dumps(program())
    assert whole.count(old) == 1, f"{old!r} stands {whole.count(old)} times"
    return text.loads(whole.replace(old, new))


def test_the_program_as_text() -> None:
    """Task u starts first in the plan; its run waits for the queue as task t leaves it, as in one process."""
    written = text.dumps(program())
    assert written.endswith(TABLES + RANK_0 + RANK_1)
    assert "  trained scale\n  statistics n\n  states queue\n" in written
    assert text.loads(written) == program()
    assert list(broken_laws(program())) == []


def test_a_task_that_rests() -> None:
    """Who holds what stays; the queue still comes to all that hold it, and nobody writes for a task that rests."""
    alone = restricted(program(), ["t"])
    assert (alone.tallies, alone.states, alone.writes) == (program().tallies, program().states, ())
    assert [str(i) for i in alone.instructions[1]] == ["AGREE", "HAND h0>", "TALLY n0", "STEP"]
    assert [(hand.source, hand.targets) for hand in alone.handovers] == [(0, (1,))]
    assert list(broken_laws(alone)) == []


def test_a_round_that_only_adds() -> None:
    """States go on and writes are made in every round; statistics are folded in once a step."""
    adding = accumulating(program().instructions[1])
    assert [i.op for i in adding if i.op in (Op.HAND, Op.WRITE, Op.TALLY)] == [Op.WRITE, Op.HAND, Op.HAND]


def test_rounds_in_which_tasks_take_turns_are_refused() -> None:
    """With one buffer; norm layers alone are no obstacle."""
    with pytest.raises(PlanError, match="tasks 't' and 'u' both read or change buffer 'queue'"):
        program(rounds=2)
    assert list(broken_laws(program(rounds=2, states=()))) == []


FAULTS = {
    "a tally left out": (RANK_0, RANK_0.replace("  TALLY n0\n", ""), "rank 0 does TALLY n0 0 times, not 1"),
    "a tally too early": (
        RANK_1,
        RANK_1.replace("  TALLY n0\n", "").replace("  BACKWARD s1\n", "  TALLY n0\n  BACKWARD s1\n"),
        "rank 1 tallies n0 before BACKWARD s1, which adds to it",
    ),
    "a layer in no tally": (
        "tally n0 ranks 0 1\n  n\n",
        "tally n0 ranks 0 1\n  m\n",
        "runs of several ranks or tasks change the statistics of 'n', which stands in no tally",
    ),
    "a tally of too few": ("tally n0 ranks 0 1", "tally n0 ranks 0", "but ranks [0, 1] hold 'n'"),
    "a state in no table": (
        "state h0 ranks 0 1\n  queue\n",
        "state h0 ranks 0 1\n  other\n",
        "ranks [0, 1] hold buffer 'queue', which runs change and no state holds",
    ),
    "a handover left out": (
        "handover h0>s1 of h0 from 0 to 1 before s1\n",
        "",
        "rank 1, HAND h0>s1: the program has no 'h0>s1'",
    ),
    "a handover too late": (
        RANK_1,
        RANK_1.replace("  HAND h0>s1\n  FORWARD s1\n", "  FORWARD s1\n  HAND h0>s1\n"),
        "rank 1 does FORWARD s1 before it has h0>s1",
    ),
    "a handover too early": (
        RANK_0,
        RANK_0.replace("  FORWARD s0\n  HAND h0>s1\n", "  HAND h0>s1\n  FORWARD s0\n"),
        "rank 0 hands h0>s1 on before FORWARD s0",
    ),
    "a handover from the wrong rank": (
        "handover h0> of h0 from 1 to 0",
        "handover h0> of h0 from 0 to 1",
        "handover h0> comes from rank 0, but s1 leaves it on 1",
    ),
    "a rank that never gets it": (
        "state h0 ranks 0 1\n",
        "state h0 ranks 0 1 2\n",
        "state 'h0' names ranks [0, 1, 2]; name at least one of 0 .. 1, each once",
    ),
    "a handover before no run": (
        "before s1",
        "before s9",
        "handover 'h0>s1' is of 'h0' before 's9', which the program does not have",
    ),
    "a write left out": (RANK_1, RANK_1.replace("  WRITE w0\n", ""), "rank 1 does WRITE w0 0 times, not 1"),
    "a write too late": (
        RANK_1,
        RANK_1.replace("  WRITE w0\n", "").replace("  BACKWARD s1\n", "  BACKWARD s1\n  WRITE w0\n"),
        "rank 1 does WRITE w0 after FORWARD s1",
    ),
    "a fetch for nobody": (
        "scale 0 -> 1",
        "scale 1 -> 0",
        "write w0 fetches 'scale' for ranks (0,), not its writers",
    ),
    "a write of a task that rests": ("write w0 task u", "write w0 task v", "which takes no part"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault(fault: tuple[str, str, str]) -> None:
    old, new, message = fault
    found = list(broken_laws(edited(old, new)))
    assert any(message in finding for finding in found), found


def test_an_order_that_is_not_that_of_one_process() -> None:
    """Runs of the later task first: what they leave is not what one process leaves."""
    found = program()
    other = replace(found, slices=found.slices[::-1])
    assert any("not in the order of one process" in finding for finding in broken_laws(other))
