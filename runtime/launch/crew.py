"""Crew: all workers of a run behind one call. What is launched where is the launcher's business; here are threads.

`call` runs one method on every worker at once and returns the results by rank. The first failure ends the crew: workers
that wait for the failed one are released, and the failure is raised with its rank, wave and instruction.
"""

import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import cloudpickle

from spindle.errors import RunError, SpindleError, WorkloadError
from spindle.runtime.transport import ThreadTransport
from spindle.runtime.worker import Job, Worker, separate

GRACE_S = 3.0  # for threads to notice that the run has ended; those that wait for each other do at once


class Crew(Protocol):
    """All workers of a run. Where several processes drive it, one of them `leads`."""

    leads: bool

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """Run `method` on every worker; the results by rank.

        Raises RunError for the first worker that fails, or for those that have not answered after `patience_s`.
        """

    def close(self) -> None:
        """End all workers."""


def silent(ranks: Sequence[int], patience_s: float | None) -> RunError:
    """What to say of ranks that do not answer."""
    return RunError(
        f"ranks {list(ranks)} did not answer within {patience_s:g} s; see what keeps them busy (py-spy dump), or raise "
        "timeout_s"
    )


def packed_job(worker: Callable[..., Any], job: Any) -> bytes:
    """What makes a worker of a job, as bytes for `cloudpickle.loads`. Raises WorkloadError that names the task whose
    data cannot be sent.
    """
    try:
        return cloudpickle.dumps((worker, job))  # type: ignore[no-any-return]
    except Exception:
        for name, task in getattr(job, "tasks", {}).items():
            try:
                cloudpickle.dumps(replace(task, rows=None))
            except Exception as error:
                raise WorkloadError(
                    f"task {name!r}: its data ({type(task.data).__name__}) cannot be sent to the processes of ranks "
                    f"({type(error).__name__}: {error}); keep locks, open files and connections out of the loader and "
                    "its data set (open them when the first sample is read), or give a function that returns the loader"
                ) from error
        raise


def is_lost_peer(error: Exception) -> bool:
    """Whether a failure only says that another rank is gone; then the other rank's failure is the one to report."""
    text = str(error).lower()
    return any(sign in text for sign in ("connection closed by peer", "connection reset", "timed out", "it left"))


class ThreadCrew:
    """Workers as threads of this process."""

    leads = True

    def __init__(self, jobs: Sequence[Job], *, timeout_s: float = 60.0) -> None:
        """Start a thread for each job; each works on copies of the modules."""
        self._transports = ThreadTransport.connect(len(jobs), timeout_s=timeout_s)
        self._threads = [concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"rank{job.rank}") for job in jobs]
        self._workers: list[Worker] = []
        self._running: list[concurrent.futures.Future[Any]] = []
        self._closed = False
        self._workers = self._gather(
            [
                thread.submit(Worker, separate(job), transport)
                for thread, job, transport in zip(self._threads, jobs, self._transports, strict=True)
            ]
        )

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See Crew."""
        pairs = zip(self._threads, self._workers, strict=True)
        return self._gather([thread.submit(getattr(w, method), *args, **kwargs) for thread, w in pairs], patience_s)

    def _gather(self, futures: "list[concurrent.futures.Future[Any]]", patience_s: float | None = None) -> list[Any]:
        self._running = futures
        done, waiting = concurrent.futures.wait(futures, patience_s, concurrent.futures.FIRST_EXCEPTION)
        failed = [error for future in done if (error := future.exception()) is not None]
        if failed:
            self.close()
            error = next((e for e in failed if isinstance(e, Exception) and not is_lost_peer(e)), failed[0])
            raise error if isinstance(error, SpindleError) else RunError.of(error) from error
        if waiting:
            self.close()
            raise silent([rank for rank, future in enumerate(futures) if future in waiting], patience_s)
        return [future.result() for future in futures]

    def close(self) -> None:
        """See Crew. A thread that does not come back is left behind: nothing can end it from outside."""
        if self._closed:
            return
        self._closed = True
        for transport in self._transports:
            transport.close()
        for worker in self._workers:
            worker.close()
        concurrent.futures.wait(self._running, GRACE_S)
        for thread, future in zip(self._threads, self._running, strict=True):
            thread.shutdown(wait=future.done())
