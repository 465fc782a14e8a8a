"""Training: a workload, a plan and an optimizer in; trained weights, and what the run leaves behind, out."""

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spindle.errors import PlanError, SpindleWarning
from spindle.failures import Failures
from spindle.ray_nodes import RayNodes
from spindle.values.plan import Plan
from spindle.values.trace import Trace
from spindle.verbs.at_hand import Anew, devices_at_hand
from spindle.verbs.planning import make_plan, plan_source
from spindle.words.whole_numbers import check_whole

if TYPE_CHECKING:
    from torch import Tensor

    from spindle.evaluation import EarlyStop, Evaluation
    from spindle.metrics import Callback, Scores
    from spindle.runtime.controller import Launcher, Prepared
    from spindle.runtime.evaluation.prepare import PreparedEvaluation
    from spindle.runtime.steps.finite import NotFinite
    from spindle.runtime.updates.optimizers import OptimizerFactory
    from spindle.runtime.updates.schedules import Metric, SchedulerFactory
    from spindle.workload import Workload


StepCallback = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind: losses of each task by step, the trace of its last steps, and how long steps took.

    `train_s` leaves out what writing checkpoints took. `step_seconds` of one call are alike: their mean.
    `first_step` steps were done before, by the run that was resumed. `ended` names the task whose data ended, where
    that stopped the training early. `startup`: what came before the second step, in seconds by phase, in a sentence.
    `checkpoint`: the last one written, which holds the trained weights; `spindle.load_checkpoint` puts them into
    modules, `spindle.export` writes them as `save_pretrained` does. `recovered`: failures after which the run went on,
    and plans for other devices, a sentence each. `skipped`: steps in which the optimizer rested, and what was not
    finite in them. `ema`: running averages of the weights by name, of a workload that keeps some and a run that wrote
    no checkpoint with them. `scores`: of each evaluation, by the steps done, earlier runs' too. `best`: the checkpoint
    that `keep_best` keeps. `stopped`: why training stopped early, where it did and no data ended, in a sentence.
    """

    losses: tuple[dict[str, float], ...]
    trace: Trace
    plan: Plan
    train_s: float
    step_seconds: tuple[float, ...] = ()
    first_step: int = 0
    ended: str | None = None
    startup: str = ""
    checkpoint: Path | None = None
    recovered: tuple[str, ...] = ()
    skipped: Mapping[int, str] = field(default_factory=dict)
    ema: "Mapping[str, Tensor]" = field(default_factory=dict, repr=False)
    scores: "Mapping[int, Scores]" = field(default_factory=dict)
    best: Path | None = None
    stopped: str = ""

    @property
    def step_s(self) -> float:
        """Median seconds of a step, since the first ones take longer; 0 when there was none."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0


