"""Worker group: all workers of a run behind one call. What is launched where is the launcher's business; here are
threads.

`call` runs one method on every worker at once and returns the results by rank. The first failure ends the worker group:
workers that wait for the failed one are released, and the failure is raised with its rank, wave and instruction.
"""

import concurrent.futures
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import cloudpickle

from spindle.errors import LostPeerError, LostRankError, RunError, SpindleError, WorkloadError
from spindle.runtime.comms.pulse import Lookout, Pulse, Sign, noted
from spindle.runtime.comms.transport import ThreadTransport, Transport
from spindle.runtime.launch.shipping import dumped
from spindle.runtime.loading.data import wait_for_readers
from spindle.runtime.rank_spec import RankSpec, separate
from spindle.runtime.startup import Phases
from spindle.runtime.worker import Worker

LOOK_S = 1.0  # between two looks at the signs of ranks that have not answered
GRACE_S = 3.0  # for threads to notice that the run has ended; ranks that wait for each other do at once
CAUSE_S = 0.5  # for the failure behind those of ranks that waited


class WorkerGroup(Protocol):
    """All workers of a run. One process drives it `alone`, or several do, one of which `leads`."""

    leads: bool
    alone: bool

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """Run `method` on every worker; the results by rank.

        Raises RunError for the first worker that fails, or for the ones that have not answered after `patience_s`. A
        rank that stays at one place for longer than its `timeout_s` counts as failed (see `Lookout`).
        """

    def close(self) -> None:
        """End all workers."""


def silent(ranks: Sequence[int], patience_s: float | None) -> LostRankError:
    """What to say of ranks that do not answer."""
    return LostRankError(
        f"ranks {list(ranks)} did not answer within {patience_s:g} s; see what keeps them busy (py-spy dump), or raise "
        "timeout_s"
    )


def packed_spec(worker: Callable[..., Any], spec: Any, left: frozenset[int] = frozenset()) -> bytes:
    """What makes a worker of a rank spec, as bytes for `cloudpickle.loads`; without the numbers of the parameters whose
    ids are `left`. Raises WorkloadError that names the task whose data cannot be sent.
    """
    try:
        return dumped((worker, spec), left)
    except Exception:
        evaluation = getattr(spec, "evaluation", None)
        tasks = (*getattr(spec, "tasks", {}).items(), *(evaluation.tasks.items() if evaluation else ()))
        for name, task in tasks:
            try:
                cloudpickle.dumps(replace(task, rows=None, weigh="micro-batches"))
            except Exception as error:
                raise WorkloadError(
                    f"task {name!r}: its data ({type(task.data).__name__}) cannot be sent to the processes of ranks "
                    f"({type(error).__name__}: {error}); keep locks, open files and connections out of the loader and "
                    "its data set (open them when the first sample is read), or give a function that returns the loader"
                ) from error
        raise


def made_worker(make: Callable[[Any, Transport], Any], spec: Any, transport: Transport, phases: Phases) -> Any:
    """The worker of a rank spec; `phases`: what its rank's start-up took so far."""
    worker = make(spec, transport)
    if isinstance(worker, Worker):
        worker.phases.seconds = phases.seconds | worker.phases.seconds
    return worker


