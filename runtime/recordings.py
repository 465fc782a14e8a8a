"""Recordings: batches of tasks in; what each rank computes of them out, recorded anew or known from before.

- A Recipe holds what recording needs: task functions, and the modules without weights. It travels to other processes.
- Each rank records the samples that its runs hold, and from that knows the shapes of all that it receives.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch

from spindle.capture.codes import Captured, TaskCode, computing_in
from spindle.capture.parts import TaskPart, divide
from spindle.capture.repeat import base_task
from spindle.errors import RunError, SpindleError, WorkloadError
from spindle.record.draws import Stream
from spindle.record.run import Failure, record
from spindle.record.skeleton import Skeleton, dumped
from spindle.runtime.programs.messages import StepLayout
from spindle.units import Bounds, SampledBatch
from spindle.workload import Precision, Workload


@dataclass(frozen=True)
class Recipe:
    """How to record the tasks of a workload: their functions, the modules as recordings need them, and how recordings
    fall into operators. Weights stay behind when it is sent.
    """

    functions: Mapping[str, Callable[..., Any]]
    codes: Mapping[str, TaskCode]
    skeleton: Skeleton
    precision: Precision = "fp32"

    @classmethod
    def of(cls, workload: Workload, captured: Captured) -> "Recipe":
        """That of a captured workload."""
        functions = {name: task.function for name, task in workload.tasks.items()}
        return cls(functions, captured.tasks, captured.skeleton, captured.precision)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (dumped((self.functions, self.codes, self.skeleton, self.precision)),)

    def apart(self) -> "Recipe":
        """A copy with modules of its own."""
        found: Recipe = _received(dumped((self.functions, self.codes, self.skeleton, self.precision)))
        return found


def _received(payload: bytes) -> Recipe:
    return Recipe(*cloudpickle.loads(payload))


@dataclass
class LoadedBatch:
    """One batch of a task on this rank: its samples, how ranks share them, and recordings by samples."""

    recordings: "Recordings"
    task: str
    batch: SampledBatch
    layout: StepLayout
    stream: Stream
    parts: dict[Bounds, TaskPart] = field(default_factory=dict)

    def prepare(self, bounds: Iterable[Bounds]) -> None:
        """Record these samples."""
        for own in dict.fromkeys(bounds):
            self.part(own)

    def part(self, bounds: Bounds) -> TaskPart:
        """What was recorded of samples `bounds`."""
        if bounds not in self.parts:
            self.parts[bounds] = self.recordings.record(self, bounds)
        return self.parts[bounds]

    def digest(self) -> int:
        """A number of 20 bits that is equal for batches of equal shapes and rows."""
        text = repr(self.batch.shapes).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) >> 12


class Recordings:
    """Records batches of the tasks of one rank."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device

    def loaded(self, task: str, batch: SampledBatch, layout: StepLayout, stream: Stream) -> LoadedBatch:
        """A batch of a task (or of a micro-batch of it) ready to be recorded. `stream`: where its draws stand."""
        return LoadedBatch(self, task, batch, layout, stream)

    def record(self, loaded: LoadedBatch, bounds: Bounds) -> TaskPart:
        """Record samples `bounds`. Raises WorkloadError that names the task and the step."""
        code = self.recipe.codes[loaded.task]
        where = f"task {base_task(loaded.task)!r}, step {loaded.stream.step}"
        stream = Stream(
            seed=loaded.stream.seed,
            step=loaded.stream.step,
            batch=loaded.stream.batch,
            task=base_task(loaded.task),
            low=bounds[0],
            high=bounds[1],
            units=loaded.batch.units,
        )
        fields = loaded.batch.part(*bounds)
        if code.copies_batch:
            fields = {
                name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in fields.items()
            }
        try:
            found = record(
                self.recipe.skeleton,
                self.recipe.functions[base_task(loaded.task)],
                fields,
                stream=stream,
                sites=code.sites.get("", ()),
                autocast=computing_in(self.recipe.precision, torch.device("cpu")),
            )
        except Failure as failure:
            raise _explained(where, failure.error) from failure.error
        if found.result is not None or found.recording.loss < 0:
            raise WorkloadError(f"{where}: its function returned no loss that depends on parameters")
        return divide(code, found, bounds, loaded.batch.units, self.device, where)


def _explained(where: str, error: Exception) -> Exception:
    if isinstance(error, SpindleError):
        return type(error)(f"{where}: {error}")
    return RunError.of(error, where)
