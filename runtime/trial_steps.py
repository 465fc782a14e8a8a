"""Trial steps: the user's optimizer and schedule, made of small parameters and stepped a few times, before ranks start.

- A step that draws random numbers would draw others on each device, and after a resume.
- What a checkpoint does not hold is lost on a resume: a second optimizer and schedule, given what a checkpoint holds of
  the first ones, must be like them, and step like them.
"""

import io
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from spindle.capture.look.repeats import places
from spindle.errors import CheckpointError, SpindleWarning, WorkloadError
from spindle.graph import Parameter
from spindle.record.draws import GLOBAL_GENERATORS
from spindle.record.fingerprints import fingerprint
from spindle.runtime.optimizers import (
    Metric,
    OptimizerFactory,
    SchedulerFactory,
    Settings,
    make_optimizer,
    make_schedule,
    takes_metric,
)
from spindle.runtime.progress import Progress, load_optimizer, optimizer_progress, optimizer_tensors

STEPS, MORE_STEPS = 3, 3
WIDTH = 3  # of each dimension of a small parameter, at most

_SAVED = ("state", "param_groups")  # what checkpoints hold of an optimizer
_TORCHS = ("step", "defaults", "optimizer", "_opt_called", "_warned_capturable_if_run_uncaptured")  # torch sets them


@dataclass(frozen=True, slots=True)
class _Trial:
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler | None

    def steps(self, count: int, draw: torch.Generator) -> Iterator[list[object]]:
        """Values of the parameters and settings of the groups after each of some steps."""
        for _ in range(count):
            for parameter in self.parameters.values():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
            with _draws_nothing(type(self.optimizer).__name__):
                self.optimizer.step()
            if self.schedule is not None:
                given: Any = (1.0,) if takes_metric(self.schedule) else ()
                with _draws_nothing(type(self.schedule).__name__):
                    self.schedule.step(*given)
            groups = [_but_parameters(group) for group in self.optimizer.param_groups]
            yield [fingerprint([p.detach() for p in self.parameters.values()]), fingerprint(groups)]


def check_trial_steps(
    every: Sequence[Parameter],
    settings: Settings,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    metric: Metric | None,
    *,
    saves: bool,
) -> None:
    """Raise WorkloadError where optimizer or schedule draw random numbers; and, if the run `saves`, CheckpointError
    where they keep what a checkpoint does not hold. Warns where they cannot be tried on small parameters.
    """
    with _generators_kept():
        try:
            first = _made(every, settings, optimizer, scheduler, metric)
            counted = [(place, place.get()) for place in places(type(first.optimizer).step, [])]
            draw = torch.Generator().manual_seed(0)
            list(first.steps(STEPS, draw))
        except _Draws as error:
            raise WorkloadError(
                f"{error} draws random numbers in its step, and each device would draw others; use one that draws none"
            ) from None
        except Exception as error:
            if saves:
                warnings.warn(
                    f"optimizer= could not be tried on small parameters ({type(error).__name__}: {error}), so whether "
                    "checkpoints hold all that it keeps is not known; verify with --resume-under compares",
                    SpindleWarning,
                    stacklevel=4,
                )
            return
        if not saves:
            return
        kind = type(first.optimizer).__name__
        for place, before in counted:
            if place.is_changed(before):
                raise _unsaved(kind, place.name)
        second = _made(every, settings, optimizer, scheduler, metric)
        _hand_over(first, second)
        _compare(first, second, draw)


def _made(
    every: Sequence[Parameter],
    settings: Settings,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    metric: Metric | None,
) -> _Trial:
    draw = torch.Generator().manual_seed(1)
    parameters = {
        p.name: nn.Parameter(
            torch.randn([min(WIDTH, size) for size in p.shape], generator=draw).to(getattr(torch, p.dtype)),
            requires_grad=p.trainable,
        )
        for p in every
    }
    with _draws_nothing("optimizer="):
        made = make_optimizer(optimizer, parameters, settings).optimizer
    with _draws_nothing("scheduler="):
        return _Trial(parameters, made, make_schedule(scheduler, made, metric))


# -- what checkpoints hold ---------------------------------------------------------------------------------------------


