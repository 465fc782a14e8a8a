"""torchrun: crews in which this process is one of the workers. Every rank runs one script, and gets all results.

- TorchrunCrew: all ranks drive, each by itself; so all must do the same.
- ServedCrew: the first drives, and the others do as it says; for work that goes by the time it takes.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from spindle.errors import RunError, SpindleError
from spindle.runtime.launch.agreement import agreement, refuse_differences
from spindle.runtime.transport import ProcessTransport, Transport
from spindle.runtime.worker import Job, Worker, separate

T = TypeVar("T")


def under_torchrun() -> bool:
    """Whether this process was started by torchrun (or set up like it)."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def place_here() -> tuple[int, int] | None:
    """This rank's number on its machine, and how many ranks run there, as torchrun tells; None where nobody does."""
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return (int(os.environ[names[0]]), int(os.environ[names[1]])) if all(n in os.environ for n in names) else None


def place_among_all() -> tuple[int, int]:
    """This rank and the number of all ranks, as torchrun tells; raises RunError where it did not start this process."""
    if not under_torchrun():
        raise RunError(
            "launcher is 'torchrun', but it did not start this process (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT "
            "are not all set); run torchrun --nproc-per-node 2 -m spindle ..., or choose another launcher"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def nodes_of_job() -> tuple[int, int]:
    """Machines of a torchrun job, and ranks on each. Raises RunError where machines have different numbers of ranks."""
    rank, num_ranks = place_among_all()
    _, per_node = place_here() or (rank, num_ranks)
    if num_ranks % per_node:
        raise RunError(
            f"torchrun started {num_ranks} processes, {per_node} of them here; give all machines the same "
            "--nproc-per-node"
        )
    return num_ranks // per_node, per_node


class _Member:
    """One of the ranks of a torchrun job, and a group over which they tell each other what they found."""

    def __init__(self, timeout_s: float) -> None:
        """Join with the others."""
        rank, num_ranks = place_among_all()
        self.leads = rank == 0
        self._transport = ProcessTransport(None, rank, num_ranks, timeout_s=timeout_s, place=place_here())
        self._talk = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._worker: Any = None

    def _done(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What a method gives on all ranks; a failure leaves the group at once, so that the others fail too, and
        torchrun ends them.
        """
        try:
            result = getattr(self._worker, method)(*args, **kwargs)
        except Exception:
            self._worker.close()
            raise
        return self._gathered(result)

    def _gathered(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own, group=self._talk)
        return found

    def close(self) -> None:
        """See Crew."""
        self._worker.close()


class TorchrunCrew(_Member):
    """The ranks of a torchrun job, each of which drives by itself."""

    def __init__(self, jobs: Sequence[Job], *, timeout_s: float = 60.0) -> None:
        """Join with the others, and compare jobs with them: each rank made its own.

        Raises RunError when they differ, or when torchrun started another number of processes than planned for.
        """
        super().__init__(timeout_s)
        rank, num_ranks = place_among_all()
        try:
            refuse_differences(self._gathered(agreement(jobs)))
            if num_ranks != len(jobs):
                raise RunError(
                    f"torchrun started {num_ranks} processes but the plan is for {len(jobs)} devices; "
                    f"use --nproc-per-node and --nnodes that make {len(jobs)}, or plan for {num_ranks}"
                )
        except Exception:
            self._transport.close()
            raise
        self._worker = Worker(separate(jobs[rank]), self._transport)

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See Crew; patience is that of the process group."""
        del patience_s
        return self._done(method, args, kwargs)


class ServedCrew(_Member):
    """The ranks of a torchrun job, driven by the first: `drive` on all of them, and `call` in what it works on."""

    def __init__(self, job: Any, *, timeout_s: float, worker: Callable[[Any, Transport], Any]) -> None:
        """Join with the others; `worker` makes of the job what serves calls.

        Between two calls no more than `timeout_s` may go by.
        """
        super().__init__(timeout_s)
        self._worker = worker(job, self._transport)

    def drive(self, work: Callable[[], T]) -> T:
        """Do some work on the first rank; all return its result, or raise its SpindleError."""
        if not self.leads:
            return cast(T, self._served())
        try:
            result = work()
        except SpindleError as error:
            with contextlib.suppress(Exception):  # others may have left the group
                self._told((None, error))
            raise
        self._told((None, result))
        return result

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See Crew; patience is that of the process group."""
        del patience_s
        self._told((method, args, kwargs))
        return self._done(method, args, kwargs)

    def _served(self) -> Any:
        """Do what the first rank says until it has ended; its result."""
        while True:
            method, *rest = self._told(None)
            if method is None:
                if isinstance(rest[0], SpindleError):
                    raise rest[0]
                return rest[0]
            self._done(method, *rest)

    def _told(self, order: Any) -> Any:
        """What the first rank says."""
        said = [order]
        dist.broadcast_object_list(said, src=0, group=self._talk)
        return said[0]
