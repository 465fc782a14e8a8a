"""Trial steps: the user's optimizer and schedule, made of small parameters and stepped a few times, before ranks start.

- A step that draws random numbers would draw others on each device, and after a resume.
- What a checkpoint does not hold is lost on a resume: a second optimizer and schedule, given what a checkpoint holds of
  the first ones, must be like them, and step like them.
- A device updates some of the parameters. What it makes of them must be what one process does that updates all; an
  optimizer that holds parameters beside its groups, or a schedule that reads them, would make something else.
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
from spindle.record.changes.fingerprints import fingerprint
from spindle.record.substitutes.draws import GLOBAL_GENERATORS
from spindle.runtime.updates.optimizers import (
    OptimizerFactory,
    Settings,
    described,
    make_optimizer,
    rank_optimizer,
    without_parameters,
)
from spindle.runtime.updates.progress import Progress, load_optimizer, optimizer_progress, optimizer_tensors
from spindle.runtime.updates.schedules import (
    Metric,
    Schedule,
    SchedulerFactory,
    SplitSchedule,
    kept_of,
    make_schedule,
    parts_of,
    same_value,
    takes_metric,
)
from spindle.values.graph import Parameter

STEPS, MORE_STEPS = 3, 3
WIDTH = 3  # of each dimension of a small parameter, at most

_SAVED = ("state", "param_groups")  # what checkpoints hold of an optimizer
_TORCHS = ("step", "defaults", "optimizer", "_opt_called", "_warned_capturable_if_run_uncaptured")  # torch sets them


@dataclass(frozen=True, slots=True)
class _Trial:
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule | None

    @property
    def last(self) -> object:
        """The user's schedule, or the optimizer where there is none."""
        return self.optimizer if self.schedule is None else next(parts_of(self.schedule))

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
                with _draws_nothing(type(self.last).__name__):
                    self.schedule.step(*given)
            groups = [without_parameters(group) for group in self.optimizer.param_groups]
            yield [fingerprint([p.detach() for p in self.parameters.values()]), fingerprint(groups)]

    def changes(self, count: int) -> Iterator[list[dict[str, Any]]]:
        """What the schedule alone changes of each group in each of some steps."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # torch warns where no step came before
        for _ in range(count):
            before = [kept_of(group) for group in self.optimizer.param_groups]
            assert self.schedule is not None
            self.schedule.step(*((1.0,) if takes_metric(self.schedule) else ()))
            now = [kept_of(group) for group in self.optimizer.param_groups]
            yield [
                {key: value for key, value in group.items() if key not in was or not same_value(was[key], value)}
                for was, group in zip(before, now, strict=True)
            ]


def check_trial_steps(
    every: Sequence[Parameter],
    settings: Settings,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    metric: Metric | None,
    *,
    saves: bool,
) -> None:
    """Raise WorkloadError where optimizer or schedule draw random numbers or step with a closure alone; and, if the run
    `saves`, CheckpointError where they keep what a checkpoint does not hold. Warns where they cannot be tried on small
    parameters.
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
            _refuse_without_closure(_Factories(every, settings, optimizer, scheduler, metric), error)
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


def _refuse_without_closure(factories: "_Factories", error: Exception) -> None:
    """Refuse an optimizer whose step fails, with `error`, unless it is given a closure."""
    f = factories
    try:
        optimizer = _made(f.every, f.settings, f.optimizer, None, None).optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

        def closure() -> Tensor:
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            return torch.ones(())

        closure()
        optimizer.step(closure)  # type: ignore[arg-type]
    except Exception:  # it is not the closure that it lacks
        return
    raise WorkloadError(
        f"{type(optimizer).__name__} steps with a closure alone ({type(error).__name__}: {error}), which computes "
        "losses and gradients anew within a step; a planned step computes them once, so use an optimizer that takes "
        "gradients as they are"
    ) from error


def check_steps_apart(
    every: Sequence[Parameter],
    settings: Settings,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    metric: Metric | None,
    *,
    several: bool,
    apart: bool,
) -> None:
    """Raise WorkloadError where the steps of a device are not those of one process. `several`: there are devices that
    may have nothing to update; `apart`: and some that update a part of the parameters.
    """
    names = [p.name for p in every if p.trainable]
    shares = [names, *([[]] if several else []), *([names[::2], names[1::2]] if apart else [])]
    with _generators_kept():
        _compare_shares(_Factories(every, settings, optimizer, scheduler, metric), shares)
        if settings:
            _refuse_groups_beside(every, settings, optimizer)
            if scheduler is not None:
                _refuse_values_by_place(_Factories(every, settings, optimizer, scheduler, metric))


def _refuse_groups_beside(every: Sequence[Parameter], settings: Settings, optimizer: OptimizerFactory) -> None:
    """Refuse an optimizer that settings of a component do not reach: it steps groups that it keeps beside its own."""
    try:
        trial = _made(every, settings, optimizer, None, None)
        for group in trial.optimizer.param_groups:
            group["params"] = []
        before = fingerprint([p.detach() for p in trial.parameters.values()])
        (after, _), *_ = trial.steps(1, torch.Generator().manual_seed(0))
    except Exception:  # reported elsewhere
        return
    if after != before:
        kind, (component, own) = type(trial.optimizer).__name__, next(iter(settings.items()))
        raise WorkloadError(
            f"{kind} steps groups that it keeps beside its `param_groups`, so that optimizer={dict(own)} of component "
            f"{component!r} would not reach them; give the component a group of its own in optimizer="
        )


