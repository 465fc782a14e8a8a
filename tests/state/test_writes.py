"""Parameters that a task writes to outside of the optimizer: as one process leaves them, or refused by line."""

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import spindle
from tests.drawn import SEEDS, drawn
from tests.state.stateful import WIDTH, Make, batches, follows, one_process, sgd, stack

quiet = pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")


class Layer(nn.Module):
    """A layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.linear(self.norm(x)).tanh()
        return y


LINE = r"line \d+ of test_writes\.py"
Pairs = list[tuple[nn.Parameter, nn.Parameter]]


def _mul_add(pairs: Pairs) -> None:
    for p, q in pairs:
        p.mul_(0.9).add_(q, alpha=0.1)


def _operators(pairs: Pairs) -> None:
    for p, q in pairs:
        p *= 0.9  # type: ignore[misc]
        p += 0.1 * q  # type: ignore[misc]


def _lerp(pairs: Pairs) -> None:
    for p, q in pairs:
        p.lerp_(q, 0.1)


def _copy(pairs: Pairs) -> None:
    for p, q in pairs:
        p.copy_(0.9 * p + 0.1 * q)


def _data(pairs: Pairs) -> None:
    for p, q in pairs:
        p.data = p.data * 0.9 + q.data * 0.1


def _data_in_place(pairs: Pairs) -> None:
    for p, q in pairs:
        p.data.mul_(0.9).add_(q.detach().data, alpha=0.1)


def _data_augmented(pairs: Pairs) -> None:
    for p, q in pairs:
        p.data *= 0.9
        p.data += 0.1 * q.data


def _detached(pairs: Pairs) -> None:
    for p, q in pairs:
        p.detach().mul_(0.9).add_(q.detach(), alpha=0.1)


def _foreach(pairs: Pairs) -> None:
    ps: list[Tensor] = [p for p, _ in pairs]
    qs: list[Tensor] = [q for _, q in pairs]
    torch._foreach_mul_(ps, 0.9)
    torch._foreach_add_(ps, qs, alpha=0.1)


def _foreach_data(pairs: Pairs) -> None:
    torch._foreach_lerp_([p.data for p, _ in pairs], [q.data for _, q in pairs], 0.1)


def _part(pairs: Pairs) -> None:
    for p, q in pairs:
        p[:2].mul_(0.5)
        p[2:] = q[2:]


FORMS: dict[str, Callable[[Pairs], None]] = {
    name.strip("_"): form
    for name, form in list(globals().items())
    if name.startswith("_") and callable(form) and getattr(form, "__module__", "") == __name__
}


def teacher(form: str, *, after: bool = False, glue: bool = False, every: int = 1, **options: object) -> Make:
    """A student, and a teacher that moves after it before or after the forward, or with a task that rests."""

    def make() -> spindle.Workload:
        workload = spindle.Workload("teacher", **options)  # type: ignore[arg-type]
        layers = [] if glue else ["0", "1"]
        student = workload.component("student", stack(Layer), layers=layers)
        follower = workload.component("teacher", copy.deepcopy(student).requires_grad_(False), layers=layers)
        pairs = list(zip(follower.parameters(), student.parameters(), strict=True))

        @torch.no_grad()
        def move() -> None:
            FORMS[form](pairs)

        @workload.task("follow", batch_size=6, data=batches(1), every=every)
        def follow(batch: dict[str, Tensor]) -> Tensor:
            if not after:
                move()
            with torch.no_grad():
                target = follower(batch["x"])
            loss: Tensor = (1.1 * student(batch["x"]) - target).square().mean()
            if after:
                move()
            return loss

        @workload.task("other", batch_size=6, data=batches(2))
        def other(batch: dict[str, Tensor]) -> Tensor:
            found: Tensor = student(batch["x"]).square().mean()
            return found

        return workload

    return make


@quiet
@pytest.mark.parametrize("form", FORMS)
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, glue=(False, True))
def test_a_teacher_that_follows(form: str, num_ranks: int, seed: int, glue: bool) -> None:
    """However it is written, and wherever student and teacher run."""
    follows(teacher(form, glue=glue), num_ranks, seed)


@quiet
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, glue=(False, True))
def test_a_teacher_that_follows_after_the_forward(num_ranks: int, seed: int, glue: bool) -> None:
    """The forward of a step sees the teacher as the step before has left it."""
    follows(teacher("lerp", glue=glue, after=True), num_ranks, seed)


@quiet
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, glue=(False, True))
def test_a_teacher_that_rests(num_ranks: int, seed: int, glue: bool) -> None:
    """A task writes in the steps in which it takes part."""
    follows(teacher("mul_add", glue=glue, every=2), num_ranks, seed, steps=4)


@quiet
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, after=(False, True))
def test_each_batch_of_a_step_writes(num_ranks: int, seed: int, after: bool) -> None:
    """With gradients accumulated a teacher moves once for each batch."""
    follows(teacher("lerp", after=after, accumulate=3), num_ranks, seed)


class Writing(Layer):
    """A layer that writes to its own weights before it uses them; `way`: how. "branches" cannot be recorded."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "clamp":
            with torch.no_grad():
                self.linear.weight.clamp_(-0.2, 0.2)
        elif self.way == "data":
            self.linear.weight.data = nn.functional.normalize(self.linear.weight.data, dim=1)
        else:
            with torch.no_grad():
                self.linear.weight.div_(self.linear.weight.norm(dim=1, keepdim=True))
        y = super().forward(x)
        return -y if self.way == "branches" and float(y.sum()) > 1e9 else y


