"""Meeting: ranks that torchrun started find each other in the store of its agent, which outlives them.

torchrun keeps one store for all its tries, in which what ranks of an earlier one wrote still lies: without a name of
their own for this try, ranks would connect to addresses of dead processes.
"""

import json
import os
import time
import uuid

from torch._C._distributed_c10d import PrefixStore, Store

from spindle.errors import LostRankError
from spindle.runtime.comms.transport import join_store

LOOK_S = 0.02


class Meeting:
    """Where the ranks of one try find each other. `store`: None where torchrun keeps none: then rank 0 makes one."""

    def __init__(self, timeout_s: float) -> None:
        """All ranks come here together. Raises LostRankError when one does not within `timeout_s`."""
        self._timeout_s, self._name = timeout_s, "spindle"
        self.store: Store | None = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self._name = name_of_try(self.connection(), rank, num_ranks, timeout_s)
            self.store = self.connection()

    def connection(self) -> Store:
        """One more connection to the store of all ranks, which is there once they have joined."""
        store = join_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self._timeout_s)
        return PrefixStore(self._name, store)


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
