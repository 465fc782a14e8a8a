"""Sizes: a captured workload in; what its operators do on some dozens of its batches, and how large these are, out.

Batches are read and recorded; no model runs. Operators of the same shapes are measured once, on fake tensors.
"""

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spindle.capture.codes import Captured, OnDevice, OperatorPart, TaskCode, computing_in
from spindle.capture.operators import costs
from spindle.capture.operators.parts import TaskPart, divide
from spindle.errors import SpindleError
from spindle.inputs.batch import SampledBatch, with_own_tensors
from spindle.record.run import Failure, record
from spindle.record.substitutes.draws import Stream
from spindle.values.graph import Operator, TaskGraph, TensorSpec, base_task, micro_batch
from spindle.values.plan import SizeRange
from spindle.workload import Task, Workload

READ, MEASURED = 32, 12  # batches of a task that are read, and of these the ones whose operators are measured
ALIKE = 8  # after this number of equal batches no more are read
READ_S = 20.0  # a slow loader is read no longer

IDLE = "idle"
"""Kind of an operator that a batch leaves out."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """The operators of a workload in some steps with the batch of each task, and how large the batches were that were
    read.

    `steps` is empty where all batches are alike.
    """

    steps: tuple[TaskGraph, ...]
    batches: tuple[Mapping[str, SampledBatch], ...]
    ranges: tuple[SizeRange, ...]

    def telling(self) -> list[int]:
        """Steps to measure layers in: the smallest, middle and largest whose batches are full and lack nothing."""
        whole = [index for index, graph in enumerate(self.steps) if all(map(_is_whole, graph))]
        order = sorted(whole, key=lambda index: sum(operator.size for operator in self.steps[index]))
        return list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]])) if order else []


def _is_whole(operator: Operator) -> bool:
    units = operator.units
    return operator.kind != IDLE and units is not None and units.num_samples == operator.batch_size


def sizes_of(workload: Workload, captured: Captured, on_task: Callable[[str], object] = str) -> Sizes:
    """Read some dozens of batches of each task; what its operators do on up to `MEASURED` of them.

    A batch that the captured code cannot take is left out here: it is refused when it is trained on.
    """
    read = {}
    for name, task in workload.tasks.items():
        on_task(f"reading batches of {name}")
        with _generators_kept():
            read[name] = list(_read(task))
    ranges = tuple(found for name, batches in read.items() for found in _ranges(name, batches))
    if not any(_differ(batches) for batches in read.values()):
        return Sizes((), (), ranges)
    measurer = _Measurer(workload, captured)
    by_task: dict[str, list[tuple[SampledBatch, dict[str, Operator]]]] = {}
    for name in captured.tasks:
        on_task(f"sizing {name}")
        sized = ((batch, measurer.operators(name, batch)) for batch in _typical(read[base_task(name)]))
        by_task[name] = [(batch, operators) for batch, operators in sized if operators is not None]
    if not all(by_task.values()):
        return Sizes((), (), ranges)
    steps = [
        {name: found[(step + micro_batch(name)) % len(found)] for name, found in by_task.items()}
        for step in range(max(map(len, by_task.values())))
    ]
    return Sizes(
        tuple(TaskGraph(tuple(step[op.task][1][op.name] for op in captured.graph)) for step in steps),
        tuple({name: batch for name, (batch, _) in step.items()} for step in steps),
        ranges,
    )


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """While open, loaders may draw from the process's generators, which then stand where they stood."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _read(task: Task) -> Iterator[SampledBatch]:
    began_s = time.monotonic()
    found: list[SampledBatch] = []
    with contextlib.suppress(Exception):  # a loader that breaks later says so when it gets there
        for batch in itertools.islice(task.batches(), READ):
            found.append(task.sampled(batch))
            yield found[-1]
            if time.monotonic() - began_s > READ_S or (len(found) == ALIKE and not _differ(found)):
                return


def _differ(batches: Sequence[SampledBatch]) -> bool:
    """Whether batches have different shapes, or samples of one different rows."""
    if len({batch.shapes for batch in batches}) > 1:
        return True
    return any(len(set(rows)) > 1 for batch in batches for rows in batch.units.counts.values())


def _ranges(task: str, batches: Sequence[SampledBatch]) -> Iterator[SizeRange]:
    """The least and most entries of each field."""
    sizes: dict[str, list[int]] = {}
    for batch in batches:
        for name, size in batch.entries.items():
            sizes.setdefault(name, []).append(size)
    for name, found in sizes.items():
        yield SizeRange(task=task, field=name, least=min(found), most=max(found))