def of_layers(way: str) -> spindle.Workload:
    workload = spindle.Workload("layers")
    tower = workload.component("tower", Layers(way).double(), layers="layers")

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = (tower(batch["x"]) - 1).square().mean()
        return found

    return workload


class Layers(nn.Module):
    """Two of them, in a list."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Writing(way) for _ in range(2))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("way", ["clamp", "data", "divided"])
@drawn(2, num_ranks=range(2, 5), seed=SEEDS)
def test_layers_that_write_to_their_own_weights(way: str, num_ranks: int, seed: int) -> None:
    """They become code between layers, with a warning that names the line."""
    words = rf"writes to its parameter 'linear.weight' in its forward \({LINE}\), so component 'tower' is not cut into"
    with pytest.warns(spindle.errors.SpindleWarning, match=words):
        spindle.make_metagraph(of_layers(way))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        follows(lambda: of_layers(way), num_ranks, seed)


@quiet
def test_a_whole_component_that_writes_to_its_weights_is_refused() -> None:
    with pytest.raises(spindle.SpindleError, match=rf"writes to its parameter '.*weight' in its forward \({LINE}\)"):
        spindle.make_metagraph(of_layers("branches"))


@quiet
def test_an_embedding_with_max_norm_is_refused() -> None:
    """By its path; and where a task calls the function, by the line."""
    workload = spindle.Workload("words")
    table = nn.Embedding(4, WIDTH, max_norm=1.0).double()
    workload.component("words", nn.Sequential(table))

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = nn.functional.embedding(batch["y"], table.weight, max_norm=0.1).square().mean()
        return found

    with pytest.raises(spindle.SpindleError, match=r"component 'words': module '0' has max_norm=1.0, by which"):
        spindle.make_metagraph(workload)
    table.max_norm = None
    with pytest.raises(spindle.SpindleError, match=rf"writes by max_norm= to parameter 'words.0.weight' \({LINE}\)"):
        spindle.make_metagraph(workload)


class Clock(nn.Module):
    """A count of steps."""

    step: Tensor
    rate: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rate", torch.tensor(0.5, dtype=torch.float64))


def _advanced(clock: Clock, when: str) -> None:
    if when == "assigned":
        clock.step = clock.step + 1
    else:
        clock.step += 1


def by_clock(when: str, *, every: int = 1, others: bool = False, **options: object) -> Make:
    """A teacher whose momentum follows a count of steps that its task advances, `when` before or after it is read; the
    loss reads the count too. `others`: another task advances it too.
    """

    def make() -> spindle.Workload:
        workload = spindle.Workload("clock", **options)  # type: ignore[arg-type]
        student = workload.component("student", stack(Layer), layers=["0", "1"])
        follower = workload.component("teacher", copy.deepcopy(student).requires_grad_(False), layers=["0", "1"])
        clock = workload.component("clock", Clock())

        @workload.task("follow", batch_size=6, data=batches(1), every=every)
        def follow(batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                if when != "after":
                    _advanced(clock, when)
                momentum = 1 - clock.rate * (torch.cos(clock.step / 4) + 1) / 2
                for p, q in zip(follower.parameters(), student.parameters(), strict=True):
                    p.lerp_(q, 1 - momentum)
                if when == "after":
                    _advanced(clock, when)
            loss: Tensor = (1.1 * student(batch["x"]) - follower(batch["x"])).square().mean() / (1 + clock.step)
            return loss

        @workload.task("other", batch_size=6, data=batches(2))
        def other(batch: dict[str, Tensor]) -> Tensor:
            if others:
                _advanced(clock, "before")
            found: Tensor = student(batch["x"]).square().mean()
            return found

        return workload

    return make


@quiet
@pytest.mark.parametrize("when", ["before", "after", "assigned"])
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, every=(1, 2), accumulate=(1, 3))
def test_a_momentum_that_follows_a_count_of_steps(
    when: str, num_ranks: int, seed: int, every: int, accumulate: int
) -> None:
    """A count in a buffer, which the task advances: each rank that writes counts too, once for each batch."""
    follows(by_clock(when, every=every, accumulate=accumulate), num_ranks, seed, steps=5)


@quiet
def test_a_count_of_steps_goes_on_after_a_resume() -> None:
    """Under another plan."""
    workload = by_clock("before")()
    report = spindle.verify(workload, num_workers=2, steps=4, optimizer=sgd, resume_under=3, launcher="threads")
    assert report.ok, str(report)


@quiet
def test_a_count_that_others_change_is_refused() -> None:
    with pytest.raises(spindle.SpindleError, match=r"buffer 'clock.step', which 'other.clock.* of task 'other'"):
        spindle.make_metagraph(by_clock("before", others=True)())


@quiet
def test_a_clamp_in_an_optimizer_of_the_users_own() -> None:
    """What sentences recommend instead."""

    class Clamped(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.2, 0.2)

    for ranks in (2, 3):
        report = spindle.verify(
            two(nothing, nothing),
            num_workers=ranks,
            steps=3,
            optimizer=lambda p: Clamped([x for x in p if x.requires_grad], lr=0.5),
            launcher="threads",
        )
        assert report.ok, str(report)


class Scale(nn.Module):
    """A logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.exp()


