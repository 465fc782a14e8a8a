"""Parity: a planned run beside a single process; losses, gradients and updates of every parameter compared.

The single process runs the user's own task functions on whole batches and on the user's own modules, which get their
values back afterwards. It draws the same random numbers: they depend on the seed, the step, the task, the place in the
code and the sample.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn

from spindle.capture import capture
from spindle.capture.codes import computing_in
from spindle.capture.eager import drawing_as_planned
from spindle.graph import parse_piece
from spindle.record.draws import Stream
from spindle.runtime.data import Feed
from spindle.runtime.parallel.names import piece_of
from spindle.runtime.worker import OptimizerFactory, Report, SchedulerFactory, parameter_groups
from spindle.workload import Precision, Workload

ROUNDINGS = 16  # of the machine's precision: for float32 2e-6 of a tensor's largest value


@dataclass(frozen=True, slots=True)
class Reference:
    """What a single process did: losses and gradients of each step, and all parameters after the last.

    `loss_dtypes`: the type of each task's loss, which may be less exact than the model's: transformers compute losses
    in float32.
    """

    losses: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]
    loss_dtypes: dict[str, torch.dtype] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """One comparison: the loss of a task, or the gradient or value of a parameter, in one step."""

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
        counts = {q: sum(row.quantity == q for row in self.rows) for q in ("loss", "gradient", "value")}
        wrong = [row for row in self.rows if not row.ok]
        verdict = "agrees with one process" if self.ok else f"DIFFERS from one process in {len(wrong)} places"
        lines = [
            f"parity: {verdict}: {counts['loss']} losses, {counts['gradient']} gradients, {counts['value']} updated "
            f"parameters; largest error {self.max_abs_error:.1e} absolute, {self.max_rel_error:.1e} relative "
            f"(rtol {self.tolerance.rtol:g}, atol {self.tolerance.atol:g})"
        ]
        worst = sorted(wrong, key=lambda row: -row.max_rel_error)[:8]
        lines += [
            f"  {row.quantity:8} step {row.step}  {row.max_abs_error:9.2e} {row.max_rel_error:9.2e}  {row.name}"
            for row in worst
        ]
        endless = [(n, t) for n, losses in enumerate(self.reference_losses) for t in losses if not isfinite(losses[t])]
        lines += [
            f"  one process itself has no finite loss of {task!r} in step {step}, and nothing agrees with that: mend "
            "the task's data or its loss first"
            for step, task in endless[:1]
        ]
        return "\n".join(lines)


def run_reference(
    workload: Workload,
    steps: int,
    *,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None = None,
    seed: int = 0,
) -> Reference:
    """Train `steps` steps in this process, then give the modules their values back.

    Dropout and all else that draws gives what it gives in planned runs with this seed.
    """
    captured = capture(workload)
    parameters = dict(workload.named_parameters())
    settings = {component.name: component.optimizer for component in workload.components.values()}
    feeds = {name: Feed(task, seed) for name, task in workload.tasks.items()}
    losses: list[dict[str, float]] = []
    gradients: list[dict[str, Tensor]] = []
    dtypes: dict[str, torch.dtype] = {}
    with _restored(workload):
        for parameter in parameters.values():
            parameter.grad = None
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        stepper = optimizer(parameter_groups(trained, settings))
        schedule = scheduler(stepper) if scheduler else None
        for step in range(steps):
            stepper.zero_grad(set_to_none=True)
            losses.append({})
            for name in workload.tasks_of(step, seed):
                task, found = workload.tasks[name], []
                for batch in range(workload.accumulate):
                    given = feeds[name].next()
                    units = given.units
                    stream = Stream(seed=seed, step=step, batch=batch, task=name, units=units, high=units.num_samples)
                    drawing = drawing_as_planned(workload, captured, stream)
                    with computing_in(workload.precision, torch.device("cpu")), drawing:
                        loss = task.function(dict(given.fields))
                    found.append(float(loss.detach()))
                    dtypes[name] = loss.dtype
                    if loss.requires_grad:  # not where a batch lacks all that is trained
                        torch.autograd.backward(loss * (task.weight / workload.accumulate))
                losses[-1][name] = sum(found) / len(found)
            if workload.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), workload.max_grad_norm)
            gradients.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
            stepper.step()
            if schedule is not None:
                schedule.step()
        final = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for feed in feeds.values():
        feed.close()
    return Reference(losses, gradients, final, dtypes)


@contextlib.contextmanager
def _restored(workload: Workload) -> Iterator[None]:
    tensors = [*(p for _, p in workload.named_parameters()), *(b for _, b in workload.named_buffers())]
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [tensor.grad for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value, gradient in zip(tensors, values, gradients, strict=True):
                tensor.copy_(value)
                tensor.grad = gradient


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


def compare(
    reference: Reference,
    losses: Sequence[Mapping[str, float]],
    reports: Sequence[Report],
    final: Mapping[str, Tensor],
    *,
    tolerance: Tolerance,
) -> ParityReport:
    """Compare a planned run with the reference. A gradient that only one side has is compared with zero.

    `final`: parameters after the last step, as far as the run holds them.
    """
    rows: list[ParityRow] = []
    for step, (ours, theirs) in enumerate(zip(losses, reference.losses, strict=True)):
        for task, loss in theirs.items():
            got = torch.tensor(ours.get(task, float("nan")), dtype=torch.float64)
            expected = torch.tensor(loss, dtype=reference.loss_dtypes.get(task, torch.float64))
            rows.append(_row("loss", task, step, got, expected, tolerance))
    for step, gradients in enumerate(reference.gradients):
        for report in reports:
            for name, gradient in report.gradients[step].items():
                label = f"{name} on rank {report.rank}"
                known = gradients.get(parse_piece(name).whole)
                wanted = torch.zeros_like(gradient) if known is None else piece_of(known, name)
                rows.append(_row("gradient", label, step, gradient, wanted, tolerance))
        held = {parse_piece(name).whole for report in reports for name in report.gradients[step]}
        for name in gradients.keys() - held:
            rows.append(_row("gradient", name, step, torch.zeros_like(gradients[name]), gradients[name], tolerance))
    last = len(reference.losses) - 1
    for name, value in final.items():
        rows.append(_row("value", name, last, value, reference.parameters[name], tolerance))
    return ParityReport(tuple(rows), tuple(map(dict, losses)), tuple(reference.losses), tolerance)


def _row(quantity: str, name: str, step: int, got: Tensor, expected: Tensor, tolerance: Tolerance) -> ParityRow:
    got, expected = got.detach().cpu().double(), expected.detach().cpu()
    allowed = tolerance.allowed(expected)
    error = (got - expected.double()).abs()
    largest = float(error.max()) if error.numel() else 0.0
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return ParityRow(
        quantity=quantity,
        name=name,
        step=step,
        max_abs_error=largest,
        max_rel_error=largest / scale if scale > tolerance.atol else 0.0,
        ok=bool((error <= allowed).all()),
    )
