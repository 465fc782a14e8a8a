"""Verifying: a workload and a plan in; how a planned run compares with one process out."""

from dataclasses import replace
from typing import TYPE_CHECKING

from spindle.values.plan import Plan
from spindle.verbs.planning import make_plan

if TYPE_CHECKING:
    from spindle.runtime.controller import Launcher
    from spindle.runtime.parity import ParityReport
    from spindle.runtime.updates.optimizers import OptimizerFactory
    from spindle.runtime.updates.schedules import Metric, SchedulerFactory
    from spindle.workload import Workload


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
