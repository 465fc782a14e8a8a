"""The public verbs: plan, profile, verify, train. Each is a few lines around the rooms that do the work."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spindle.cluster import Cluster
from spindle.errors import PlanError
from spindle.metagraph import MetaGraph
from spindle.plan import Plan
from spindle.pricing import Pricing
from spindle.profile import Profile
from spindle.trace import Trace

if TYPE_CHECKING:
    import torch

    from spindle.runtime.controller import Launcher
    from spindle.runtime.parity import ParityReport
    from spindle.runtime.worker import OptimizerFactory, SchedulerFactory
    from spindle.source import Source
    from spindle.workload import Workload

StepCallback = Callable[[int, dict[str, float]], None]


def make_plan(
    workload: "Workload | MetaGraph",
    cluster: Cluster | str,
    *,
    profile: Profile | Path | str | None = None,
    method: str = "auto",
    time_limit_s: float | None = None,
) -> Plan:
    """Plan a workload (or a MetaGraph) on a cluster; no device is needed. `print(plan)` is a Gantt chart.

    `cluster`: a Cluster, `"4x8"`, `"4x8:a100-80g"` or a YAML file. `profile`: measured times, or the file that holds
    them; without it times are predicted from the architecture. Raises InfeasibleError when nothing fits.
    """
    from spindle.clusterfile import parse_cluster
    from spindle.source import Source

    where = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    metagraph = workload if isinstance(workload, MetaGraph) else make_metagraph(workload)
    source = Source(metagraph, Pricing(), executable=True)
    return plan_source(source, where, _profile(profile), method=method, time_limit_s=time_limit_s)[0]


def plan_source(
    source: "Source",
    cluster: Cluster,
    profile: Profile | None = None,
    *,
    method: str = "auto",
    time_limit_s: float | None = None,
    aligned: bool = False,
) -> tuple[Plan, Pricing]:
    """The plan of a loaded source, and how it wants the workload trained so that it fits.

    Sharded optimiser states and recompute are only chosen for a dry run: the runtime does not do them yet.
    """
    from spindle.cost.price import price
    from spindle.planner.choose import solve_fitting
    from spindle.planner.solve import solve

    def solved(metagraph: MetaGraph, where: Cluster) -> Plan:
        return solve(metagraph, where, method=method, time_limit_s=time_limit_s, aligned=aligned)

    if source.executable:
        return solved(price(source.metagraph, cluster, profile, pricing=source.pricing), cluster), source.pricing
    return solve_fitting(source.metagraph, cluster, solved, profile=profile, pricing=source.pricing)


def make_metagraph(workload: "Workload") -> MetaGraph:
    """The MetaGraph of a workload, not yet priced."""
    from spindle.capture import capture
    from spindle.contract import contract

    return contract(capture(workload).graph)


def make_profile(
    workload: "Workload", *, num_devices: int, progress: Callable[[int, int], None] | None = None
) -> Profile:
    """Time the workload's operators on this machine, for every device count up to `num_devices` that is valid."""
    from spindle.capture import capture
    from spindle.runtime.measure import measure_profile

    return measure_profile(workload, capture(workload), num_devices=num_devices, progress=progress)


def _profile(profile: Profile | Path | str | None) -> Profile | None:
    if profile is None or isinstance(profile, Profile):
        return profile
    from spindle.formats import read

    return read(profile, Profile)