def _typical(batches: Sequence[SampledBatch]) -> list[SampledBatch]:
    """Batches that stand for all that were read, in the order in which they came; the largest is one of them."""
    if len(batches) <= MEASURED:
        return list(batches)
    order = sorted(range(len(batches)), key=lambda index: sum(batches[index].entries.values()))
    wanted = [round((index + 0.5) * len(order) / MEASURED - 0.5) for index in range(MEASURED - 1)]
    return [batches[index] for index in sorted({*(order[place] for place in wanted), order[-1]})]


class _Measurer:
    """Measures operators on other batches; equal ones once."""

    def __init__(self, workload: Workload, captured: Captured) -> None:
        self.workload, self.captured = workload, captured
        self.costs: dict[str, costs.Cost | None] = {}
        self.tensors = captured.graph.tensors

    def operators(self, task: str, batch: SampledBatch) -> dict[str, Operator] | None:
        """The operators of a task on one batch, by name; None where its code cannot take it."""
        code = self.captured.tasks[task]
        try:
            part = self._part(task, code, batch)
        except (Failure, SpindleError):
            return None
        own = [operator for operator in self.captured.graph if operator.task == task]
        return {operator.name: self._sized(operator, part, batch) for operator in own}

    def _part(self, task: str, code: TaskCode, batch: SampledBatch) -> TaskPart:
        bounds = batch.units.whole
        name, fields = base_task(task), batch.part(*bounds)
        recorded = record(
            self.captured.skeleton,
            self.workload.tasks[name].function,
            with_own_tensors(fields) if code.copies_batch else fields,
            stream=Stream(task=name, high=bounds[1], units=batch.units),
            sites=code.sites.get("", ()),
            autocast=computing_in(self.captured.precision, _CPU),
        )
        lacks = sorted(code.held - batch.held)
        return divide(code, recorded, bounds, batch.units, OnDevice(_CPU), f"task {name!r}", lacks)

    def _sized(self, operator: Operator, part: TaskPart, batch: SampledBatch) -> Operator:
        """The operator on this batch; one that computes nothing takes nothing."""
        own = part.operators.get(operator.name)
        outputs = tuple(_shaped(tensor, part) for tensor in operator.outputs)
        if own is None or operator.name in part.idle:
            return replace(
                operator,
                kind=IDLE,
                family="",
                outputs=outputs,
                forward_flops=0.0,
                backward_flops=0.0,
                input_bytes=0,
                activation_bytes=0,
                units=batch.units,
            )
        inputs = [self._input(name, part) for name in operator.inputs if name in part.shapes]
        aux = [own.recording.aux[number] for number in own.aux_read()]
        input_bytes = sum(spec.num_bytes for spec in inputs) + sum(value.nbytes for value in aux)
        cost, kind = self._cost(operator, own, inputs, aux, part.shapes)
        if cost is None:  # neither fake tensors nor what was captured tells: work grows with the bytes
            factor = input_bytes / operator.input_bytes if operator.input_bytes else 1.0
            cost = costs.Cost(
                (),
                operator.forward_flops * factor,
                operator.backward_flops * factor,
                int(operator.activation_bytes * factor),
                (),
                frozenset(),
            )
        return replace(
            operator,
            kind=kind,
            outputs=outputs,
            forward_flops=cost.forward_flops,
            backward_flops=cost.backward_flops,
            input_bytes=input_bytes,
            activation_bytes=cost.activation_bytes,
            units=batch.units,
        )

    def _input(self, name: str, part: TaskPart) -> costs.ValueSpec:
        tensor = self.tensors[name]
        return costs.ValueSpec(part.shapes[name], getattr(torch, tensor.dtype), tensor.needs_grad)

    def _cost(
        self,
        operator: Operator,
        own: OperatorPart,
        inputs: Sequence[costs.ValueSpec],
        aux: Sequence[Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> tuple[costs.Cost | None, str]:
        precision, code = self.captured.precision, self.captured.codes[operator.name]
        specs = [*inputs, *(costs.ValueSpec(tuple(value.shape), value.dtype) for value in aux)]
        live = [tensor.needs_grad for tensor in operator.outputs if tensor.name in shapes]
        kind = costs.kind_of(operator.kind.partition("-")[0], code.module, own, specs, precision)
        kind += costs.live_suffix(live)
        if kind not in self.costs:
            try:
                self.costs[kind] = costs.measure(code.module, own, inputs, live, precision)
            except Exception:
                self.costs[kind] = None
        return self.costs[kind], kind


def _shaped(tensor: TensorSpec, part: TaskPart) -> TensorSpec:
    shape = part.shapes.get(tensor.name)
    return replace(tensor, shape=shape) if shape is not None else replace(tensor, shape=(0,) * len(tensor.shape))
