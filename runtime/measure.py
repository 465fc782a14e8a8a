"""Measure: the operators of a captured workload in; a Profile of their times on this machine out.

One operator of each kind runs forward and backward on random inputs and real batch fields, at the share of the batch
that it would have on n devices. The median of a few runs counts, after warm-up.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spindle.capture.codes import Captured, OperatorCode, computing_in
from spindle.graph import Operator, TensorSpec
from spindle.profile import Profile, ProfileEntry
from spindle.runtime.lower import split_samples
from spindle.workload import Batch, Precision, Workload

MIN_REPEATS, MAX_REPEATS = 3, 30
Progress = Callable[[int, int], None]


def measure_profile(
    workload: Workload,
    captured: Captured,
    *,
    num_devices: int,
    seconds_per_entry: float = 0.05,
    progress: Progress | None = None,
) -> Profile:
    """Time each operator kind on every count up to `num_devices` that divides its batch.

    `progress(done, total)` is called after each entry. Runs on the first CUDA device if there is one, else on CPU with
    the threads that torch has been given.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    todo = list(_distinct(captured, num_devices))
    batches = {name: task.first_batch() for name, task in workload.tasks.items()}
    entries = []
    for index, (operator, count) in enumerate(todo):
        entries.append(_measure(captured, operator, count, batches[operator.task], device, seconds_per_entry))
        if progress is not None:
            progress(index + 1, len(todo))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    versions = (("threads", str(torch.get_num_threads())), ("torch", torch.__version__))
    return Profile(name, versions, tuple(entries))


def _distinct(captured: Captured, num_devices: int) -> Iterator[tuple[Operator, int]]:
    seen: set[str] = set()
    for operator in captured.graph:
        if operator.kind not in seen:
            seen.add(operator.kind)
            limit = min(num_devices, operator.batch_size) if operator.splittable else 1
            yield from ((operator, n) for n in range(1, limit + 1) if operator.batch_size % n == 0)


def _measure(
    captured: Captured, operator: Operator, count: int, batch: Batch, device: torch.device, seconds: float
) -> ProfileEntry:
    low, high = split_samples(operator.batch_size, count)[0]
    code = copy.deepcopy(captured.codes[operator.name])
    code.module.to(device)
    arguments = list(_arguments(captured, code, operator, batch, low, high, device))
    live = [index for index, tensor in enumerate(operator.outputs) if tensor.needs_grad]
    forward, backward = [], []
    started = time.perf_counter()
    for repeat in range(MAX_REPEATS + 1):
        forward_s, backward_s = _once(code, arguments, live, device, captured.precision)
        if repeat:  # the first warms up
            forward.append(forward_s)
            backward.append(backward_s)
        if len(forward) >= MIN_REPEATS and time.perf_counter() - started > seconds:
            break
    return ProfileEntry(
        kind=operator.kind,
        num_devices=count,
        forward_s=statistics.median(forward),
        backward_s=statistics.median(backward) if live else 0.0,
    )


def _arguments(
    captured: Captured, code: OperatorCode, operator: Operator, batch: Batch, low: int, high: int, device: torch.device
) -> Iterator[Tensor | int]:
    for given in code.inputs:
        if given.kind == "rows":
            yield high - low
        elif given.kind == "aux":
            yield captured.aux[given.name].value(batch, low, high, operator.batch_size).to(device)
        else:
            yield _random(captured.graph.tensors[given.name], high - low, device)


def _random(spec: TensorSpec, samples: int, device: torch.device) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        return torch.zeros(spec.shape_of(samples), dtype=dtype, device=device)
    return torch.randn(spec.shape_of(samples), device=device).to(dtype).requires_grad_(spec.needs_grad)


def _once(
    code: OperatorCode,
    arguments: Sequence[Tensor | int],
    live: Sequence[int],
    device: torch.device,
    precision: Precision,
) -> tuple[float, float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start_s = now()
    with torch.set_grad_enabled(bool(live)), computing_in(precision, device):
        outputs = code.module(*arguments)
    middle_s = now()
    if live:
        ends = [outputs[index] for index in live]
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
    return middle_s - start_s, now() - middle_s
