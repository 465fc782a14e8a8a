"""What a user changes between a run and its resume holds, or is refused; nothing of it is ignored without a word."""

import dataclasses
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler

import spindle
from spindle.errors import CheckpointError, SpindleWarning
from spindle.runtime.checkpoints.checkpoint import load_weights
from tests.random_plans import random_plan

BATCHES = [{"x": torch.arange(12.0).reshape(4, 3).sin() * n} for n in (1, 2, 3)]


def workload(*names: str, layers: int = 2, settings: dict[str, Any] | None = None) -> spindle.Workload:
    """Some components, each with a task of its own."""
    made = spindle.Workload("changed")
    torch.manual_seed(0)
    for name in names or ("a", "b"):
        parts = [nn.Linear(3, 3) for _ in range(layers)]
        module = made.component(name, nn.Sequential(*parts), optimizer=settings if name == "a" else None)

        @made.task(name, batch_size=4, data=BATCHES)
        def task(batch: dict[str, Tensor], module: nn.Module = module) -> Tensor:
            return F.mse_loss(module(batch["x"]), batch["x"])

    return made


def trained(
    folder: Path, steps: int, optimizer: Any, scheduler: Any = None, made: spindle.Workload | None = None, **more: Any
) -> dict[str, Tensor]:
    made = made or workload()
    plan = random_plan(spindle.make_metagraph(made), 2, 1)
    spindle.train(made, plan, optimizer=optimizer, scheduler=scheduler, steps=steps, launcher="threads",
                  checkpoints=folder, resume=True, **more)  # fmt: skip
    return {name: parameter.detach().clone() for name, parameter in made.named_parameters()}


def by_name(*rates: float) -> Any:
    def optimizer(named_parameters: Any) -> torch.optim.Optimizer:
        groups = [[p for n, p in named_parameters if n.startswith(letter)] for letter in "ab"]
        return SGD([{"params": g, "lr": rate} for g, rate in zip(groups, rates, strict=True)])

    return optimizer


def two_stages(length: int) -> Any:
    def scheduler(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        stages = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.StepLR(optimizer, length)]
        return lr_scheduler.SequentialLR(optimizer, stages, [2])

    return scheduler


sgd, adam = functools.partial(SGD, lr=0.1), functools.partial(AdamW, lr=0.1)
REFUSED: dict[str, tuple[tuple[Any, Any], tuple[Any, Any], str]] = {
    "another class": ((adam, None), (sgd, None), "the checkpoint's optimizer is AdamW and this one SGD"),
    "another rate under a schedule": (
        (sgd, lambda o: lr_scheduler.StepLR(o, 2)),
        (functools.partial(SGD, lr=0.2), lambda o: lr_scheduler.StepLR(o, 2)),
        "lr of the optimizer's group 0 was 0.1 when the checkpoint's run began, is 0.2 now, and a schedule",
    ),
    "a schedule more": ((sgd, None), (sgd, lambda o: lr_scheduler.StepLR(o, 2)), "run had none as its schedule"),
    "a schedule less": ((sgd, lambda o: lr_scheduler.StepLR(o, 2)), (sgd, None), "had StepLR, and this one has none"),
    "another schedule": (
        (sgd, lambda o: lr_scheduler.StepLR(o, 2)),
        (sgd, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        "schedule is StepLR and this one ExponentialLR",
    ),
    "another length of a schedule": (
        (sgd, lambda o: lr_scheduler.CosineAnnealingLR(o, 10)),
        (sgd, lambda o: lr_scheduler.CosineAnnealingLR(o, 20)),
        "T_max of the schedule (CosineAnnealingLR) was 10 when the checkpoint's run began and is 20 now",
    ),
    "one inside of another": (
        (sgd, two_stages(2)),
        (sgd, two_stages(3)),
        "_schedulers[1].step_size of the schedule (SequentialLR) was 2",
    ),
    "other groups": ((by_name(0.1, 0.2), None), (sgd, None), "2 parameter groups, and this one 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_checkpoint_would_contradict_is_refused(case: str, tmp_path: Path) -> None:
    """With what it was and what it is, before the first step."""
    first, second, said = REFUSED[case]
    trained(tmp_path, 2, *first)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        trained(tmp_path, 4, *second)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


APPLIED: dict[str, tuple[Any, Any, str]] = {
    "rate": (sgd, functools.partial(SGD, lr=0.2), "lr of the optimizer was 0.1 .* is 0.2 from here on"),
    "decay": (sgd, functools.partial(SGD, lr=0.1, weight_decay=0.5), "weight_decay of the optimizer was 0 .* is 0.5"),
    "rate of a group": (by_name(0.1, 0.2), by_name(0.1, 0.4), r"lr of the optimizer \(group 1\) was 0.2 .* is 0.4"),
}


@pytest.mark.parametrize("case", APPLIED)
def test_settings_that_were_changed_hold(case: str, tmp_path: Path) -> None:
    """A run that is resumed with another rate ends as one process does that changes it between two steps."""
    first, second, said = APPLIED[case]
    trained(tmp_path, 2, first)
    with pytest.warns(SpindleWarning, match=said):
        found = trained(tmp_path, 4, second)
    plain = workload()
    named = list(plain.named_parameters())
    for step, factory in enumerate((first, first, second, second)):
        optimizer = factory(named) if factory is not sgd and "group" in case else factory([p for _, p in named])
        optimizer.zero_grad()
        for task in plain.tasks.values():
            torch.autograd.backward(task.function(dict(BATCHES[step % 3])))
        optimizer.step()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), msg=name)


def test_nothing_is_told_where_nothing_changed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Functions and objects in a schedule's state are no differences."""
    schedule = functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step)
    trained(tmp_path, 2, adam, schedule)
    trained(tmp_path, 4, adam, functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step))
    assert [w for w in recwarn if issubclass(w.category, SpindleWarning)] == []


