"""Loaders: the same batches everywhere, from wherever a feed goes on, until they end as the user chose."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

import spindle
from spindle.errors import WorkloadError
from spindle.runtime.loading.data import Feed, wait_for_readers
from spindle.workload import Task
from tests.checkpoints.test_resume import Rows
from tests.random_plans import widest_plan
from tests.tiny_workloads import HandWritten


@pytest.fixture(autouse=True)
def no_readers_left() -> Iterator[None]:
    """What a test leaves reading would draw beside the next one."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("data-"):
            thread.join(20.0)


def task(data: Any, **options: Any) -> Task:
    return Task(name="t", function=lambda batch: batch["b"].sum(), batch_size=6, data=data, **options)


def numbers(count: int) -> Any:
    return lambda: ({"b": torch.full((6, 1), float(i))} for i in range(count))


def taken(feed: Feed, count: int) -> list[float]:
    return [float(feed.next().fields["b"].sum()) for _ in range(count)]


@given(before=st.integers(0, 11), prefetch=st.integers(0, 3))
def test_a_feed_goes_on_where_it_was(before: int, prefetch: int) -> None:
    """Whatever was read ahead, over the ends of passes, with shuffling and noise."""
    loader = DataLoader(Rows(), batch_size=6, shuffle=True)
    first, again = Feed(task(loader, prefetch=prefetch), 1), Feed(task(loader), 1)
    taken(first, before)
    state = first.state()
    again.digest()  # reads ahead
    again.resume(state)
    assert taken(again, 6) == taken(first, 6)
    first.close()
    again.close()


def test_passes_differ_and_processes_agree() -> None:
    """Two feeds of one seed shuffle alike, anew in each pass; another seed shuffles otherwise."""
    one, two, other = (Feed(task(DataLoader(Rows(), batch_size=6, shuffle=True)), seed) for seed in (1, 1, 2))
    first = taken(one, 8)
    assert first == taken(two, 8)
    assert first[:4] != first[4:]
    assert first != taken(other, 8)


def test_global_generators_are_left_alone() -> None:
    """What a loader draws changes nothing for anyone else."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    feed = Feed(task(DataLoader(Rows(), batch_size=6, shuffle=True)), 1)
    taken(feed, 5)
    feed.settle()
    assert torch.equal(torch.rand(3), expected)


def test_a_closed_feed_leaves_the_generators_alone() -> None:
    """A batch that is being read when a run ends is outwaited; one that would be read afterwards is not."""
    begun, goes_on = threading.Event(), threading.Event()

    def slow() -> Iterator[dict[str, Tensor]]:
        while True:
            torch.rand(1)
            begun.set()
            goes_on.wait(20.0)
            yield {"b": torch.zeros(6, 1)}

    feeds = [Feed(task(lambda: slow()), seed) for seed in range(2)]  # the second waits until it may draw
    state = torch.get_rng_state()
    for feed in feeds:
        feed.ask(2)
    assert begun.wait(20.0)
    for feed in feeds:
        feed.close()
    threading.Timer(0.2, goes_on.set).start()
    wait_for_readers(20.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for thread in threading.enumerate():
        if thread.name.startswith("data-"):
            thread.join(20.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_data_that_ends_with_an_error_says_when() -> None:
    """`on_end="error"` names the task and how many batches there were."""
    feed = Feed(task(numbers(3), on_end="error"), 0)
    taken(feed, 3)
    with pytest.raises(WorkloadError, match=r"task 't': its data ended after 3 batches"):
        feed.next()


def test_a_loader_that_stalls_is_told() -> None:
    """Nobody waits for a loader longer than allowed."""
    release = threading.Event()

    def stalled() -> Iterator[dict[str, Tensor]]:
        release.wait(20.0)
        yield {"b": torch.zeros(6, 1)}

    feed = Feed(task(lambda: stalled()), 0, timeout_s=0.1)
    with pytest.raises(WorkloadError, match=r"gave no batch within 0\.1 s"):
        feed.next()
    release.set()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_stops_before_the_first_step_that_lacks_a_batch(num_ranks: int, accumulate: int) -> None:
    """All ranks agree, though only those that load can know; the other task's data goes round."""
    workload = spindle.Workload("ends", accumulate=accumulate)
    model = workload.component("model", HandWritten(1))

    @workload.task("goes-on", batch_size=6, data=numbers(2))
    def goes_on(batch: dict[str, Tensor]) -> Tensor:
        return model(batch["b"]).square().mean()  # type: ignore[no-any-return]

    @workload.task("ends", batch_size=6, data=numbers(5), on_end="stop")
    def ends(batch: dict[str, Tensor]) -> Tensor:
        return model(-batch["b"]).square().mean()  # type: ignore[no-any-return]

    result = spindle.train(
        workload,
        widest_plan(spindle.make_metagraph(workload), num_ranks),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        steps=50,
        launcher="threads",
    )
    assert (len(result.losses), result.ended) == (5 // accumulate, "ends")
