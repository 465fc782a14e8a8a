"""What checkpoints would lose of an optimizer or a schedule is refused before the run, by name; and nothing else is."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import spindle
from spindle.errors import CheckpointError, SpindleWarning, WorkloadError
from spindle.record.changes.fingerprints import fingerprint
from spindle.runtime.updates.optimizers import described
from spindle.runtime.updates.trial_steps import check_trial_steps
from tests.state.test_optimizers import OPTIMIZERS, Elsewhere, built, towers

Make = Callable[[Any], Any]

CALLS = [0]


def _sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _tried(optimizer: Make, scheduler: Make | None = None, *, saves: bool = True) -> None:
    every = described(towers().named_parameters())
    check_trial_steps(every, {}, optimizer, scheduler, lambda losses: 1.0, saves=saves)


def _chained(optimizer: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def _sequence(optimizer: Any) -> Any:
    later = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2)
    return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2), later], [2])


def _warmup(optimizer: Any) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, 2, 10)


class Warm:
    """A rate as an object, whose attributes LambdaLR saves."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1 / self.calls


SCHEDULES: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, Warm()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=4),
    "ChainedScheduler": _chained,
    "SequentialLR": _sequence,
    "transformers' cosine": _warmup,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_checkpoints_hold_all_of_every_optimizer(kind: str) -> None:
    _tried(OPTIMIZERS[kind])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_checkpoints_hold_all_of_every_schedule(kind: str) -> None:
    _tried(_sgd, SCHEDULES[kind])


class Warmed(torch.optim.SGD):
    """Steps with what it keeps from step to step; `how` it keeps it."""

    def __init__(self, parameters: Any, how: str) -> None:
        super().__init__(parameters, lr=0.1)
        self.how, self.steps, self.sizes, self.own = how, 0, [0.0], itertools.count(1)
        self.kept: dict[str, Tensor] = {}
        self.held = Held()
        self.names = {p: torch.zeros_like(p) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-0.1 / self._count(parameter))

    def _count(self, parameter: Tensor) -> float:
        if self.how == "steps":
            self.steps += 1
            return self.steps
        if self.how == "own":
            return next(self.own)
        if self.how == "sizes":
            self.sizes.append(1.0)
            return len(self.sizes)
        if self.how == "kept":
            self.kept["sum"] = self.kept.get("sum", torch.ones(())) + 1
            return float(self.kept["sum"])
        if self.how == "held":
            self.held.count += 1
            return self.held.count
        if self.how == "names":
            self.names[parameter] += 1
            return float(self.names[parameter].max())
        CALLS[0] += 1
        return CALLS[0]


class Held:
    """Counts in an object."""

    def __init__(self) -> None:
        self.count = 0


class Falling:
    """A schedule of nobody's kind."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9


class Forgetful(lr_scheduler.LRScheduler):
    """Saves the step and not what it has seen."""

    def __init__(self, optimizer: Any) -> None:
        self.worst = 0.0
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        self.worst += 0.1
        return [base / (1 + self.worst) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}


class Objects(Forgetful):
    """Saves an object."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"held": Held()}


def _closure(optimizer: Any) -> Any:
    calls = itertools.count()
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + next(calls)))


def _groups_of_functions(parameters: Any) -> Optimizer:
    return torch.optim.SGD([{"params": parameters, "rule": lambda lr: lr}], lr=0.1)


UNSAVED: dict[str, tuple[Make, Make | None, str]] = {
    **{
        f"an optimizer's {how}": (functools.partial(Warmed, how=how), None, f"Warmed keeps '{how}' from step to step")
        for how in ("steps", "own", "sizes", "kept", "held", "names")
    },
    "an optimizer's global": (lambda p: Warmed(p, "global"), None, "Warmed (counts|keeps)"),
    "functions in groups": (_groups_of_functions, None, "SGD keeps more than plain values and tensors"),
    "no state_dict": (_sgd, Falling, r"gave a Falling, which has no state_dict\(\)"),
    "half of a state_dict": (_sgd, Forgetful, "Forgetful keeps '(worst|_step_count)'"),
    "objects in a state_dict": (_sgd, Objects, "Objects keeps more than plain values"),
    "a closure that counts": (_sgd, _closure, "LambdaLR counts or keeps something"),
}


@pytest.mark.parametrize("kind", UNSAVED)
def test_what_a_checkpoint_would_lose_is_refused_before_the_run(kind: str, tmp_path: Path) -> None:
    """By name; without checkpoints it trains."""
    optimizer, scheduler, words = UNSAVED[kind]
    _tried(optimizer, scheduler, saves=False)
    with pytest.raises(CheckpointError, match=words):
        spindle.train(*built(), optimizer=optimizer, scheduler=scheduler, steps=1, launcher="threads",
                      checkpoints=tmp_path)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(CheckpointError, match=words):
        spindle.verify(*built(), optimizer=optimizer, scheduler=scheduler, resume_under=1, launcher="threads")


class Noisy(torch.optim.SGD):
    """Adds noise to each parameter (Langevin dynamics)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "words"),
    [
        (lambda p: Noisy(p, lr=0.1), None, "Noisy draws random numbers in its step"),
        (_sgd, lambda o: lr_scheduler.LambdaLR(o, lambda epoch: float(torch.rand(()))), "draws random numbers"),
    ],
)
def test_random_numbers_of_a_step_are_refused(optimizer: Make, scheduler: Make | None, words: str) -> None:
    """Each device would draw its own. What is tried leaves the numbers of the process as they were."""
    with pytest.raises(WorkloadError, match=words):
        spindle.train(*built(), optimizer=optimizer, scheduler=scheduler, steps=1, launcher="threads")
    every, before = described(towers().named_parameters()), torch.get_rng_state()
    with pytest.raises(WorkloadError, match=words):
        check_trial_steps(every, {}, optimizer, scheduler, None, saves=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_tried_is_warned_of() -> None:
    """Code that needs a device that is not here may still run there."""

    class Never(Elsewhere):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("no such device")

    _tried(lambda p: Never(p, lr=0.1), saves=False)
    with pytest.warns(SpindleWarning, match="could not be tried on small parameters .RuntimeError: no such device"):
        _tried(lambda p: Never(p, lr=0.1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (torch.ones(2), torch.ones(3)),
        ([1, [2]], [1, [3]]),
        ({"a": {1, 2}}, {"a": {1, 3}}),
        (itertools.count(1), itertools.count(2)),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        (nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))),
    ],
)
def test_a_fingerprint_tells_values_apart(one: object, other: object) -> None:
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)
