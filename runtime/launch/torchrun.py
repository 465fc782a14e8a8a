"""torchrun: a crew in which this process is one of the workers. Every rank runs one script, and gets all results."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from spindle.errors import RunError
from spindle.runtime.launch.agreement import agreement, refuse_differences
from spindle.runtime.transport import ProcessTransport
from spindle.runtime.worker import Job, Worker, separate


def under_torchrun() -> bool:
    """Whether this process was started by torchrun (or set up like it)."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def place_here() -> tuple[int, int] | None:
    """This rank's number on its machine, and how many ranks run there, as torchrun tells; None where nobody does."""
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return (int(os.environ[names[0]]), int(os.environ[names[1]])) if all(n in os.environ for n in names) else None


def place_among_all() -> tuple[int, int]:
    """This rank and the number of all ranks, as torchrun tells."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class TorchrunCrew:
    """The ranks of a torchrun job."""

    def __init__(self, jobs: Sequence[Job], *, timeout_s: float = 60.0) -> None:
        """Join with the others, and compare jobs with them: each rank made its own.

        Raises RunError when they differ, or when torchrun started another number of processes than planned for.
        """
        rank, num_ranks = place_among_all()
        self.leads = rank == 0
        transport = ProcessTransport(None, rank, num_ranks, timeout_s=timeout_s, place=place_here())
        self._results = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        try:
            refuse_differences(self._gathered(agreement(jobs)))
            if num_ranks != len(jobs):
                raise RunError(
                    f"torchrun started {num_ranks} processes but the plan is for {len(jobs)} devices; "
                    f"use --nproc-per-node and --nnodes that make {len(jobs)}, or plan for {num_ranks}"
                )
        except Exception:
            transport.close()
            raise
        self._worker = Worker(separate(jobs[rank]), transport)

    def _gathered(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own, group=self._results)
        return found

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See Crew; patience is that of the process group.

        A failure leaves the group at once, so that the other ranks fail too, and torchrun ends them.
        """
        del patience_s
        try:
            result = getattr(self._worker, method)(*args, **kwargs)
        except Exception:
            self._worker.close()
            raise
        return self._gathered(result)

    def close(self) -> None:
        """See Crew."""
        self._worker.close()
