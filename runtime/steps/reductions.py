"""Reductions: starts the reduction of each bucket as soon as its last gradient is there, and waits for them. Flags of
sharded parameters are summed as a bucket without gradients.

- The instruction REDUCE of a bucket stands right behind the BACKWARD that adds to it last. While that backward
  computes, a hook on each parameter tells that its gradient is complete. A bucket whose gradients all are is reduced at
  once, beside the rest of the backward; REDUCE then finds it started. A bucket that waits for a gradient that this step
  does not give is started by its REDUCE.
- Buckets start in the order of the instructions, whatever became ready first, so that all ranks meet them in one order
  (as torch's DistributedDataParallel does). Tensor parallel layers sum over their group in the middle of backward, and
  the ranks of a group hold other parameters, so get ready at other moments: there a bucket waits for its instruction.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from spindle.errors import RunError
from spindle.runtime.comms.transport import Transport, Wait
from spindle.runtime.programs.program import Bucket, Flags, Instruction, Op, Program, SliceRun
from spindle.runtime.steps.busy import Together
from spindle.runtime.steps.store import ParameterStore
from spindle.values.cluster import Collective


class Reductions:
    """The reductions of one rank in a step."""

    def __init__(
        self, program: Program, store: ParameterStore, transport: Transport, together: Together | None = None
    ) -> None:
        self.program, self.store, self.transport = program, store, transport
        self._together = together or Together(transport.streams)
        self._completed = completed_buckets(program.instructions[transport.rank])
        self.begin(early=False)

    def begin(self, *, early: bool) -> None:
        """Begin a round. `early`: it is the one in which gradients are reduced, so buckets may start in a backward."""
        self._early = early
        self._waits: dict[str, Wait] = {}
        self._posted: dict[str, tuple[Any, Any]] = {}
        self._queue: list[Bucket] = []
        self._missing: dict[str, set[str]] = {}

    @contextlib.contextmanager
    def during(self, run: SliceRun) -> Iterator[None]:
        """While open a run's backward computes, and starts the reductions of buckets that it completes."""
        names = self._completed.get(run.name, ()) if self._early and run.tensor_parallel == 1 else ()
        if not names:
            yield
            return
        own = set(run.trained_on(self.transport.rank))
        self._queue = [self.program.bucket_by_name[name] for name in names]
        self._missing = {bucket.name: own.intersection(bucket.parameters) for bucket in self._queue}
        home = {name: bucket for bucket, found in self._missing.items() for name in found}
        self._start_complete()

        def completed(name: str) -> None:
            bucket = home.get(name)
            if bucket is None:
                return
            if bucket in self._waits:
                raise RunError(
                    f"parameter {name} got a gradient again after the reduction of its bucket had started: {run.name} "
                    "runs a backward inside of its backward; compute that gradient with torch.autograd.grad instead"
                )
            self._missing[bucket].discard(name)
            self._start_complete()

        self.store.on_gradient = completed
        try:
            yield
        finally:
            self.store.on_gradient = None
            self._queue = []

    def _start_complete(self) -> None:
        while self._queue and not self._missing[self._queue[0].name]:
            self._post(self._queue.pop(0))

    def start(self, name: str) -> tuple[Any, Any]:
        """Start the reduction of a bucket or of flags unless it has started; when that began and ended."""
        if name not in self._waits:
            self._post(self.program.bucket_by_name.get(name) or self.program.flags_by_name[name])
        return self._posted[name]

    def _post(self, bucket: Bucket | Flags) -> None:
        streams, flat = self.transport.streams, self.store.flag(bucket.name)
        began = streams.mark()
        sent = flat if isinstance(bucket, Flags) else flat.to(self.store.numbers.reduced(flat.dtype))
        wait = self._begun(bucket, sent)
        self._waits[bucket.name] = wait if sent is flat else functools.partial(_taken_over, wait, flat, sent)
        self._posted[bucket.name] = began, streams.mark()

    def _begun(self, bucket: Bucket | Flags, sent: Tensor) -> Wait:
        owner = None if isinstance(bucket, Flags) else bucket.owner
        if owner is None:
            begin = functools.partial(self.transport.all_reduce, sent, bucket.ranks)
        else:
            begin = functools.partial(self.transport.reduce, sent, bucket.ranks, owner)
        operation: Collective = "all_reduce" if owner is None else "reduce"
        return self._together.timed(bucket.name, operation, bucket.ranks, sent.nbytes, begin)

    def __contains__(self, name: str) -> bool:
        return name in self._waits

    def wait(self, name: str) -> None:
        """Wait for the reduction of a bucket or of flags."""
        self._waits.pop(name)()


def _taken_over(wait: Wait, flat: Tensor, sent: Tensor) -> None:
    """Wait for a sum of another type, and take it over."""
    wait()
    flat.copy_(sent)


def completed_buckets(instructions: Sequence[Instruction]) -> dict[str, tuple[str, ...]]:
    """Buckets of which the REDUCE follows the BACKWARD of a run, with nothing between that other ranks wait for."""
    found: dict[str, list[str]] = {}
    run: str | None = None
    for instruction in instructions:
        if instruction.op is Op.BACKWARD:
            run = instruction.target
        elif instruction.op is Op.REDUCE and run is not None:
            found.setdefault(run, []).append(instruction.target)
        elif instruction.op is not Op.FREE:
            run = None
    return {name: tuple(buckets) for name, buckets in found.items()}
