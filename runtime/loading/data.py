"""Data: what a task's loader gives, the same on every rank that needs it.

- On each machine one of the ranks that need a task's batches runs the loader, in a thread that reads ahead; a thread of
  each of the others gets them from it (shared_batches.py). What has been read tells where the feed stands, so that all
  ranks know it. A list of batches, which every rank has, needs neither thread, nor random numbers.
- Random numbers that the loader draws come from generators of its own, seeded alike everywhere, so that a shuffling
  loader gives all ranks the same order.
- A feed reads a copy of the loader (spindle/inputs/loaders.py): generators that the user gave it start where the user's
  stand, in every run, and draw what they would in one process. Each pass gets its number through `set_epoch`.
- Where a feed stands is a small state: the generators at the start of the present pass, and the batches taken of it. A
  resumed feed reads those again and drops them; a loader with `state_dict` and `load_state_dict` of its own need not.
- Worker processes that persist go on from pass to pass. They hold what the data set was in the first pass and draw on
  from there, as in one process, so that a resumed run starts them as in the first pass; what they draw is lost to it.
"""

import contextlib
import hashlib
import logging
import queue
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spindle.errors import WorkloadError
from spindle.inputs.batch import SampledBatch
from spindle.inputs.loaders import deaf, persisting, reading, set_epoch
from spindle.record.substitutes.draws import GLOBAL_GENERATORS
from spindle.runtime.comms.background import END_S, start_thread
from spindle.runtime.comms.host import running_on
from spindle.runtime.loading.shared_batches import SharedReads
from spindle.workload import Task

logger = logging.getLogger(__name__)

FeedState = dict[str, Any]
"""Plain values and tensors: {"pass": 0, "taken": 12, "generators": ..., "own": ..., "loader": None}. `generators` are
those of the process, `own` the loader's.
"""


@dataclass(frozen=True, slots=True)
class _Read:
    """A batch, or None where the data has ended for good, and the feed's state once it is taken."""

    batch: SampledBatch | None
    state: FeedState


def keeps_state(task: Task) -> bool:
    """Whether a task's loader can tell where it stands, and go on from there."""
    loader = getattr(task.data, "base_dataloader", task.data)  # accelerate's have the methods, but pass them on to this
    return all(hasattr(loader, method) for method in ("state_dict", "load_state_dict"))


def is_listed(task: Task) -> bool:
    """Whether a task's batches are all there already, on every rank."""
    return type(task.data) in (list, tuple)