def _saved(trial: _Trial) -> tuple[dict[str, Tensor], Progress, Any]:
    """What a checkpoint would hold: states of the optimizer, its groups, and the state of the schedule.

    Raises CheckpointError where it could not be read again.
    """
    names = {id(p): name for name, p in trial.parameters.items() if p.requires_grad}
    states = optimizer_tensors(trial.optimizer, {name: trial.parameters[name] for name in names.values()})
    progress = optimizer_progress(trial.optimizer, {id(p): name for name, p in trial.parameters.items()}, {})
    progress = _read_again(type(trial.optimizer).__name__, progress)
    if trial.schedule is None:
        return states, progress, None
    kind = type(trial.schedule).__name__
    if lacking := [name for name in ("state_dict", "load_state_dict") if not hasattr(trial.schedule, name)]:
        raise CheckpointError(
            f"scheduler= gave a {kind}, which has no {lacking[0]}(), so that no checkpoint can hold where it stands; "
            "derive it from torch.optim.lr_scheduler.LRScheduler, give it state_dict() and load_state_dict(), or train "
            "without checkpoints"
        )
    return states, progress, _read_again(kind, trial.schedule.state_dict())


def _read_again(kind: str, state: Any) -> Any:
    stream = io.BytesIO()
    try:
        torch.save(state, stream)
        stream.seek(0)
        return torch.load(stream, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{kind} keeps more than plain values and tensors in its state or its groups "
            f"({' '.join(str(error).split())[:160]}), which no checkpoint can hold; keep numbers there, or train "
            "without checkpoints"
        ) from None


def _hand_over(first: _Trial, second: _Trial) -> None:
    """Give the second what a checkpoint holds of the first."""
    states, progress, schedule = _saved(first)
    with torch.no_grad():
        for name, parameter in second.parameters.items():
            parameter.copy_(first.parameters[name])
    last: object = second.optimizer
    try:
        load_optimizer(second.optimizer, second.parameters, progress, states)
        if second.schedule is not None:
            last = second.schedule
            second.schedule.load_state_dict(schedule)
    except Exception as error:
        raise CheckpointError(
            f"{type(last).__name__} cannot load the state that it saved itself ({type(error).__name__}: {error}), so "
            "that no run can go on from a checkpoint; mend its load_state_dict(), or train without checkpoints"
        ) from error


def _compare(first: _Trial, second: _Trial, draw: torch.Generator) -> None:
    pairs = [(first.optimizer, second.optimizer), (first.schedule, second.schedule)]
    for one, other in pairs:
        if one is not None and (names := _differing(one, other)):
            raise _unsaved(type(one).__name__, names[0])
    again = torch.Generator()
    again.set_state(draw.get_state())
    for ours, theirs in zip(first.steps(MORE_STEPS, draw), second.steps(MORE_STEPS, again), strict=True):
        if ours != theirs:
            last = first.optimizer if first.schedule is None or ours[0] != theirs[0] else first.schedule
            raise _unsaved(type(last).__name__, "")


def _differing(one: object, other: object) -> list[str]:
    ours, theirs = ({k: v for k, v in vars(x).items() if k not in (*_SAVED, *_TORCHS)} for x in (one, other))
    return [name for name in {**ours, **theirs} if fingerprint(ours.get(name)) != fingerprint(theirs.get(name))]


def _unsaved(kind: str, name: str) -> CheckpointError:
    what = f"keeps {name!r}" if name else "counts or keeps something"
    return CheckpointError(
        f"{kind} {what} from step to step where no checkpoint holds it, so that a resume would go on otherwise; keep "
        "it in the parameter groups or in the states of parameters (of a schedule: in its state_dict()), or train "
        "without checkpoints"
    )


def _but_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


# -- random numbers ---------------------------------------------------------------------------------------------------


class _Draws(Exception):
    """Something draws from a generator of the process; the message says what."""


@contextmanager
def _generators_kept() -> Iterator[None]:
    """While open nobody else draws; all generators of the process are put back."""
    alone = GLOBAL_GENERATORS.acquire(timeout=5.0)  # a loader that hangs is outwaited
    ours, pythons, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(ours)
        random.setstate(pythons)
        np.random.set_state(numpys)
        if alone:
            GLOBAL_GENERATORS.release()


@contextmanager
def _draws_nothing(what: str) -> Iterator[None]:
    """Raise _Draws when a generator of the process has moved while it was open."""
    before = _states()
    yield
    if _states() != before:
        raise _Draws(what)


def _states() -> tuple[bytes, str, str]:
    return torch.get_rng_state().numpy().tobytes(), repr(random.getstate()), repr(np.random.get_state())
