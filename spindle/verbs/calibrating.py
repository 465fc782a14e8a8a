"""Calibrating: factors of the cost model fitted to measured steps."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spindle.errors import InfeasibleError, InputError, SpindleWarning
from spindle.values.calibration import Calibration, MeasuredStep
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.plan import Plan
from spindle.values.profile import Profile
from spindle.verbs.planning import plan_source, read_value

if TYPE_CHECKING:
    from spindle.verbs.source import Source


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
    from spindle.cost.measured.links import measured_links
    from spindle.errors import ProfileError
    from spindle.files.calibrationfile import read_steps
    from spindle.files.clusterfile import parse_cluster
    from spindle.planner.calibrate import Case, calibrate_cases
    from spindle.planner.recost import Costs
    from spindle.planner.report.sizes import resized
    from spindle.values.execution import as_run
    from spindle.verbs.source import on_batches

    rows = read_steps(steps).rows if isinstance(steps, Path | str) else steps
    if not rows:
        raise ProfileError("no measured step is given to calibrate on; give at least two")
    whole = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    measured = read_value(profile, Profile)
    load = source if callable(source) else on_batches(str(source))
    rare: set[str] = set()

    def case(row: MeasuredStep) -> Case:
        with _about_row(row):
            where = resized(whole, row.gpus)
            loaded = load(row, where)
        rare.update(presence.task for presence in loaded.presences if not presence.is_constant)
        linked = as_run(measured_links(where, measured) if measured else where, loaded.cost_options.execution)

        def solve(calibration: Calibration) -> tuple[Plan, CostOptions]:
            with _about_row(row):
                return plan_source(loaded, where, measured, calibration=calibration, method=method)

        def costs(cost_options: CostOptions) -> Costs:
            return Costs(loaded.metagraph, linked, cost_options, measured, loaded.steps, loaded.is_mean)

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
