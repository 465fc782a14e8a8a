"""Optimizers and schedules step as in one process, whatever groups they make, under every plan, and after a resume."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import spindle
from spindle.errors import CheckpointError, SpindleError, SpindleWarning, WorkloadError
from spindle.runtime.checkpoints import checkpoint
from spindle.runtime.updates.optimizers import (
    Optimization,
    Reach,
    described,
    make_optimizer,
    rank_optimizer,
    reach_of,
    without_parameters,
)
from spindle.runtime.updates.schedules import SplitSchedule, make_schedule, step_schedule
from spindle.values.graph import Parameter
from tests.drawn import SEEDS, drawn
from tests.parity.test_tensor_parallel import workload as cut_towers
from tests.random_plans import random_plan, widest_plan

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW by for loop": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Muon on matrices": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.01),
    "transformers' Adafactor": lambda p: _adafactor(p),
}


def _adafactor(parameters: list[nn.Parameter]) -> Optimizer:
    from transformers.optimization import Adafactor

    made: Optimizer = Adafactor(parameters)
    return made


def _by_dimension(parameters: list[nn.Parameter]) -> Optimizer:
    decayed: Any = [p for p in parameters if p.ndim > 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in parameters if p.ndim < 2]}],
        lr=0.01,
        weight_decay=0.0,
    )


def _by_name(named_parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
    heads: Any = [(n, p) for n, p in named_parameters if n.startswith("head")]
    rest: Any = [(n, p) for n, p in named_parameters if not n.startswith("head")]
    return torch.optim.SGD([{"params": rest, "lr": 0.05}, {"params": heads}], lr=0.2, momentum=0.9)


def _by_depth(named_parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
    """A rate for each layer of the trunk, deepest first, and one for the rest; frozen ones left out, as many do."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in reversed(named_parameters):
        if parameter.requires_grad:
            layer = name.split(".")[1] if name.startswith("trunk.") else "rest"
            groups.setdefault(layer, {"params": [], "lr": 0.1 * 0.7 ** len(groups)})["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()))


GROUPED: dict[str, Callable[[Any], Optimizer]] = {
    "by dimension": _by_dimension,
    "by name": _by_name,
    "by depth": _by_depth,
    "one parameter": lambda p: torch.optim.SGD(p[:1], lr=0.1),
}


def _rates(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    """A function of its own for each group."""

    def rate(group: int, epoch: int) -> float:
        return 1.0 / (1 + group + epoch)

    return lr_scheduler.LambdaLR(optimizer, [functools.partial(rate, k) for k in range(len(optimizer.param_groups))])


def _one_cycle(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.OneCycleLR(
        optimizer, [0.1 * (k + 1) for k in range(len(optimizer.param_groups))], total_steps=8, cycle_momentum=False
    )


def _sequence(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    warmup = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 4)], [2])


SCHEDULES = {"none": None, "a function a group": _rates, "one cycle": _one_cycle, "sequence": _sequence}


def towers(*, frozen: bool = False, own: Mapping[str, float] | None = None, **options: Any) -> spindle.Workload:
    torch.manual_seed(0)
    workload = spindle.Workload("towers", **options)
    layers = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3)]
    trunk = workload.component("trunk", nn.Sequential(*layers).double(), optimizer=own)
    head = workload.component("head", nn.Linear(8, 3, bias=False).double())
    other = workload.component("other", nn.Linear(8, 8).double())
    trunk.requires_grad_(not frozen)
    draw = torch.Generator().manual_seed(1)
    batches = [
        {"x": torch.randn(6, 8, generator=draw, dtype=torch.float64), "y": torch.randint(3, (6,), generator=draw)}
        for _ in range(3)
    ]

    @workload.task("name", batch_size=6, data=batches)
    def name(batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(head(trunk(batch["x"])), batch["y"])

    @workload.task("fit", batch_size=6, data=batches, every=2)
    def fit(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = (other(trunk(batch["x"])) - 1).square().mean()
        return loss

    return workload


def apart(workload: spindle.Workload) -> spindle.Plan:
    """Components on devices of their own, so that groups are empty on some."""
    return spindle.make_plan(workload, "1x2:cpu", pins={"trunk": [0], "head": [1], "other": [1]})


@functools.cache
def built() -> tuple[spindle.Workload, spindle.Plan]:
    """Towers, and their plan, for tests that leave the towers as they were."""
    workload = towers()
    return workload, apart(workload)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_steps_as_in_one_process(kind: str) -> None:
    """Apart on two devices, then resumed on three, with states."""
    workload, plan = built()
    other = widest_plan(spindle.make_metagraph(workload), 3)
    report = spindle.verify(workload, plan, steps=4, optimizer=OPTIMIZERS[kind], resume_under=other, launcher="threads")
    assert report.ok, str(report)
    assert kind in ("SGD", "Muon on matrices") or "state" in {row.quantity for row in report.rows}


@drawn(
    4, groups=sorted(GROUPED), schedule=sorted(SCHEDULES), own=[None, {"lr": 0.02}], sharded=(False, True), seed=SEEDS
)
def test_groups_and_schedules_are_those_of_one_process(
    groups: str, schedule: str, own: Mapping[str, float] | None, sharded: bool, seed: int
) -> None:
    """Any groups with any schedule, under one random plan and then another."""
    workload = towers(own=own, shard_optimizer=sharded)
    graph = spindle.make_metagraph(workload)
    report = spindle.verify(
        workload,
        random_plan(graph, 1 + seed % 3, seed),
        steps=4,
        optimizer=GROUPED[groups],
        scheduler=SCHEDULES[schedule],
        resume_under=random_plan(graph, 1 + (seed + 1) % 3, seed + 1),
        launcher="threads",
    )
    assert report.ok, str(report)
    assert "rate" in {row.quantity for row in report.rows}


def test_nothing_moves_in_a_step_without_its_tasks() -> None:
    """A device, or all of them, may hold nothing that a step updates: momentum and weight decay rest too."""
    workload = towers(max_grad_norm=5.0)
    del workload.tasks["name"]  # leaves one task, of every second step
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    report = spindle.verify(workload, plan, steps=4, optimizer=OPTIMIZERS["SGD"], launcher="threads")
    assert report.ok, str(report)


def test_a_plateau_is_seen_by_its_metric() -> None:
    """The rate falls when the given loss no longer does: the same on all ranks, as in one process."""
    report = spindle.verify(
        towers(),
        steps=5,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0, factor=0.5),
        metric=lambda losses: losses["name"] + losses.get("fit", 0.0),
        launcher="threads",
    )
    assert report.ok, str(report)


def test_a_part_thawed_later_has_the_rate_of_its_schedule(tmp_path: Any) -> None:
    """Its group is there from the first step on, so its rate is where one process has it."""

    def trained(workload: spindle.Workload, steps: int) -> spindle.TrainResult:
        rates: list[Mapping[str, float]] = []

        class Rates(spindle.metrics.Callback):
            def on_step_end(self, metrics: spindle.metrics.StepMetrics) -> None:
                rates.append(metrics.learning_rates)

        spindle.train(
            workload,
            apart(workload),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5),
            steps=steps,
            checkpoints=tmp_path,
            resume=True,
            launcher="threads",
            callbacks=[Rates()],
        )
        return rates  # type: ignore[return-value]

    trained(towers(frozen=True, own={"lr": 0.8}), 2)
    after: Any = trained(towers(own={"lr": 0.8}), 3)
    assert dict(after[-1]) == {"trunk": 0.1, "": 0.1 / 8}


