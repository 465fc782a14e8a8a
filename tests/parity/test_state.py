"""State beside gradients follows one process: running statistics, buffers that layers and tasks change."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spindle
from tests.parity.stateful import WIDTH, Make, batches, follows, one_process, planned, sgd, stack, tasks_on, values
from tests.parity.stateful_layers import LAYERS, REFUSED, Checkpointed, Normed, Spectral
from tests.random_plans import random_plan

few = settings(max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate])
quiet = pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
anywhere = given(num_ranks=st.integers(2, 4), seed=st.integers(0, 10**6), glue=st.booleans())
MOST = ("batch norm", "batch norm, cumulative", "spectral norm", "center in place", "center assigned")


def blocks(
    layer: Callable[[], nn.Module], tasks: int = 1, *, glue: bool = False, every: int = 1, **options: object
) -> Make:
    """Two layers of a kind under some tasks, each a block of its own or both glue; `options` go to the workload."""

    def make() -> spindle.Workload:
        workload = spindle.Workload("state", **options)  # type: ignore[arg-type]
        trunk = workload.component("trunk", stack(layer), layers=[] if glue else ["0", "1"])
        return tasks_on(workload, trunk, tasks, every=every)

    return make


@quiet
@pytest.mark.parametrize("layer", LAYERS)
@few
@anywhere
def test_layers_of_several_tasks(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """Tasks change what they share in the order of the list, on whatever devices they run; one rests now and then."""
    follows(blocks(LAYERS[layer], tasks=2, glue=glue, every=2), num_ranks, seed)


@quiet
@pytest.mark.parametrize("layer", MOST)
@few
@anywhere
def test_layers_computed_again(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """Recomputation finds what it changes as it was, and leaves it as it stood."""
    follows(blocks(LAYERS[layer], tasks=2, glue=glue, recompute=("trunk",)), num_ranks, seed)


@quiet
@pytest.mark.parametrize("layer", MOST)
@few
@anywhere
def test_layers_under_concurrent_micro_batches(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """All batches of a task come before those of the next one."""
    follows(blocks(LAYERS[layer], tasks=2, glue=glue, accumulate=2, in_flight=2), num_ranks, seed)


@quiet
@pytest.mark.parametrize("momentum", [0.1, None])
@few
@given(num_ranks=st.integers(1, 4), seed=st.integers(0, 10**6), in_flight=st.sampled_from((1, 2)))
def test_statistics_in_rounds(momentum: float | None, num_ranks: int, seed: int, in_flight: int) -> None:
    """Statistics keep the order of one process though rounds let tasks take turns."""
    make = blocks(functools.partial(Normed, momentum), tasks=2, accumulate=4, in_flight=in_flight)
    follows(make, num_ranks, seed)


@quiet
@few
@anywhere
def test_states_of_one_task_in_rounds(num_ranks: int, seed: int, glue: bool) -> None:
    """A state goes from the last run of a round to the first of the next."""
    follows(blocks(LAYERS["center in place"], glue=glue, accumulate=4, in_flight=2), num_ranks, seed)


def test_one_rank_is_bitwise_one_process() -> None:
    """Statistics and states of one task on one rank are left as they are: no rounding of ours."""
    make = blocks(LAYERS["batch norm"])
    workload = make()
    found = planned(workload, random_plan(spindle.make_metagraph(workload), 1, 0), 3)
    wanted = one_process(make(), 3)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if "running" in name)


# -- tasks ------------------------------------------------------------------------------------------------------------


class Center(nn.Module):
    """A buffer."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))


def tower() -> nn.Sequential:
    return stack(lambda: nn.Linear(WIDTH, WIDTH))


def moved_by_tasks(way: str) -> spindle.Workload:
    """DINO's center, which two tasks move in their own code."""
    workload = spindle.Workload("dino")
    trunk, state = workload.component("trunk", tower()), workload.component("state", Center().double())
    for index in range(2):

        @workload.task(f"t{index}", batch_size=6, data=batches(index))
        def task(batch: dict[str, Tensor]) -> Tensor:
            h = trunk(batch["x"])
            loss: Tensor = (h - state.center.clone()).square().mean()
            with torch.no_grad():
                if way == "assigned":
                    state.center = state.center * 0.9 + h.mean(0) * 0.1
                else:
                    state.center.mul_(0.9).add_(h.mean(0), alpha=0.1)
            return loss

    return workload


