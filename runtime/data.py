"""Data: what a task's loader gives, the same on every rank that reads it.

Each rank that needs a task's batches runs its own copy of the loader. Random numbers that the loader draws come from
a generator of its own, seeded alike everywhere, so that a shuffling loader gives all ranks the same order.
"""

import contextlib
import hashlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

from spindle.errors import WorkloadError
from spindle.workload import Batch, Task

_GLOBAL_GENERATORS = threading.Lock()  # threads of one process share them


class Feed:
    """The endless batches of one task: when its data ends it starts over."""

    def __init__(self, task: Task, seed: int) -> None:
        """Nothing is read until the first batch is asked for."""
        self.task = task
        state = np.random.RandomState(int.from_bytes(hashlib.sha256(f"{seed}/{task.name}".encode()).digest()[:4]))
        self._states = (
            random.Random(int(state.randint(2**31))).getstate(),
            np.random.RandomState(int(state.randint(2**31))).get_state(),
            torch.Generator().manual_seed(int(state.randint(2**31))).get_state(),
        )
        self._iterator: Iterator[object] | None = None
        self._peeked: Batch | None = None

    def peek(self) -> Batch:
        """The next batch, which stays the next."""
        if self._peeked is None:
            self._peeked = self._fetch()
        return self._peeked

    def next(self) -> Batch:
        """The next batch. Raises WorkloadError when the loader raises or gives what the task cannot take."""
        batch, self._peeked = self.peek(), None
        return batch

    def digest(self) -> str:
        """A short fingerprint of the next batch."""
        found = hashlib.sha256()
        for name, value in sorted(self.peek().items()):
            found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def _fetch(self) -> Batch:
        with self._own_randomness():
            try:
                batch = self._advance()
            except WorkloadError:
                raise
            except Exception as error:
                raise WorkloadError(
                    f"task {self.task.name!r}: its loader raised {type(error).__name__}: {error}"
                ) from error
        return self.task.check(batch)

    def _advance(self) -> object:
        for _ in range(2):  # the present pass, then a fresh one
            if self._iterator is None:
                self._iterator = self.task.batches()
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
        raise WorkloadError(f"task {self.task.name!r}: its data holds no batch; give at least one")

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        with _GLOBAL_GENERATORS:
            outside = (random.getstate(), np.random.get_state(), torch.get_rng_state())
            self._restore(self._states)
            try:
                yield
            finally:
                self._states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
                self._restore(outside)

    @staticmethod
    def _restore(states: tuple[object, object, torch.Tensor]) -> None:
        random.setstate(states[0])  # type: ignore[arg-type]
        np.random.set_state(states[1])  # type: ignore[arg-type]
        torch.set_rng_state(states[2])
