"""Evaluation: forward-only tasks over a workload's components, with loaders and metrics of their own.

evaluation = spindle.Evaluation(workload)

@evaluation.task("val", batch_size=64, data=loader, metrics={"accuracy": accuracy})
def val(batch): ...
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from spindle.errors import WorkloadError
from spindle.metrics import Scores
from spindle.words.whole_numbers import is_whole
from spindle.workload import Batch, RowsFunction, Task, Workload, forward_only

Outputs = dict[str, Tensor]
Metric = Callable[[Outputs], Any]
"""Gives a number, or a pair of a sum and a count, from what a task returned."""

OutputFunction = Callable[[Batch], Any]
GATHERED_BYTES = 256 * 2**20

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Metrics of one task: metrics that add up over batches, and metrics of all outputs of a pass."""

    metrics: Mapping[str, Metric]
    over_all: Mapping[str, Metric]

    @property
    def names(self) -> tuple[str, ...]:
        """All that the task may give; "loss" where it returns one."""
        return ("loss", *self.metrics, *self.over_all)


class Evaluation:
    """Tasks that run forward only, on all batches of their data, whenever the workload is evaluated."""

    def __init__(self, workload: Workload, *, ema: bool = False, gathered_bytes: int = GATHERED_BYTES) -> None:
        """Over the components of `workload`. `ema`: on the running average of the weights that `Workload(ema=...)`
        keeps; before its first step, on the weights. `gathered_bytes`: how much of one task's outputs is kept for its
        `over_all` metrics, in the memory of one process.
        """
        self.workload, self.ema, self.gathered_bytes = workload, ema, gathered_bytes
        self.tasks: dict[str, Task] = {}
        self.measures: dict[str, Measures] = {}
        self._forward: Workload | None = None

    def task(
        self,
        name: str,
        *,
        batch_size: int,
        data: Iterable[Any] | Callable[[], Iterable[Any]],
        metrics: Mapping[str, Metric] | None = None,
        over_all: Mapping[str, Metric] | None = None,
        prefetch: int = 1,
        rows: RowsFunction | None = None,
    ) -> Callable[[OutputFunction], OutputFunction]:
        """Decorator that registers a function from a batch to a loss, or to a dict of tensors, of which "loss" is one.

        Each evaluation takes one pass over `data`, from its start, the last short batch included. A loss is averaged
        over all samples: that of each batch counts as often as the batch has samples. `metrics`: functions of the
        whole batch's outputs, by name, to a pair of a sum and a count, which are added over batches and then divided,
        or to a number, which is added. `over_all`: functions of the outputs of all batches, joined along their first
        dimension, to a number: what does not add up, such as the recall over all pairs. `data`, `prefetch` and `rows`
        are as of `Workload.task`.

        Raises WorkloadError on a name taken or malformed, and on a metric called "loss", or named twice.
        """
        held = Workload(self.workload.name)
        held.tasks = dict(self.tasks)
        held.task(name, batch_size=batch_size, data=data, weight=0.0, on_end="stop", prefetch=prefetch, rows=rows)(
            lambda batch: batch["x"]
        )
        made = held.tasks[name]
        measures = Measures(metrics=dict(metrics or {}), over_all=dict(over_all or {}))
        twice = next((each for each in measures.names if measures.names.count(each) > 1), None)
        if twice is not None:
            raise WorkloadError(f"evaluation task {name!r}: {twice!r} names two metrics; give each a name of its own")

        def register(function: OutputFunction) -> OutputFunction:
            self.tasks[name] = replace(made, function=forward_only(packing(name, function)), evaluates=True)
            self.measures[name] = measures
            self._forward = None
            return function

        return register

    def forward_workload(self) -> Workload:
        """The workload's components with these tasks in place of its own; the same one each time.

        Raises WorkloadError without tasks.
        """
        if not self.tasks:
            raise WorkloadError(
                f"the evaluation of workload {self.workload.name!r} has no tasks; add one with @evaluation.task(...)"
            )
        known = self._forward
        if known is None or known.components != self.workload.components:
            found = known = Workload(self.workload.name, precision=self.workload.precision)
            found.components = dict(self.workload.components)
            found.filled = self.workload.filled
            found.tasks = dict(self.tasks)
            self._forward = found
        return known

    def check_name(self, what: str, metric: str) -> None:
        """Raise WorkloadError unless `metric` is "task:metric" of a task and a metric of this evaluation."""
        task, _, name = metric.partition(":")
        if task not in self.tasks or name not in self.measures[task].names:
            known = ", ".join(f"{task}:{name}" for task, found in self.measures.items() for name in found.names)
            raise WorkloadError(f"{what} is {metric!r}, which is no metric of the evaluation; choose one of {known}")


