"""The public verbs: plan, profile, verify, train. Each is a few lines around the rooms that do the work."""

import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from spindle.calibration import Calibration, MeasuredStep, calibrated
from spindle.cluster import Cluster
from spindle.errors import InfeasibleError, InputError, PlanError, SpindleWarning
from spindle.metagraph import MetaGraph
from spindle.plan import Plan, laid_out, with_fixed
from spindle.pricing import Pricing
from spindle.profile import Profile
from spindle.trace import Trace

if TYPE_CHECKING:
    import torch

    from spindle.metrics import Callback
    from spindle.runtime.controller import Launcher
    from spindle.runtime.optimizers import Metric, OptimizerFactory, SchedulerFactory
    from spindle.runtime.parity import ParityReport
    from spindle.runtime.profiling.site import SiteLauncher
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
    source = Source(workload, Pricing(), executable=True) if isinstance(workload, MetaGraph) else source_of(workload)
    measured, fitted = _read(profile, Profile), _read(calibration, Calibration)
    plan, pricing = plan_source(
        source,
        where,
        measured,
        calibration=fitted,
        method=method,
        time_limit_s=time_limit_s,
        start=_read(start, Plan),
        pins=pins,
    )
    return with_outlook(plan, source, pricing, profile=measured, calibration=fitted)


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
) -> tuple[Plan, Pricing]:
    """The plan of a loaded source, and how it wants the workload trained so that it fits.

    The plan says so too, and a run of it does so.
    """
    from spindle.cost.measured import check_device, measured_links, warn_of_gaps
    from spindle.cost.sampled import Priced
    from spindle.cost.style import style_of
    from spindle.execution import as_run
    from spindle.planner.choose import solve_fitting
    from spindle.planner.report.rates import work_of
    from spindle.planner.sets import fitted_to_sets
    from spindle.planner.solve import solve, usual_ways_fit

    def solved(priced: Priced, where: Cluster, share: float) -> Plan:
        plan = solve(
            priced.metagraph,
            where,
            steps=priced.steps,
            method=method,
            time_limit_s=time_limit_s,
            share=share,
            aligned=aligned,
            start=start,
            pins=pins,
        )
        return laid_out(plan, priced.metagraph)

    if profile is not None:
        check_device(cluster, profile)
        warn_of_gaps(source.metagraph, profile)
        cluster = measured_links(cluster, profile)
    pricing = source.pricing
    if profile is not None:
        pricing = replace(pricing, execution=style_of(source.metagraph, cluster, profile, pricing))
    cluster = as_run(cluster, pricing.execution)
    if calibration is not None:
        cluster = calibrated(cluster, calibration)
    plan, pricing = solve_fitting(
        source.metagraph,
        cluster,
        solved,
        profile=profile,
        pricing=pricing,
        steps=source.steps,
        is_mean=source.is_mean,
        all_fit=partial(usual_ways_fit, aligned=aligned) if method in ("auto", "lp") and not pins else None,
        with_alternatives=True,
    )
    plan = replace(
        plan,
        recompute=pricing.recompute,
        shard_optimizer=pricing.shard_optimizer,
        sizes=source.sizes,
        work=work_of(source.metagraph),
    )
    plan = fitted_to_sets(plan, source.presences, may_change=method == "auto" and not pins and not aligned)
    return with_fixed(plan, calibration.step_s) if calibration else plan, pricing