def verify(
    workload: "Workload",
    plan: Plan | None = None,
    *,
    num_workers: int = 2,
    steps: int = 2,
    rtol: float | None = None,
    atol: float | None = None,
    optimizer: "OptimizerFactory | None" = None,
    launcher: "Launcher" = "auto",
    timeout_s: float = 60.0,
) -> "ParityReport":
    """Run `steps` steps as planned and in one process, and compare losses, all gradients and all updates.

    `plan` None makes one for `num_workers` devices. Tolerances default to 1e-10 for float64 models, to rtol 1e-4 and
    atol 1e-5 for float32, and to 10 % of each tensor's largest value under bf16. Modules have their values back
    afterwards. The report's `ok` says whether both runs agree.
    """
    from spindle.runtime import parity
    from spindle.runtime.controller import launched, prepare

    prepared = prepare(workload, plan or make_plan(workload, f"1x{num_workers}:cpu"))
    optimizer = optimizer or parity.default_optimizer
    usual = parity.default_tolerance(prepared.captured.parameters, workload.precision)
    tolerance = replace(usual, rtol=usual.rtol if rtol is None else rtol, atol=usual.atol if atol is None else atol)
    with launched(prepared, optimizer=optimizer, launcher=launcher, timeout_s=timeout_s) as run:
        losses, reports = run.steps(steps, keep_gradients=True, dropout=False)
        final = run.state()
    reference = parity.run_reference(workload, steps, optimizer=optimizer)
    return parity.compare(
        reference,
        losses,
        reports,
        {name: value for name, value in final.items() if name in reference.parameters},
        tolerance=tolerance,
    )


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind: losses of each task by step, the trace of its last steps, and how long it took."""

    losses: tuple[dict[str, float], ...]
    trace: Trace
    plan: Plan
    train_s: float

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return self.train_s / len(self.losses)


def train(
    workload: "Workload",
    plan: Plan | None = None,
    *,
    optimizer: "OptimizerFactory",
    scheduler: "SchedulerFactory | None" = None,
    steps: int,
    launcher: "Launcher" = "auto",
    on_step: StepCallback | None = None,
    trace_steps: int = 5,
    seed: int = 0,
    timeout_s: float = 60.0,
) -> TrainResult:
    """Train `workload` as planned, on Ray unless told otherwise; the trained weights end up in the user's modules.

    `optimizer`: a function from a list of parameters (or parameter groups, where components have settings of their own)
    to a torch optimizer; each rank makes one over what it holds. `scheduler`: one from an optimizer to its schedule.
    `plan` None plans for the devices at hand. `on_step(step, losses)` is called in this process for every step, a few
    steps late. The spans of the last `trace_steps` steps are returned. `timeout_s` bounds every wait of one rank for
    another. Raises RunError naming rank, wave and instruction when a worker raises, dies or stalls.
    """
    from spindle.runtime.controller import launched, merge_traces, prepare

    if steps < 1:
        raise PlanError(f"steps is {steps}; train at least one")
    prepared = prepare(workload, plan or make_plan(workload, devices_at_hand()))
    losses: list[dict[str, float]] = []
    with launched(
        prepared, optimizer=optimizer, scheduler=scheduler, launcher=launcher, seed=seed, timeout_s=timeout_s
    ) as run:
        started = time.perf_counter()
        chunk, reports = 1, []
        while len(losses) < steps:
            keep = len(losses) >= steps - trace_steps
            count = min(chunk, steps - len(losses) - (0 if keep else trace_steps)) or 1
            chunk_started = time.perf_counter()
            found, reports_now = run.steps(count, keep_spans=keep)
            reports += reports_now if keep else []
            for values in found:
                losses.append(values)
                if on_step is not None:
                    on_step(len(losses), values)
            chunk = _next_chunk(count, time.perf_counter() - chunk_started)
        train_s = time.perf_counter() - started
        state = run.state()
    _load(workload, state)
    return TrainResult(tuple(losses), merge_traces(reports, prepared.program.num_ranks), prepared.plan, train_s)


def _next_chunk(count: int, took_s: float, target_s: float = 0.25) -> int:
    """Steps of the next call: so many that a call is rare but progress is seen."""
    return max(1, min(2 * count, int(count * target_s / max(took_s, 1e-6))))


def _load(workload: "Workload", state: "Mapping[str, torch.Tensor]") -> None:
    import torch

    with torch.no_grad():
        for name, tensor in (*workload.named_parameters(), *workload.named_buffers()):
            if name in state:
                tensor.copy_(state[name])


def devices_at_hand() -> str:
    """This machine as a cluster: its GPUs, or its cores."""
    import os

    import torch

    gpus = torch.cuda.device_count()
    return f"1x{gpus}" if gpus else f"1x{os.cpu_count() or 1}:cpu"