@dataclass(frozen=True, slots=True)
class Goal:
    """An evaluated number that is to be as small, or as large, as can be."""

    task: str
    metric: str
    mode: Literal["min", "max"]

    @classmethod
    def parse(cls, what: str, text: str, evaluation: Evaluation | None) -> "Goal":
        """Read "task:metric:min" or "task:metric:max"; a loss is to be small where nothing is said.

        Raises WorkloadError, which calls the setting `what`, for anything else.
        """
        if evaluation is None:
            raise WorkloadError(f"{what} is {text!r}, but nothing is evaluated; give evaluation= and evaluate_every=")
        task, _, rest = text.partition(":")
        metric, _, mode = rest.partition(":")
        evaluation.check_name(what, f"{task}:{metric}")
        mode = mode or ("min" if metric == "loss" else "")
        if mode not in ("min", "max"):
            raise WorkloadError(
                f"{what} is {text!r}; say whether the metric is to be small or large: {task}:{metric}:min or "
                f"{task}:{metric}:max"
            )
        return cls(task, metric, "min" if mode == "min" else "max")

    def of(self, scores: Scores) -> float:
        """The number. Raises WorkloadError where the task gave none of this name."""
        try:
            return scores[self.task][self.metric]
        except KeyError:
            raise WorkloadError(
                f"evaluation task {self.task!r} gave no {self.metric!r}; return a loss, or name another metric"
            ) from None

    def improves(self, value: float, best: float | None, by: float = 0.0) -> bool:
        """Whether a number is better than the best so far, by more than `by`; one that is none never is."""
        if value != value:
            return False
        if best is None:
            return True
        return value < best - by if self.mode == "min" else value > best + by


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStop:
    """Stop training once an evaluated metric ("task:metric:min" or ":max"; a loss is to be small) has not improved by
    more than `min_delta` in `patience` evaluations in a row. A number that is none counts as no improvement.

    Raises WorkloadError for a patience below 1, or a min_delta below 0.
    """

    metric: str
    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if not is_whole(self.patience, 1) or not 0 <= self.min_delta < float("inf"):
            raise WorkloadError(
                f"early stop on {self.metric!r}: patience is {self.patience!r}, min_delta {self.min_delta!r}; give at "
                "least 1 evaluation, and 0 or more"
            )


def check_evaluation(given: object) -> None:
    """Raise WorkloadError unless it is an Evaluation."""
    if not isinstance(given, Evaluation):
        raise WorkloadError(
            f"evaluation is a {type(given).__name__}; make one with spindle.Evaluation(workload), and register tasks "
            "with its task()"
        )


@contextlib.contextmanager
def evaluation_mode(workload: Workload) -> Iterator[None]:
    """While open all modules of a workload are in eval mode; then each is in its own mode again.

    The flags alone are set: `train()` and `eval()` of a module, which may do more, are not called.
    """
    modules = {id(m): m for c in workload.components.values() for m in c.module.modules()}.values()
    with modes_kept(modules):
        yield


@contextlib.contextmanager
def modes_kept(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """While open these modules are in eval mode; then each is in its own mode again."""
    modes = [(module, module.training) for module in modules]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# -- what a task returns, as one tensor ------------------------------------------------------------------------------


def packing(name: str, function: OutputFunction) -> OutputFunction:
    """The same function with what it returns as one tensor, which `unpacked` reads."""

    @functools.wraps(function)
    def forward(batch: Batch) -> Tensor:
        return packed(name, function(batch))

    return forward


def packed(task: str, returned: Any) -> Tensor:
    """Tensors by name side by side in float64, with their names, types and shapes before them; nothing is rounded.

    A loss alone is {"loss": loss}. Raises WorkloadError for anything else than tensors.
    """
    outputs = returned if isinstance(returned, Mapping) else {"loss": returned}
    head: list[float] = [len(outputs)]
    parts: list[Tensor] = []
    for name, value in outputs.items():
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
            kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise WorkloadError(
                f"evaluation task {task!r} returned {kind} as {name!r}; return the loss, or a dict of real tensors"
            )
        if name == "loss" and value.numel() != 1:
            raise WorkloadError(
                f"evaluation task {task!r} returned a loss of shape {tuple(value.shape)}; return one number, the mean "
                "over the samples of the batch"
            )
        letters = str(name).encode()
        head += [len(letters), *letters, _DTYPES.index(value.dtype), value.ndim, *value.shape]
        flat = value.reshape(-1)
        if value.dtype == torch.int64:  # float64 holds 53 bits
            parts += [(flat >> 32).to(torch.float64), (flat & 0xFFFFFFFF).to(torch.float64)]
        else:
            parts.append(flat.to(torch.float64))
    return torch.cat([torch.tensor([len(head) + 1, *head], dtype=torch.float64), *parts])


def unpacked(values: Tensor) -> Outputs:
    """What `packed` made one tensor of.

    >>> unpacked(packed("t", {"a": torch.tensor([2**60 + 1, -3]), "b": torch.tensor([[0.5]])}))
    {'a': tensor([1152921504606846977,                  -3]), 'b': tensor([[0.5000]])}
    """
    size = int(values[0])
    head = iter([int(number) for number in values[1:size].tolist()])
    found: Outputs = {}
    at = size
    for _ in range(next(head)):
        name = bytes(next(head) for _ in range(next(head))).decode()
        dtype = _DTYPES[next(head)]
        shape = [next(head) for _ in range(next(head))]
        count = torch.Size(shape).numel()
        part = values[at : at + count]
        at += count
        if dtype == torch.int64:
            part = (part.to(torch.int64) << 32) + values[at : at + count].to(torch.int64)
            at += count
        found[name] = part.to(dtype).reshape(shape)
    return found