class Feed:
    """The batches of one task. When its data ends it starts over, or ends too, as `task.on_end` says."""

    def __init__(
        self,
        task: Task,
        seed: int,
        *,
        timeout_s: float = 60.0,
        shared: SharedReads | None = None,
        cores: Sequence[int] = (),
    ) -> None:
        """Nothing is read until the first batch is asked for. `timeout_s`: how long to wait for one. `shared`: how the
        ranks of this machine share what one of them reads. `cores`: where processes that the loader starts may run.
        """
        self.task, self.timeout_s, self._shared, self._cores = task, timeout_s, shared, cores
        self._listed = is_listed(task)
        state = np.random.RandomState(int.from_bytes(hashlib.sha256(f"{seed}/{task.name}".encode()).digest()[:4]))
        self._generators = _Generators(
            random.Random(int(state.randint(2**31))).getstate(),
            np.random.RandomState(int(state.randint(2**31))).get_state(),
            torch.Generator().manual_seed(int(state.randint(2**31))).get_state(),
        )
        self._first_generators = self._generators.dumped()
        self._reading = reading(task.data)
        self._first_own = self._reading.state()
        self._thread = _Thread(f"data-{task.name}")
        self._ahead: deque[Future[_Read]] = deque()
        self._iterator: Iterator[object] | None = None
        self._pass, self._taken, self._skip = 0, 0, 0
        self._pass_generators, self._pass_own = self._first_generators, self._first_own
        self._begun = False  # whether a pass was begun with this copy of the loader
        self._loader_state: Any = None
        self._closed = False
        self._state = self._now()

    # -- what a worker calls --------------------------------------------------------------------------------------

    def next(self) -> SampledBatch:
        """The next batch. Raises WorkloadError when the loader raises, ends where it must not, gives what the task
        cannot take, or nothing in time.
        """
        ahead, read = self._ahead, self._wait_for(0)
        if read.batch is None:
            raise WorkloadError(
                f"task {self.task.name!r}: its data ended after {self._state['taken']} batches, and on_end is "
                f"{self.task.on_end!r}; give more data, train fewer steps, or set on_end='restart'"
            )
        ahead.popleft()
        self._state = read.state
        for _ in range(0 if self._listed else self.task.prefetch - len(self._ahead)):
            self._ahead.append(self._ordered())
        return read.batch

    def ask(self, count: int) -> None:
        """Have the next `count` batches read, without waiting for them."""
        while len(self._ahead) < count and not self._listed:
            self._ahead.append(self._ordered())

    def peek(self, index: int) -> SampledBatch | None:
        """The batch after the next `index`, which is not taken; None where the data has ended for good."""
        return self._wait_for(index).batch

    def holds(self, count: int) -> bool:
        """Whether at least `count` more batches come."""
        return all(self._wait_for(index).batch is not None for index in range(count))

    def digest(self) -> str:
        """A short fingerprint of the next batch, which stays the next."""
        found = hashlib.sha256()
        batch = self._wait_for(0).batch
        for name, value in sorted((batch.fields if batch else {}).items()):
            if not isinstance(value, torch.Tensor):
                found.update(f"{name}{type(value).__name__}".encode())
                continue
            found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def state(self) -> FeedState:
        """Where the feed stands, after the last batch taken; what was read ahead does not count."""
        return self._state

    def resume(self, state: FeedState) -> None:
        """Go on from `state`, and drop what was read ahead. Raises WorkloadError if the loader does not come back."""
        if self._shared is not None:
            self._shared.restart()
        running = [future for future in self._ahead if not future.cancel()]
        if wait(running, self.timeout_s).not_done:
            raise self._late("its loader gave no batch")
        self._ahead.clear()
        self._iterator = None
        self._pass, self._taken, self._skip = int(state["pass"]), 0, int(state["taken"])
        self._pass_generators = state["generators"]
        self._generators = _Generators.loaded(self._pass_generators)
        self._reading.close()
        self._reading, self._begun = reading(self.task.data), False
        self._reading.load(f"task {self.task.name!r}", state.get("own", self._first_own))
        self._pass_own = self._reading.state()
        self._loader_state = state["loader"]
        self._state = state

    def settle(self) -> None:
        """Wait until nothing is being read here: only then are the process's generators its own again."""
        if self._shared is None or self._shared.reads:
            wait(self._ahead, self.timeout_s)

    def close(self) -> None:
        """Read no more. What the loader started ends when what it is reading has come."""
        self._closed = True
        if self._shared is not None:
            self._shared.leave()
        for future in self._ahead:
            future.cancel()
        self._ahead = deque()  # a rank that is taking a batch of the old one may do so
        if self._shared is not None or self._iterator is not None:
            self._thread.submit(self._finish)
        self._thread.end()

    def _wait_for(self, index: int) -> _Read:
        ahead = self._ahead
        while len(ahead) <= index:
            ahead.append(self._ordered())
        try:
            return ahead[index].result(self.timeout_s)
        except TimeoutError:
            raise self._late(self._shared.waits_for() if self._shared else "its loader gave no batch") from None

    def _late(self, what: str) -> WorkloadError:
        return WorkloadError(
            f"task {self.task.name!r}: {what} within {self.timeout_s:g} s; make it faster, or raise timeout_s"
        )

    def _ordered(self) -> "Future[_Read]":
        if not self._listed:
            generation = self._shared.generation if self._shared else 0  # of now: a resume may come before it begins
            return self._thread.submit(lambda: self._read(generation))
        found: Future[_Read] = Future()
        try:
            found.set_result(self._read(0))
        except WorkloadError as error:
            found.set_exception(error)
        return found

    # -- what its thread does -------------------------------------------------------------------------------------

    def _read(self, generation: int) -> _Read:
        return self._shared.read(self._loaded, generation) if self._shared else self._loaded()

    def _finish(self) -> None:
        self._iterator = None
        self._reading.close()
        if self._shared is not None:
            self._shared.release()

    def _loaded(self) -> _Read:
        with contextlib.nullcontext() if self._listed else self._own_generators():
            try:
                batch = self._advance()
                while batch is not None and self._skip:
                    batch, self._skip = self._advance(), self._skip - 1
            except WorkloadError:
                raise
            except BaseException as error:  # a loader that ends its process must not take a rank with it
                raise WorkloadError(
                    f"task {self.task.name!r}: its loader raised {type(error).__name__}: {error}"
                ) from error
        return _Read(batch, self._now())

    def _advance(self) -> SampledBatch | None:
        """The next batch of this pass, or of a fresh one; None when the data has ended for good."""
        for _ in range(2):
            if self._iterator is None:
                self._begin_pass()
            assert self._iterator is not None
            for batch in self._iterator:
                self._taken += 1
                return self.task.sampled(batch)
            if self._taken and self.task.on_end != "restart":
                return None
            logger.info("task %r: its data ended after %d batches and starts over", self.task.name, self._taken)
            self._iterator, self._pass, self._taken = None, self._pass + 1, 0
        raise WorkloadError(f"task {self.task.name!r}: its data holds no batch; give at least one")

    def _begin_pass(self) -> None:
        if not self._listed:
            self._pass_generators, self._pass_own = _Generators.now().dumped(), self._reading.state()
        with running_on(self._cores):
            if self._pass and not self._begun and self._loader_state is None:
                self._start_workers()
            if self._pass == 1 and any(map(deaf, self._reading.loaders)):
                logger.warning(
                    "task %r: its loader's workers persist and hold a copy of its data set, which set_epoch does not "
                    "reach, here as in one process; set persistent_workers=False, or keep the number in shared memory",
                    self.task.name,
                )
            self._iterator = self.task.begun(self._reading.data, self._pass, self._loader_state)
        if self._loader_state is not None:
            self._taken, self._skip, self._loader_state = self._skip, 0, None
        self._begun = True

    def _start_workers(self) -> None:
        """Start worker processes that persist as the first pass did, before a later one that a run resumes in: a pass
        that finds them draws no numbers to start them.
        """
        name, own = f"task {self.task.name!r}", self._pass_own
        persistent = [loader for loader in self._reading.loaders if persisting(loader)]
        if not persistent:
            return
        logger.warning(
            "%s: its workers persist, and what they drew in earlier passes is lost: the order of samples goes on as "
            "it was, but random numbers drawn in workers (augmentation) do not; persistent_workers=False repeats them",
            name,
        )
        _Generators.loaded(self._first_generators).set()
        self._reading.load(name, self._first_own)
        for loader in persistent:
            set_epoch(name, loader, 0)
            iter(loader)
        _Generators.loaded(self._pass_generators).set()
        self._reading.load(name, own)

    def _now(self) -> FeedState:
        loader: Any = self._reading.data
        return {
            "pass": self._pass,
            "taken": self._taken,
            "generators": self._pass_generators,
            "own": self._pass_own,
            "loader": loader.state_dict() if keeps_state(self.task) and self._taken else None,
        }

    @contextlib.contextmanager
    def _own_generators(self) -> Iterator[None]:
        with GLOBAL_GENERATORS:
            if self._closed:
                raise CancelledError
            outside = _Generators.now()
            self._generators.set()
            try:
                yield
            finally:
                self._generators = _Generators.now()
                outside.set()


