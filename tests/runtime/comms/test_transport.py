"""Transport: what arrives where, in which order, and what a rank is told that waits in vain."""

import concurrent.futures
import time
import warnings

import psutil
import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from spindle.errors import RunError
from spindle.runtime.comms.backend import agreed_gpu, own_gpu
from spindle.runtime.comms.transport import ThreadTransport, is_loopback, join_store, serve_store
from spindle.runtime.launch.torchrun import local_rank_and_size
from spindle.runtime.launch.worker_group import is_lost_peer


def filled(value: float, *shape: int) -> Tensor:
    return torch.full(shape or (2,), value)


def test_messages_between_two_ranks_keep_their_order() -> None:
    """The first receive gets what was sent first, whatever was waited for first."""
    one, two = ThreadTransport.connect(2)
    one.start([(1, filled(1.0)), (1, filled(2.0))], [])
    one.start([(1, filled(3.0))], [])
    got = [filled(0.0) for _ in range(3)]
    _, first = two.start([], [(0, got[0])])
    _, rest = two.start([], [(0, got[1]), (0, got[2])])
    rest()
    first()
    assert [float(t[0]) for t in got] == [1.0, 2.0, 3.0]


def test_both_may_send_before_either_receives() -> None:
    """Posting does not wait: no circle of waits can come of it."""
    one, two = ThreadTransport.connect(2)
    here, there = filled(0.0), filled(0.0)
    sent, arrived = one.start([(1, filled(1.0))], [(1, here)])
    sent_back, arrived_back = two.start([(0, filled(2.0))], [(0, there)])
    for wait in (sent, sent_back, arrived, arrived_back):
        wait()
    assert (float(here[0]), float(there[0])) == (2.0, 1.0)


def test_what_is_sent_is_what_it_was_then() -> None:
    """A buffer may be written again after its send was posted, once it has left; threads copy at once."""
    one, two = ThreadTransport.connect(2)
    value, got = filled(1.0), filled(0.0)
    sent, _ = one.start([(1, value)], [])
    sent()
    value.zero_()
    _, arrived = two.start([], [(0, got)])
    arrived()
    assert got.tolist() == [1.0, 1.0]


def test_sums_over_some_ranks() -> None:
    """Ranks 0 and 2 sum, rank 1 takes no part; each gets the same bits; a second sum is another one."""
    transports = ThreadTransport.connect(3)
    group = (0, 2)
    for scale in (1.0, 10.0):
        values = {rank: filled(scale * (rank + 1)) for rank in group}
        waits = [transports[rank].all_reduce(values[rank], group) for rank in group]
        for wait in waits:
            wait()
        assert [values[rank].tolist() for rank in group] == [[4.0 * scale] * 2] * 2


def test_a_sum_for_one_rank_and_copies_of_its_values() -> None:
    """Only the owner has the sum; what others hold means nothing until it is broadcast."""
    transports = ThreadTransport.connect(2)
    values = [filled(1.0), filled(2.0)]
    for wait in [t.reduce(v, (0, 1), 1) for t, v in zip(transports, values, strict=True)]:
        wait()
    assert values[1].tolist() == [3.0, 3.0]
    assert values[0].tolist() != [3.0, 3.0]
    for wait in [t.broadcast(v, (0, 1), 1) for t, v in zip(transports, values, strict=True)]:
        wait()
    assert values[0].tolist() == [3.0, 3.0]


def test_a_receive_that_nobody_sends() -> None:
    """It ends after the timeout, and names the peer."""
    one, _ = ThreadTransport.connect(2, timeout_s=0.02)
    _, arrived = one.start([], [(1, filled(0.0))])
    with pytest.raises(RunError, match=r"nothing arrived from rank 1: not in 0\.02 s"):
        arrived()


def test_a_sum_to_which_one_does_not_come() -> None:
    """The missing rank is named, not those that wait."""
    transports = ThreadTransport.connect(3, timeout_s=0.02)
    wait = transports[0].all_reduce(filled(1.0), (0, 1, 2))
    transports[2].all_reduce(filled(1.0), (0, 1, 2))
    with pytest.raises(RunError, match=r"ranks \[1\] did not come to a reduction over ranks \(0, 1, 2\): not in"):
        wait()


