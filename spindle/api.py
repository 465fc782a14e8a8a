"""The public verbs: plan, profile, verify, train. Each is a few lines around the rooms that do the work."""

import os
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar

from spindle.at_hand import Anew
from spindle.at_hand import devices_at_hand as devices_at_hand
from spindle.calibration import Calibration
from spindle.checkpoints import export as export
from spindle.checkpoints import load_checkpoint as load_checkpoint
from spindle.cluster import Cluster
from spindle.cost_options import CostOptions
from spindle.errors import PlanError, SpindleWarning
from spindle.failures import Failures
from spindle.metagraph import MetaGraph
from spindle.plan import Plan, laid_out, with_fixed
from spindle.profile import Profile
from spindle.trace import Trace
from spindle.turns import Turns
from spindle.whole_numbers import check_whole

if TYPE_CHECKING:
    from torch import Tensor

    from spindle.evaluation import EarlyStop, Evaluation
    from spindle.metrics import Callback, Scores
    from spindle.runtime.controller import Launcher, Prepared
    from spindle.runtime.evaluation.prepare import PreparedEvaluation
    from spindle.runtime.parity import ParityReport
    from spindle.runtime.profiling.bench_target import BenchLauncher
    from spindle.runtime.steps.finite import NotFinite
    from spindle.runtime.updates.optimizers import OptimizerFactory
    from spindle.runtime.updates.schedules import Metric, SchedulerFactory
    from spindle.source import Source
    from spindle.workload import Workload

StepCallback = Callable[[int, dict[str, float]], None]

VALIDATED = 8
"""Devices up to which `validate` adds counts: one, two, four and eight give two inner points to leave out."""


