"""Shared batches: one rank reads, the others get the same; errors, ends and resumes reach all; nothing stays behind."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spindle.errors import RunError, WorkloadError
from spindle.runtime.loading import shared_batches
from spindle.runtime.loading.data import Feed
from spindle.runtime.loading.machines import Door, called, machine
from spindle.runtime.loading.shared_batches import Dropped, Reader, Receiver, Seat, readers
from spindle.workload import Task

ROOT = Path(__file__).parents[2]
AHEAD = 4
WAIT_S = 20.0  # for what comes at once
SHORT_S = 0.2  # for what never comes


def task(data: Any, **options: Any) -> Task:
    return Task(name="t", function=lambda batch: batch["b"].sum(), batch_size=2, data=data, **options)


def numbers(count: int, read: list[int] | None = None) -> Callable[[], Iterator[dict[str, Any]]]:
    """Batches 0, 1, ...; `read` is told of each that is read."""

    def batches() -> Iterator[dict[str, Any]]:
        for number in range(count):
            if read is not None:
                read.append(number)
            yield {"b": torch.full((2, 1), float(number)), "words": [f"w{number}", "x"]}

    return batches


def nothing() -> Iterator[dict[str, Any]]:
    """The loader of a rank that must not read."""
    raise AssertionError("this rank reads")
    yield {}


class Sharing:
    """Feeds of one task: that of the rank that reads, and those of others."""

    def __init__(self, data: Any, *, others: int = 1, timeout_s: float = WAIT_S, **options: Any) -> None:
        pairs = [socket.socketpair() for _ in range(others)]
        self.reader = Reader("t", {index + 1: ours for index, (ours, _) in enumerate(pairs)}, AHEAD)
        self.receivers = [Receiver("t", 0, theirs) for _, theirs in pairs]
        own, given = task(data, **options), task(nothing, **options)
        self.first = Feed(own, 1, timeout_s=timeout_s, shared=self.reader)
        self.others = [Feed(given, 1, timeout_s=timeout_s, shared=receiver) for receiver in self.receivers]

    @property
    def feeds(self) -> list[Feed]:
        return [self.first, *self.others]


@pytest.fixture
def sharing() -> Iterator[Callable[..., Sharing]]:
    """Makes feeds that share; afterwards they are closed, and no thread, descriptor or memory of theirs is left."""
    descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    made: list[Sharing] = []

    def make(*arguments: Any, **options: Any) -> Sharing:
        made.append(Sharing(*arguments, **options))
        return made[-1]

    yield make
    while made:
        for feed in made.pop().feeds:
            feed.close()
    for thread in set(threading.enumerate()) - threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    del feed
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert mapped() == 0


def mapped() -> int:
    """Batches in shared memory that this process holds."""
    return Path("/proc/self/maps").read_text().count("spindle-batch")


def taken(feed: Feed, count: int) -> list[float]:
    return [float(feed.next().fields["b"].flatten()[0]) for _ in range(count)]


def test_each_batch_is_read_once(sharing: Callable[..., Sharing]) -> None:
    """Three ranks get all of two passes, in order, with equal states; the loader runs on one."""
    read: list[int] = []
    one = sharing(numbers(3, read), others=2)
    for number in (0, 1, 2, 0, 1, 2):
        assert [taken(feed, 1) for feed in one.feeds] == [[number]] * 3
        states = [feed.state() for feed in one.feeds]
        assert [(state["pass"], state["taken"]) for state in states] == [(states[0]["pass"], number + 1)] * 3
        assert torch.equal(states[0]["generators"][2], states[2]["generators"][2])
    one.first.settle()
    assert read == [0, 1, 2, 0, 1, 2, 0]  # and one ahead
    assert len({feed.digest() for feed in one.feeds}) == 1


class Grid:
    """A field of a class of the user's."""

    def __init__(self, sizes: torch.Tensor) -> None:
        self.sizes = sizes