def test_settings_of_a_component_count_too(tmp_path: Path) -> None:
    """They make a group of their own, which bears its name."""
    trained(tmp_path, 2, sgd, made=workload(settings={"lr": 0.01}))
    with pytest.warns(SpindleWarning, match=r"lr of the optimizer \(a\) was 0.01 .* is 0.02"):
        trained(tmp_path, 4, sgd, made=workload(settings={"lr": 0.02}))


def test_components_that_are_gone_are_told(tmp_path: Path) -> None:
    """A task and its tower may leave; a renamed one is missing, and a layer less is another model."""
    trained(tmp_path, 2, sgd, made=workload("a", "b", "c"))
    with pytest.warns(SpindleWarning, match=r"does not have \(c\): their weights are left out"):
        trained(tmp_path, 3, sgd, made=workload("a", "b"))
    with pytest.raises(CheckpointError, match=r"has no 'z.0.weight'"), pytest.warns(SpindleWarning):
        trained(tmp_path, 4, sgd, made=workload("a", "z"))
    with pytest.raises(CheckpointError, match=r"has 'a.1.bias', which the model has no longer"):
        trained(tmp_path, 4, sgd, made=workload("a", "b", layers=1))


def by_hand(made: spindle.Workload, steps: int, since: int) -> dict[str, Tensor]:
    """A loop of one process in which task c joins, and a weighs half, after `since` steps."""
    optimizer = adam([parameter for _, parameter in made.named_parameters()])
    for step in range(steps):
        optimizer.zero_grad()
        for name, task in made.tasks.items():
            if name != "c" or step >= since:
                batch = dict(BATCHES[(step - since * (name == "c")) % 3])
                torch.autograd.backward(task.function(batch) * (0.5 if name == "a" and step >= since else 1.0))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in made.named_parameters()}


