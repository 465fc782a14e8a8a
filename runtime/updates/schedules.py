"""Schedules: the user's factory and the groups of an optimizer in; a schedule of all groups out, stepped once a step.

Settings of components split the groups that the user's factory has made (`optimizers`). A schedule takes the groups
after that; or, where its lists have a value for each of the user's own groups, those: then there is a schedule of the
user's groups as each component with settings has them, and each group takes what its own component's says. So its rates
are what torch would give had the lists one value for each group, that of the group it was split from.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from spindle.errors import CheckpointError, RunError, WorkloadError
from spindle.inputs.usercode import arguments
from spindle.runtime.updates.optimizers import Optimization, is_required, without_parameters

SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]
Metric = Callable[[Mapping[str, float]], float]
_PARTS = "by component"


class SplitSchedule:
    """Schedules of the user's own groups, one for each component that has settings and one for the rest."""

    def __init__(self, factory: SchedulerFactory, made: Optimization) -> None:
        self._optimizer, self._origins = made.optimizer, made.origins  # loading a state makes new groups
        self._views = {component: made.of_user(component) for _, component in made.origins}
        self.parts = {component: factory(view) for component, view in self._views.items()}
        for view in self._views.values():
            view._opt_called = True  # type: ignore[attr-defined]  # the optimizer steps, and not what stands for it
        self._carry_over({component: [{} for _ in view.param_groups] for component, view in self._views.items()})

    def step(self, *metric: Any) -> None:
        """Step all, and give each group what its own has changed."""
        for group, (number, component) in zip(self._optimizer.param_groups, self._origins, strict=True):
            self._views[component].param_groups[number].update(without_parameters(group))
        before = {component: [kept_of(g) for g in view.param_groups] for component, view in self._views.items()}
        for part in self.parts.values():
            part.step(*metric)
        self._carry_over(before)

    def _carry_over(self, before: Mapping[str, list[dict[str, Any]]]) -> None:
        for group, (number, component) in zip(self._optimizer.param_groups, self._origins, strict=True):
            known = before[component][number]
            for key, value in without_parameters(self._views[component].param_groups[number]).items():
                if key in known and same_value(known[key], value):
                    continue
                if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value.clone() if isinstance(value, Tensor) else value

    def state_dict(self) -> dict[str, Any]:
        """What each keeps."""
        return {_PARTS: {component: part.state_dict() for component, part in self.parts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what each kept. Raises CheckpointError where it is that of other schedules."""
        found = state.get(_PARTS, {})
        if found.keys() != self.parts.keys():
            raise CheckpointError(
                "the checkpoint's schedule was made for other groups; make the same groups with the same settings of "
                "components"
            )
        for component, part in self.parts.items():
            part.load_state_dict(found[component])


def kept_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group holds besides its parameters, as it is now."""
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in without_parameters(group).items()}


def same_value(before: Any, now: Any) -> bool:
    """Whether a setting of a group is what it was."""
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return torch.equal(before, now)
    return before is now or (type(before) is type(now) and bool(before == now))


Schedule = LRScheduler | SplitSchedule


def parts_of(schedule: Schedule) -> Iterator[LRScheduler]:
    """The user's own schedules that a schedule is made of."""
    if isinstance(schedule, SplitSchedule):
        yield from schedule.parts.values()
    else:
        yield schedule


def make_schedule(factory: SchedulerFactory | None, made: Optimization, metric: Metric | None) -> Schedule | None:
    """The user's schedule of an optimizer. Raises WorkloadError when it needs a metric and there is none, RunError when
    it raises.
    """
    if factory is None:
        return None
    before = [kept_of(group) for group in made.optimizer.param_groups]
    schedule: Schedule
    try:
        schedule = factory(made.optimizer)
    except Exception as error:
        if not any(component for _, component in made.origins):
            raise RunError.of(error, "scheduler=") from error
        for group, kept in zip(made.optimizer.param_groups, before, strict=True):
            for key in without_parameters(group).keys() - kept.keys():
                del group[key]
            group.update(kept)
        try:
            schedule = SplitSchedule(factory, made)
        except Exception:
            raise RunError.of(error, "scheduler=") from error
    for part in parts_of(schedule):
        if not callable(getattr(part, "step", None)):
            raise WorkloadError(f"scheduler= gave a {type(part).__name__}; return a schedule with a step()")
        if takes_metric(part) and metric is None:
            raise WorkloadError(
                f"{type(part).__name__} needs a number in each step; give metric=, a function from a step's losses "
                "(by task) to the number, such as lambda losses: sum(losses.values())"
            )
    return schedule


def takes_metric(schedule: Schedule) -> bool:
    """Whether a schedule's step needs a number, as ReduceLROnPlateau's does."""
    return any(is_required(p) for part in parts_of(schedule) for p in arguments(part.step).values())


def step_schedule(schedule: Schedule, metric: Metric | None, losses: Callable[[], Mapping[str, float]]) -> None:
    """Step a schedule once; `losses` gives those of the step, by task, to a metric that the schedule takes."""
    if metric is None or not takes_metric(schedule):
        schedule.step()
    else:
        number: Any = metric(losses())
        schedule.step(number)