def test_a_batch_comes_as_it_is(sharing: Callable[..., Sharing]) -> None:
    """Tensors of any type, order and size, also inside of other fields; words, arrays and objects; rows by sample."""
    pixels = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    batch: dict[str, Any] = {
        "b": torch.randn(2, 7, dtype=torch.bfloat16),
        "pixels": pixels,
        "same": pixels,
        "part": torch.arange(100_000.0).view(2, -1)[:, ::2],
        "none": torch.empty(2, 0),
        "flags": torch.rand(2, 20_000) > 0.5,
        "one": torch.tensor(3),
        "rows": torch.arange(5),
        "words": ["pick", "place"],
        "nested": [{"at": torch.ones(3), "array": np.random.rand(100, 100)}, Grid(torch.ones(40_000))],
        "name": "set",
    }
    one = sharing(lambda: iter([batch]), rows=lambda fields: {"rows": [2, 3]})
    sent, came = (feed.next() for feed in one.feeds)
    assert list(came.fields) == list(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            found = came.fields[name]
            assert torch.equal(found, value)
            assert (found.dtype, found.is_contiguous()) == (value.dtype, value.is_contiguous() or name == "part")
    assert came.fields["pixels"].stride() == pixels.stride()
    assert came.fields["same"] is came.fields["pixels"]
    assert came.fields["words"] == batch["words"]
    (first, second), (there, grid) = batch["nested"], came.fields["nested"]
    assert torch.equal(there["at"], first["at"])
    assert np.array_equal(there["array"], first["array"])
    assert torch.equal(grid.sizes, second.sizes)
    assert (came.units, came.places) == (sent.units, sent.places)
    assert came.shapes == sent.shapes


def test_what_a_rank_writes_no_other_sees(sharing: Callable[..., Sharing]) -> None:
    """A task may change its batch in place, as it may where each rank reads its own."""
    one = sharing(lambda: iter([{"b": torch.zeros(2, 100_000), "array": [np.zeros(100_000)] * 2}]), others=2)
    batches = [feed.next() for feed in one.feeds]
    for number, batch in enumerate(batches):
        batch.fields["b"].add_(number)
        batch.fields["array"][0][:] = number
    assert [float(batch.fields["b"].mean()) for batch in batches] == [0.0, 1.0, 2.0]
    assert [float(batch.fields["array"][0].mean()) for batch in batches] == [0.0, 1.0, 2.0]


def named_memory() -> list[str]:
    """What stands in /dev/shm; semaphores of other processes come and go there."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith("sem."))


def test_memory_goes_with_the_batch(sharing: Callable[..., Sharing]) -> None:
    """A batch is gone when its tensors are; the state, which is kept, holds none. /dev/shm is not used."""
    before = named_memory()
    one = sharing(lambda: iter([{"b": torch.zeros(2, 100_000)}] * 3), on_end="stop", prefetch=0)
    for feed in one.feeds:
        feed.next()
    assert mapped() == 0
    held = [feed.next() for feed in one.feeds]
    assert mapped() == 1
    assert named_memory() == before
    del held
    assert mapped() == 0


def failing(error: BaseException) -> Callable[[], Iterator[dict[str, Any]]]:
    def batches() -> Iterator[dict[str, Any]]:
        yield {"b": torch.zeros(2, 1)}
        raise error

    return batches


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (failing(OSError("disk on fire")), "task 't': its loader raised OSError: disk on fire"),
        (failing(SystemExit(3)), "task 't': its loader raised SystemExit: 3"),
        (lambda: iter([{"b": torch.zeros(2, 1)}, None]), "task 't': a batch is a NoneType"),
        (lambda: iter([{"b": torch.zeros(2, 1)}, {"b": torch.zeros(2), "lock": threading.Lock()}]), "cannot be passed"),
    ],
    ids=["raises", "exits", "no batch", "not picklable"],
)
def test_an_error_of_the_loader_is_raised_everywhere(sharing: Callable[..., Sharing], data: Any, words: str) -> None:
    """With the same words, on the rank that reads and on the others, in the same place."""
    one = sharing(data, others=2)
    for feed in one.feeds:
        feed.next()
    found = []
    for feed in one.feeds:
        with pytest.raises(WorkloadError) as caught:
            feed.next()
        found.append(str(caught.value))
    assert words in found[0]
    assert found == [found[0]] * 3


@pytest.mark.parametrize("on_end", ["restart", "stop", "error"])
def test_data_ends_for_all_alike(sharing: Callable[..., Sharing], on_end: str) -> None:
    """The question whether there is more has one answer; so has taking more than there is."""
    one = sharing(numbers(3), on_end=on_end)
    for feed in one.feeds:
        assert taken(feed, 2) == [0.0, 1.0]
    assert [feed.holds(1) for feed in one.feeds] == [True] * 2
    assert [feed.holds(3) for feed in one.feeds] == [on_end == "restart"] * 2
    if on_end == "restart":
        assert [taken(feed, 3) for feed in one.feeds] == [[2.0, 0.0, 1.0]] * 2
        return
    for feed in one.feeds:
        assert taken(feed, 1) == [2.0]
        with pytest.raises(WorkloadError, match=r"task 't': its data ended after 3 batches"):
            feed.next()


def test_the_reader_waits_for_the_slowest(sharing: Callable[..., Sharing]) -> None:
    """It reads `ahead` batches that a rank has not received, names it, and goes on when it takes some."""
    read: list[int] = []
    one = sharing(numbers(100, read), others=2, prefetch=0, timeout_s=SHORT_S)
    quick, slow = one.others
    for number in range(AHEAD):
        assert taken(one.first, 1) == taken(quick, 1) == [number]
    with pytest.raises(WorkloadError, match=r"task 't': rank 2, which gets its batches .*, has received none"):
        one.first.next()
    assert len(read) == AHEAD
    assert taken(slow, 2) == [0.0, 1.0]
    one.first.timeout_s = quick.timeout_s = WAIT_S
    assert taken(one.first, 2) == taken(quick, 2) == [AHEAD, AHEAD + 1]
    assert len(read) == AHEAD + 2


def test_ranks_that_read_for_each_other_do_not_lock(sharing: Callable[..., Sharing]) -> None:
    """One loads four batches of a task, then of another; its peer does so in the other order, step by step."""
    one, other = (sharing(numbers(100), prefetch=0) for _ in range(2))
    orders = [one.first, other.others[0]], [other.first, one.others[0]]
    together = threading.Barrier(2, timeout=WAIT_S)

    def load(feeds: list[Feed]) -> list[float]:
        found = []
        for _ in range(3):
            found += [number for feed in feeds for number in taken(feed, AHEAD)]
            together.wait()
        return found

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(load, orders)
    assert first == second
    assert first[-AHEAD:] == [8.0, 9.0, 10.0, 11.0]


def test_a_reader_that_gives_nothing_is_named(sharing: Callable[..., Sharing]) -> None:
    """No rank waits longer for it than for a loader of its own."""
    one = sharing(numbers(3), timeout_s=SHORT_S)
    with pytest.raises(WorkloadError, match=r"its loader, which rank 0 runs .*, gave no batch within 0\.2 s"):
        one.others[0].next()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["reader first", "reader last"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_of_before_are_not_taken_after_a_resume(
    sharing: Callable[..., Sharing], order: tuple[int, int], prefetch: int
) -> None:
    """Whoever resumes first, what was read ahead is dropped, and a thread that waits for more of it ends."""
    one = sharing(numbers(9), prefetch=prefetch)
    for feed in one.feeds:
        taken(feed, 2)
    state = one.first.state()
    assert taken(one.first, 3) == [2.0, 3.0, 4.0]  # the other rank has not received all of these
    taken(one.others[0], 1)
    for _ in range(2):
        for place in order:
            one.feeds[place].resume(state)
        assert [taken(feed, 3) for feed in one.feeds] == [[2.0, 3.0, 4.0]] * 2
        assert one.first.state()["taken"] == one.others[0].state()["taken"] == 5


def test_work_ordered_before_a_resume_reads_nothing_regression(sharing: Callable[..., Sharing]) -> None:
    """A thread may begin with it only afterwards: it must not take, or send, a batch of what comes then."""
    one = sharing(numbers(3))
    sides: list[Reader | Receiver] = [one.reader, *one.receivers]
    for side in sides:
        ordered = side.generation
        side.restart()
        with pytest.raises(Dropped):
            side.read(lambda: pytest.fail("the loader was run"), ordered)


def test_a_rank_that_waits_is_free_to_resume(sharing: Callable[..., Sharing]) -> None:
    """Its thread asks for a batch that the reader never reads."""
    one = sharing(numbers(9), prefetch=0)
    waiting = one.others[0]
    waiting.timeout_s = SHORT_S
    state = waiting.state()
    with pytest.raises(WorkloadError):
        waiting.next()
    for feed in one.feeds:
        feed.resume(state)
    waiting.timeout_s = WAIT_S
    assert [taken(feed, 2) for feed in one.feeds] == [[0.0, 1.0]] * 2


def test_a_loader_that_does_not_come_back_stops_no_resume(sharing: Callable[..., Sharing]) -> None:
    """For longer than a batch may take."""
    release = threading.Event()

    def stalled() -> Iterator[dict[str, Any]]:
        release.wait(WAIT_S)
        yield {"b": torch.zeros(2, 1)}

    one = sharing(stalled, timeout_s=SHORT_S)
    state = one.first.state()
    with pytest.raises(WorkloadError, match=r"its loader gave no batch within 0\.2 s"):
        one.first.digest()
    with pytest.raises(WorkloadError, match=r"its loader gave no batch within 0\.2 s"):
        one.first.resume(state)
    release.set()


def test_the_reader_goes_on_without_a_rank_that_left(sharing: Callable[..., Sharing]) -> None:
    """Other exchanges between ranks report that one; a loader does not hang for it."""
    one = sharing(numbers(100), others=2, prefetch=0)
    one.others[0].close()
    for number in range(AHEAD + 2):
        assert taken(one.first, 1) == taken(one.others[1], 1) == [number]
    one.others[1].close()
    assert taken(one.first, AHEAD + 2)[-1] == 2 * AHEAD + 3


def test_a_closed_feed_gives_no_more(sharing: Callable[..., Sharing]) -> None:
    """A rank that still asks, while another ends the run, does not wait."""
    one = sharing(numbers(3))
    for feed in one.feeds:
        feed.next()
    for feed in one.feeds:
        feed.close()
        with pytest.raises(CancelledError):
            feed.next()
        feed.close()


def test_a_resumed_feed_knows_where_it_stands_regression(sharing: Callable[..., Sharing]) -> None:
    """All look at a first batch before they resume; that one counted as taken."""
    one = sharing(numbers(9), prefetch=0)
    for feed in one.feeds:
        taken(feed, 3)
    state = one.first.state()
    again = sharing(numbers(9), prefetch=0)
    for feed in again.feeds:
        feed.digest()
    for feed in again.feeds:
        feed.resume(state)
    assert [taken(feed, 1) for feed in again.feeds] == [[3.0]] * 2
    assert [feed.state()["taken"] for feed in again.feeds] == [4] * 2


def test_a_reader_that_closes_is_noticed_at_once(sharing: Callable[..., Sharing]) -> None:
    """By a rank that waits for the next batch."""
    one = sharing(numbers(3), prefetch=1)
    for feed in one.feeds:
        feed.next()
    one.first.settle()
    one.first.close()
    assert taken(one.others[0], 1) == [1.0]  # sent before
    with pytest.raises(RunError, match=r"task 't': no batch came from rank 0, .*: it left"):
        one.others[0].next()


KILLED = """
import os, signal, socket, sys, torch
from spindle.runtime.loading.data import Feed
from spindle.runtime.loading.shared_batches import Reader
from spindle.workload import Task

data = lambda: ({"b": torch.full((2, 50_000), float(i))} for i in range(9))
task = Task(name="t", function=None, batch_size=2, data=data, prefetch=0)
feed = Feed(task, 1, shared=Reader("t", {1: socket.socket(fileno=int(sys.argv[1]))}, 4))
feed.next(), feed.next()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_reader_that_is_killed_leaves_nothing() -> None:
    """What it sent can be taken; then its death is told. No memory stays: it has no name."""
    before = named_memory()
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", KILLED, str(theirs.fileno())]
        killed = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT)
    feed = Feed(task(nothing, prefetch=0), 1, timeout_s=60.0, shared=Receiver("t", 0, ours))
    assert taken(feed, 2) == [0.0, 1.0]
    with pytest.raises(RunError, match="it left"):
        feed.next()
    assert killed.wait(WAIT_S) == -signal.SIGKILL
    feed.close()
    assert mapped() == 0
    assert named_memory() == before


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        (["a", "a", "a"], {"a": [0, 1, 2]}),
        (["ab", "ab", "b"], {"a": [0, 1], "b": [1, 0, 2]}),
        (["abc", "abc"], {"a": [0, 1], "b": [1, 0], "c": [0, 1]}),
        (["a", "", "b"], {}),
        (["", "a!", "a", "a!", "a"], {"a": [2, 4]}),
    ],
)
def test_which_rank_reads(loads: list[str], expected: dict[str, list[int]]) -> None:
    """Tasks that ranks load, those of another machine with a "!": readers come first, and take turns."""
    seats = [Seat(("!" in each and "there") or "here", "", tuple(each.replace("!", ""))) for each in loads]
    assert readers(seats, "here") == expected


