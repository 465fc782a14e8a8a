"""Run: one call of a task function under a recorder; what was recorded, and what was drawn, out."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spindle.inputs.nested import nested
from spindle.record.lazy import Forbidden, Refused, is_lazy, memory_of
from spindle.record.recorder import ByRows, Recorder
from spindle.record.recording import Recording
from spindle.record.replay import Replay
from spindle.record.shapes import Drawn
from spindle.record.skeleton import Skeleton
from spindle.record.substitutes.draws import Site, Stream, drawing_from
from spindle.record.substitutes.randomness import RecordedDrawing
from spindle.record.writes import take_out

TaskFunction = Callable[[Any], Any]


@dataclass(frozen=True)
class Recorded:
    """One call of a task function: what was recorded, and draws by scope, "" for the glue.

    `result` is what the function returned, where that is no value of the model. `replay` gives what the recording read
    of the batch for other batches of the same shapes, where that is sure. `is_plain`: what it read of the batch follows
    entry by entry from tensors of the batch, of which a part has the rows of its samples.
    """

    recording: Recording
    drawn: Mapping[str, Drawn]
    result: Any = None
    replay: Replay | None = None
    is_plain: bool = False


class Failure(Exception):
    """A call of a task function that raised: where it was when it did."""

    def __init__(self, error: Exception, component: str, block: str) -> None:
        super().__init__(str(error))
        self.error, self.component, self.block = error, component, block


def record(
    skeleton: Skeleton,
    function: TaskFunction,
    fields: Mapping[str, Any],
    *,
    stream: Stream,
    sites: Sequence[Site] | None = None,
    autocast: contextlib.AbstractContextManager[object] | None = None,
) -> Recorded:
    """Call `function` on a batch, or on a part of one, and note what it computes from parameters.

    `stream`: where its draws stand; `sites`: along what the samples lie in each draw of the glue. Raises Failure.
    """
    fields = {name: value.detach() if isinstance(value, Tensor) else value for name, value in fields.items()}
    with skeleton.open(_call.__code__) as recorder, autocast or contextlib.nullcontext():
        recorder.kept, recorder.constants = skeleton.kept, skeleton.constants
        recorder.stateful = skeleton.stateful
        drawing = RecordedDrawing(recorder, sites)
        try:
            with drawing_from(stream), recorder, ByRows(), drawing, _gradients_as_found():
                result = _call(function, dict(fields))
            with torch._C.DisableTorchFunction():
                _note_assigned(skeleton, recorder)
                of_model = isinstance(result, Tensor) and (is_lazy(result) or recorder.number(result) is not None)
                if of_model:  # itself, or what values of the model were added to in place
                    recorder.recording.loss = recorder.known(result)
        except Exception as error:
            failed = recorder.failed[1] if recorder.failed is not None and recorder.failed[0] is error else ""
            raise Failure(error, failed, recorder.block) from error
        skeleton.read |= recorder.read
        recording = recorder.recording
        try:
            take_out(recording, skeleton.parameters, skeleton.parameters_of)
        except Refused as error:
            raise Failure(error, "", "") from error
        drawn = {"": Drawn(tuple(drawing.shapes), drawing.writes_out_attention), **recorder.drawn}
        # a task that writes to parameters is recorded anew each time: its momentum may follow a schedule of its own
        replay = None if recording.writes else recorder.real_calls.replay(fields, recorder.sources)
        tensors = all(isinstance(value, Tensor) for value in fields.values())
        plain = tensors and replay is not None and not replay.of_samples_together.calls
        return Recorded(recording, drawn, None if of_model and recording.loss >= 0 else result, replay, plain)


@contextlib.contextmanager
def _gradients_as_found() -> Iterator[None]:
    """Raise Forbidden where code leaves gradients switched, which its next call would see; they are switched back."""
    found = torch.is_grad_enabled()
    try:
        yield
        if torch.is_grad_enabled() != found:
            raise Forbidden(
                f"it leaves gradients switched {'on' if torch.is_grad_enabled() else 'off'} (torch.set_grad_enabled), "
                "which its next call would see; switch them in a with statement"
            )
    finally:
        torch.set_grad_enabled(found)


def _call(function: TaskFunction, fields: dict[str, Any]) -> Any:
    """The outermost place of every site."""
    return function(nested(fields))


def _note_assigned(skeleton: Skeleton, recorder: Recorder) -> None:
    """Buffers that were replaced by a new tensor: a call that writes it to the buffer. Buffers that a call changed in
    place, though they were taken as constants, are noted in the skeleton.
    """
    names = {id(buffer): name for name, buffer in skeleton.buffers().items()} if recorder.changed else {}
    if recorder.written:
        memory = {memory_of(buffer): name for name, buffer in skeleton.buffers().items() if memory_of(buffer)}
        written = {memory[of] for of in map(memory_of, recorder.written) if of in memory} - skeleton.changed
        if written and not skeleton.learning:
            raise Refused(_moved(min(written)))
        skeleton.changed |= written
    for changed in recorder.changed:
        if id(changed) not in names:
            raise Refused(
                "a call changes a tensor in place that is no buffer of a component (statistics of its own, say); make "
                "it a buffer of a module that is registered"
            )
        skeleton.changed.add(names[id(changed)])
    for name, leaf, value in skeleton.replaced_buffers():
        if leaf is None:
            if is_lazy(value):
                raise Refused(
                    f"buffer {name!r} is made by the first batch, which every rank would make its own; register it in "
                    "__init__ with its first value"
                )
            continue
        if tuple(value.shape) != tuple(leaf.shape):
            raise Refused(
                f"buffer {name!r} was replaced by one of shape {tuple(value.shape)}, where it had {tuple(leaf.shape)}; "
                "keep its shape"
            )
        if name not in skeleton.stateful:
            skeleton.changed.add(name)
            if not skeleton.learning and not (is_lazy(value) or torch.equal(value, leaf)):
                raise Refused(_moved(name))
            continue
        recorder.note_assigned(name, leaf, value)


def _moved(name: str) -> str:
    return (
        f"buffer {name!r} changes, and did not when it was captured, so that no plan keeps it alike on all ranks; "
        "begin with a batch in which it changes (the longest, say)"
    )
