"""Meeting: ranks agree on a name for their try, though the store is full of what earlier ones have left."""

import concurrent.futures

import pytest
from torch._C._distributed_c10d import HashStore

from spindle.errors import LostRankError
from spindle.runtime.launch.meeting import name_of_try


def met(store: HashStore, num_ranks: int) -> set[str]:
    """The names that ranks find; they come in any order."""
    with concurrent.futures.ThreadPoolExecutor(num_ranks) as threads:
        found = [threads.submit(name_of_try, store, rank, num_ranks, 20.0) for rank in reversed(range(num_ranks))]
        return {future.result() for future in found}


def test_each_try_has_a_name_of_its_own() -> None:
    store = HashStore()
    tries = [met(store, 3) for _ in range(4)]
    assert [len(names) for names in tries] == [1] * 4
    assert len(set.union(*tries)) == 4


def test_a_rank_alone_needs_nobody() -> None:
    assert len(met(HashStore(), 1)) == 1


@pytest.mark.parametrize(("rank", "missing"), [(0, "[1]"), (1, "[0]")])
def test_a_rank_that_does_not_come_is_named(rank: int, missing: str) -> None:
    """Also when one of that number came in an earlier try."""
    store = HashStore()
    met(store, 2)
    with pytest.raises(
        LostRankError, match=rf"ranks \{missing} did not come within 0\.1 s after this one, rank {rank}"
    ):
        name_of_try(store, rank, 2, 0.1)