def test_a_rank_that_leaves_releases_all_that_wait() -> None:
    """At once, not after the timeout; the message is one of a lost peer, behind which the first cause is looked for."""
    one, two = ThreadTransport.connect(2, timeout_s=60.0)
    two.close()
    started_s = time.monotonic()
    _, arrived = one.start([], [(1, filled(0.0))])
    with pytest.raises(RunError, match="nothing arrived from rank 1: it left") as caught:
        arrived()
    with pytest.raises(RunError, match="it left"):
        one.all_reduce(filled(1.0), (0, 1))()
    assert time.monotonic() - started_s < 10.0
    assert is_lost_peer(caught.value)
    assert not is_lost_peer(RunError("too hot"))


def test_what_was_sent_before_leaving_still_arrives() -> None:
    one, two = ThreadTransport.connect(2)
    two.start([(0, filled(5.0))], [])
    two.close()
    got = filled(0.0)
    _, arrived = one.start([], [(1, got)])
    arrived()
    assert got.tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (filled(1.0, 3), r"rank 0 sent \(3,\) torch.float32, not \(2,\) torch.float32"),
        (filled(1.0).double(), r"rank 0 sent \(2,\) torch.float64, not \(2,\) torch.float32"),
    ],
)
def test_a_message_of_another_shape_or_type(sent: Tensor, words: str) -> None:
    """gloo would fill the buffer with something; threads check."""
    one, two = ThreadTransport.connect(2)
    one.start([(1, sent)], [])
    _, arrived = two.start([], [(0, filled(0.0))])
    with pytest.raises(RunError, match=words):
        arrived()


def test_the_store_listens_on_one_address() -> None:
    """Ranks find each other there; nobody else on the network can."""
    store = serve_store("127.0.0.1")
    assert is_loopback(store)
    listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr and c.laddr.port == store.port}
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    other = join_store("127.0.0.1", store.port, 5.0)
    other.set("key", "value")
    assert store.get("key") == b"value"


def test_other_stores_are_not_on_loopback() -> None:
    """torchrun's, and stores that are no network."""
    assert not is_loopback(None)
    assert not is_loopback(HashStore())


@pytest.mark.parametrize(
    ("place", "num_gpus", "gpu"),
    [
        ((0, 1), 1, 0),
        ((3, 4), 4, 3),
        ((3, 4), 8, 3),
        ((1, 2), 1, 0),
        ((2, 4), 3, None),
        ((9, 16), 8, None),
        ((0, 1), 0, None),
    ],
)
def test_a_gpu_for_each_rank_regression(place: tuple[int, int], num_gpus: int, gpu: int | None) -> None:
    """One each where there are enough for those that see them: eight of sixteen ranks on each of two machines, or one
    rank in a Ray actor that sees one GPU; else all compute on the CPU. A single one is each rank's own, or all ranks
    find out that it is not.
    """
    assert own_gpu(place, range(num_gpus)) == (None if gpu is None else torch.device("cuda", gpu))


@pytest.mark.parametrize(
    ("ids", "agreed", "why"),
    [
        (["x", "y", "z"], True, ""),
        (["x", "", "z"], False, "rank 1 has none"),
        (["x", "y", "x"], False, "ranks 0 and 2 have the same one"),
        (["", "", ""], False, ""),
    ],
)
def test_all_ranks_have_a_gpu_of_their_own_or_none_has_one(ids: list[str], agreed: bool, why: str) -> None:
    """As Slurm shows them, each process its own; else NCCL on some ranks would wait for gloo on others."""
    store = HashStore()

    def rank(number: int) -> torch.device | None:
        own = torch.device("cuda", 0) if ids[number] else None
        return agreed_gpu(store, number, len(ids), own, ids[number], 30.0)

    with warnings.catch_warnings(record=True) as caught, concurrent.futures.ThreadPoolExecutor(len(ids)) as threads:
        warnings.simplefilter("always")
        found = list(threads.map(rank, range(len(ids)), timeout=60.0))
    warned = [str(each.message) for each in caught]
    assert found == [torch.device("cuda", 0) if agreed else None] * len(ids)
    assert len(warned) == (0 if agreed else sum(map(bool, ids)))
    assert all(why in text for text in warned)


def test_a_gpu_that_was_lost_is_left_out() -> None:
    """The ranks that are left take the others, in order."""
    assert [own_gpu((number, 3), [0, 2, 3]) for number in range(3)] == [torch.device("cuda", n) for n in (0, 2, 3)]


def test_torchrun_tells_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 9 of 16 is number 1 of 8 on its machine; whoever sets up ranks by hand need not say."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_rank_and_size() == (1, 8)
    monkeypatch.delenv("LOCAL_RANK")
    assert local_rank_and_size() is None