def clamped(tasks: int = 1, **options: object) -> Make:
    """Tasks that clamp the scale they share before they use it."""

    def make() -> spindle.Workload:
        workload = spindle.Workload("clamp", **options)  # type: ignore[arg-type]
        tower = workload.component("tower", stack(Layer))
        scale = workload.component("scale", Scale())
        for index in range(tasks):

            @workload.task(f"t{index}", batch_size=6, data=batches(index))
            def task(batch: dict[str, Tensor]) -> Tensor:
                with torch.no_grad():
                    scale.log.clamp_(0, 0.25)
                found: Tensor = -10 * scale(tower(batch["x"])).tanh().mean()
                return found

        return workload

    return make


@quiet
@drawn(2, num_ranks=range(1, 5), seed=SEEDS, tasks=(1, 2), batches_and_rounds=((1, 1), (2, 1), (2, 2)))
def test_a_scale_that_is_clamped(num_ranks: int, seed: int, tasks: int, batches_and_rounds: tuple[int, int]) -> None:
    """The forward sees the clamped value; to clamp again, in another task or batch, changes nothing."""
    accumulate, in_flight = batches_and_rounds
    make = clamped(tasks, accumulate=accumulate, in_flight=in_flight)
    wanted = one_process(make(), 2)
    assert float(wanted["scale.log"]) != 0.3
    follows(make, num_ranks, seed, steps=3)


def two(
    first: Callable[..., None], second: Callable[..., None], every: tuple[int, int] = (1, 1), **options: object
) -> spindle.Workload:
    """Two tasks on one tower and a frozen copy of it; each may write first, or after. `every`: when they take part."""
    workload = spindle.Workload("two", **options)  # type: ignore[arg-type]
    tower = workload.component("tower", stack(Layer))
    frozen = workload.component("frozen", copy.deepcopy(tower).requires_grad_(False))
    for name, write, rests in (("first", first, every[0]), ("second", second, every[1])):

        @workload.task(name, batch_size=6, data=batches(1), every=rests)
        def task(batch: dict[str, Tensor], write: Callable[..., None] = write) -> Tensor:
            with torch.no_grad():
                write(tower, frozen, batch["x"], 0)
            found: Tensor = (tower(batch["x"]) - frozen(batch["x"])).square().mean()
            with torch.no_grad():
                write(tower, frozen, batch["x"], 1)
            return found

    return workload


