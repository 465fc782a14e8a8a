"""torchrun: worker groups in which this process is one of the workers. Every rank runs one script, and gets all
results.

- TorchrunWorkers: all ranks drive, each by itself; so all must do the same.
- ServedWorkers: the first drives, and the others do as it says; for work that depends on the time it takes.
- A rank ends when torchrun does: without it nobody would end the others when one fails, or start them again.
- Workers of Ray Train are set up like ranks of torchrun, and are taken for them (`ray_train`).
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from spindle.errors import RunError, SpindleError
from spindle.runtime.comms.pulse import SILENT_S, Heart, Lookout, Pulse, StoreSigns
from spindle.runtime.comms.transport import ProcessTransport, Transport
from spindle.runtime.launch.agreement import agreement, refuse_differences
from spindle.runtime.launch.meeting import Lent, Meeting
from spindle.runtime.launch.worker_group import called, is_lost_peer
from spindle.runtime.loading.data import wait_for_readers
from spindle.runtime.programs.program import Program
from spindle.runtime.rank_spec import RankSpec, separate
from spindle.runtime.worker import Worker

T = TypeVar("T")


def under_torchrun() -> bool:
    """Whether this process was started by torchrun (or set up like it)."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def local_rank_and_size() -> tuple[int, int] | None:
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
    _, per_node = local_rank_and_size() or (rank, num_ranks)
    if num_ranks % per_node:
        raise RunError(
            f"torchrun started {num_ranks} processes, {per_node} of them here; give all machines the same "
            "--nproc-per-node"
        )
    return num_ranks // per_node, per_node


class _Member:
    """One of the ranks of a torchrun job, and a group over which they tell each other what they found."""

    alone = False

    def __init__(self, timeout_s: float, *, moves: bool) -> None:
        """Join with the others. `moves`: see Lookout."""
        rank, num_ranks = place_among_all()
        self.leads, self._rank, self._num_ranks = rank == 0, rank, num_ranks
        self.pulse = Pulse()
        self._alone = Lookout(lambda: [self.pulse.sign()], timeout_s, moves=moves)
        self._busy, self._parent = False, os.getppid()
        self._heart = Heart(self.pulse, on_beat=self._look)
        meeting = Meeting(timeout_s)
        self._lent = Lent()
        self._transport = ProcessTransport(
            meeting.store, rank, num_ranks, timeout_s=timeout_s, place=local_rank_and_size(), pulse=self.pulse
        )
        self._heart.close()
        own, others = meeting.connection(), meeting.connection()
        self._heart = Heart(self.pulse, store=own, key=f"pulse/{rank}", on_beat=self._look)
        self._lookout = Lookout(StoreSigns(others, num_ranks), timeout_s)
        self._talk = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._worker: Any = None

    def _done(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What a method gives on all ranks; a failure leaves the group at once, so that the others fail too, and
        torchrun ends them.
        """
        with self._leaving():
            self._busy = True
            result = called(self._worker, self.pulse, method, args, kwargs)
            self._busy = False
            return self._gathered(result)

    def _look(self) -> None:
        """With each beat: end without torchrun, and when this rank hangs, which has no driver that sees it."""
        if os.getppid() != self._parent:
            os.kill(os.getpid(), signal.SIGKILL)
        late = self._alone.overdue([0]) if self._busy else None
        if late is not None:
            text = str(late).replace("rank 0", f"rank {self._rank}", 1)
            self.pulse.fail(text)
            self._heart.beat()
            sys.stderr.write(f"spindle: {text}\n")
            sys.stderr.flush()
            os._exit(RunError.exit_code)

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """On a failure leave the group; of a lost peer say which."""
        try:
            yield
        except Exception as error:
            self._busy = False
            blamed = self._blamed(error)
            self._worker.close()
            if blamed is not None:
                raise blamed from error
            raise

    def _gathered(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size()
        with self._transport.peers:
            dist.all_gather_object(found, own, group=self._talk)
        return found

    def _blamed(self, error: Exception) -> RunError | None:
        """The error that names the rank for which this one waited; of an error of its own it tells the others."""
        if is_lost_peer(error):
            return self._lookout.blamed(range(self._num_ranks), self._rank, patience_s=2 * SILENT_S)
        self.pulse.fail((str(error).splitlines() or [type(error).__name__])[0])
        self._heart.beat()
        return None

    def stop(self) -> None:
        """This process was asked to end: the rank's next report says so to all."""
        self.pulse.stop()

    def close(self) -> None:
        """See WorkerGroup."""
        self._heart.close()
        self._worker.close()
        wait_for_readers()
        self._lent.back()


class TorchrunWorkers(_Member):
    """The ranks of a torchrun job, each of which drives by itself."""

    def __init__(self, program: Program, specs: Sequence[RankSpec], *, timeout_s: float = 60.0) -> None:
        """Join with the others, and compare rank specs with them: each rank made its own, of the whole program.

        Raises RunError when they differ, or when torchrun started another number of processes than planned for.
        """
        super().__init__(timeout_s, moves=True)
        rank, num_ranks = place_among_all()
        try:
            refuse_differences(self._gathered(agreement(program, specs)))
            if num_ranks != len(specs):
                raise RunError(
                    f"torchrun started {num_ranks} processes but the plan is for {len(specs)} devices; "
                    f"use --nproc-per-node and --nnodes that make {len(specs)}, plan for {num_ranks}, or let the "
                    "run plan anew for the processes that are there: Failures(elastic=True), --elastic"
                )
        except Exception:
            self._transport.close()
            raise
        self._worker = Worker(separate(specs[rank]), self._transport)

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See WorkerGroup; patience is that of the process group."""
        del patience_s
        return self._done(method, args, kwargs)


class ServedWorkers(_Member):
    """The ranks of a torchrun job, driven by the first: `drive` on all of them, and `call` in what it works on."""

    def __init__(self, spec: Any, *, timeout_s: float, worker: Callable[[Any, Transport], Any]) -> None:
        """Join with the others; `worker` makes of the rank spec what serves calls.

        Between two calls no more than `timeout_s` may pass.
        """
        super().__init__(timeout_s, moves=False)
        self._worker = worker(spec, self._transport)

    def drive(self, work: Callable[[], T]) -> T:
        """Do some work on the first rank; all return its result, or raise its SpindleError."""
        if not self.leads:
            return cast(T, self._served())
        try:
            result = work()
        except SpindleError as error:
            with contextlib.suppress(Exception):  # others may have left the group
                self._broadcast((None, error))
            raise
        self._broadcast((None, result))
        return result

    def call(self, method: str, *args: Any, patience_s: float | None = None, **kwargs: Any) -> list[Any]:
        """See WorkerGroup; patience is that of the process group."""
        del patience_s
        self._broadcast((method, args, kwargs))
        return self._done(method, args, kwargs)

    def _served(self) -> Any:
        """Do what the first rank says until it has ended; its result."""
        while True:
            method, *rest = self._broadcast(None)
            if method is None:
                if isinstance(rest[0], SpindleError):
                    raise rest[0]
                return rest[0]
            self._done(method, *rest)

    def _broadcast(self, order: Any) -> Any:
        """What the first rank says."""
        said = [order]
        with self._leaving(), self._transport.peers:
            dist.broadcast_object_list(said, src=0, group=self._talk)
        return said[0]