def test_states_of_a_part_that_rests_are_kept(tmp_path: Any) -> None:
    """Frozen for two steps and thawed again, a tower has the momentum and the step count that it had before."""
    for steps, frozen in ((2, False), (4, True), (6, False)):
        workload = towers(frozen=frozen)
        plan = random_plan(spindle.make_metagraph(workload), 1 + steps % 3, steps)
        spindle.train(workload, plan, optimizer=_by_dimension, steps=steps, checkpoints=tmp_path, resume=True,
                      launcher="threads")  # fmt: skip
    stages = [
        checkpoint.tensors(path, lambda name: name.startswith("optimizer:trunk.0.1.weight:"))
        for path in sorted(tmp_path.glob("step-*"))
    ]
    assert [float(states["optimizer:trunk.0.1.weight:step"]) for states in stages] == [2, 2, 4]
    assert all(torch.equal(value, stages[1][name]) for name, value in stages[0].items())


def _hooked(parameters: Any) -> Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


class Perturbed(torch.optim.SGD):
    """As sharpness-aware minimization does, computes gradients twice in a step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "give a closure"
        closure()
        super().step()


REFUSED: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "no optimizer": (lambda p: None, None, "gave a NoneType"),
    "LBFGS": (lambda p: torch.optim.LBFGS(p), None, "LBFGS.step needs 'closure'"),
    "a closure": (lambda p: Perturbed(p, lr=1.0), None, "Perturbed steps with a closure alone .AssertionError: give"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p), None, "needs sparse gradients"),
    "another's parameter": (lambda p: torch.optim.SGD([nn.Parameter(torch.ones(2, 7))], lr=1.0), None, r"\(2, 7\)"),
    "it raises": (lambda p: torch.optim.SGD([], lr=1.0), None, "optimizer= raised ValueError"),
    "a hook": (lambda p: _hooked(p), None, "registered a hook on SGD.step"),
    "no metric": (lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler.ReduceLROnPlateau, "give metric="),
    "wrong lists": (
        lambda p: torch.optim.SGD(p, lr=1.0),
        lambda o: lr_scheduler.LambdaLR(o, [lambda e: 1.0] * 3),
        "scheduler= raised ValueError",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_step_is_refused_before_the_run(kind: str) -> None:
    optimizer, scheduler, sentence = REFUSED[kind]
    with pytest.raises(SpindleError, match=sentence):
        spindle.train(towers(), optimizer=optimizer, scheduler=scheduler, steps=1, launcher="threads")


def test_a_setting_that_the_optimizer_lacks_is_refused() -> None:
    with pytest.raises(WorkloadError, match="'lrr', which SGD does not have"):
        spindle.train(towers(own={"lrr": 1.0}), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), steps=1,
                      launcher="threads")  # fmt: skip


class Coupled(torch.optim.SGD):
    """Divides each update by the norm of all gradients, as optimizers with one step size for a model do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = sum((p.grad.square().sum() for p in held), torch.tensor(1e-12)).sqrt()
        for parameter in held:
            parameter.data.sub_(0.1 * parameter.grad / norm)


