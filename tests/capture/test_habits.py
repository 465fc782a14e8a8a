"""Habits: the shapes of a block's results are told without running it once enough runs agree, and never guessed."""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from spindle.capture import capture
from spindle.capture.codes import OnDevice
from spindle.record.shapes import AGREED, CHECKED, Drawn, Habit, Made, Results, Shape
from spindle.record.substitutes.draws import Stream
from spindle.runtime.loading.recordings import Recipe, Recordings
from spindle.runtime.programs.messages import StepLayout
from tests.capture.test_sizes import text, texts

Block = Callable[[int, int], Shape]
"""Samples and length of the argument in; the shape of the result out."""

REGULAR: list[Block] = [
    lambda b, t: (b, t, 8),
    lambda b, t: (b, 2 * t),
    lambda b, t: (t, b),
    lambda b, t: (1, b, 3),
    lambda b, t: (),
]
IRREGULAR: list[Block] = [
    lambda b, t: (b, -(-t // 8) * 8),  # padded to windows
    lambda b, t: (b, (t - 1) // 2 + 1),  # a convolution of stride two
    lambda b, t: (b, t + 1),  # a token in front
    lambda b, t: (b * t, 8),  # samples and positions in one
]


def results(shape: Shape, other: object = None) -> Results:
    """One tensor, and a value beside it."""
    return Results((Made(shape, torch.float32, True), other), Drawn())


def shape_of(found: Results | None) -> Shape | None:
    """The shape of the tensor."""
    return None if found is None else found.structure[0].shape


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 99)), min_size=1, max_size=60)


@given(block=st.sampled_from([*REGULAR, *IRREGULAR]), seen=sizes)
def test_what_is_told_is_what_a_run_gives(block: Block, seen: list[tuple[int, int]]) -> None:
    """Of blocks that follow a rule. Others are told until a run contradicts, and found out when they are computed."""
    habit = Habit()
    for b, t in seen:
        told = habit.tell([(b, t)])
        if told is None:
            habit.learn(results(block(b, t)), [(b, t)])
        elif block in REGULAR:
            assert shape_of(told) == block(b, t)


def test_it_takes_some_runs_of_different_sizes() -> None:
    """Equal ones leave open what a size follows."""
    habit = Habit()
    for _ in range(AGREED):
        assert habit.tell([(4, 7)]) is None
        habit.learn(results((4, 7)), [(4, 7)])
    assert shape_of(habit.tell([(4, 7)])) == (4, 7)
    assert habit.tell([(4, 9)]) is None  # the 7 may be a constant
    habit.learn(results((4, 9)), [(4, 9)])
    assert shape_of(habit.tell([(4, 11)])) == (4, 11)
    assert habit.tell([(5, 11)]) is None


def test_now_and_then_it_is_run_all_the_same() -> None:
    """A rule that has come to an end is found out."""
    habit = Habit()
    for index in range(AGREED):
        habit.learn(results((index + 1, 8)), [(index + 1, 3)])
    told = [habit.tell([(index + 1, 3)]) for index in range(4 * CHECKED)]
    assert [index for index, found in enumerate(told) if found is None] == [
        CHECKED * (1 + index) - 1 for index in range(4)
    ]


def test_blocks_that_follow_no_rule_are_always_run() -> None:
    """Sizes that no multiple explains, values beside the tensors that change, and another number of dimensions."""
    for block in IRREGULAR:
        habit = Habit()
        for index in range(2 * AGREED):
            habit.learn(results(block(2 + index % 3, 5 + 3 * index)), [(2 + index % 3, 5 + 3 * index)])
        assert habit.tell([(3, 50)]) is None
    habit = Habit()
    for index in range(2 * AGREED):
        habit.learn(results((2, 5 + index), other=5 + index), [(2, 5 + index)])
    assert habit.tell([(2, 50)]) is None
    habit = Habit()
    for index in range(2 * AGREED):
        habit.learn(results((2,) * (1 + index % 2)), [(2, 5 + index)])
    assert habit.tell([(2, 50)]) is None


def test_recordings_are_those_of_a_model_that_has_seen_nothing() -> None:
    """Fifty batches of different sizes, whole and in part, by one recorder and each by a fresh one."""
    workload = texts([text(5)])
    recipe = Recipe.of(workload, capture(workload))
    device, task = OnDevice(torch.device("cpu")), workload.tasks["read"]
    known = Recordings(recipe.apart(), device)
    for length in range(3, 53):
        batch = task.sampled(text(length, samples=2 + length % 4))
        whole = (0, batch.units.num_samples)
        own, fresh = (
            recordings.loaded("read", batch, StepLayout(batch.units, {}, {}), Stream(task="read")).part(whole)
            for recordings in (known, Recordings(recipe.apart(), device))
        )
        assert own.shapes == fresh.shapes
    habits = known.recipe.skeleton.habits.values()
    assert any(habit.tell([(2, 77, 8)]) is not None for habit in habits)
