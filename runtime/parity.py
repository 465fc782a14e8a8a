"""Parity: a planned run beside a single process; all that docs/exactness.md promises compared, name by name."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

from spindle.errors import PlanError
from spindle.runtime.checkpoints.checkpoint import Checkpoints
from spindle.runtime.checkpoints.run_folder import opened
from spindle.runtime.controller import Launcher, Prepared, Run, launched
from spindle.runtime.launch.torchrun import under_torchrun
from spindle.runtime.parallel.names import joined_pieces, piece_of
from spindle.runtime.reference import Gradients, Outcome, restored, run_reference
from spindle.runtime.updates.averages import PREFIX as AVERAGE
from spindle.runtime.updates.masters import Numbers, PlainMasters, master_tensors
from spindle.runtime.updates.optimizers import OptimizerFactory
from spindle.runtime.updates.schedules import Metric, SchedulerFactory
from spindle.values.graph import parse_piece
from spindle.workload import Precision, Workload

__all__ = ["compare", "default_optimizer", "default_tolerance", "observed", "run_planned", "run_reference"]

ROUNDINGS = 16  # of the machine's precision: for float32 2e-6 of a tensor's largest value
QUANTITIES = {
    "loss": "loss",
    "gradient": "gradient",
    "parameter": "parameter",
    "buffer": "buffer",
    "state": "optimizer state",
    "average": "average",
    "rate": "learning rate",
}
"""What is compared, in the order in which a step makes it, and how a report calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """One comparison of a quantity (QUANTITIES) in one step, counted from 1."""

    quantity: str
    name: str
    step: int
    max_abs_error: float
    max_rel_error: float
    ok: bool


@dataclass(frozen=True, slots=True)
class Tolerance:
    """An error may be `atol` plus `rtol` of the expected value, or, `by_scale`, of the largest value of its tensor.

    ROUNDINGS of the largest value come on top: a small sum of large terms is only as exact as they are.
    """

    rtol: float
    atol: float
    by_scale: bool = False

    def allowed(self, expected: Tensor) -> Tensor:
        """Largest error allowed for each element."""
        size = expected.abs()
        if not size.numel():
            return size
        rounding = ROUNDINGS * torch.finfo(torch.promote_types(expected.dtype, torch.float32)).eps * size.max()
        return self.atol + self.rtol * (size.max() if self.by_scale else size) + rounding


@dataclass(frozen=True)
class ParityReport:
    """All comparisons, and both runs' losses by step."""

    rows: tuple[ParityRow, ...]
    losses: tuple[dict[str, float], ...]
    reference_losses: tuple[dict[str, float], ...]
    tolerance: Tolerance

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def max_abs_error(self) -> float:
        """Largest absolute error of any comparison."""
        return max((row.max_abs_error for row in self.rows), default=0.0)

    @property
    def max_rel_error(self) -> float:
        """Largest error relative to the largest value of its tensor."""
        return max((row.max_rel_error for row in self.rows), default=0.0)

    def __str__(self) -> str:
        counts = {quantity: sum(row.quantity == quantity for row in self.rows) for quantity in QUANTITIES}
        compared = ", ".join(_counted(count, QUANTITIES[quantity]) for quantity, count in counts.items() if count)
        wrong = [row for row in self.rows if not row.ok]
        verdict = "agrees with one process" if self.ok else f"DIFFERS from one process in {len(wrong)} places"
        lines = [
            f"parity: {verdict}: {compared}; largest error {self.max_abs_error:.1e} absolute, {self.max_rel_error:.1e} "
            f"relative (rtol {self.tolerance.rtol:g}, atol {self.tolerance.atol:g})"
        ]
        order = list(QUANTITIES)
        first = sorted(wrong, key=lambda row: (row.step, order.index(row.quantity), -row.max_rel_error))[:8]
        lines += [
            f"  {row.quantity:9} step {row.step}  {row.max_abs_error:9.2e} {row.max_rel_error:9.2e}  {row.name}"
            for row in first
        ]
        losses = enumerate(self.reference_losses, 1)
        endless = [(step, task) for step, own in losses for task in own if not isfinite(own[task])]
        lines += [
            f"  one process itself has no finite loss of {task!r} in step {step}; mend the task's data or loss first"
            for step, task in endless[:1]
        ]
        return "\n".join(lines)