def test_ranks_find_each_other() -> None:
    """A socket for each that calls, by who it is; the directory for it is gone afterwards."""
    with Door(WAIT_S) as door:
        calls = [called(door.address, caller, WAIT_S) for caller in ((3, 0), (2, 1))]
        came = door.let_in({(2, 1), (3, 0)})
        came[3, 0].sendall(b"x")
        assert calls[0].recv(1) == b"x"
        for end in (*calls, *came.values()):
            end.close()
        directory = Path(door.address).parent
        assert directory.stat().st_mode & 0o077 == 0
    assert not directory.exists()
    with pytest.raises(RunError, match="was not reached"):
        called(door.address, (1, 0), SHORT_S)


def test_ranks_that_do_not_come_are_named() -> None:
    with Door(SHORT_S) as door, pytest.raises(RunError, match=r"ranks \[2, 5\] did not come within 0\.2 s"):
        door.let_in({(2, 0), (5, 1)})


def test_a_long_path_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of sockets are short; one that does not fit is not tried."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert machine()
    with Door(SHORT_S) as door:
        assert not door.address.startswith(str(long))


def test_one_rank_shares_with_nobody() -> None:
    """Nor do threads of one process."""
    from spindle.runtime.comms.transport import ThreadTransport

    for transport in (*ThreadTransport.connect(1), *ThreadTransport.connect(2)):
        assert shared_batches.shared_reads(transport, ["t"], in_flight=1, timeout_s=WAIT_S) == {}