class Counting(torch.optim.Optimizer):
    """Counts in its groups the steps in which any of their parameters had a gradient, and steps less and less."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.5, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            group["count"] += bool(held)
            for parameter in held:
                parameter.add_(parameter.grad, alpha=-group["lr"] / group["count"])


def test_what_an_optimizer_counts_in_its_groups() -> None:
    """It depends on which parameters are there, so it needs one device; a resume has the count of who holds some."""
    with pytest.raises(WorkloadError, match="the update of a parameter from others"):
        spindle.verify(*built(), optimizer=Counting, launcher="threads")
    for sharded in (False, True):
        workload = towers(shard_optimizer=sharded)
        del workload.tasks["fit"]
        plan = widest_plan(spindle.make_metagraph(workload), 1)
        report = spindle.verify(workload, plan, steps=4, optimizer=Counting, resume_under=plan, launcher="threads")
        assert report.ok, str(report)


def test_a_schedule_that_takes_its_state_apart_resumes() -> None:
    """Threads share what a checkpoint holds, and CyclicLR takes keys out of it."""
    workload, plan = built()
    report = spindle.verify(
        workload,
        plan,
        steps=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        scheduler=lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
        resume_under=plan,
        launcher="threads",
    )
    assert report.ok, str(report)


class Both(torch.optim.Optimizer):
    """Two optimizers as one, whose states only they know."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.first = torch.optim.SGD([p for p in parameters if p.ndim == 2], lr=0.1, momentum=0.9)
        self.second = torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=0.1)
        super().__init__([*self.first.param_groups, *self.second.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first.step()
        self.second.step()


def test_an_optimizer_made_of_others_steps_all_on_every_device() -> None:
    """Its parts hold the groups that it has, so a device that puts its own parameters there gives them to the parts."""
    every, draw = described(towers().named_parameters()), torch.Generator().manual_seed(2)
    whole = {p.name: nn.Parameter(torch.randn(p.shape, generator=draw, dtype=torch.float64)) for p in every}
    for names in (list(whole), list(whole)[::2], []):
        ours, plain = ({name: nn.Parameter(p.detach().clone()) for name, p in whole.items()} for _ in range(2))
        own = [(name, ours[name]) for name in names]
        planned = rank_optimizer(Both, every, own, {}, torch.device("cpu")).optimizer
        alone = Both(list(plain.values()))
        for _ in range(3):
            for name, parameter in plain.items():
                parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                ours[name].grad = parameter.grad.clone()
            planned.step()
            alone.step()
        assert all(torch.equal(ours[name], plain[name]) for name in names)
        assert not any(torch.equal(ours[name], whole[name]) for name in names)


def test_an_optimizer_made_of_others_is_refused_where_its_groups_are_split() -> None:
    """By settings of a component, whose group none of its parts has; or by tensor parallelism, which it hides."""
    workload = towers(own={"lr": 0.1})
    with pytest.raises(WorkloadError, match=r"Both steps groups that it keeps beside its .* of component 'trunk'"):
        spindle.train(workload, apart(workload), optimizer=Both, steps=1, launcher="threads")
    with pytest.raises(WorkloadError, match="Both does not step the parameters that stand in its groups"):
        spindle.verify(cut_towers(), optimizer=Both, launcher="threads")


def _power(number: int, step: int) -> float:
    return float(0.9 ** (step * number))


LISTS: dict[str, Callable[[torch.optim.Optimizer, list[int]], Any]] = {
    "LambdaLR": lambda o, of: lr_scheduler.LambdaLR(o, [functools.partial(_power, 1 + n) for n in of]),
    "OneCycleLR": lambda o, of: lr_scheduler.OneCycleLR(o, [0.1 / (1 + n) for n in of], total_steps=9),
    "ReduceLROnPlateau": lambda o, of: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.5, patience=0, min_lr=[0.01 * (1 + n) for n in of]
    ),
    "SequentialLR": lambda o, of: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.2, total_iters=2), LISTS["LambdaLR"](o, of)], [2]
    ),
}
"""Schedules with a value for each group, by the number of the user's group that it stems from."""


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("own", [{"lr": 0.02}, {"weight_decay": 0.5}, {"lr": 0.02, "weight_decay": 0.5}])
def test_lists_of_the_users_groups_reach_groups_that_settings_split(kind: str, own: dict[str, float]) -> None:
    """As torch would do it with the list's value for each group after the split; after a resume, too."""
    parameters = {name: nn.Parameter(torch.ones(2, 2) if "w" in name else torch.ones(2)) for name in
                  ("a.w", "a.b", "b.w", "c.b")}  # fmt: skip

    def factory(given: Any) -> torch.optim.Optimizer:
        held: list[nn.Parameter] = list(given)
        groups: list[dict[str, Any]] = [{"params": [p for p in held if p.ndim == dims]} for dims in (2, 1)]
        groups[0]["lr"] = 0.3
        return torch.optim.AdamW(groups, lr=0.2)

    def split() -> Optimization:
        return make_optimizer(factory, {n: p.detach().clone() for n, p in parameters.items()}, {"a": own})  # type: ignore[misc]

    def rates(made: Optimization) -> list[dict[str, Any]]:
        return [without_parameters(group) for group in made.optimizer.param_groups]

    ours, torchs, later = split(), split(), split()
    numbers = [number for number, _ in torchs.origins]
    assert numbers == [0, 0, 1, 1]
    wanted = LISTS[kind](torchs.optimizer, numbers)
    torchs.optimizer.step()
    metric = (lambda losses: 1.0) if kind == "ReduceLROnPlateau" else None
    schedule = make_schedule(lambda o: LISTS[kind](o, [0, 1]), ours, metric)
    assert isinstance(schedule, SplitSchedule)
    for step in range(6):
        assert rates(ours) == rates(torchs)
        if step == 3:
            state = schedule.state_dict()
            ours, schedule = later, make_schedule(lambda o: LISTS[kind](o, [0, 1]), later, metric)
            assert isinstance(schedule, SplitSchedule)
            later.optimizer.load_state_dict(torchs.optimizer.state_dict())
            schedule.load_state_dict(state)
        step_schedule(schedule, metric, dict)
        wanted.step(*([1.0] if metric else []))


