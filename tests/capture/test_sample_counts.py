"""Code that takes some numbers of samples only: looked at with such numbers, or refused with one that it lacks."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

import spindle
from tests.drawn import SEEDS, drawn
from tests.state.stateful import WIDTH, Make, batches, follows, stack, tasks_on
from tests.state.stateful_layers import Normed, Queued

quiet = pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
Code = Callable[[nn.Module, Tensor], Tensor]


def _in_threes(tower: nn.Module, x: Tensor) -> Tensor:
    assert len(x) % 3 == 0, "groups of three"
    found: Tensor = tower(x).view(-1, 3, WIDTH).mean(1).square()
    return found


def _viewed(tower: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = tower(x).view(-1, 3, WIDTH).mean(1).square()
    return found


def _divides(tower: nn.Module, x: Tensor) -> Tensor:
    assert 24 % len(x) == 0
    found: Tensor = (tower(x) - 1).square()
    return found


def _raises(tower: nn.Module, x: Tensor) -> Tensor:
    if len(x) % 2:
        raise ValueError("give an even number of samples")
    found: Tensor = (tower(x) - 1).square()
    return found


def _twelve(tower: nn.Module, x: Tensor) -> Tensor:
    assert len(x) == 12, "twelve"
    found: Tensor = (tower(x) - 1).square()
    return found


def _broken(tower: nn.Module, x: Tensor) -> Tensor:
    raise ValueError("of no number of samples")


def of(code: Code, size: int = 12) -> Make:
    def make() -> spindle.Workload:
        workload = spindle.Workload("sizes")
        tower = workload.component("tower", stack(lambda: nn.Linear(WIDTH, WIDTH)))

        @workload.task("t", batch_size=size, data=batches(1, size))
        def task(batch: dict[str, Tensor]) -> Tensor:
            return code(tower, batch["x"]).mean()

        return workload

    return make


@quiet
@pytest.mark.parametrize("code", [_in_threes, _viewed, _divides, _raises])
@drawn(1, seed=SEEDS)
def test_other_numbers_of_samples_are_tried(code: Code, seed: int) -> None:
    """Those that divide the batch."""
    follows(of(code), 2, seed)


class Keys(Queued):
    """A queue whose length the batch must divide, as MoCo asserts."""

    def __init__(self) -> None:
        super().__init__("number")

    def forward(self, x: Tensor) -> Tensor:
        assert 12 % len(x) == 0
        return super().forward(x)


@quiet
@drawn(1, num_ranks=range(2, 4), seed=SEEDS, glue=(False, True))
def test_a_queue_that_the_batch_must_divide(num_ranks: int, seed: int, glue: bool) -> None:
    def make() -> spindle.Workload:
        workload = spindle.Workload("queue")
        trunk = workload.component("trunk", stack(Keys), layers=[] if glue else ["0", "1"])
        return tasks_on(workload, trunk, 1)

    follows(make, num_ranks, seed)


@quiet
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("glue", [False, True])
def test_batch_norm_of_small_batches(size: int, glue: bool) -> None:
    """Of a single sample too, which a part may have and torch's batch norm refuses."""

    def make() -> spindle.Workload:
        workload = spindle.Workload("small")
        trunk = workload.component("trunk", stack(lambda: Normed(None)), layers=[] if glue else ["0", "1"])

        @workload.task("t", batch_size=size, data=batches(1, size))
        def task(batch: dict[str, Tensor]) -> Tensor:
            found: Tensor = (trunk(batch["x"]) - batch["x"]).square().mean()
            return found

        return workload

    follows(make, 2, 0)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            _twelve,
            r"AssertionError .*: twelve.* It was tried with 5 of the batch's 12 samples, which all together it",
        ),
        (_broken, r"ValueError .*: of no number of samples\. Mend that line$"),
    ],
)
def test_code_that_takes_no_part_of_a_batch_is_refused(code: Code, words: str) -> None:
    with pytest.raises(spindle.SpindleError, match=words):
        spindle.make_metagraph(of(code)())