def read_by_another(first: str) -> spindle.Workload:
    """One task reads what another one changes: a buffer in glue, and running statistics of a layer."""
    workload = spindle.Workload("readers")
    trunk, state = workload.component("trunk", tower()), workload.component("state", Center().double())
    normed = workload.component("normed", stack(Normed), layers=["0", "1"])

    def reads(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = trunk(batch["x"]) - state.center + normed[0].norm.running_mean  # type: ignore[union-attr]
        return found.square().mean()

    def writes(batch: dict[str, Tensor]) -> Tensor:
        h: Tensor = normed(trunk(batch["x"]))
        with torch.no_grad():
            state.center.lerp_(h.mean(0), 0.5)
        return h.square().mean()

    functions = {"reads": reads, "writes": writes}
    for name in sorted(functions, key=lambda name: name != first):
        workload.task(name, batch_size=6, data=batches(2))(functions[name])
    return workload


def teacher_with_statistics(*, evaluates: bool) -> spindle.Workload:
    """A momentum teacher whose buffers are copied from the student's."""
    workload = spindle.Workload("teacher")
    student = workload.component("student", stack(Normed), layers=["0", "1"])
    teacher = workload.component("teacher", copy.deepcopy(student).requires_grad_(False), layers=["0", "1"])
    teacher.train(not evaluates)

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
                p.lerp_(q, 0.1)
            for b, c in zip(teacher.buffers(), student.buffers(), strict=True):
                b.copy_(c)
            target = teacher(batch["x"])
        found: Tensor = (student(batch["x"]) - target).square().mean()
        return found

    return workload


def results_unused() -> spindle.Workload:
    """Layers that run for their statistics alone."""
    workload = spindle.Workload("unused")
    normed = workload.component("normed", stack(Normed), layers=["0", "1"])
    head = workload.component("head", nn.Linear(WIDTH, 1).double())

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            normed(2 * batch["x"])
        found: Tensor = head(batch["x"]).mean()
        return found

    return workload


def called_twice() -> spindle.Workload:
    """Layers that each of two tasks calls twice."""
    workload = spindle.Workload("twice")
    normed = workload.component("normed", stack(Normed), layers=["0", "1"])
    for index in range(2):

        @workload.task(f"t{index}", batch_size=6, data=batches(index))
        def task(batch: dict[str, Tensor]) -> Tensor:
            found: Tensor = (normed(batch["x"]) - normed(2 * batch["x"])).square().mean()
            return found

    return workload


TASKS: dict[str, Make] = {
    "moved in place": functools.partial(moved_by_tasks, "in place"),
    "moved by assignment": functools.partial(moved_by_tasks, "assigned"),
    "read first": functools.partial(read_by_another, "reads"),
    "written first": functools.partial(read_by_another, "writes"),
    "a teacher's buffers": functools.partial(teacher_with_statistics, evaluates=False),
    "a teacher's buffers, evaluating": functools.partial(teacher_with_statistics, evaluates=True),
    "results unused": results_unused,
    "called twice": called_twice,
}


@quiet
@pytest.mark.parametrize("tasks", TASKS)
@few
@given(num_ranks=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_tasks_that_change_buffers(tasks: str, num_ranks: int, seed: int) -> None:
    """In their own code, for each other, or through layers whose results nobody reads."""
    follows(TASKS[tasks], num_ranks, seed)


# -- what is refused --------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("glue", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_state_that_no_plan_can_follow_is_refused(case: str, glue: bool) -> None:
    """Before anything runs, by name and line; the user's modules are as they were."""
    layer, words = REFUSED[case]
    workload = blocks(layer, glue=glue)()
    before = values(workload)
    with pytest.raises(spindle.SpindleError, match=words):
        spindle.make_metagraph(workload)
    assert all(torch.equal(value, before[name]) for name, value in values(workload).items())


def test_a_tensor_of_the_program_is_refused() -> None:
    """One that is no buffer of any module, which each rank would change by itself."""
    center = torch.zeros(WIDTH, dtype=torch.float64)
    workload = spindle.Workload("global")
    trunk = workload.component("trunk", tower())

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        h = trunk(batch["x"])
        loss: Tensor = (h - center.clone()).square().mean()
        with torch.no_grad():
            center.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return loss

    with pytest.raises(spindle.SpindleError, match=r"line \d+ of test_state.py: tensor 'center' is changed in place"):
        spindle.make_metagraph(workload)


@quiet
def test_states_of_several_tasks_in_rounds_are_refused() -> None:
    """Rounds let tasks take turns, which no order of one process is."""
    workload = blocks(LAYERS["center in place"], tasks=2, accumulate=2)()
    line = r"\(changed in line \d+ of stateful_layers.py\)"
    words = rf"tasks 't0' and 't1' both read or change buffer 'trunk.0.center' {line}.*set accumulate=1"
    with pytest.raises(spindle.SpindleError, match=words):
        spindle.train(workload, optimizer=sgd, steps=1, launcher="threads")


@quiet
@pytest.mark.parametrize("glue", [False, True])
def test_states_under_checkpoints(glue: bool) -> None:
    """Of one task they follow; of two, one process goes forward and backward by turns."""
    layer = functools.partial(Checkpointed, Spectral)
    follows(blocks(layer, glue=glue), 2, 3)
    words = r"changes buffer 'trunk.0.inner.new.* under a checkpoint of its own.*name the component in the workload's"
    with pytest.raises(spindle.SpindleError, match=words):
        spindle.make_metagraph(blocks(layer, tasks=2, glue=glue)())
