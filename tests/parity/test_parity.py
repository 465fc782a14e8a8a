"""Parity: a planned run gives the losses, gradients and updates of one process, for every plan and number of ranks."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import spindle
from spindle.runtime import parity
from spindle.runtime.controller import launched, prepare
from spindle.runtime.parity import ParityReport, Tolerance
from spindle.runtime.programs.program import Op, Program
from spindle.runtime.reference import Outcome
from spindle.workload import Workload
from tests.drawn import SEEDS, drawn
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import FAMILIES

STEPS = 2


@functools.cache
def built(family: str, dtype: torch.dtype) -> tuple[Workload, Outcome]:
    """A workload with its reference run; capture and reference are made once."""
    workload = FAMILIES[family](dtype)
    return workload, parity.run_reference(workload, STEPS, optimizer=parity.default_optimizer)


def report_of(
    family: str, dtype: torch.dtype, program: Program | None = None, plan: spindle.Plan | None = None
) -> ParityReport:
    workload, reference = built(family, dtype)
    assert plan is not None
    prepared = prepare(workload, plan)
    if program is not None:
        prepared = replace(prepared, program=program)
    with launched(prepared, optimizer=parity.default_optimizer, launcher="threads", timeout_s=30.0) as run:
        planned = parity.observed(run, STEPS)
    tolerance = parity.default_tolerance(prepared.captured.parameters)
    return parity.compare(reference, planned, tolerance=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@drawn(4, num_ranks=range(1, 5), seed=SEEDS)
def test_random_plans_are_exact_in_float64(family: str, num_ranks: int, seed: int) -> None:
    """Any valid plan on 1 to 4 ranks agrees with one process to 1e-10, whatever the buckets of its reductions hold."""
    workload, _ = built(family, torch.float64)
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed)
    plan = replace(plan, bucket_bytes=(1, 2**10, 25 * 2**20)[seed % 3])
    report = report_of(family, torch.float64, plan=plan)
    assert report.ok, str(report)
    assert report.tolerance == Tolerance(1e-10, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planned_plans_are_exact(family: str, num_ranks: int, dtype: torch.dtype) -> None:
    """What the planner plans agrees too, in both float types."""
    workload, _ = built(family, dtype)
    plan = spindle.make_plan(workload, f"1x{num_ranks}:cpu")
    report = report_of(family, dtype, plan=plan)
    assert report.ok, str(report)


@pytest.mark.parametrize("family", ["five_families", "encoder_decoder"])
@pytest.mark.parametrize("num_ranks", [6, 8])
def test_many_ranks_are_exact_in_float32(family: str, num_ranks: int) -> None:
    """Wide clusters: batches that do not divide evenly over them included."""
    workload, _ = built(family, torch.float32)
    plan = random_plan(spindle.make_metagraph(workload), num_ranks, seed=num_ranks)
    report = report_of(family, torch.float32, plan=plan)
    assert report.ok, str(report)


def test_a_reduction_left_out_is_found() -> None:
    """Negative control: without one bucket's reduction the gradients are wrong, and the report says so."""
    workload, _ = built("two_towers", torch.float64)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    program = prepare(workload, plan).program
    bucket = next(b for b in program.buckets if len(b.ranks) == 2)
    without = tuple(
        tuple(i for i in instructions if not (i.op in (Op.REDUCE, Op.AWAIT) and i.target == bucket.name))
        for instructions in program.instructions
    )
    report = report_of("two_towers", torch.float64, program=replace(program, instructions=without), plan=plan)
    assert not report.ok
    wrong = {row.name.split(" ")[0] for row in report.rows if row.quantity == "gradient" and not row.ok}
    assert wrong == set(bucket.parameters)


def test_a_wrong_task_weight_is_found() -> None:
    """Negative control: a loss counted at another weight changes gradients, not losses of the first step."""
    workload, _ = built("two_towers", torch.float64)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    program = prepare(workload, plan).program
    heavier = tuple((task, 1.001 * weight if task == "fit" else weight) for task, weight in program.weights)
    report = report_of("two_towers", torch.float64, program=replace(program, weights=heavier), plan=plan)
    assert not report.ok
    assert all(row.ok for row in report.rows if row.quantity == "loss" and row.step == 1)


def test_verify_leaves_the_modules_as_they_were() -> None:
    """Verification trains copies, and gives the user's modules their values back."""
    workload = FAMILIES["two_towers"](torch.float32)
    before = {name: p.detach().clone() for name, p in workload.named_parameters()}
    assert spindle.verify(workload, num_workers=2, launcher="threads").ok
    assert all(torch.equal(before[name], p) for name, p in workload.named_parameters())
    assert all(p.grad is None for _, p in workload.named_parameters())


def test_a_reference_without_a_finite_loss_is_told() -> None:
    """A loss that diverges in one process too is no fault of the plan, though nothing agrees with it."""
    losses = [{"t": 1.0, "u": 1.0}, {"t": 1.0, "u": float("nan")}]
    report = parity.compare(
        Outcome(losses), Outcome([losses[0], {"t": 1.0, "u": 2.0}]), tolerance=Tolerance(1e-4, 1e-5)
    )
    assert not report.ok
    assert "one process itself has no finite loss of 'u' in step 2" in str(report)
    sound = parity.compare(Outcome(losses[:1]), Outcome([{"t": 2.0}]), tolerance=Tolerance(1e-4, 1e-5))
    assert not sound.ok
    assert "itself" not in str(sound)


def test_report_names_the_worst_parameters() -> None:
    """The text of a failed report says what differs, where and by how much."""
    _, reference = built("two_towers", torch.float64)
    shifted = {name: value + (name == "left.stem.bias") for name, value in reference.values.items()}
    report = parity.compare(reference, replace(reference, values=shifted), tolerance=Tolerance(1e-10, 1e-10))
    assert not report.ok
    assert "left.stem.bias" in str(report)
    assert "DIFFERS" in str(report)


@pytest.mark.parametrize(
    ("largest", "error", "dtype", "is_allowed"),
    [
        (1.0, 9e-6, torch.float32, True),
        (1.0, 2e-5, torch.float32, False),
        (1.2e4, 6e-3, torch.float32, True),  # half a rounding of the largest value
        (1.2e4, 6e-2, torch.float32, False),
        (1.2e4, 2e-5, torch.float64, False),
        (0.1, 2e-5, torch.bfloat16, False),
    ],
)
def test_small_sums_of_large_terms_are_as_exact_as_these(
    largest: float, error: float, dtype: torch.dtype, is_allowed: bool
) -> None:
    """The error of an element that should be zero beside one of `largest`."""
    allowed = Tolerance(1e-4, 1e-5).allowed(torch.tensor([0.0, largest], dtype=dtype))
    assert bool(error <= allowed[0]) is is_allowed


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.tensor(100_001), torch.tensor(100_000)),
        (torch.tensor(1 + 2j), torch.tensor(1 + 3j)),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("nan")])),
    ],
)
def test_values_of_every_type_are_compared(ours: Tensor, theirs: Tensor) -> None:
    """Counts and flags must be the same, and both parts of a complex number agree."""
    for value, ok in ((ours, False), (theirs, True)):
        planned, alone = (Outcome([{"t": 1.0}], values={"b": v}, buffers=frozenset("b")) for v in (value, theirs))
        report = parity.compare(alone, planned, tolerance=Tolerance(1e-4, 1e-5))
        assert report.ok is ok, str(report)
