"""State beside gradients follows one process: running statistics, buffers that layers and tasks change."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.runtime.comms.host import threads_of_rank
from tests.drawn import SEEDS, drawn
from tests.random_plans import random_plan
from tests.state.stateful import WIDTH, Make, batches, follows, one_process, planned, sgd, stack, tasks_on, values
from tests.state.stateful_layers import LAYERS, REFUSED, Checkpointed, Normed, Spectral
from tests.threads import computing_with

quiet = pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
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
@drawn(1, num_ranks=range(2, 5), seed=SEEDS, glue=(False, True))
def test_layers_of_several_tasks(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """Tasks change what they share in the order of the list, on whatever devices they run; one rests now and then."""
    follows(blocks(LAYERS[layer], tasks=2, glue=glue, every=2), num_ranks, seed)


@quiet
@pytest.mark.parametrize("layer", MOST)
@drawn(1, num_ranks=range(2, 5), seed=SEEDS, glue=(False, True))
def test_layers_computed_again(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """Recomputation finds what it changes as it was, and leaves it as it stood."""
    follows(blocks(LAYERS[layer], tasks=2, glue=glue, recompute=("trunk",)), num_ranks, seed)


@quiet
@pytest.mark.parametrize("layer", MOST)
@drawn(1, num_ranks=range(2, 5), seed=SEEDS, glue=(False, True))
def test_layers_under_concurrent_micro_batches(layer: str, num_ranks: int, seed: int, glue: bool) -> None:
    """All batches of a task come before those of the next one."""
    follows(blocks(LAYERS[layer], tasks=2, glue=glue, accumulate=2, in_flight=2), num_ranks, seed)


@quiet
@pytest.mark.parametrize("momentum", [0.1, None])
@drawn(1, num_ranks=range(1, 5), seed=SEEDS, in_flight=(1, 2))
def test_statistics_in_rounds(momentum: float | None, num_ranks: int, seed: int, in_flight: int) -> None:
    """Statistics keep the order of one process though rounds let tasks take turns."""
    make = blocks(functools.partial(Normed, momentum), tasks=2, accumulate=4, in_flight=in_flight)
    follows(make, num_ranks, seed)


@quiet
@drawn(1, num_ranks=range(2, 5), seed=SEEDS, glue=(False, True))
def test_states_of_one_task_in_rounds(num_ranks: int, seed: int, glue: bool) -> None:
    """A state goes from the last run of a round to the first of the next."""
    follows(blocks(LAYERS["center in place"], glue=glue, accumulate=4, in_flight=2), num_ranks, seed)


def test_one_rank_is_bitwise_one_process() -> None:
    """Statistics and states of one task on one rank are left as they are: no rounding of ours. Kernels add up what each
    thread has summed, so both compute with as many threads as a rank does.
    """
    make = blocks(LAYERS["batch norm"])
    workload = make()
    found = planned(workload, random_plan(spindle.make_metagraph(workload), 1, 0), 3)
    with computing_with(threads_of_rank(1)):
        wanted = one_process(make(), 3)
    running = [name for name in wanted if "running" in name]
    assert running
    assert all(torch.equal(found[name], wanted[name]) for name in running)


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
@drawn(1, num_ranks=range(1, 5), seed=SEEDS)
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
@drawn(1, num_ranks=range(1, 5), seed=SEEDS, rounds=((2, 1), (3, 1), (4, 2)), tasks=(2, 3))
def test_states_of_several_tasks_in_rounds(num_ranks: int, seed: int, rounds: tuple[int, int], tasks: int) -> None:
    """All batches of one task come before those of the next one; tasks without the state keep their rounds."""

    def make() -> spindle.Workload:
        accumulate, in_flight = rounds
        layer = LAYERS["center in place"]
        workload = blocks(layer, tasks=tasks, every=2, accumulate=accumulate, in_flight=in_flight)()
        alone = workload.component("alone", stack(lambda: nn.Linear(WIDTH, WIDTH)))

        @workload.task("apart", batch_size=6, data=batches(7))
        def apart(batch: dict[str, Tensor]) -> Tensor:
            found: Tensor = alone(batch["x"]).square().mean()
            return found

        return workload

    follows(make, num_ranks, seed, steps=4)


@quiet
@pytest.mark.parametrize("glue", [False, True])
def test_states_under_checkpoints(glue: bool) -> None:
    """Of one task they follow; of two, one process goes forward and backward by turns."""
    layer = functools.partial(Checkpointed, Spectral)
    follows(blocks(layer, glue=glue), 2, 3)
    words = r"changes buffer 'trunk.0.inner.new.* under a checkpoint of its own.*name the component in the workload's"
    with pytest.raises(spindle.SpindleError, match=words):
        spindle.make_metagraph(blocks(layer, tasks=2, glue=glue)())


class Counting(nn.Module):
    """A head that counts its calls in an attribute; `way`: in what."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(WIDTH, WIDTH), way
        self.calls: Any = {"number": 0, "list": [], "dict": {"calls": 0}, "tensor": torch.zeros(())}[way]

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "list":
            self.calls.append(1)
        elif self.way == "dict":
            self.calls["calls"] += 1
        else:
            self.calls = self.calls + 1
        count = {"list": len, "dict": dict.__len__}.get(self.way, float)(self.calls)
        y: Tensor = self.linear(x) / (self.calls["calls"] if self.way == "dict" else count)
        return y


