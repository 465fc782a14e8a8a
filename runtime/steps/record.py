"""Record: what a step leaves behind on a rank, and the span of each instruction that it carried out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spindle.runtime.devices import Streams
from spindle.runtime.programs.program import Instruction, Op, Program
from spindle.runtime.steps.busy import Busy, Meeting, Together
from spindle.values.trace import Span, SpanKind

_KIND_BY_OP = {
    Op.LOAD: SpanKind.LOAD,
    Op.AGREE: SpanKind.TRANSFER,
    Op.FORWARD: SpanKind.FORWARD,
    Op.BACKWARD: SpanKind.BACKWARD,
    Op.TRANSFER: SpanKind.TRANSFER,
    Op.AWAIT: SpanKind.TRANSFER,
    Op.REDUCE: SpanKind.REDUCE,
    Op.CLIP: SpanKind.REDUCE,
    Op.STEP: SpanKind.STEP,
    Op.GATHER: SpanKind.REDUCE,
    Op.UNSHARD: SpanKind.REDUCE,
    Op.SCATTER: SpanKind.REDUCE,
    Op.ADD: SpanKind.REDUCE,
    Op.TALLY: SpanKind.REDUCE,
    Op.HAND: SpanKind.TRANSFER,
    Op.WRITE: SpanKind.STEP,
}


HOST_OPS = (Op.LOAD, Op.AGREE)
"""Instructions that the process carries out, not its device."""


@dataclass(frozen=True, slots=True)
class Timed:
    """An instruction that was given to the device, the moments at which it begins and ends there, and what it moves."""

    instruction: Instruction
    begun: Any
    ended: Any
    moved_bytes: int


@dataclass(slots=True)
class StepRecord:
    """What one step leaves behind on a rank: losses of the tasks that end on it, the norm of all gradients when it was
    clipped, and its spans. `skipped`: what was not finite here, where no rank's optimizer stepped for such a thing.
    """

    losses: dict[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    skipped: str | None = None
    spans: list[Span] = field(default_factory=list)
    busy_s: dict[str, float] = field(default_factory=dict)  # by slice run
    together_s: dict[Meeting, tuple[float, float]] = field(default_factory=dict)  # waited, and since the start


class Stepped:
    """A step that was given to the device. `skipped`: see StepRecord."""

    def __init__(self, make: Callable[[], StepRecord], skipped: str | None) -> None:
        """`make` waits for the step's numbers."""
        self._make, self.skipped = make, skipped
        self._found: StepRecord | None = None

    def record(self) -> StepRecord:
        """What it leaves behind; waits until the device has done all of it."""
        if self._found is None:
            self._found = self._make()
            self._found.skipped = self.skipped
        return self._found


def record_of(
    tasks: Sequence[str],
    rounds: int,
    numbers: Callable[[], list[float]],
    spans: Sequence[Timed],
    timed: Callable[..., Span],
    step: int,
    clocks: tuple[Streams, Busy, Together],
) -> StepRecord:
    """What a step leaves behind. `numbers` waits for the losses of each of the `tasks` by round, and behind them the
    norm of all gradients if there is one; `timed` makes spans.
    """
    found, (streams, busy, together) = numbers(), clocks
    moment_s = streams.moment_s
    return StepRecord(
        losses={task: sum(found[at * rounds : (at + 1) * rounds]) / rounds for at, task in enumerate(tasks)},
        grad_norm=found[-1] if len(found) > len(tasks) * rounds else None,
        spans=[timed(t.instruction, moment_s(t.begun), moment_s(t.ended), step, t.moved_bytes) for t in spans],
        busy_s=busy.taken(),
        together_s=together.taken(),
    )


def span_of(
    program: Program,
    rank: int,
    bucket_bytes: Mapping[str, int],
    instruction: Instruction,
    start_s: float,
    end_s: float,
    step: int,
    moved_bytes: int,
) -> Span:
    """An instruction that a rank has carried out in a step, counted from 1. `bucket_bytes`: of the buckets, flats and
    flags that the rank holds; `moved_bytes`: what a transfer has sent and received here.
    """
    transfer = program.transfer_by_name.get(instruction.target)
    run = program.slice_by_name.get(transfer.target if transfer else instruction.target)
    num_bytes = 0
    if transfer is not None:
        num_bytes = moved_bytes
    elif instruction.target in bucket_bytes:
        num_bytes = bucket_bytes[instruction.target]
    kind = SpanKind.REDUCE if instruction.target in bucket_bytes else _KIND_BY_OP[instruction.op]
    return Span(
        rank=rank,
        kind=kind,
        name=str(instruction),
        start_s=start_s,
        end_s=end_s,
        task=run.task if run else instruction.target if instruction.op is Op.LOAD else "",
        component=run.component if run else "",
        metaop=run.metaop if run else "",
        wave=run.wave if run else -1,
        num_bytes=num_bytes,
        step=step,
    )
