"""Batch: a workload spec and a number of samples a step in, the same spec with its tasks' batches scaled to it out."""

from dataclasses import replace
from fractions import Fraction
from math import gcd, lcm

from spindle.errors import WorkloadError
from spindle.spec.values import WorkloadSpec


def scaled_by(spec: WorkloadSpec, factor: Fraction) -> WorkloadSpec | None:
    """The batch of each task times a factor; None where one would be no whole number."""
    batches = [factor * task.batch_size for task in spec.tasks]
    if any(batch.denominator != 1 for batch in batches):
        return None
    tasks = tuple(replace(task, batch_size=int(batch)) for task, batch in zip(spec.tasks, batches, strict=True))
    return replace(spec, tasks=tasks)


def per_device(spec: WorkloadSpec, batch: int, num_devices: int) -> WorkloadSpec:
    """The spec with `batch` samples a step on each of `num_devices`: a single task has batch * num_devices samples,
    several are scaled by one factor, so that their batches have that sum.

    Raises WorkloadError where a task's batch would be no whole number, and names batches that work.
    """
    total, samples = sum(task.batch_size for task in spec.tasks), batch * num_devices
    found = scaled_by(spec, Fraction(samples, total))
    if found is not None:
        return found
    needed = lcm(*(total // gcd(total, num_devices * task.batch_size) for task in spec.tasks))
    task = next(task for task in spec.tasks if samples * task.batch_size % total)
    raise WorkloadError(
        f"{batch} samples on each of {num_devices} devices are {samples} a step, of which task {task.name!r} would "
        f"have {samples * task.batch_size / total:.6g} (its batch of {task.batch_size} scaled by {samples}/{total}); "
        f"give a multiple of {needed}, so that each task has whole samples"
    )