@quiet
@pytest.mark.parametrize("way", ["number", "list", "dict", "tensor"])
@pytest.mark.parametrize("layers", [[], ["0"], None])
def test_counts_in_attributes_are_refused_alike(way: str, layers: list[str] | None) -> None:
    """In layers, in code between them and in a module without any: with the line, and the same advice."""
    workload = spindle.Workload("counts")
    made = nn.Sequential(Counting(way)).double() if layers is not None else Counting(way).double()
    head = workload.component("head", made, layers=layers)

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = head(batch["x"]).square().mean()
        return found

    words = (
        r"keeps a state of its own in attribute 'calls' \(line \d+ of test_state.py\).*make it a buffer that __init__"
    )
    with pytest.raises(spindle.SpindleError, match=words):
        spindle.make_metagraph(workload)


@quiet
@pytest.mark.parametrize("first", [True, False])
def test_code_between_layers_that_branches_on_a_flag_is_refused_with_the_line(first: bool) -> None:
    """By the line that did not run, or did not when it was captured; a layer does so as one operator."""

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, flag: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            if flag:
                y = y.tanh()
            return y

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Flagged(), Flagged()])

        def forward(self, x: Tensor, flag: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, flag)
            return x

    def make(layers: Any) -> spindle.Workload:
        workload = spindle.Workload("flags")
        torch.manual_seed(0)
        body = workload.component("body", Body().double(), layers=layers)
        head = workload.component("head", nn.Linear(WIDTH, 3).double())
        data = [{"x": b["x"], "flag": torch.tensor(first == (i < 3))} for i, b in enumerate(batches(1))]

        @workload.task("t", batch_size=6, data=data)
        def task(batch: dict[str, Tensor]) -> Tensor:
            found: Tensor = head(body(batch["x"], batch["flag"])).square().mean()
            return found

        return workload

    with pytest.raises(spindle.SpindleError, match=r"step 4: .*line \d+ of test_state.py.*torch.where.*layers="):
        spindle.train(make([]), optimizer=sgd, steps=4, launcher="threads")
    follows(lambda: make("layers"), 2, 1, steps=4)


@quiet
def test_a_module_under_several_names_whose_buffers_change_is_refused() -> None:
    """Where code between layers writes to them; capture went on for ever."""
    workload = spindle.Workload("names")
    torch.manual_seed(0)
    student = workload.component("student", nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).double())
    held = nn.Module()
    held.one = held.two = held.three = copy.deepcopy(student).requires_grad_(False)
    teacher = workload.component("teacher", held)

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            target = teacher.one(batch["x"])  # type: ignore[operator]
        found: Tensor = (student(batch["x"]) - target).square().mean()
        return found

    with pytest.raises(spindle.SpindleError, match="is registered under several names in its component; register it"):
        spindle.make_metagraph(workload)


class Centered(nn.Module):
    """Norms a map of what it is given, less its mean: so a running mean moves by rounding alone, or by nothing."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.times, self.map, self.norm = times, nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.times * self.map(x - x.mean(0))) + x
        return found


@quiet
@pytest.mark.parametrize("times", [0.0, 1.0])
def test_running_means_that_hardly_move(times: float) -> None:
    """A norm's statistics change together: none is taken for a constant, which each rank would round by itself."""
    make = blocks(functools.partial(Centered, times), tasks=2)
    follows(make, 2, 11)
    assert capture(make()).graph.by_name["t0.trunk.0"].statistics == ("trunk.0.norm",)


class WithNorm(nn.Module):
    """A layer and a norm, which may be another module's, kept in a list."""

    def __init__(self, norm: nn.Module, own: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).double()
        self.norm = norm if own else [norm]

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm[0] if isinstance(self.norm, list) else self.norm
        found: Tensor = norm(self.linear(x)).tanh()
        return found


@quiet
@pytest.mark.parametrize("own", [True, False])
def test_a_norm_that_stands_in_two_components_is_refused_or_held_by_one(own: bool) -> None:
    """Its buffers have one name; the remedy of the error is exact."""
    torch.manual_seed(0)
    workload = spindle.Workload("shared")
    norm = nn.BatchNorm1d(WIDTH).double()
    nets = [workload.component(f"net{number}", WithNorm(norm, own or number == 0)) for number in range(2)]

    def fit(number: int) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda batch: (nets[number](batch["x"]) - number).square().mean()

    for number in range(2):
        workload.task(f"t{number}", batch_size=6, data=batches(number))(fit(number))
    if own:
        with pytest.raises(
            spindle.SpindleError, match=r"buffer 'net1\.norm\.\w+' changes, and its module stands in several"
        ):
            spindle.make_metagraph(workload)
    else:
        report = spindle.verify(workload, num_workers=2, steps=3, launcher="threads")
        assert report.ok, report
