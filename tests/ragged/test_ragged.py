"""Parity of recorded runs: random task code on batches of changing shapes gives what one process gives, in any plan.

SPINDLE_RAGGED_EXAMPLES sets how many cases are tried; `benchmarks/fuzz/ragged_fuzz.py` tries many and prints a summary.
"""

import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spindle
from spindle.capture.operators import of_task
from spindle.errors import SpindleError, WorkloadError
from spindle.inputs.batch import SampledBatch
from spindle.runtime.programs.messages import Layouts, StepLayout
from spindle.runtime.steps import batch_shards, executor
from spindle.values.graph import TensorSpec
from spindle.values.units import SAMPLES, Bounds, Units
from spindle.workload import Batch, Workload
from tests.ragged.ragged_tasks import Case, Stack, TaskCase, TowerCase, plan_of, random_case, verdict_of, workload_of
from tests.random_plans import random_plan

EXAMPLES = int(os.environ.get("SPINDLE_RAGGED_EXAMPLES", "12"))
PARTS = 4  # so that none takes as long as a test that hangs


@pytest.mark.timeout(60 + 20 * EXAMPLES)
@pytest.mark.parametrize("part", range(PARTS))
@settings(
    max_examples=-(-EXAMPLES // PARTS), phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # smaller() shrinks better
@given(seed=st.integers(0, 10**6))
def test_random_task_code_on_ragged_batches_is_exact(part: int, seed: int) -> None:
    """Any code, batches and plan agree with one process to 1e-10, or a sentence says what is not supported."""
    case = random_case(seed + 10**7 * part)  # the seeds of all parts are the same
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict, text = verdict_of(case)
    assert verdict in ("ok", "refused"), f"{text}\n{case}"


# -- faults that must be found ----------------------------------------------------------------------------------------

TOWER = TowerCase(reads="ids", layer="attention", depth=2)
IMAGES = TowerCase(reads="floats", layer="residual", depth=2)
TEXTS = Case(
    towers=(TOWER,),
    tasks=(
        TaskCase(kind="text", tower=0, pieces=("gated",), loss="tokens", lengths=((2, 5, 3, 4), (6, 1, 2, 2, 3, 4))),
    ),
    num_ranks=2,
    plan_seed=0,
    is_widest=True,
)
SPREAD = replace(TEXTS, num_ranks=3, plan_seed=3, is_widest=False)
"""In another plan, so that messages carry parts of what their senders hold."""
PICTURES = Case(
    towers=(TOWER, IMAGES),
    tasks=(
        TaskCase(
            kind="images",
            tower=0,
            pieces=("gated",),
            loss="tokens",
            lengths=((2, 5, 3, 4), (6, 3, 2, 4)),
            images=((2, 0, 1, 2), (0, 2, 1, 2)),
        ),
    ),
    num_ranks=2,
    plan_seed=3,
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Plans of random workloads warn of operators that run whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_found(case: Case, plant: Callable[[], None] = lambda: None) -> bool:
    """Whether verification says that something is wrong. `plant` is called between capture and the run."""
    workload = workload_of(case)
    plan = plan_of(case, workload)
    plant()
    return says_wrong(workload, plan)


def says_wrong(workload: Workload, plan: spindle.Plan) -> bool:
    """Whether verification of a workload that is captured already raises, or finds that something differs."""
    try:
        return not spindle.verify(workload, plan, steps=2, launcher="threads", timeout_s=20.0).ok
    except (SpindleError, AssertionError):
        return True


@pytest.mark.parametrize("case", [TEXTS, SPREAD, PICTURES], ids=["texts", "spread", "images"])
def test_without_a_fault_the_cases_are_exact(case: Case) -> None:
    """What the planted faults change works by itself."""
    assert not is_found(case)


def test_bounds_of_the_batch_before_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that was not worked out anew for this batch's number of samples."""
    own = Layouts.of
    known: dict[tuple[int, str], StepLayout] = {}

    def stale(self: Layouts, task: str, units: Units, costs: Any = None) -> StepLayout:
        return replace(known.setdefault((id(self), task), own(self, task, units, costs)), units=units)

    assert is_found(TEXTS, lambda: monkeypatch.setattr(Layouts, "of", stale))


def test_a_part_padded_in_its_own_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a batch that is recorded with its texts padded to their own longest, while the batch's is longer."""
    own = SampledBatch.part

    def trimmed(self: SampledBatch, low: int, high: int) -> dict[str, Any]:
        fields = own(self, low, high)
        longest = int(fields["lengths"].max())
        return {**fields, **{name: fields[name][:, :longest] for name in ("x", "mask", "labels")}}

    assert is_found(SPREAD, lambda: monkeypatch.setattr(SampledBatch, "part", trimmed))


def test_rows_in_another_order_in_a_message_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message whose samples are the wrong way round."""
    own = batch_shards.cut

    def swapped(value: Tensor, spec: TensorSpec, units: Units, held: Bounds, low: int, high: int) -> Tensor:
        piece = own(value, spec, units, held, low, high)
        return piece.flip(spec.row_dim) if spec.rows and high - low > 1 else piece

    assert is_found(SPREAD, lambda: monkeypatch.setattr(executor, "cut", swapped))


def test_rows_of_another_sample_in_a_message_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of the right size, cut one row too early."""

    def early(value: Tensor, spec: TensorSpec, units: Units, held: Bounds, low: int, high: int) -> Tensor:
        if not spec.rows or held == (low, high):
            return value
        start, length = units.span(spec.unit, value.shape[spec.row_dim], held, (low, high))
        return value.narrow(spec.row_dim, max(0, start - 1), length)

    assert is_found(SPREAD, lambda: monkeypatch.setattr(executor, "cut", early))


def test_a_wrong_unit_of_a_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of images that are taken to be one row a sample."""
    own = of_task._Builder._tensor_spec

    def wrong(self: Any, tensor: str) -> TensorSpec:
        spec = own(self, tensor)
        return replace(spec, unit=SAMPLES) if spec.unit == "pixels" else spec

    monkeypatch.setattr(of_task._Builder, "_tensor_spec", wrong)
    assert is_found(PICTURES)


# -- loaders that do not agree ----------------------------------------------------------------------------------------


def _parted() -> tuple[Workload, spindle.Plan]:
    """A workload and a plan for three ranks, whose loader gives one of them longer texts from its second step on."""
    torch.manual_seed(0)
    workload = Workload("parted")
    tower = workload.component("tower", Stack(TowerCase(reads="ids", layer="residual", depth=2)).double())
    head = workload.component("head", nn.Linear(16, 3).double())
    passes = itertools.count()
    lock = threading.Lock()
    state = {"runs": False}

    def data() -> Iterator[Batch]:
        with lock:
            own = next(passes) if state["runs"] else 0
        for index in range(4):
            length = 5 if own == 1 and index else 3
            ids = torch.arange(4 * length).reshape(4, length) % 20
            yield {"ids": ids + index, "y": torch.arange(4) % 3}

    @workload.task("t", batch_size=4, data=data)
    def fit(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(head(tower(batch["ids"]).mean(1)), batch["y"])

    plan = random_plan(spindle.make_metagraph(workload), 3, 1)
    state["runs"] = True
    return workload, plan


@pytest.mark.timeout(60)
def test_ranks_that_read_other_shapes_are_named() -> None:
    """A loader that is not the same in every process ends the run with a sentence, before a message depends on it."""
    workload, plan = _parted()
    with pytest.raises(WorkloadError, match=r"ranks \d and \d read batches of different shapes or rows"):
        spindle.verify(workload, plan, steps=3, launcher="threads", timeout_s=20.0)


@pytest.mark.timeout(60)
def test_without_agreement_other_shapes_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the agreement left out, pieces of other sizes are refused where they arrive, or their results differ."""
    monkeypatch.setattr(executor.Executor, "_agree", lambda self, target: None)
    assert says_wrong(*_parted())