def test_a_list_of_neither_is_refused_with_the_groups_names() -> None:
    workload = towers(own={"lr": 0.1})
    with pytest.raises(
        WorkloadError, match=r"settings of components split .* into group 0 trunk, group 0, group 1 trunk, group 1, and"
    ):
        spindle.train(
            workload,
            optimizer=_by_dimension,
            scheduler=lambda o: lr_scheduler.LambdaLR(o, [lambda e: 1.0] * 3),
            steps=1,
            launcher="threads",
        )


class Reading(lr_scheduler.LRScheduler):
    """A rate by the first parameter of each group, as AdafactorSchedule's."""

    def get_lr(self) -> Any:
        return [0.1 / (1 + float(group["params"][0].detach().norm())) for group in self.optimizer.param_groups]


class Sparing(Reading):
    """The same, which can do without."""

    def get_lr(self) -> Any:
        held = [group["params"] or [torch.zeros(())] for group in self.optimizer.param_groups]
        return [0.1 / (1 + float(first.detach().norm())) for first, *_ in held]


@pytest.mark.parametrize(("schedule", "words"), [(Reading, "Reading raises IndexError"), (Sparing, "Sparing gives")])
def test_a_schedule_that_reads_parameters_needs_one_device(schedule: Any, words: str) -> None:
    options: Any = {"optimizer": OPTIMIZERS["SGD"], "scheduler": schedule, "launcher": "threads"}
    with pytest.raises(WorkloadError, match=f"{words}.* where the optimizer's groups hold the parameters of one"):
        spindle.train(*built(), steps=1, **options)
    assert spindle.verify(built()[0], num_workers=1, steps=3, **options).ok