def test_a_task_joins_with_a_component_of_its_own(tmp_path: Path) -> None:
    """Where that is asked for: it begins at its own values, and the states of the others stay. All ends as in a loop
    that has the task from that step on, and each change is told.
    """
    trained(tmp_path, 2, adam)
    with pytest.raises(CheckpointError, match=r"has no 'c.0.weight', nor .* 'c'; .* allow_changes=True"):
        trained(tmp_path, 5, adam, made=workload("a", "b", "c"))
    made = workload("a", "b", "c")
    made.tasks["a"] = dataclasses.replace(made.tasks["a"], weight=0.5)
    with pytest.warns(SpindleWarning) as told:
        found = trained(tmp_path, 5, adam, made=made, allow_changes=True)
    assert sorted(str(warning.message) for warning in told) == [
        "component 'c' is new: it begins at its own values from step 3 on, without states of the optimizer",
        "task 'c' joins from step 3 on; its data begin at their start",
        "weight of task 'a' was 1 and is 0.5 from here on",
    ]
    for name, value in by_hand(workload("a", "b", "c"), 5, 2).items():
        torch.testing.assert_close(found[name], value, msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(tmp_path, 6, adam, made=made)


def test_a_new_component_begins_at_its_own_values_each_time(tmp_path: Path) -> None:
    """Also where a run that was resumed with it fails, and begins again from the checkpoint that does not have it."""
    trained(tmp_path, 2, sgd)
    made, initial = workload("a", "b", "c"), dict[str, Tensor]()
    path = tmp_path / "step-00000002"
    load_weights(made, path, initial=initial)
    own = {name: value.detach().clone() for name, value in made.named_parameters()}
    for _, value in made.named_parameters():
        value.data.zero_()
    load_weights(made, path, initial=initial)
    assert all(torch.equal(value, own[name]) for name, value in made.named_parameters())


def test_what_else_changes_is_told(tmp_path: Path) -> None:
    trained(tmp_path, 2, sgd, made=workload("a", "b"))
    made = workload("a", "b").only(["a"])
    made.accumulate = 2
    made.components["a"].module[0].requires_grad_(False)  # type: ignore[index]
    made.tasks["a"] = dataclasses.replace(made.tasks["a"], every=2)
    with pytest.warns(SpindleWarning) as told:
        trained(tmp_path, 3, sgd, made=made)
    assert sorted(str(warning.message) for warning in told) == [
        "2 parameters of component 'a' are frozen from here on; states of the optimizer are kept",
        "accumulate of the workload was 1 and is 2 from here on",
        "every of task 'a' was 1 and is 2 from here on",
        "task 'b' has left; where its data stand is kept, for when it joins again",
    ]
    with pytest.warns(SpindleWarning) as told:
        trained(tmp_path, 4, sgd, made=workload("a", "b"))
    assert "component 'a' are trained from here on" in " ".join(str(warning.message) for warning in told)
    assert "task 'b' joins from step 4 on; its data begin where they stood when it left" in [
        str(warning.message) for warning in told
    ]


def test_numbers_of_numpy_do_no_harm(tmp_path: Path) -> None:
    """A checkpoint holds what Python itself can read."""
    made = workload("a", "b")
    made.tasks["a"] = dataclasses.replace(made.tasks["a"], weight=np.float64(0.5))
    trained(tmp_path, 2, sgd, made=made)
    with pytest.warns(SpindleWarning, match="weight of task 'a' was 0.5 and is 1 from here on"):
        trained(tmp_path, 3, sgd)


def test_between_stages_nothing_is_told(tmp_path: Path) -> None:
    """What a stage says is no change; what is changed of a stage is one."""
    stages = [spindle.Stage(until=1), spindle.Stage(until=3, weights={"b": 1.0})]
    given: dict[str, Any] = {"optimizer": sgd, "launcher": "threads", "checkpoints": tmp_path, "cluster": "1x1:cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spindle.train_stages(workload(), stages, steps=2, **given)
    stages[1] = spindle.Stage(until=3, weights={"b": 2.0})
    with pytest.warns(SpindleWarning, match="weight of task 'b' was 1 and is 2 from here on"):
        spindle.train_stages(workload(), stages, resume=True, **given)


def test_another_seed_is_told(tmp_path: Path) -> None:
    """A run keeps the seed that it was begun with."""
    trained(tmp_path, 2, sgd, seed=5)
    with pytest.warns(SpindleWarning, match="goes on with its seed 5, not with 6"):
        trained(tmp_path, 3, sgd, seed=6)
