"""Batches: what the tasks of a step are computed from on one rank, loaded, shared among ranks and recorded.

Beside a GPU, where a thread of its own costs the step nothing, the batches of the next step are
recorded while this one is computed. They are looked at then, not taken: a checkpoint says where the present step
stands.
"""

import concurrent.futures
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from spindle.errors import WorkloadError
from spindle.inputs.batch import SampledBatch
from spindle.inputs.weighing import shares
from spindle.record.substitutes.draws import Stream
from spindle.runtime.comms.transport import Transport, sum_over_all
from spindle.runtime.devices import Streams
from spindle.runtime.drift import Drift
from spindle.runtime.loading.data import Feed
from spindle.runtime.loading.recordings import OTHER_LAYERS, LoadedBatch, Recordings
from spindle.runtime.programs.messages import Layouts
from spindle.runtime.programs.program import Program
from spindle.runtime.watch import tokens_of
from spindle.values.graph import base_task, micro_batch, num_micro_batches

OTHER_SHAPES = (
    "read batches of different shapes or rows; every pass over its data must give the same batches in every process "
    "(seed your own random generators)"
)

TakesPart = Callable[[int], Iterable[str]]
"""Tasks that take part in a step."""


class Batches:
    """Batches of one rank's tasks, round by round. `tokens`, `samples`: read since these were cleared, by task."""

    def __init__(
        self,
        program: Program,
        rank: int,
        feeds: Mapping[str, Feed],
        recordings: Recordings,
        *,
        seed: int,
        rounds: int,
        takes_part: TakesPart,
        ahead: Streams | None = None,
        drift: Drift | None = None,
    ) -> None:
        """`rounds` of a step; `takes_part` names the tasks of a step. `ahead`: record the next round beside this
        one, in a thread that gives copies to these streams. `drift` looks at all batches.
        """
        self.program, self.rank, self.feeds, self.recordings = program, rank, feeds, recordings
        self.seed, self.rounds, self.takes_part = seed, rounds, takes_part
        self.layouts = Layouts(program)
        self.in_flight = num_micro_batches(task for task, _ in program.losses)
        self.loads = [task for task, runs in program.runs_by_task.items() if any(rank in run.ranks for run in runs)]
        self.tokens: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()
        self.drift = drift or Drift(())
        self._thread = (
            concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="recording", initializer=ahead.enter_thread)
            if ahead is not None
            else None
        )
        self._running: concurrent.futures.Future[None] | None = None
        self._stopped = threading.Event()
        self._shares: dict[str, list[float]] = {}  # what the losses of a step's batches count, by task
        self._prepared: dict[tuple[str, int, int, int], LoadedBatch] = {}  # by task, step, batch and id of its fields

    def round(self, step: int, number: int) -> Callable[[str], LoadedBatch]:
        """What gives the batch of a task, or of one of its micro-batches, in a round of a step.

        Concurrent ones are read together: all ranks count alike.
        """
        self.wait()
        first = number * self.in_flight
        read: dict[str, list[SampledBatch]] = {}
        tasks = set(self.takes_part(step))
        left = {task for task in self.loads if base_task(task) in tasks}
        for base in self.feeds.keys() & {base_task(task) for task in left}:
            self.feeds[base].ask(self.in_flight)  # two ranks that read for each other would wait for each other

        def fetch(task: str) -> LoadedBatch:
            base, micro = base_task(task), micro_batch(task)
            if base not in read:
                read[base] = [self.feeds[base].next() for _ in range(self.in_flight)]
                self.tokens[base] += sum(tokens_of(batch.fields) for batch in read[base])
                self.samples[base] += sum(batch.units.num_samples for batch in read[base])
                for batch in read[base]:
                    self.drift.look(base, step + 1, batch)
                if not number:
                    self._shares[base] = self._counted(base, read[base])
            batch = read[base][micro]
            found = self._prepared.pop((task, step, first + micro, id(batch)), None)
            left.discard(task)
            if not left:
                self._prepared.clear()
                self._begin(*((step, number + 1) if number + 1 < self.rounds else (step + 1, 0)))
            loaded = found or self._loaded_batch(task, step, first + micro, batch)
            loaded.share = self._shares[base][first + micro]
            return loaded

        return fetch

    def _counted(self, task: str, first: Sequence[SampledBatch]) -> list[float]:
        """What the loss of each batch of a step is multiplied by; the batches of later rounds are looked at now."""
        feed, later = self.feeds[task], (self.rounds - 1) * self.in_flight
        if feed.task.weigh == "micro-batches":
            return [1.0] * (self.in_flight + later)
        coming = [feed.peek(index) for index in range(later)]  # None where the data end, which raises when it is taken
        return shares([0.0 if batch is None else feed.task.counted(batch) for batch in (*first, *coming)])

    def _loaded_batch(self, task: str, step: int, number: int, batch: SampledBatch) -> LoadedBatch:
        stream = Stream(seed=self.seed, step=step, batch=number, task=base_task(task))
        return self.recordings.loaded(task, batch, self.layouts.of(task, batch.units), stream)

    # -- ahead ----------------------------------------------------------------------------------------------------

    def _begin(self, step: int, number: int) -> None:
        if self._thread is not None and not self._stopped.is_set():
            self._running = self._thread.submit(self._record_ahead, step, number)

    def _record_ahead(self, step: int, number: int) -> None:
        """Record what a later round will load. An error here is raised again when it is loaded."""
        with contextlib.suppress(Exception):
            tasks = set(self.takes_part(step))
            for task in (task for task in self.loads if base_task(task) in tasks):
                if self._stopped.is_set():
                    return
                batch = self.feeds[base_task(task)].peek(micro_batch(task))
                if batch is not None:
                    place = number * self.in_flight + micro_batch(task)
                    loaded = self._loaded_batch(task, step, place, batch)
                    loaded.prepare(self.program, self.rank)
                    self._prepared[task, step, place, id(batch)] = loaded

    def wait(self) -> None:
        """Until nothing is recorded ahead any more: only then may others look at the feeds."""
        if self._running is not None:
            concurrent.futures.wait([self._running])
            self._running = None

    def forget(self) -> None:
        """Drop what was recorded ahead: the feeds go on elsewhere."""
        self.wait()
        self._prepared.clear()

    def settle(self) -> None:
        """Wait until nothing is recorded or read."""
        self.wait()
        for feed in self.feeds.values():
            feed.settle()

    def close(self) -> None:
        """Read and record no more."""
        self._stopped.set()
        for feed in self.feeds.values():
            feed.close()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def check_alike(tasks: Sequence[str], loaded: Mapping[str, LoadedBatch], transport: Transport, step: int) -> None:
    """See that all ranks that loaded a task have a batch of the same shapes and call the same layers for their samples:
    they send each other pieces of it.

    All ranks call it together. `step`: counted from 1. Raises WorkloadError that names two ranks.
    """
    own = [digest for task in tasks for digest in (loaded[task].digests() if task in loaded else (0, 0))]
    sums = torch.tensor([[d > 0, d, d**2] for d in own], dtype=torch.float64)
    sum_over_all(sums, transport)
    for index, (count, total, squares) in enumerate(sums.tolist()):
        if count * squares != total * total:  # the variance is zero where all are equal
            first, other = _differing(own[index], transport)
            what = f"call different layers: {OTHER_LAYERS}" if index % 2 else OTHER_SHAPES
            raise WorkloadError(f"task {tasks[index // 2]!r}, step {step}: ranks {first} and {other} {what}")


def _differing(digest: int, transport: Transport) -> tuple[int, int]:
    """Two ranks whose digests differ."""
    seen = torch.zeros(transport.num_ranks, dtype=torch.float64)
    seen[transport.rank] = digest
    sum_over_all(seen, transport)
    digests = {rank: value for rank, value in enumerate(seen.tolist()) if value}
    first = next(iter(digests))
    return first, next(rank for rank, value in digests.items() if value != digests[first])