def make_plan(
    workload: "Workload | MetaGraph",
    cluster: Cluster | str,
    *,
    profile: Profile | Path | str | None = None,
    calibration: Calibration | Path | str | None = None,
    method: str = "auto",
    time_limit_s: float | None = None,
    start: Plan | Path | str | None = None,
    pins: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Plan a workload (or a MetaGraph) on a cluster; no device is needed. `print(plan)` is a Gantt chart.

    Where batches of a workload differ in size, some dozens of them are read, and the plan is for their mean.

    `cluster`: a Cluster, `"4x8"`, `"4x8:a100-80g"` or a YAML file. `profile`: measured times, or the file that holds
    them; without it times are predicted from the architecture. `calibration`: factors that were fitted on measured
    steps (`make_calibration`), or the file that holds them. `start`: a former plan, of a workload with other tasks
    for instance, to begin from, which takes a fraction of the time. `pins`: devices by name of a MetaOp or component,
    which then runs on exactly these. Raises InfeasibleError when nothing fits.
    """
    from spindle.clusterfile import parse_cluster
    from spindle.source import Source, source_of

    where = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    source = (
        Source(workload, CostOptions(), executable=True) if isinstance(workload, MetaGraph) else source_of(workload)
    )
    measured, fitted = read_value(profile, Profile), read_value(calibration, Calibration)
    plan, cost_options = plan_source(
        source,
        where,
        measured,
        calibration=fitted,
        method=method,
        time_limit_s=time_limit_s,
        start=read_value(start, Plan),
        pins=pins,
    )
    return with_outlook(plan, source, cost_options, profile=measured, calibration=fitted)


class Common(TypedDict):
    """What plans at once and plans in turns are asked for alike."""

    method: str
    time_limit_s: float | None
    aligned: bool
    start: Plan | None


def plan_source(
    source: "Source",
    cluster: Cluster,
    profile: Profile | None = None,
    *,
    calibration: Calibration | None = None,
    method: str = "auto",
    time_limit_s: float | None = None,
    aligned: bool = False,
    start: Plan | None = None,
    pins: Mapping[str, Sequence[int]] | None = None,
    is_as_run: bool = False,
) -> tuple[Plan, CostOptions]:
    """The plan of a loaded source, and how it wants the workload trained so that it fits.

    The plan says so too, and a run of it does so. `is_as_run`: the constants of the cluster's device are those of
    layers as they are run already, as in the cluster of a plan.
    """
    from spindle.cost.sampled import Costed
    from spindle.planner.choose import solve_fitting
    from spindle.planner.report.rates import work_of
    from spindle.planner.sets import fitted_to_sets
    from spindle.planner.solve import solve, usual_ways_fit
    from spindle.planner.turns import solve_in_turns
    from spindle.source import costs_on

    common = Common(method=method, time_limit_s=time_limit_s, aligned=aligned, start=start)
    ends_s = perf_counter()  # of the next solve: costs and alternatives are made within the limit

    def end_s(share: float) -> float:
        nonlocal ends_s
        ends_s += share * (time_limit_s or 0.0)
        return ends_s

    def solved(costed: Costed, where: Cluster, share: float) -> Plan:
        plan = solve(costed.metagraph, where, steps=costed.steps, share=share, pins=pins, ends_s=end_s(share), **common)
        return laid_out(plan, costed.metagraph)

    def in_turns(costed: Costed, where: Cluster, share: float, turns: Turns) -> Plan:
        plan = solve_in_turns(
            costed.metagraph, where, turns, steps=costed.steps, share=share, ends_s=end_s(share), **common
        )
        return laid_out(plan, costed.metagraph)

    cluster, cost_options = costs_on(source, cluster, profile, calibration, is_as_run=is_as_run)
    plan, cost_options = solve_fitting(
        source.metagraph,
        cluster,
        solved,
        profile=profile,
        cost_options=cost_options,
        steps=source.steps,
        is_mean=source.is_mean,
        all_fit=partial(usual_ways_fit, aligned=aligned) if method in ("auto", "lp") and not pins else None,
        in_turns=None if pins else in_turns,
        with_alternatives=True,
    )
    plan = replace(
        plan,
        recompute=cost_options.recompute,
        shard_optimizer=cost_options.shard_optimizer,
        shard_parameters=cost_options.shard_parameters,
        sizes=source.sizes,
        work=work_of(source.metagraph),
        workload=source.name,
    )
    plan = fitted_to_sets(plan, source.presences, may_change=method == "auto" and not pins and not aligned)
    return with_fixed(plan, calibration.step_s) if calibration else plan, cost_options


def with_outlook(
    plan: Plan,
    source: "Source",
    cost_options: CostOptions,
    *,
    profile: Profile | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan with how sure its step and its gain are; it is costed again some twenty times, and not searched."""
    from fractions import Fraction

    from spindle.planner.recost import Costs
    from spindle.planner.report.outlook import outlook_of
    from spindle.source import scaled_source

    assert plan.cluster is not None, "a plan that was made just now carries its cluster"

    def costs(source: "Source") -> Costs:
        assert plan.cluster is not None
        return Costs(source.metagraph, plan.cluster, cost_options, profile, source.steps, source.is_mean)

    def on_batches(factor: Fraction) -> Costs | None:
        other = scaled_source(source, factor)
        return costs(other) if other else None

    found = outlook_of(
        plan,
        costs(source),
        on_batches,
        calibration=calibration,
        can_profile=source.executable and any(metaop.operators for metaop in source.metagraph),
    )
    return replace(plan, outlook=found)


def make_metagraph(workload: "Workload") -> MetaGraph:
    """The MetaGraph of a workload, without costs yet."""
    from spindle.capture import capture
    from spindle.contract import contract

    return contract(capture(workload).graph)


def make_profile(
    workload: "Workload",
    *,
    num_devices: int | None = None,
    cluster: Cluster | str | None = None,
    known: Profile | None = None,
    optimizer: "OptimizerFactory | None" = None,
    launcher: Literal["auto", "ray", "processes", "torchrun"] = "auto",
    validate: bool = False,
    progress: Callable[[int, int], None] | None = None,
    keep: Callable[[Profile], None] | None = None,
) -> Profile:
    """Time the workload's operators, its optimizer and messages, for up to `num_devices` devices.

    `cluster`: what to measure for instead, of the kind of device at hand; without both, what is at hand. As many ranks
    measure at once as a run would have: on this machine; with `launcher` ray on the nodes of a Ray cluster; under
    torchrun all that it has started. Of several nodes messages between them are measured too. auto: torchrun's ranks,
    or the cluster that RAY_ADDRESS names, or this machine. `known` is not measured again; `keep(profile)` is called
    every few seconds, under torchrun on rank 0, with what is known by then. `validate` adds counts, for
    `spindle.cost.heldout` to leave out.
    """
    from spindle.capture import capture
    from spindle.clusterfile import parse_cluster
    from spindle.runtime.launch.torchrun import under_torchrun
    from spindle.runtime.profiling.bench_target import bench_target_for
    from spindle.runtime.profiling.profiler import measure_profile

    usual: BenchLauncher = "torchrun" if under_torchrun() else "ray" if os.environ.get("RAY_ADDRESS") else "processes"
    chosen = usual if launcher == "auto" else launcher
    where = parse_cluster(cluster or devices_at_hand(chosen)) if not isinstance(cluster, Cluster) else cluster
    num_devices = num_devices or where.num_devices
    return measure_profile(
        workload,
        capture(workload),
        num_devices=num_devices,
        target=bench_target_for(where, num_devices, chosen),
        cluster=where if cluster is not None else None,
        most_devices=max(num_devices, VALIDATED) if validate else None,
        known=known,
        optimizer=optimizer,
        progress=progress,
        keep=keep,
    )


ReadT = TypeVar("ReadT", Plan, Profile, Calibration)


def read_value(value: ReadT | Path | str | None, kind: type[ReadT]) -> ReadT | None:
    """A value as it is, or the file that holds it."""
    if value is None or isinstance(value, kind):
        return value
    from spindle.formats import read

    assert isinstance(value, Path | str)
    return read(value, kind)


def verify(
    workload: "Workload",
    plan: Plan | None = None,
    *,
    num_workers: int = 2,
    steps: int = 2,
    rtol: float | None = None,
    atol: float | None = None,
    optimizer: "OptimizerFactory | None" = None,
    scheduler: "SchedulerFactory | None" = None,
    metric: "Metric | None" = None,
    resume_under: Plan | int | None = None,
    launcher: "Launcher" = "auto",
    timeout_s: float = 60.0,
) -> "ParityReport":
    """Run `steps` steps as planned and in one process, and compare all that a step changes (docs/exactness.md).

    `plan` None makes one for `num_workers` devices. `optimizer`, `scheduler` and `metric` as `train` takes them; None
    is plain gradient descent. `resume_under`: another plan, or a number of devices to make one for; after half of the
    steps the run is saved, and resumed under it. Tolerances default to 1e-10 for float64 models, to rtol 1e-4 and
    atol 1e-5 for float32 (and 2e-6 of each tensor's largest value), to 10 % of that under bf16. Modules have their
    values back afterwards. The report's `ok` says whether both runs agree, its text how many of what were compared.

    One process steps with the planned run's gradients, once its own have been compared with them, so that each step is
    compared from the same parameters.
    """
    from spindle.runtime import parity
    from spindle.runtime.checkpoints.weights import require_values
    from spindle.runtime.controller import prepare

    require_values(workload)
    plans = [make_plan(workload, f"1x{num_workers}:cpu") if plan is None else plan]
    if resume_under is not None:
        again = resume_under
        plans.append(again if isinstance(again, Plan) else make_plan(workload, f"1x{again}:cpu"))
    prepared = [prepare(workload, each) for each in plans]
    precision = "bf16" if workload.reduce_dtype == "bf16" else workload.precision
    usual = parity.default_tolerance(prepared[0].captured.parameters, precision)
    tolerance = replace(usual, rtol=usual.rtol if rtol is None else rtol, atol=usual.atol if atol is None else atol)
    factory = optimizer or parity.default_optimizer
    planned = parity.run_planned(
        workload,
        prepared,
        steps,
        optimizer=factory,
        scheduler=scheduler,
        metric=metric,
        launcher=launcher,
        timeout_s=timeout_s,
    )
    reference = parity.run_reference(
        workload,
        steps,
        optimizer=factory,
        scheduler=scheduler,
        metric=metric,
        follow=parity.joined_gradients(planned),
    )
    return parity.compare(reference, planned, tolerance=tolerance)


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
    from spindle.runtime.controller import check_steps, launched, merge_traces, place_among_drivers, prepare
    from spindle.runtime.evaluation.prepare import prepare_beside
    from spindle.runtime.evaluation.scores import Evaluations
    from spindle.runtime.faults.elastic import Elastic
    from spindle.runtime.faults.preemption import Notice
    from spindle.runtime.faults.recovery import Attempts, left_to_torchrun, newest_of_this_job
    from spindle.runtime.faults.replicas import steps_between
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
    with opened(workload, kept, resume, place, initial) as start:
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
        elastic = Elastic(failures, launcher, plan, anew)
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
            )
            directory = kept.directory if kept else None
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
