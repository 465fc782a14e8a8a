"""Recordings: batches of tasks in; what each rank computes of them out, recorded anew or known from before.

- A Recipe holds what recording needs: task functions, and the modules without weights. It travels to other processes.
- Each rank records the samples that its runs hold, and from that knows the shapes of all that it receives.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from spindle.capture.codes import Captured, CopiesIn, TaskCode, computing_in
from spindle.capture.operators.parts import TaskPart, divide
from spindle.errors import RunError, SpindleError, WorkloadError
from spindle.inputs.batch import SampledBatch, with_own_tensors
from spindle.inputs.same import same_numbers
from spindle.record.lazy import Forbidden, LazyRead, Refused
from spindle.record.replay import signature
from spindle.record.run import Failure, Recorded, record
from spindle.record.skeleton import Skeleton
from spindle.record.substitutes.draws import Stream, drawing_from
from spindle.record.travel import dumped
from spindle.runtime.loading.comparison import Comparison
from spindle.runtime.programs.messages import StepLayout
from spindle.runtime.programs.program import Program
from spindle.runtime.steps.compiled import apart_from_compiling
from spindle.values.graph import base_task
from spindle.values.units import Bounds
from spindle.workload import Precision, Workload

_CPU = torch.device("cpu")
MOST_KNOWN = 64  # recordings kept; batches of other shapes are recorded anew

OTHER_LAYERS = (
    "for some samples of a batch that lacks a modality the task calls other layers than for others; decide by the "
    "fields of the whole batch, not by their values"
)
"""What is wrong where parts of one batch call other layers."""


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
        return _received, (self._dumped,)

    @cached_property
    def _dumped(self) -> bytes:
        """Made once for the rank specs of all ranks."""
        content = (self.functions, self.codes, self.skeleton, self.precision)
        return dumped(content, self.functions.values())

    def apart(self) -> "Recipe":
        """A copy with modules of its own."""
        found: Recipe = _received(self._dumped)
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
    share: float = 1.0  # what its loss is multiplied by, among those of the step's batches of its task

    def prepare(self, program: Program, rank: int) -> None:
        """Record the samples that the runs of a rank hold, and see that they ask of the batch what the whole asks. What
        they read begins its way to the device.
        """
        operators: dict[Bounds, list[str]] = {}
        for run in program.runs_by_task.get(self.task, ()):
            if rank in run.ranks:
                low, high = self.layout.bounds[run.name][run.ranks.index(rank)]
                if low < high:
                    self.part((low, high))
                    operators.setdefault((low, high), []).extend(run.operators)
        whole = self.batch.units.whole
        for bounds, names in operators.items():
            if bounds != whole and not self.parts[bounds].is_plain:
                self.recordings.compare(self, self.parts[bounds], names)
        for bounds, names in operators.items():
            self.parts[bounds].begin(names)

    def part(self, bounds: Bounds) -> TaskPart:
        """What was recorded of samples `bounds`."""
        if bounds not in self.parts:
            found = self.recordings.record(self, bounds)
            self.check_layers(found)
            self.parts[bounds] = found
        return self.parts[bounds]

    def check_layers(self, found: TaskPart) -> None:
        """Raise WorkloadError where these samples call other layers than others of the batch."""
        if any((found.absent, found.idle) != (part.absent, part.idle) for part in self.parts.values()):
            raise WorkloadError(f"{self.where}: {OTHER_LAYERS}")

    @property
    def where(self) -> str:
        """Task and step, counted from 1, for messages."""
        return f"task {base_task(self.task)!r}, step {self.stream.step + 1}"

    @property
    def absent(self) -> frozenset[str]:
        """Tensors that operators do not send of this batch, since it lacks a modality: the same on all ranks."""
        return next((part.absent for part in self.parts.values()), frozenset())

    def digests(self) -> tuple[int, int]:
        """A number that is equal for batches of equal shapes and rows, and one that is equal where the same operators
        compute and send something; 0 where nothing is recorded.
        """
        ways = {_digest((sorted(part.absent), sorted(part.idle))) for part in self.parts.values()}
        return _digest(self.batch.shapes), max(ways, default=0)


class Recordings:
    """Records batches of the tasks of one rank."""

    def __init__(self, recipe: Recipe, device: CopiesIn) -> None:
        """`device`: where operators read what is recorded."""
        self.recipe, self.device = recipe, device
        self.checking = False  # whether what is known from before is compared with a new recording
        self._known: OrderedDict[object, tuple[Recorded, TaskPart]] = OrderedDict()
        self._comparison = Comparison(recipe.codes)

    def loaded(self, task: str, batch: SampledBatch, layout: StepLayout, stream: Stream) -> LoadedBatch:
        """A batch of a task (or of a micro-batch of it) ready to be recorded. `stream`: where its draws stand."""
        return LoadedBatch(self, task, batch, layout, stream)

    def record(self, loaded: LoadedBatch, bounds: Bounds, *, of_samples_together: bool = False) -> TaskPart:
        """Samples `bounds` recorded, or gone through anew as a recording of the same shapes did; then, if so asked,
        without tensors that follow entry by entry from fields.

        Raises WorkloadError that names the task and the step.
        """
        code = self.recipe.codes[loaded.task]
        where = loaded.where
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
            fields = with_own_tensors(fields)
        key = (loaded.task, signature(fields))
        known = self._known.get(key)
        if known is not None:
            found = self._replayed(known, fields, stream, where, of_samples_together)
            if found is not None:
                self._known.move_to_end(key)
                return known[1].of_others(code, known[0], found, bounds, loaded.batch.units)
        lacks = sorted(code.held - loaded.batch.held)
        try:
            recorded = self._recorded(loaded.task, fields, stream, where)
            part = divide(code, recorded, bounds, loaded.batch.units, self.device, where, lacks)
        except (RunError, WorkloadError) as error:
            raise self._of_a_part(error, loaded, bounds) from error
        if key[1] is not None and recorded.replay is not None:
            self._known[key] = recorded, part
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return part

    def _of_a_part(self, error: SpindleError, loaded: LoadedBatch, bounds: Bounds) -> Exception:
        """What is wrong with a part of a batch: another error, where the whole is right."""
        size = loaded.batch.units.num_samples
        if bounds == loaded.batch.units.whole:
            return error
        try:
            self.record(loaded, loaded.batch.units.whole)
        except Exception:  # it takes this batch neither whole nor in parts
            return error
        explained = WorkloadError(
            f"{error}\nIt was called with {bounds[1] - bounds[0]} of the batch's {size} samples, which all together it "
            "takes: plans give parts of a batch to devices, so let it go the same way for any of its samples, let "
            "samples that belong together be one by rows= (docs/packed.md), or plan for fewer devices"
        )
        for note in getattr(error, "__notes__", ()):
            explained.add_note(note)
        return explained

    def compare(self, loaded: LoadedBatch, part: TaskPart, operators: Sequence[str]) -> None:
        """See that what the calls of these operators take of a part of a batch is what they take of the whole, as far
        as it was at capture. Raises WorkloadError that names the task, the step and the line.
        """
        units = loaded.batch.units
        whole = loaded.parts.get(units.whole) or self.record(loaded, units.whole, of_samples_together=True)
        if units.whole not in loaded.parts and self._comparison.needs_entries(whole, part, operators):
            whole = self.record(loaded, units.whole)
        loaded.check_layers(whole)
        difference = self._comparison.difference(whole, part, units, operators)
        if difference:
            raise WorkloadError(f"{loaded.where}: {difference}")

    def _recorded(self, task: str, fields: dict[str, Any], stream: Stream, where: str) -> Recorded:
        try:
            with apart_from_compiling():
                found = record(
                    self.recipe.skeleton,
                    self.recipe.functions[base_task(task)],
                    fields,
                    stream=stream,
                    sites=self.recipe.codes[task].sites.get("", ()),
                    autocast=computing_in(self.recipe.precision, _CPU),
                )
        except Failure as failure:
            raise _explained(where, failure.error) from failure.error
        if found.result is not None or found.recording.loss < 0:
            raise WorkloadError(
                f"{where}: its function returned no loss that depends on parameters; where samples may have nothing to "
                "learn from, begin with a zero that does (features.sum() * 0)"
            )
        return found

    def _replayed(
        self, known: tuple[Recorded, TaskPart], fields: dict[str, Any], stream: Stream, where: str, together: bool
    ) -> list[Tensor] | None:
        replay = known[0].replay
        assert replay is not None
        if together and not self.checking:
            replay = replay.of_samples_together
        unread = with_own_tensors(fields) if self.checking else fields  # the replay may change its fields in place
        with computing_in(self.recipe.precision, _CPU), drawing_from(stream):
            found = replay.run(fields)
        if found is not None and self.checking:
            again = self._recorded(known[1].task, unread, stream, where).recording
            same = len(again.aux) == len(found) and len(again.nodes) == len(known[0].recording.nodes)
            if not same or not all(map(same_numbers, again.aux, found)):
                raise WorkloadError(
                    f"{where}: its function computes something else of the same fields than before (a counter, a "
                    "global, a number from outside of torch); let it depend on its batch alone"
                )
        return found


def _digest(value: object) -> int:
    """A number of 20 bits, at least 1: squares of it are exact in float64."""
    return 1 + (int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=4).digest()) >> 12)


def _explained(where: str, error: Exception) -> Exception:
    if isinstance(error, LazyRead):
        return WorkloadError(
            f"{where}: {error.what} (if, while, int(), .item()), which it did not when it was captured; {error.instead}"
        )
    if isinstance(error, SpindleError):
        return type(error)(f"{where}: {error}")
    if isinstance(error, Forbidden | Refused):
        return WorkloadError(f"{where}: {error}")
    return RunError.of(error, where)
