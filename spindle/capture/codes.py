"""Codes: what the runtime executes. Each is a torch module with named inputs and outputs.

- An operator's code runs on any part of the batch, its own parameters inside under the module's own names.
- An aux code computes, from batch fields alone, something operators read beside their data flow: the field itself, a
  mask, rotary tables, the number of counted positions. It is cheap and holds no parameters, so each rank computes its
  own instead of being sent it.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from spindle.capture.draws import Sites
from spindle.errors import WorkloadError
from spindle.graph import TaskGraph
from spindle.workload import Precision


FieldSpecs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each field of a task's batches."""


def field_specs(batch: Mapping[str, Tensor]) -> FieldSpecs:
    """Shape and dtype of each field of a batch."""
    return {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}


def check_fields(task: str, step: int, batch: Mapping[str, Tensor], captured: FieldSpecs) -> None:
    """Refuse a batch whose fields, shapes or dtypes are not those that capture saw, since code was made for these.

    Raises WorkloadError that names the task, the step and the field.
    """
    found = field_specs(batch)
    for name in (*captured, *(name for name in found if name not in captured)):
        if found.get(name) != captured.get(name):
            raise WorkloadError(
                f"task {task!r}, step {step}: batch[{name!r}] {_spec_text(found.get(name))}, but the batch that was "
                f"captured {_spec_text(captured.get(name), 'had')}; give every batch the same fields, shapes and "
                "dtypes, for instance by padding to a fixed length"
            )


def _spec_text(spec: tuple[tuple[int, ...], torch.dtype] | None, verb: str = "has") -> str:
    if spec is None:
        return f"{verb} no such field" if verb == "had" else "is missing"
    return f"{verb} shape {spec[0]} and dtype {str(spec[1]).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class CodeInput:
    """One argument of an operator: a tensor of another operator, an aux value, or the number of samples at hand."""

    kind: Literal["tensor", "aux", "rows"]
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCode:
    """Code of one operator: `module(*inputs)` gives a tuple with a tensor for each of `outputs`.

    `parameters` maps names inside the module to the workload's names; `buffers` likewise.
    """

    name: str
    module: nn.Module
    inputs: tuple[CodeInput, ...]
    outputs: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...]
    buffers: tuple[tuple[str, str], ...] = ()


def aux_read(codes: Iterable[OperatorCode]) -> set[str]:
    """Names of the aux values that operators read."""
    return {given.name for code in codes for given in code.inputs if given.kind == "aux"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxCode:
    """Code of one aux value: `module(rows, *fields)`.

    `rows` entries of dimension `row_dim` belong to one sample (0: none do). `whole`: it must see the whole batch, and
    is cut to the samples at hand afterwards.
    """

    name: str
    task: str
    module: nn.Module
    fields: tuple[str, ...]
    whole: bool
    rows: int
    row_dim: int = 0

    def value(self, batch: Mapping[str, Tensor], low: int, high: int, batch_size: int) -> Tensor:
        """The value for samples low..high-1 of the whole batch."""
        with torch.no_grad():
            if not self.whole:
                return self._run([batch[name][low:high] for name in self.fields], high - low)
            value = self._run([batch[name] for name in self.fields], batch_size)
            return value.narrow(self.row_dim, low * self.rows, (high - low) * self.rows) if self.rows else value

    def _run(self, fields: list[Tensor], rows: int) -> Tensor:
        value: Tensor = self.module(rows, *fields)[0]
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A workload as captured: its task graph and the code of each operator in it.

    `losses` names the tensor that holds each task's loss; `parameters` are the user's, by the workload's names; `draws`
    tells what each task draws; `fields` holds shape and dtype of each batch field of each task, as captured.
    """

    graph: TaskGraph
    codes: Mapping[str, OperatorCode]
    aux: Mapping[str, AuxCode]
    losses: Mapping[str, str]
    weights: Mapping[str, float]
    parameters: Mapping[str, nn.Parameter]
    precision: Precision = "fp32"
    draws: Mapping[str, Sites] = field(default_factory=dict)
    fields: Mapping[str, FieldSpecs] = field(default_factory=dict)


def computing_in(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which operators compute: autocast, or none even where it is on outside."""
    if precision != "bf16" and not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # half a millisecond of a small model's step less
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