def with_outlook(
    plan: Plan,
    source: "Source",
    pricing: Pricing,
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
        return Costs(source.metagraph, plan.cluster, pricing, profile, source.steps, source.is_mean)

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


def make_calibration(
    source: "Callable[[MeasuredStep, Cluster], Source] | Path | str",
    cluster: Cluster | str,
    steps: Sequence[MeasuredStep] | Path | str,
    *,
    profile: Profile | Path | str | None = None,
    method: str = "sequential",
) -> Calibration:
    """Fit factors on computation, host and network, and a fixed part of each step, to steps that were measured.

    `source`: a spec, or file.py:workload, whose batches are scaled to each row's, or a function from a row and its
    cluster to what ran. `steps`: rows, or a CSV file of them (gpus,per_gpu_batch,seconds_per_step). `method`: how it
    ran; by default data parallel on all devices, tasks in turn. Each row's devices are full nodes of `cluster`, or a
    part of one. The calibration's rows carry its own prediction of each; its `undetermined` and `inseparable` say what
    the rows leave open.

    Raises ProfileError without rows, InfeasibleError when a row has no plan, and errors as `make_plan`.
    """
    from spindle.calibrationfile import read_steps
    from spindle.clusterfile import parse_cluster
    from spindle.cost.measured import measured_links
    from spindle.errors import ProfileError
    from spindle.execution import as_run
    from spindle.planner.calibrate import Case, calibrate_cases
    from spindle.planner.recost import Costs
    from spindle.planner.report.compare import resized
    from spindle.source import on_batches

    rows = read_steps(steps).rows if isinstance(steps, Path | str) else steps
    if not rows:
        raise ProfileError("no measured step is given to calibrate on; give at least two")
    whole = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    measured = _read(profile, Profile)
    load = source if callable(source) else on_batches(str(source))
    rare: set[str] = set()

    def case(row: MeasuredStep) -> Case:
        with _about_row(row):
            where = resized(whole, row.gpus)
            loaded = load(row, where)
        rare.update(presence.task for presence in loaded.presences if not presence.is_constant)
        linked = as_run(measured_links(where, measured) if measured else where, loaded.pricing.execution)

        def solve(calibration: Calibration) -> tuple[Plan, Pricing]:
            with _about_row(row):
                return plan_source(loaded, where, measured, calibration=calibration, method=method)

        def costs(pricing: Pricing) -> Costs:
            return Costs(loaded.metagraph, linked, pricing, measured, loaded.steps, loaded.is_mean)

        return Case(row, solve, costs)

    cases = [case(row) for row in rows]
    if rare:
        _warn_of_rare(sorted(rare))
    found = calibrate_cases(cases, whole.device.name)
    return replace(found, method=method, source="" if callable(source) else Path(source).name)


def _warn_of_rare(tasks: Sequence[str]) -> None:
    """Say that measured steps are taken for steps of all tasks."""

    warnings.warn(
        f"rows are taken for steps with all tasks, and {', '.join(tasks)} takes part in some steps only: give the "
        "seconds of steps that had all, not a mean over all steps",
        SpindleWarning,
        stacklevel=3,
    )


@contextmanager
def _about_row(row: MeasuredStep) -> Iterator[None]:
    """Errors inside say which measured row they are about."""
    try:
        yield
    except (InputError, InfeasibleError) as error:
        raise type(error)(f"the row of {row}: {error}") from None


def make_metagraph(workload: "Workload") -> MetaGraph:
    """The MetaGraph of a workload, not yet priced."""
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
    """Time the workload's operators, its optimiser and messages, for up to `num_devices` devices.

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
    from spindle.runtime.profiling.profiler import measure_profile
    from spindle.runtime.profiling.site import site_for

    usual: SiteLauncher = "torchrun" if under_torchrun() else "ray" if os.environ.get("RAY_ADDRESS") else "processes"
    chosen = usual if launcher == "auto" else launcher
    where = parse_cluster(cluster or devices_at_hand(chosen)) if not isinstance(cluster, Cluster) else cluster
    num_devices = num_devices or where.num_devices
    return measure_profile(
        workload,
        capture(workload),
        num_devices=num_devices,
        site=site_for(where, num_devices, chosen),
        cluster=where if cluster is not None else None,
        most_devices=max(num_devices, VALIDATED) if validate else None,
        known=known,
        optimizer=optimizer,
        progress=progress,
        keep=keep,
    )


ReadT = TypeVar("ReadT", Plan, Profile, Calibration)


def _read(value: ReadT | Path | str | None, kind: type[ReadT]) -> ReadT | None:
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
    from spindle.runtime.controller import prepare

    plans = [make_plan(workload, f"1x{num_workers}:cpu") if plan is None else plan]
    if resume_under is not None:
        again = resume_under
        plans.append(again if isinstance(again, Plan) else make_plan(workload, f"1x{again}:cpu"))
    prepared = [prepare(workload, each) for each in plans]
    usual = parity.default_tolerance(prepared[0].captured.parameters, workload.precision)
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
    that stopped the training early.
    """

    losses: tuple[dict[str, float], ...]
    trace: Trace
    plan: Plan
    train_s: float
    step_seconds: tuple[float, ...] = ()
    first_step: int = 0
    ended: str | None = None

    @property
    def step_s(self) -> float:
        """Median seconds of a step, since the first ones take longer; 0 when there was none."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0


def train(
    workload: "Workload",
    plan: Plan | None = None,
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
    resume: bool | Path | str = False,
) -> TrainResult:
    """Train `workload` as planned, on Ray unless told otherwise; the trained weights end up in the user's modules.

    `optimizer`: a function from the list of all parameters, frozen ones too, to a torch optimizer with any groups of
    them; if its argument is called `named_parameters` it gets (name, parameter) pairs. `scheduler`: one from an
    optimizer to its schedule. `metric`: the number that a schedule such as ReduceLROnPlateau watches, from a step's
    losses by task.
    `plan` None plans for the devices at hand. `on_step(step, losses)` is called in this process for every step, a few
    steps late; `callbacks` are told more (`spindle.metrics`). The spans of the last `trace_steps` steps are returned.
    `timeout_s` bounds every wait of one rank for another, and how long a step may take.

    `checkpoints`: a directory, which all machines share, for a checkpoint every `checkpoint_every` steps and at the
    end; the newest `keep_checkpoints` stay. `resume`: go on from a checkpoint, or, when True, from the newest in the
    directory if there is one; plan and number of devices may have changed. `steps` counts from the first run on.

    Raises RunError naming rank, wave and instruction when a worker raises, dies or stalls; CheckpointError for a
    checkpoint that is not whole or of another model.
    """
    from spindle.runtime.checkpoint import Checkpoints, to_resume
    from spindle.runtime.controller import launched, merge_traces, place_among_drivers, prepare
    from spindle.runtime.training import run_steps
    from spindle.runtime.watch import Watch

    if steps < 1:
        raise PlanError(f"steps is {steps}; train at least one")
    kept = None
    if checkpoints is not None:
        kept = Checkpoints(directory=Path(checkpoints), every=checkpoint_every, keep=keep_checkpoints)
    before = to_resume(workload, kept, resume, place_among_drivers(launcher))
    first, seed = (before.step, before.seed) if before else (0, seed)
    if first >= steps:
        raise PlanError(f"{first} steps are done already and steps is {steps}; ask for more, it counts from the start")
    prepared = prepare(workload, plan or make_plan(workload, devices_at_hand(launcher)))
    with launched(
        prepared,
        optimizer=optimizer,
        scheduler=scheduler,
        metric=metric,
        launcher=launcher,
        seed=seed,
        timeout_s=timeout_s,
        saves=kept is not None or before is not None,
    ) as run:
        if before is not None:
            run.resume(before)
        with Watch(prepared, callbacks, leads=run.crew.leads).running(first) as watch:
            found = run_steps(
                run,
                first=first,
                last=steps,
                seed=seed,
                on_step=on_step,
                trace_steps=trace_steps,
                checkpoints=kept,
                watch=watch,
            )
        state = run.state()
    _load(workload, state)
    trace = merge_traces(found.reports, prepared.program.num_ranks)
    return TrainResult(
        tuple(found.losses), trace, prepared.plan, found.train_s, tuple(found.seconds), first, found.ended
    )


def load_checkpoint(workload: "Workload", path: Path | str) -> int:
    """Put the weights of a checkpoint into the user's modules; the steps it was trained for.

    Raises CheckpointError when it is not whole or of another model.
    """
    from spindle.runtime.checkpoint import load_weights

    return load_weights(workload, Path(path)).step


def export(workload: "Workload", directory: Path | str) -> dict[str, Path]:
    """Write each component to `directory`/NAME: by its own `save_pretrained` where it has one, else as safetensors."""
    from spindle.runtime.checkpoint import export as export_components

    return export_components(workload, Path(directory))


def _load(workload: "Workload", state: "Mapping[str, torch.Tensor]") -> None:
    import torch

    with torch.no_grad():
        for name, tensor in (*workload.named_parameters(), *workload.named_buffers()):
            if name in state:
                tensor.copy_(state[name])


def devices_at_hand(launcher: "Launcher" = "processes") -> str:
    """This machine as a cluster: its GPUs, or its cores. Under torchrun a device for each rank that it has started; for
    Ray, where RAY_ADDRESS names a cluster, that one.
    """
    import torch

    from spindle.runtime.host import usable_cores
    from spindle.runtime.launch.torchrun import nodes_of_job, under_torchrun

    gpus = torch.cuda.device_count()
    if launcher in ("auto", "torchrun") and under_torchrun():
        nodes, ranks = nodes_of_job()
        return f"{nodes}x{ranks}" if ranks <= gpus else f"{nodes}x{ranks}:cpu"
    if launcher in ("auto", "ray") and os.environ.get("RAY_ADDRESS"):
        from spindle.runtime.launch.ray_crew import devices_of_cluster

        return devices_of_cluster()
    return f"1x{gpus}" if gpus else f"1x{len(usable_cores())}:cpu"
