"""Meeting: ranks that torchrun started find each other in the store of its agent, which outlives them, or in that of a
process group that they are in already, such as Ray Train's.

torchrun keeps one store for all its tries, in which what ranks of an earlier one wrote still lies: without a name of
their own for this try, ranks would connect to addresses of dead processes.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from spindle.errors import LostRankError, RunError
from spindle.runtime.comms.transport import join_store

LOOK_S = 0.02
LED_S = 3600.0  # for the work of the first process, such as to fetch a checkpoint


class Meeting:
    """Where the ranks of one try find each other. `store`: None where torchrun keeps none: then rank 0 makes one."""

    def __init__(self, timeout_s: float) -> None:
        """All ranks come here together. Raises LostRankError when one does not within `timeout_s`."""
        self._timeout_s, self._name = timeout_s, "spindle"
        self.store: Store | None = None
        if has_store():
            rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self._name = name_of_try(self.connection(), rank, num_ranks, timeout_s)
            self.store = self.connection()

    def connection(self) -> Store:
        """One more connection to the store of all ranks, which is there once they have joined."""
        store = join_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self._timeout_s)
        return PrefixStore(self._name, store)


def has_store() -> bool:
    """Whether a store at MASTER_ADDR and MASTER_PORT is there before ranks join."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or dist.is_initialized()


class Lent:
    """The process group in which this process was before a run: gone while ranks have one of their own, and there again
    after a good end. Its store, in which ranks meet, stays.
    """

    def __init__(self) -> None:
        """Leave the group, if there is one; called once all ranks have met."""
        self._store: Store | None = None
        if dist.is_initialized():
            self._backend, self._rank, self._num_ranks = dist.get_backend(), dist.get_rank(), dist.get_world_size()
            self._store = _get_default_store()
            dist.destroy_process_group()

    def back(self) -> None:
        """Join it anew, unless an error is on its way: then other ranks may be gone."""
        if self._store is not None and sys.exception() is None:
            store = PrefixStore("again", self._store)
            dist.init_process_group(self._backend, store=store, rank=self._rank, world_size=self._num_ranks)


def led(work: Callable[[], object], place: tuple[int, int], timeout_s: float) -> None:
    """Have the first of the processes that drive a run do some work, which the others wait for. `place`: which of how
    many this is; where there are several, they have a store.

    Raises what the work raises, and a RunError with its words in the other processes.
    """
    if place[1] == 1:
        work()
        return
    store = Meeting(timeout_s).connection()
    if place[0]:
        store.wait(["led"], timedelta(seconds=LED_S))
        if said := store.get("led").decode():
            raise RunError(f"rank 0: {said}")
        return
    said = "it ended"
    try:
        work()
        said = ""
    except Exception as error:
        said = str(error) or type(error).__name__
        raise
    finally:
        store.set("led", said)


def name_of_try(store: Store, rank: int, num_ranks: int, timeout_s: float) -> str:
    """A name on which all ranks that are alive now agree, whatever earlier ones have left in the store.

    Each rank says hello with a word that nobody knew before. The first answers with a name and all words that it has
    read, again and again, until all ranks have found their own word in the answer.
    """
    own = uuid.uuid4().hex
    deadline_s = time.monotonic() + timeout_s
    others = range(1, num_ranks)
    store.set(f"hello/{rank}", own)
    while True:
        if rank == 0:
            words = {other: _read(store, f"hello/{other}") for other in others}
            store.set("answer", json.dumps([own, words]))
            missing = [other for other in others if not store.check([f"{own}/{other}"])]
            if not missing:
                return own
        else:
            missing = [0]
            name, words = json.loads(_read(store, "answer") or '["", {}]')
            if words.get(str(rank)) == own:
                store.set(f"{name}/{rank}", "")
                return str(name)
        if time.monotonic() > deadline_s:
            raise LostRankError(
                f"ranks {missing} did not come within {timeout_s:g} s after this one, rank {rank}; see what keeps "
                "them, or raise timeout_s"
            )
        time.sleep(LOOK_S)


def _read(store: Store, key: str) -> str:
    """Nothing for what is not there."""
    return store.get(key).decode() if store.check([key]) else ""
