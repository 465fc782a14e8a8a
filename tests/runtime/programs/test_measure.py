"""Measure: which operators are timed, on how many devices, and what the profile then says."""

import functools
import platform

import torch

from spindle.capture import Captured, capture
from spindle.runtime.comms.host import threads_of_rank
from spindle.runtime.profiling.profiler import measure_profile
from spindle.values.profile import Profile
from spindle.workload import Workload
from tests.tiny_workloads import frozen_tower, two_towers


@functools.cache
def captured(name: str) -> tuple[Workload, Captured]:
    workload = {"two_towers": two_towers, "frozen_tower": frozen_tower}[name](torch.float32)
    return workload, capture(workload)


def profile(name: str, num_devices: int, progress: list[tuple[int, int]] | None = None) -> Profile:
    workload, found = captured(name)
    told: list[tuple[int, int]] = [] if progress is None else progress
    return measure_profile(
        workload,
        found,
        num_devices=num_devices,
        seconds_per_entry=0.0,
        progress=lambda done, total: told.append((done, total)),
    )


def test_each_kind_on_each_count_that_divides_its_batch() -> None:
    """Batches of 6 and 5 on up to 4 devices: 1, 2, 3 and 1; what mixes samples on one device only."""
    found = profile("two_towers", 4)
    counts: dict[str, set[int]] = {}
    for entry in found.entries:
        counts.setdefault(entry.kind, set()).add(entry.num_devices)
    graph = captured("two_towers")[1].graph
    wanted: dict[str, set[int]] = {}
    for operator in graph:
        usable = {n for n in (1, 2, 3, 4) if operator.batch_size % n == 0} if operator.splittable else {1}
        wanted.setdefault(operator.kind, usable)
    assert counts == wanted
    assert {1, 2, 3} in counts.values()
    assert {1} in counts.values()


def test_times_are_real_and_the_machine_is_named() -> None:
    found = profile("two_towers", 1)
    assert all(entry.forward_s > 0 for entry in found.entries)
    assert found.device.startswith("cpu")
    assert dict(found.versions) == {
        "dtype": "fp32",
        "python": platform.python_version(),
        "ranks": "1",
        "threads": str(threads_of_rank(1)),
        "torch": torch.__version__,
    }


def test_a_layer_without_gradients_has_no_backward() -> None:
    """The teacher runs under no_grad: its backward takes no time, and is not run."""
    entries = profile("frozen_tower", 1).by_kind
    teacher = [op for op in captured("frozen_tower")[1].graph if op.component == "teacher"]
    assert teacher
    assert {(e.backward_s, e.bare_forward_s) for op in teacher for e in entries[op.kind].values()} == {(0.0, 0.0)}
    trained = [op for op in captured("frozen_tower")[1].graph if op.component == "trained"]
    assert all(e.backward_s > 0 < e.bare_forward_s for op in trained for e in entries[op.kind].values())


def test_progress_counts_every_entry() -> None:
    told: list[tuple[int, int]] = []
    found = profile("two_towers", 2, told)
    assert {total for _, total in told} == {found.size}
    assert told == sorted(told)
    assert told[-1] == (found.size, found.size)


def test_measuring_changes_nothing() -> None:
    """Timing runs on copies: parameters keep their values and get no gradients."""
    workload, _ = captured("frozen_tower")
    before = [(p.detach().clone(), p.grad) for _, p in workload.named_parameters()]
    profile("frozen_tower", 1)
    for (value, gradient), (_, parameter) in zip(before, workload.named_parameters(), strict=True):
        assert torch.equal(value, parameter)
        assert parameter.grad is gradient