class Global(torch.optim.SGD):
    """Keeps a state of no parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self._own()["count"] = torch.zeros(())

    def _own(self) -> Any:
        states: Any = self.state
        return states["global"]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._own()["count"] += 1
        super().step(closure)


@pytest.mark.parametrize(("factory", "named"), [(Both, "first"), (Global, "global")])
def test_states_that_only_the_optimizer_knows_are_not_saved(tmp_path: Any, factory: Any, named: str) -> None:
    """It trains; a checkpoint, which would lose them, is refused."""
    workload, plan = towers(), built()[1]
    options: Any = {"optimizer": factory, "steps": 1, "launcher": "threads"}
    spindle.train(workload, plan, **options)
    with pytest.raises(CheckpointError, match=f"keeps '{named}' beside its states and groups"):
        spindle.train(workload, plan, checkpoints=tmp_path, **options)


class Around(torch.optim.Optimizer):
    """Steps another optimizer, and is one by name alone."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.SGD(parameters, lr=0.1)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)


def test_an_optimizer_whose_states_cannot_be_asked_for_is_refused_with_checkpoints(tmp_path: Any) -> None:
    workload, plan = built()
    assert spindle.verify(workload, plan, optimizer=Around, launcher="threads").ok
    with pytest.raises(CheckpointError, match=r"Around\.state_dict\(\) raises AttributeError .*super\(\).__init__"):
        spindle.train(workload, plan, optimizer=Around, steps=1, launcher="threads", checkpoints=tmp_path)
    assert not list(tmp_path.glob("step*"))