def run_planned(
    workload: Workload,
    prepared: Sequence[Prepared],
    steps: int,
    *,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None = None,
    metric: Metric | None = None,
    launcher: Launcher = "auto",
    seed: int = 0,
    timeout_s: float = 60.0,
) -> Outcome:
    """Train `steps` steps as planned, under each of the plans an equal part: between them the run is saved and resumed.

    The user's modules stay as they are. Raises PlanError when there are fewer steps than plans.
    """
    if len(prepared) > 1 and under_torchrun():
        raise PlanError(
            "resume_under= saves into a folder of this process, and torchrun starts several; run verify without it"
        )
    if steps < len(prepared):
        raise PlanError(f"steps is {steps} and there are {len(prepared)} plans; give each at least one step")
    parts: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder, restored(workload):
        kept = Checkpoints(directory=Path(folder), every=steps)
        for number, each in enumerate(prepared):
            first, last = (steps * n // len(prepared) for n in (number, number + 1))
            with (
                opened(workload, kept, resume=first > 0) as start,
                launched(
                    each,
                    optimizer=optimizer,
                    scheduler=scheduler,
                    metric=metric,
                    launcher=launcher,
                    seed=seed,
                    timeout_s=timeout_s,
                    saves=len(prepared) > 1,
                ) as run,
            ):
                if start.before is not None:
                    run.resume(start.before)
                parts.append(observed(run, last - first))
                if last < steps:
                    run.save(kept, last, seed)
        untouched = {name: t.detach().clone() for name, t in (*workload.named_parameters(), *workload.named_buffers())}
        own = PlainMasters(dict(workload.named_parameters()), Numbers.of(workload)).masters
        masters = master_tensors(own, own)  # of parameters that no task uses
    ends = parts[-1]
    return Outcome(
        [losses for part in parts for losses in part.losses],
        [gradients for part in parts for gradients in part.gradients],
        untouched | ends.values,
        masters | ends.states,
        ends.learning_rates,
    )


def observed(run: Run, steps: int) -> Outcome:
    """Some steps of a run, and how it stands after them."""
    losses, reports = run.steps(steps, keep_gradients=True)
    return Outcome(
        losses,
        [{report.rank: report.gradients[step] for report in reports} for step in range(len(losses))],
        run.state(),
        run.optimizer_state() | run.ema_state(),
        {label: rate for report in reports for label, rate in report.learning_rates.items()},
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def joined_gradients(outcome: Outcome) -> list[Gradients]:
    """Gradients of whole parameters by step, each from any rank that has it."""
    return [
        joined_pieces({n: g for held in by_rank.values() for n, g in held.items()}) for by_rank in outcome.gradients
    ]


def default_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain gradient descent: an update shows the gradient's error as it is, where Adam would blow up that of zeros."""
    return torch.optim.SGD(parameters, lr=0.1)


def default_tolerance(parameters: Mapping[str, Tensor], precision: Precision = "fp32") -> Tolerance:
    """1e-10 when all parameters are float64, rtol 1e-4 and atol 1e-5 for float32. In bfloat16, with its 8 bits, the
    order of a sum shows in the second digit of a gradient after two steps: 10 % of the largest value.
    """
    if precision == "bf16" or any(parameter.dtype == torch.bfloat16 for parameter in parameters.values()):
        return Tolerance(1e-1, 1e-5, by_scale=True)
    if all(parameter.dtype == torch.float64 for parameter in parameters.values()):
        return Tolerance(1e-10, 1e-10)
    return Tolerance(1e-4, 1e-5)


def compare(reference: Outcome, planned: Outcome, *, tolerance: Tolerance) -> ParityReport:
    """Compare a planned run with one process. A gradient that only one side has differs, zeros too: an optimizer with
    momentum or weight decay moves a parameter with zeros. A state that only one side has is compared with zeros.
    """
    rows: list[ParityRow] = []
    for step, (ours, theirs) in enumerate(zip(planned.losses, reference.losses, strict=True), 1):
        for task, loss in theirs.items():
            got = torch.tensor(ours.get(task, float("nan")), dtype=torch.float64)
            expected = torch.tensor(loss, dtype=reference.loss_dtypes.get(task, torch.float64))
            rows.append(_row("loss", task, step, got, expected, tolerance))
    by_step = zip(planned.gradients, reference.gradients, strict=True)
    for step, (held_by_rank, expected_by_rank) in enumerate(by_step, 1):
        (alone,) = expected_by_rank.values()
        rows += _gradient_rows(step, held_by_rank, alone, tolerance)
    last = len(reference.losses)
    for name, value in planned.values.items():
        quantity = "buffer" if name in reference.buffers else "parameter"
        rows.append(_row(quantity, name, last, value, reference.values[name], tolerance))
    for name in dict.fromkeys((*planned.states, *reference.states)):
        pair = [side.get(name) for side in (planned.states, reference.states)]
        some = next(value for value in pair if value is not None)
        got, expected = (torch.zeros_like(some) if value is None else value for value in pair)
        quantity = "average" if name.startswith(AVERAGE) else "state"
        rows.append(_row(quantity, name, last, got, expected, tolerance))
    for label, rate in reference.learning_rates.items():
        got, expected = (torch.tensor(x, dtype=torch.float64) for x in (planned.learning_rates[label], rate))
        rows.append(_row("rate", label, last, got, expected, tolerance))
    return ParityReport(tuple(rows), tuple(planned.losses), tuple(reference.losses), tolerance)


def _gradient_rows(
    step: int, held_by_rank: Mapping[int, Gradients], expected: Gradients, tolerance: Tolerance
) -> list[ParityRow]:
    rows = []
    for rank, gradients in held_by_rank.items():
        for name, gradient in gradients.items():
            known = expected.get(parse_piece(name).whole)
            wanted = torch.zeros_like(gradient) if known is None else piece_of(known, name)
            row = _row("gradient", f"{name} on rank {rank}", step, gradient, wanted, tolerance)
            rows.append(row if known is not None else replace(row, name=f"{row.name}, none in one process", ok=False))
    held = {parse_piece(name).whole for gradients in held_by_rank.values() for name in gradients}
    for name in sorted(expected.keys() - held):
        row = _row("gradient", name, step, torch.zeros_like(expected[name]), expected[name], tolerance)
        rows.append(replace(row, name=f"{name}, which has none as planned", ok=False))
    return rows


def _row(quantity: str, name: str, step: int, got: Tensor, expected: Tensor, tolerance: Tolerance) -> ParityRow:
    """One comparison; what is not finite must be the same on both sides, and so must whole numbers and flags."""
    counts = not (expected.is_floating_point() or expected.is_complex())
    got, expected = (_real(value.detach().cpu()) for value in (got, expected))
    got = got.double()
    if got.shape != expected.shape:
        return ParityRow(quantity=quantity, name=f"{name} ({tuple(got.shape)} for {tuple(expected.shape)})", step=step,
                         max_abs_error=float("inf"), max_rel_error=float("inf"), ok=False)  # fmt: skip
    wanted = expected.double()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    sound = torch.where(expected.isfinite(), expected, torch.zeros_like(expected))
    error = torch.where(same, 0.0, (got - wanted).abs())
    largest = float(error.max()) if error.numel() else 0.0
    scale = float(sound.abs().max()) if expected.numel() else 0.0
    return ParityRow(
        quantity=quantity,
        name=name,
        step=step,
        max_abs_error=largest,
        max_rel_error=largest / scale if scale > tolerance.atol else 0.0,
        ok=bool((same if counts else error <= tolerance.allowed(sound)).all()),
    )


def _real(value: Tensor) -> Tensor:
    if value.is_complex():
        return torch.view_as_real(value.resolve_conj())
    return value if value.is_floating_point() else value.double()