def called(worker: Any, pulse: Pulse, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a method of the worker gives; meanwhile the rank's place is this method, unless the method tells more."""
    pulse.at(method)
    with noted(pulse):
        return getattr(worker, method)(*args, **kwargs)


def is_lost_peer(error: Exception) -> bool:
    """Whether a failure only says that another rank is gone; then the other rank's failure is the one to report."""
    return isinstance(error, LostPeerError)


def looks_s(timeout_s: float, deadline_s: float | None) -> float:
    """Seconds until the next look, which is not after the deadline."""
    left_s = LOOK_S if deadline_s is None else max(0.0, deadline_s - time.monotonic())
    return min(LOOK_S, timeout_s / 4, left_s)


def too_late(
    lookout: Lookout, ranks: Collection[int], deadline_s: float | None, patience_s: float | None
) -> LostRankError | None:
    """What to say of ranks that have not answered: that one hangs, or that the time of the call is over."""
    late = lookout.overdue(ranks)
    if late is None and ranks and deadline_s is not None and time.monotonic() > deadline_s:
        return silent(sorted(ranks), patience_s)
    return late


def _wait_for_cause(futures: "Sequence[concurrent.futures.Future[Any]]") -> None:
    """Wait a moment for a failure that is no loss of a peer: peers may hear of it before its thread has ended."""
    until_s = time.monotonic() + CAUSE_S
    waiting = {future for future in futures if not future.done()}
    while waiting and (left_s := until_s - time.monotonic()) > 0:
        failed = [e for future in futures if future.done() and (e := future.exception())]
        if not all(isinstance(error, Exception) and is_lost_peer(error) for error in failed):
            return
        _, waiting = concurrent.futures.wait(waiting, left_s, concurrent.futures.FIRST_COMPLETED)


class ThreadWorkers:
    """Workers as threads of this process."""

    leads = alone = True

    def __init__(self, specs: Sequence[RankSpec], *, timeout_s: float = 60.0) -> None:
        """Start a thread for each rank spec; each works on copies of the modules."""
        self._transports = ThreadTransport.connect(len(specs), timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._lookout = Lookout(self._signs, timeout_s)
        self._threads = [
            concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"rank{spec.rank}") for spec in specs
        ]
        self._workers: list[Worker] = []
        self._running: list[concurrent.futures.Future[Any]] = []
        self._closed = False
        self._workers = self._gather(
            [
                thread.submit(Worker, separate(spec), transport)
                for thread, spec, transport in zip(self._threads, specs, self._transports, strict=True)
            ]
        )

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See WorkerGroup."""
        places = zip(self._threads, self._workers, self._transports, strict=True)
        return self._gather([t.submit(called, w, at.pulse, method, args, kwargs) for t, w, at in places], patience_s)

    def _signs(self) -> list[Sign]:
        """Threads of this process need not prove that they live."""
        return [replace(transport.pulse.sign(), silent_s=0.0) for transport in self._transports]

    def _gather(self, futures: "list[concurrent.futures.Future[Any]]", patience_s: float | None = None) -> list[Any]:
        self._running = futures
        rank_of = {future: rank for rank, future in enumerate(futures)}
        deadline_s = None if patience_s is None else time.monotonic() + patience_s
        waiting = set(futures)
        while waiting:
            _, waiting = concurrent.futures.wait(
                waiting, looks_s(self._timeout_s, deadline_s), concurrent.futures.FIRST_EXCEPTION
            )
            if any(future.done() and future.exception() for future in futures):
                _wait_for_cause(futures)
                raise self._failure({rank_of[f]: e for f in futures if f.done() and (e := f.exception())})
            late = too_late(self._lookout, [rank_of[future] for future in waiting], deadline_s, patience_s)
            if late is not None:
                self.close()
                raise late
        return [future.result() for future in futures]

    def _failure(self, failed: Mapping[int, BaseException]) -> BaseException:
        """Of failures by rank the cause; a rank that hangs is blamed as it is before the others are released."""
        own = [e for e in failed.values() if not (isinstance(e, Exception) and is_lost_peer(e))]
        waited = next(iter(failed))
        error = own[0] if own else self._blamed(waited, failed) or failed[waited]
        self.close()
        if isinstance(error, SpindleError) or not isinstance(error, Exception):
            return error
        explained = RunError.of(error)
        explained.__cause__ = error
        return explained

    def _blamed(self, waited: int, failed: Mapping[int, BaseException]) -> LostRankError | None:
        return self._lookout.blamed([rank for rank in range(len(self._threads)) if rank not in failed], waited)

    def close(self) -> None:
        """See WorkerGroup. A thread that does not come back is left behind: nothing can end it from outside."""
        if self._closed:
            return
        self._closed = True
        for transport in self._transports:
            transport.close()
        for worker in self._workers:
            worker.close()
        concurrent.futures.wait(self._running, GRACE_S)
        wait_for_readers()
        for thread, future in zip(self._threads, self._running, strict=True):
            thread.shutdown(wait=future.done())