def nothing(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    del tower, frozen, x, when


def first_of(module: nn.Module) -> nn.Linear:
    """The linear layer of a stack's first layer."""
    assert isinstance(module, nn.Sequential)
    layer = module[0]
    assert isinstance(layer, Layer)
    return layer.linear


def moves(at: int, tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    del x
    if when == at:
        first_of(frozen).weight.lerp_(first_of(tower).weight, 0.5)


def from_batch(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    del tower
    if when == 0:
        first_of(frozen).bias.copy_(x.mean(0))


def from_layers(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    if when == 0:
        first_of(frozen).bias.copy_(tower(x).mean(0))


def in_a_circle(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    del x
    if when == 0:
        first_of(frozen).weight.mul_(0.5).add_(first_of(tower).weight)
        first_of(tower).weight.mul_(0.9).add_(first_of(frozen).weight)


def twice(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    del x, when
    first_of(frozen).weight.lerp_(first_of(tower).weight, 0.5)


def follows_the_frozen(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    """Reads what the other task writes."""
    del x
    if when == 1:
        first_of(tower).bias.lerp_(first_of(frozen).weight[0], 0.2)


def data_after(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    """Backward computes with what autograd has kept: of some layers the new weight."""
    del frozen, x
    if when == 1:
        first_of(tower).weight.data = first_of(tower).weight.data * 0.9


def data_in_place_after(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    """Backward computes with the new weight."""
    del frozen, x
    if when == 1:
        first_of(tower).weight.data.mul_(0.9)


def shares(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    del x
    if when == 0:
        first_of(frozen).weight.data = first_of(tower).weight.data


COUNT = [0]


def by_list(tower: nn.Module, frozen: nn.Module, x: Tensor, when: int) -> None:
    del x
    if when == 0:
        COUNT[0] += 1
        first_of(frozen).weight.lerp_(first_of(tower).weight, 1 / (1 + COUNT[0]))


before, after = functools.partial(moves, 0), functools.partial(moves, 1)

REFUSED: dict[str, tuple[Callable[..., None], Callable[..., None], dict[str, object], str]] = {
    "from the batch": (from_batch, nothing, {}, rf"'frozen.0.linear.bias'.*{LINE}.*what depends on the batch"),
    "from layers": (from_layers, nothing, {}, rf"'frozen.0.linear.bias' \({LINE}\).*what depends on the batch"),
    "in a circle": (in_a_circle, nothing, {}, rf"'frozen.0.linear.weight' \({LINE}\) what it reads of 'tower.0.lin"),
    "by a number of its own": (
        by_list,
        nothing,
        {},
        rf"'frozen.0.linear.weight' \({LINE}\).*changes from call to call",
    ),
    "memory of another": (shares, nothing, {}, "to the memory of 'tower.0.linear.weight', which both.*copy it"),
    "before and after": (twice, nothing, {}, rf"before and after it writes to it \({LINE}\)"),
}


@quiet
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_keep_its_order_is_refused(case: str) -> None:
    """Before anything runs, with the parameter, the line and a remedy."""
    first, second, options, words = REFUSED[case]
    with pytest.raises(spindle.SpindleError, match=words):
        spindle.make_metagraph(two(first, second, **options))  # type: ignore[arg-type]


def test_what_nobody_holds_is_refused() -> None:
    """A copy that no task computes with lives on no rank."""
    workload = spindle.Workload("copy")
    tower = workload.component("tower", stack(Layer))
    kept = workload.component("kept", copy.deepcopy(tower).requires_grad_(False))

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            _lerp(list(zip(kept.parameters(), tower.parameters(), strict=True)))
        found: Tensor = tower(batch["x"]).square().mean()
        return found

    with pytest.raises(spindle.SpindleError, match=r"no task computes with 'kept.0.norm.weight'"):
        spindle.train(workload, optimizer=sgd, steps=1, launcher="threads")


@quiet
def test_a_momentum_that_follows_a_schedule_is_refused() -> None:
    """Ranks write what was captured; a number that changes from step to step is noticed, not ignored."""
    workload = spindle.Workload("schedule")
    tower = workload.component("tower", stack(Layer))
    frozen = workload.component("frozen", copy.deepcopy(tower).requires_grad_(False))
    momentum = [0.9]

    @workload.task("t", batch_size=6, data=batches(1))
    def task(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            first_of(frozen).weight.lerp_(first_of(tower).weight, 1 - momentum[0])
        found: Tensor = (tower(batch["x"]) - frozen(batch["x"])).square().mean()
        return found

    spindle.make_metagraph(workload)
    momentum[0] = 0.95
    words = (
        r"task 't', step 1: it writes to parameter 'frozen.0.linear.weight' in another way than when it was captured"
    )
    with pytest.raises(spindle.SpindleError, match=words):
        spindle.train(workload, optimizer=sgd, steps=1, launcher="threads")
