"""Stages: a training in parts, each with its own tasks, weights and mixture, and a plan of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spindle.errors import WorkloadError
from spindle.verbs.at_hand import devices_at_hand
from spindle.verbs.planning import make_plan
from spindle.verbs.training import TrainResult, train
from spindle.words.whole_numbers import check_whole

if TYPE_CHECKING:
    from spindle.values.plan import Plan
    from spindle.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The steps of a training up to step `until`, counted from its start.

    `weights`: the tasks that take part, each with its weight in the sum of losses; None: all, with their own.
    `mixture`: by which weights each step draws `tasks_per_step` of these tasks, at a `temperature`
    (`Workload.mixture`); None: as the workload says.
    """

    until: int
    weights: Mapping[str, float] | None = None
    mixture: Mapping[str, float] | None = None
    temperature: float = 1.0
    tasks_per_step: int = 1

    def of(self, workload: "Workload") -> "Workload":
        """The workload as this stage trains it. Raises WorkloadError for tasks or weights that do not fit it."""
        found = workload.only(workload.tasks if self.weights is None else self.weights)
        found.stage = self.until
        if self.mixture is not None:
            found.tasks = {name: replace(task, mixture=None) for name, task in found.tasks.items()}
        for name, weight in (self.weights or {}).items():
            task = found.tasks[name]
            if not 0 <= weight < float("inf") or (weight == 0) != (task.weight == 0):
                raise WorkloadError(
                    f"the stage up to step {self.until} gives task {name!r} the weight {weight!r}, and it is "
                    f"registered with {task.weight!r}; give a positive weight, or leave it out (a task that runs "
                    "forward only has weight 0 in both)"
                )
            found.tasks[name] = replace(task, weight=float(weight))
        if self.mixture is not None:
            found.mixture(self.mixture, temperature=self.temperature, tasks_per_step=self.tasks_per_step)
        return found


def train_stages(
    workload: "Workload",
    stages: Sequence[Stage],
    *,
    checkpoints: Path | str,
    cluster: str | None = None,
    plan: "Callable[[Workload], Plan] | None" = None,
    steps: int | None = None,
    resume: bool | int = False,
    **options: Any,
) -> TrainResult:
    """Train stage after stage. Where one ends a checkpoint is written; the next is planned anew, and goes on from it.

    Weights, optimizer, schedule, order of data, and counts of steps go on from stage to stage. A task that a stage
    leaves out goes on with its data where it stood, and optimizer states of what nobody trains meanwhile are kept.
    `cluster`: what each stage is planned for; None: the devices at hand. `plan` makes the plan of a stage's workload
    instead. `steps` ends the training before its last stage does. `options`, and what is raised, are as for `train`;
    the result is of all stages that ran, with the plan of the last.

    Raises WorkloadError for stages that are none, whose steps do not rise, or that do not fit the workload.
    """
    from spindle.runtime.checkpoints.checkpoint import checkpoints_in, step_of

    _check(stages)
    workloads = [stage.of(workload) for stage in stages]
    done = int(resume)
    if resume is True:
        done = max(map(step_of, checkpoints_in(Path(checkpoints))), default=0)
    last = stages[-1].until if steps is None else min(steps, stages[-1].until)
    results: list[TrainResult] = []
    made: Plan | None = None
    for stage, own in zip(stages, workloads, strict=True):
        until = min(stage.until, last)
        if until <= done:
            if until == last and not results:  # `train` says that there is nothing left to do
                train(own, steps=until, checkpoints=checkpoints, resume=done, **options)
            continue
        made = plan(own) if plan else make_plan(own, cluster or devices_at_hand(options.get("launcher", "auto")))
        results.append(train(own, made, steps=until, checkpoints=checkpoints, resume=done or False, **options))
        done = results[-1].first_step + len(results[-1].losses)
        if results[-1].ended is not None or results[-1].stopped:
            break
    return _joined(results)


def _check(stages: Sequence[Stage]) -> None:
    if not stages:
        raise WorkloadError("there are no stages; give at least one spindle.Stage(until=STEPS)")
    for stage in stages:
        check_whole({"until= of a stage": stage.until}, error=WorkloadError)
    ends = [0, *(stage.until for stage in stages)]
    for before, until in pairwise(ends):
        if until <= before:
            raise WorkloadError(
                f"a stage ends at step {until}, and the one before it at {before}; give steps that rise, counted from "
                "the start of the training"
            )


def _joined(results: Sequence[TrainResult]) -> TrainResult:
    """One result of stages that ran one after another."""
    return replace(
        results[-1],
        losses=tuple(losses for each in results for losses in each.losses),
        step_seconds=tuple(seconds for each in results for seconds in each.step_seconds),
        train_s=sum(each.train_s for each in results),
        first_step=results[0].first_step,
        recovered=tuple(sentence for each in results for sentence in each.recovered),
        skipped={step: why for each in results for step, why in each.skipped.items()},
    )