def test_an_optimizer_over_all_parameters_needs_one_device() -> None:
    """Refused where ranks update different ones; the same as in one process where each has all."""
    with pytest.raises(WorkloadError, match="the update of a parameter from others"):
        spindle.verify(*built(), optimizer=lambda p: Coupled(p, lr=0.1), launcher="threads")
    alone = spindle.verify(built()[0], num_workers=1, optimizer=lambda p: Coupled(p, lr=0.1), launcher="threads")
    assert alone.ok, str(alone)


class Elsewhere(torch.optim.SGD):
    """Needs a kind of device that is not here."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if any(p.dtype == torch.float64 and p.shape == (4, 6) for group in self.param_groups for p in group["params"]):
            raise RuntimeError("no such device")
        super().step(closure)


def test_an_optimizer_that_cannot_be_tried_is_warned_of() -> None:
    """It runs, unless parameters are cut."""
    with pytest.warns(SpindleWarning, match="Elsewhere could not be tried on a small matrix .RuntimeError: no such"):
        assert spindle.verify(towers(), optimizer=lambda p: Elsewhere(p, lr=0.1), launcher="threads").ok
    with pytest.raises(WorkloadError, match="leave tensor_parallel= and shard= out"):
        spindle.verify(cut_towers(), optimizer=lambda p: Elsewhere(p, lr=0.1), launcher="threads")


@pytest.mark.parametrize("kind", ["Adafactor", "Muon on matrices", "transformers' Adafactor"])
def test_whole_matrices_are_not_stepped_in_pieces(kind: str) -> None:
    with pytest.raises(WorkloadError, match="computes with whole matrices, and component 'encoder'"):
        spindle.verify(cut_towers(), optimizer=OPTIMIZERS[kind], launcher="threads")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_an_optimizer_sees_at_once_is_tried(kind: str) -> None:
    """Only these need whole matrices, and none needs others'."""
    optimizer = OPTIMIZERS[kind]([nn.Parameter(torch.ones(4, 6, dtype=torch.float64))])
    whole = kind in ("Adafactor", "Muon on matrices", "transformers' Adafactor")
    assert reach_of(optimizer) == Reach(of_parameter=whole, of_others=False, of_shape=whole)
    assert not optimizer.state or kind == "Adagrad"


def test_groups_are_the_same_on_a_rank_that_holds_little() -> None:
    """Each group is there, in order, with its settings, and with what the rank holds of it."""
    every = [
        Parameter(name=f"{part}.{kind}", shape=shape, dtype="float64")
        for part in ("a", "b", "c")
        for kind, shape in (("weight", (4, 4)), ("bias", (4,)))
    ]
    own = nn.Parameter(torch.ones(4, dtype=torch.float64))
    everything = {p.name: nn.Parameter(torch.ones(p.shape, dtype=torch.float64)) for p in every}
    settings_by_part = {"b": {"lr": 0.5}, "c": {"lr": 0.25}}
    whole = make_optimizer(_by_dimension, everything, settings_by_part)
    part = rank_optimizer(_by_dimension, every, [("b.bias", own)], settings_by_part, torch.device("cpu"))
    assert part.labels == whole.labels == tuple(f"group {g}{c}" for g in (0, 1) for c in ("", " b", " c"))
    assert [len(group["params"]) for group in whole.optimizer.param_groups] == [1] * 6
    assert [group["params"] for group in part.optimizer.param_groups] == [[], [], [], [], [own], []]
    for ours, theirs in zip(part.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


@pytest.mark.parametrize(
    ("then", "now", "sentence"),
    [
        (lambda p: torch.optim.AdamW(p), _by_dimension, "1 parameter groups, and this one 2"),
        (
            _by_name,
            lambda p: torch.optim.SGD([{"params": p[1:]}, {"params": p[:1]}], lr=0.1, momentum=0.9),
            "is in group",
        ),
    ],
)
def test_other_groups_do_not_go_on(tmp_path: Any, then: Any, now: Any, sentence: str) -> None:
    workload, plan = towers(), built()[1]
    spindle.train(workload, plan, optimizer=then, steps=1, checkpoints=tmp_path, launcher="threads")
    with pytest.raises(CheckpointError, match=sentence):
        spindle.train(workload, plan, optimizer=now, steps=2, checkpoints=tmp_path, resume=True, launcher="threads")