def wait_for_readers(timeout_s: float = END_S) -> None:
    """Wait, at most `timeout_s`, until no closed feed reads: the generators of this process are the caller's again."""
    if GLOBAL_GENERATORS.acquire(timeout=timeout_s):
        GLOBAL_GENERATORS.release()


_Work = tuple["Future[Any]", Callable[[], Any]]


class _Thread:
    """A thread that does one piece of work after the other.

    It is no ThreadPoolExecutor: a process that is forked from a thread of one waits for that thread at its end, and so
    ends with an error; and Python does not end while a loader in it does not come back.
    """

    def __init__(self, name: str) -> None:
        """It starts with the first piece of work, and ends when nobody can give it more."""
        self.name = name
        self._waiting: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._started, self._ended = False, False
        self._lock = threading.Lock()
        weakref.finalize(self, self._waiting.put, None)

    def submit(self, work: Callable[[], Any]) -> "Future[Any]":
        """What the work will give; canceled when the thread is to end."""
        found: Future[Any] = Future()
        with self._lock:
            if self._ended:
                found.cancel()
                return found
            if not self._started:
                self._started = True
                waiting = self._waiting
                start_thread(lambda: _do_all(waiting), self.name, end=lambda: waiting.put(None))
            self._waiting.put((found, work))
        return found

    def end(self) -> None:
        """End it when it has done what it was given."""
        with self._lock:
            self._ended = True
            self._waiting.put(None)


def _do_all(waiting: "queue.SimpleQueue[_Work | None]") -> None:
    while (given := waiting.get()) is not None:
        found, work = given
        if found.set_running_or_notify_cancel():
            try:
                found.set_result(work())
            except BaseException as error:
                found.set_exception(error)
        del given, found, work  # which hold batches


@dataclass(frozen=True, slots=True)
class _Generators:
    """States of the three generators that loaders draw from: Python's, numpy's, torch's."""

    of_python: Any
    of_numpy: Any
    of_torch: torch.Tensor

    @classmethod
    def now(cls) -> "_Generators":
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())

    def set(self) -> None:
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)
        torch.set_rng_state(self.of_torch)

    def dumped(self) -> tuple[Any, Any, torch.Tensor]:
        """As plain values and tensors, which load without unpickling code."""
        name, keys, *rest = self.of_numpy
        return self.of_python, (name, torch.from_numpy(keys.astype(np.int64)), *rest), self.of_torch

    @classmethod
    def loaded(cls, dumped: Any) -> "_Generators":
        python, (name, keys, *rest), generator = dumped
        version, internal, gauss = python
        return cls((version, tuple(internal), gauss), (name, keys.numpy().astype(np.uint32), *rest), generator)