def train(
    workload: "Workload",
    plan: Plan | Callable[[str], Plan] | None = None,
    *,
    optimizer: "OptimizerFactory",
    scheduler: "SchedulerFactory | None" = None,
    metric: "Metric | None" = None,
    steps: int,
    launcher: "Launcher" = "auto",
    on_step: StepCallback | None = None,
    callbacks: "Sequence[Callback]" = (),
    trace_steps: int = 5,
    seed: int = 0,
    timeout_s: float = 60.0,
    checkpoints: Path | str | None = None,
    checkpoint_every: int = 1000,
    keep_checkpoints: int | None = None,
    resume: bool | int | Path | str = False,
    allow_changes: bool = False,
    failures: Failures | None = None,
    not_finite: "NotFinite" = "stop",
    check_replicas_every: int | None = None,
    save_async: bool = False,
    keep_checkpoints_every_s: float | None = None,
    evaluation: "Evaluation | None" = None,
    evaluate_every: int | None = None,
    keep_best: str | None = None,
    early_stop: "EarlyStop | None" = None,
    max_samples: int | None = None,
    max_tokens: int | None = None,
    upload: str | None = None,
    upload_wait_s: float = 600.0,
    ray_nodes: RayNodes | None = None,
) -> TrainResult:
    """Train `workload` as planned, on Ray unless you choose otherwise; the trained weights end up in the user's
    modules, or, of modules on the meta device, in the last checkpoint.

    `optimizer`: a function from the list of all parameters, frozen ones too, to a torch optimizer with any groups of
    them; if its argument is called `named_parameters` it gets (name, parameter) pairs. `scheduler`: one from an
    optimizer to its schedule. `metric`: the number that a schedule such as ReduceLROnPlateau watches, from a step's
    losses by task.
    `plan` None plans for the devices at hand; a function makes the plan for a number of devices such as "2x4" (nodes x
    devices of each), also where an elastic run plans anew. `on_step(step, losses)` is called in this process for every
    step, a few steps late; `callbacks` get more (`spindle.metrics`). The spans of the last `trace_steps` steps are
    returned.
    `timeout_s` bounds every wait of one rank for another, and how long a step may take.

    `checkpoints`: a directory, which all machines share, for a checkpoint every `checkpoint_every` steps and at the
    end; the newest `keep_checkpoints` stay, and of older ones one each `keep_checkpoints_every_s`. `save_async` writes
    them beside the next steps. It belongs to one run at a time. `resume`: go on from a checkpoint: the newest whole one
    in the directory if there is one (True), the one of a step (its number), or one by its path; plan and number of
    devices may have changed. `steps` counts from the first run on. What the workload has changed since (tasks, weights,
    batch sizes, frozen parts) holds, and a warning names each change. `allow_changes`: components that the checkpoint
    does not have begin at their own values (docs/elastic.md); else they are refused.
    `failures`: how many failures are followed by another start, from the newest whole checkpoint of the run
    (docs/reliability.md), and whether the run plans anew for other devices (docs/elastic.md); None: none. SIGTERM ends
    the run after the steps under way and a checkpoint. `not_finite`: what a step does when a loss or a gradient is no
    finite number: "stop" raises NotFiniteError before the optimizer has stepped with it, "skip" lets the optimizer rest
    on all devices, "ignore" goes on. `check_replicas_every`: steps between two comparisons of what several ranks should
    hold alike (None: 100; 0: none), which also come before each checkpoint; ReplicaError names what differs.
    `evaluation`: tasks that run forward only after each `evaluate_every` steps, where the weights are; training does
    not see it. `keep_best`: "task:metric:min" or "task:metric:max"; the checkpoint with the best number stays whatever
    `keep_checkpoints` says. `early_stop`: when a metric that does not improve ends the training (docs/evaluation.md).
    `max_samples`, `max_tokens`: training ends once all tasks together have seen this number of them, from the first
    run on.
    `upload`: a URL, s3://BUCKET/FOLDER or the like, to which checkpoints are copied beside the steps, and from which
    `resume=True` fetches the newest one. At its end the run waits `upload_wait_s` for what is not there yet.
    `ray_nodes`: on which nodes of a Ray cluster ranks run, and how long the run waits for nodes that are to come.
    Inside of a function of Ray Train its workers are the ranks; they report each checkpoint, and `resume=True` goes on
    from the one reported last (docs/ray.md).

    Raises RunError naming rank, wave and instruction when a worker raises, dies or stalls, the first one where there
    were several tries; CheckpointError for a checkpoint that is not whole or of another model; PreemptedError after
    SIGTERM.
    """
    from spindle.capture import capture
    from spindle.metrics import check_callbacks
    from spindle.runtime.checkpoints.changes import changes
    from spindle.runtime.checkpoints.checkpoint import Checkpoint, Checkpoints, load_weights, path_of
    from spindle.runtime.checkpoints.later import cleared
    from spindle.runtime.checkpoints.run_folder import opened
    from spindle.runtime.checkpoints.weights import weights_of_run
    from spindle.runtime.comms.flight import recorded
    from spindle.runtime.controller import check_steps, chosen, launched, merge_traces, place_among_drivers, prepare
    from spindle.runtime.evaluation.prepare import prepare_beside
    from spindle.runtime.evaluation.scores import Evaluations
    from spindle.runtime.faults.elastic import Elastic
    from spindle.runtime.faults.preemption import Notice
    from spindle.runtime.faults.recovery import Attempts, left_to_torchrun, newest_of_this_job
    from spindle.runtime.faults.replicas import steps_between
    from spindle.runtime.launch.fetching import fetch_newest, uploads_during
    from spindle.runtime.launch.ray_train import reports
    from spindle.runtime.loading.counts import Limits
    from spindle.runtime.startup import Phases
    from spindle.runtime.steps.finite import checked
    from spindle.runtime.training import Steps, load_trained, run_steps
    from spindle.runtime.watch import Watch

    check_whole({"steps": steps}, error=PlanError)
    check_whole({"trace_steps": trace_steps}, least=0)
    check_whole({"seed": seed}, least=-(2**63))
    checked(not_finite)
    check_callbacks(callbacks)
    check_every = steps_between(check_replicas_every)
    limits = Limits(samples=max_samples, tokens=max_tokens)
    evaluations = Evaluations.asked(
        evaluation, evaluate_every, keep_best=keep_best, early_stop=early_stop, saves=checkpoints is not None
    )
    kept = None
    if checkpoints is not None:
        often = keep_checkpoints_every_s
        kept = Checkpoints(Path(checkpoints), checkpoint_every, keep_checkpoints, keep_every_s=often, later=save_async)
    place = place_among_drivers(launcher)
    failures = left_to_torchrun(launcher, failures or Failures())
    if kept is not None and resume is False:  # unless torchrun started the ranks anew
        resume = newest_of_this_job(launcher, kept.directory) or False
    initial: dict[str, Tensor] | None = {} if allow_changes else None
    if ray_nodes is not None and chosen(launcher) != "ray":
        _warn(f"ray_nodes is given and the launcher is {chosen(launcher)!r}, which asks nothing of nodes")
    callbacks = (*callbacks, *reports())
    directory = kept.directory if kept else None
    uploads = uploads_during(upload, directory, _warn, wait_s=upload_wait_s, leads=place[0] == 0)
    if directory is not None and resume is True:
        fetch_newest(upload, directory, _warn, place=place, timeout_s=timeout_s)
    with opened(workload, kept, resume, place, initial) as start, uploads:
        before, kept = start.before, start.checkpoints
        for sentence in changes(before, workload) if before is not None and place[0] == 0 else ():
            warnings.warn(SpindleWarning(sentence), stacklevel=2)
        if before is not None and seed not in (0, before.seed):
            warnings.warn(SpindleWarning(f"the run goes on with its seed {before.seed}, not with {seed}"), stacklevel=2)
        found, seed = (Steps(before.step), before.seed) if before else (Steps(), seed)
        found.scores = dict(before.progress.get("scores", {})) if before else {}
        if found.first >= steps:
            raise PlanError(
                f"{found.first} steps are done already and steps is {steps}; ask for more, it counts from the start"
            )
        saves = kept is not None
        weights_of_run(workload, before.path if before else None, saves=saves)
        phases = Phases.begun()
        anew = Anew(workload, optimizer, plan_source, plan if callable(plan) else None)
        if not isinstance(plan, Plan):
            with phases("capture"):
                capture(workload)
            with phases("plan"):
                there = devices_at_hand(launcher)
                plan = anew.asked(there.partition(":")[0]) if plan else make_plan(workload, there)
        elastic = Elastic(failures, launcher, plan, anew, waits=ray_nodes is not None and ray_nodes.wait_s is not None)
        attempts = Attempts(
            failures,
            partial(load_weights, workload, share=place, initial=initial),
            before,
            elastic if failures.elastic else None,
            leads=place[0] == 0,
        )
        with phases("plan"):
            attempts.begin()

        def prepared_for(plan: Plan) -> "tuple[Prepared, PreparedEvaluation | None]":
            prepared = prepare(workload, plan, phases)
            check_steps(prepared, optimizer, scheduler, metric, saves=saves or before is not None)
            return prepared, prepare_beside(evaluation, prepared) if evaluation is not None else None

        prepared, evaluated = prepared_for(elastic.plan)
        averages: dict[str, Tensor] = {}

        def attempt(again: Checkpoint | None) -> None:
            nonlocal prepared, evaluated
            if elastic.plan is not prepared.plan:
                prepared, evaluated = prepared_for(elastic.plan)
            sources = weights_of_run(workload, again.path if again else None, saves=saves)
            made = partial(
                launched,
                prepared,
                optimizer=optimizer,
                scheduler=scheduler,
                metric=metric,
                launcher=launcher,
                seed=seed,
                timeout_s=timeout_s,
                weights=sources,
                checked=True,
                on_broken=not_finite,
                check_replicas_every=check_every,
                evaluated=evaluated,
                limits=limits,
                lost_gpus=elastic.lost_gpus,
                ray_nodes=ray_nodes,
            )
            with (
                recorded(directory, leads=place[0] == 0) as flight,
                cleared(kept, leads=place[0] == 0),
                made(flight=flight) as run,
                notice.driving(run.workers),
            ):
                if kept is not None:
                    run.check_directory(kept)
                if again is not None:
                    run.resume(again)
                with notice.steps(), Watch(prepared, callbacks, leads=run.workers.leads).running(found.done) as watch:
                    run_steps(
                        run,
                        found,
                        last=steps,
                        seed=seed,
                        on_step=on_step,
                        trace_steps=trace_steps,
                        checkpoints=kept,
                        watch=watch,
                        notice=notice,
                        timeout_s=timeout_s,
                        evaluations=evaluations,
                    )
                    load_trained(workload, run)
                    averages.update({} if workload.ema is None or saves else run.ema_state())

        with Notice(grace_s=failures.grace_s, saves=saves).heeded() as notice:
            attempts.run(attempt, found, notice)
    best = evaluations.best_of(found.scores) if evaluations else None
    return TrainResult(
        tuple(found.losses),
        merge_traces(found.reports, prepared.program.num_ranks),
        prepared.plan,
        found.train_s,
        tuple(found.seconds),
        found.first,
        found.ended,
        prepared.summary,
        found.checkpoint,
        tuple(attempts.sentences),
        dict(found.skipped),
        {name.removeprefix("ema:"): value for name, value in averages.items()},
        dict(found.scores),
        path_of(kept.directory, best) if kept and best else None,
        found.stopped,
    )


def _warn(sentence: str) -> None:
    warnings.warn(SpindleWarning(sentence), stacklevel=2)