def _refuse_values_by_place(factories: "_Factories") -> None:
    """Refuse a schedule that takes groups by their place, where settings of a component put others there: what it
    changes of each part of a group must be what it changes of the whole group where nothing is split.
    """
    f = factories
    try:
        whole = _made(f.every, {}, f.optimizer, f.scheduler, f.metric)
        parameters = _parameters(f.every)
        made = make_optimizer(f.optimizer, parameters, f.settings)
        split = _Trial(parameters, made.optimizer, make_schedule(f.scheduler, made, f.metric))
        if isinstance(split.schedule, SplitSchedule | LRScheduler):  # whose lists have a value for each group by design
            return
        steps = [list(trial.changes(STEPS)) for trial in (whole, split)]
    except Exception:  # reported elsewhere
        return
    for changed, changed_apart in zip(*steps, strict=True):
        for (number, component), found in zip(made.origins, changed_apart, strict=True):
            own = f.settings.get(component, {})
            if "lr" in own:  # from which others may be computed
                continue
            named = sorted(key for key in changed[number].keys() | found.keys() if key not in own)
            if wrong := [key for key in named if not same_value(changed[number].get(key), found.get(key))]:
                settled, given = next(iter(f.settings.items()))
                raise WorkloadError(
                    f"{type(split.last).__name__} gives {wrong[0]!r} to groups by their place, and optimizer="
                    f"{dict(given)} of component {settled!r} splits groups, so that others stand there; give the "
                    "component a group of its own in optimizer="
                )


@dataclass(frozen=True, slots=True)
class _Factories:
    every: Sequence[Parameter]
    settings: Settings
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    metric: Metric | None


def _compare_shares(factories: _Factories, shares: Sequence[Sequence[str]]) -> None:
    """Refuse what makes something else of a share of the parameters than of all."""
    f = factories
    try:
        whole = _made(f.every, f.settings, f.optimizer, f.scheduler, f.metric)
        groups = [step[1] for step in whole.steps(STEPS, torch.Generator().manual_seed(0))]
    except Exception:  # reported elsewhere
        return
    for own in shares:
        last, what = _differs_apart(factories, own, whole, groups)
        if what:
            raise WorkloadError(
                f"{type(last).__name__} {what} where the optimizer's groups hold the parameters of one device alone, "
                "as each device has it in this plan; compute with `param_groups` in step(), and rates of a schedule "
                "from numbers of the groups alone"
            )


def _differs_apart(
    factories: _Factories, own: Sequence[str], whole: _Trial, groups: list[object]
) -> tuple[object, str]:
    """What does something else with the parameters `own` than with the `whole`, and how; "" where nothing does."""
    f, last = factories, whole.last
    parameters = _parameters(f.every)
    held = [(name, parameters[name]) for name in own]
    try:
        made = rank_optimizer(f.optimizer, described(parameters.items()), held, f.settings, torch.device("cpu"))
        schedule = make_schedule(f.scheduler, made, f.metric)
        steps = list(_Trial(parameters, made.optimizer, schedule).steps(STEPS, torch.Generator().manual_seed(0)))
    except Exception as error:
        cause = error.__cause__ or error
        return last, f"raises {type(cause).__name__} ({str(cause).strip()})"
    if own and groups != [step[1] for step in steps]:
        return last, "gives other rates"
    if any(fingerprint(parameters[name].detach()) != fingerprint(whole.parameters[name].detach()) for name in own):
        return whole.optimizer, "steps otherwise"
    return last, ""


def _parameters(every: Sequence[Parameter]) -> dict[str, nn.Parameter]:
    """Small parameters of the same names, the same in each call."""
    draw = torch.Generator().manual_seed(1)
    return {
        p.name: nn.Parameter(
            torch.randn([min(WIDTH, size) for size in p.shape], generator=draw).to(getattr(torch, p.dtype)),
            requires_grad=p.trainable,
        )
        for p in every
    }


def _made(
    every: Sequence[Parameter],
    settings: Settings,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    metric: Metric | None,
) -> _Trial:
    parameters = _parameters(every)
    with _draws_nothing("optimizer="):
        made = make_optimizer(optimizer, parameters, settings)
    with _draws_nothing("scheduler="):
        return _Trial(parameters, made.optimizer, make_schedule(scheduler, made, metric))


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
    kind, part = type(trial.last).__name__, trial.last
    if lacking := [name for name in ("state_dict", "load_state_dict") if not hasattr(part, name)]:
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
            last = second.last
            second.schedule.load_state_dict(schedule)
    except Exception as error:
        raise CheckpointError(
            f"{type(last).__name__} cannot load the state that it saved itself ({type(error).__name__}: {error}), so "
            "that no run can go on from a checkpoint; mend its load_state_dict(), or train without checkpoints"
        ) from error


def _compare(first: _Trial, second: _Trial, draw: torch.Generator) -> None:
    pairs: list[tuple[object, object]] = [(first.optimizer, second.optimizer)]
    if first.schedule is not None and second.schedule is not None:
        pairs += zip(parts_of(first.schedule), parts_of(second.schedule), strict=True)
    for one, other in pairs:
        if names := _differing(one, other):
            raise _unsaved(type(one).__name__, names[0])
    again = torch.Generator()
    again.set_state(draw.get_state())
    for ours, theirs in zip(first.steps(MORE_STEPS, draw), second.steps(MORE_STEPS, again), strict=True):
        if ours != theirs:
            last = first.optimizer if ours[0] != theirs[0] else first.last
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


def _states() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), name, np.asarray(keys).tobytes(), *rest
