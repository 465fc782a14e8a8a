"""Faults while a run is on: each ends it soon, with a typed error that says where, and leaves nothing behind."""

import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

import spindle
from spindle.errors import LostRankError, RunError, SpindleError, WorkloadError
from spindle.runtime.controller import Launcher
from spindle.runtime.loading.data import Feed
from spindle.workload import Workload
from tests.faults.breaking import (
    RELEASE,
    Exiting,
    Killed,
    Raising,
    Stalling,
    breaking_block,
    good_then,
    marked,
    rows,
    workload_of,
)
from tests.random_plans import widest_plan

LIMIT_S = 10.0  # from the fault to the error
STARTING_S = 20.0  # of processes, on a busy machine
TIMEOUT_S = 2.0  # what ranks wait for each other in runs that stall

both = pytest.mark.parametrize("launcher", ["threads", pytest.param("processes", marks=[pytest.mark.gloo])])


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No worker, whether thread or process, and no reader of a loader outlives its run."""
    RELEASE.clear()
    before = set(threading.enumerate())
    yield
    RELEASE.set()
    assert multiprocessing.active_children() == []
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(("rank", "data-")):
            continue  # of a library
        thread.join(5.0)
        assert not thread.is_alive(), thread.name
    assert worker_processes() == []


def worker_processes() -> list[psutil.Process]:
    """What the forkserver, which stays, has started and still runs."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return [child for server in servers for child in server.children() if child.status() != psutil.STATUS_ZOMBIE]


def failure(workload: Workload, launcher: Launcher, *, num_ranks: int = 2, timeout_s: float = 30.0) -> SpindleError:
    """What training ends with; it has to end in time."""
    plan = widest_plan(spindle.make_metagraph(workload), num_ranks)
    started_s = time.monotonic()
    with pytest.raises(SpindleError) as caught:
        spindle.train(workload, plan, optimizer=sgd, steps=50, launcher=launcher, timeout_s=timeout_s)
    assert time.monotonic() - started_s < LIMIT_S + (STARTING_S if launcher == "processes" else 0.0)
    return caught.value


@both
def test_a_block_that_raises(launcher: Launcher, tmp_path: Path) -> None:
    """Rank, wave, instruction and layers come first, then the user's own line; the traceback to it is a note."""
    error = failure(breaking_block(Raising, tmp_path / "flag"), launcher)
    assert type(error) is RunError
    first, second = str(error).splitlines()
    assert first == "rank 0, wave 0, FORWARD s0 (t.net.0) raised ValueError: too hot"
    assert re.fullmatch(r'.*breaking\.py:\d+ in act: raise ValueError\("too hot"\)', second)
    (note,) = error.__notes__
    assert note.startswith("Traceback (most recent call last):")
    assert "in forward" in note
    assert note.endswith("ValueError: too hot")


@both
def test_a_loader_that_raises(launcher: Launcher) -> None:
    """The first batches are good, so that only the run can find it; rank and instruction are named too."""
    error = failure(workload_of(good_then(OSError("disk on fire"))), launcher)
    assert type(error) is WorkloadError
    assert re.fullmatch(r"rank \d, LOAD t: task 't': its loader raised OSError: disk on fire", str(error))


@both
def test_a_task_that_raises(launcher: Launcher, tmp_path: Path) -> None:
    """Its own code runs where batches are loaded: rank, task and step come first, then the user's own line."""
    flag = tmp_path / "flag"
    workload = Workload("raising")
    net = workload.component("net", nn.Linear(4, 4))

    @workload.task("t", batch_size=4, data=marked)
    def task(batch: dict[str, Tensor]) -> Tensor:
        if os.path.exists(flag):
            raise ValueError("too cold")
        return net(batch["x"]).square().mean()  # type: ignore[no-any-return]

    spindle.make_metagraph(workload)
    flag.touch()
    error = failure(workload, launcher)
    assert type(error) is RunError
    first, second = str(error).splitlines()
    assert re.fullmatch(r"rank \d, LOAD t: task 't', step 1 raised ValueError: too cold", first)
    assert re.fullmatch(r'.*test_faults\.py:\d+ in task: raise ValueError\("too cold"\)', second)
    (note,) = error.__notes__
    assert note.startswith("Traceback (most recent call last):")
    assert note.endswith("ValueError: too cold")


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({}, "a batch is a dict; the loader must give dicts of fields"),
        (None, "a batch is a NoneType; the loader must give dicts of fields"),
        ({"x": torch.zeros(0, 4)}, "a batch has no samples; leave empty batches out"),
        (
            {"x": torch.zeros(4, 4), "y": torch.zeros(7)},
            "batch['y'] has 7 rows for 4 samples; where it is packed, give rows= (how many belong to each sample",
        ),
    ],
    ids=["empty", "nothing", "no samples", "packed"],
)
def test_a_loader_that_gives_something_else(last: object, words: str) -> None:
    """What a batch must be is checked for every batch."""
    error = failure(workload_of(good_then(last)), "threads")
    assert type(error) is WorkloadError
    assert words in str(error)
    assert re.match(r"rank \d, LOAD t: task 't': ", str(error))


@pytest.mark.parametrize(
    ("last", "where", "words"),
    [
        ({"y": torch.zeros(4, 4)}, "LOAD t: task 't', step 3", "raised KeyError: 'x'"),
        ({"x": [1.0, 2.0]}, "LOAD t: task 't', step 3", "raised TypeError: layer_norm(): argument 'input'"),
        ({"x": torch.zeros(4, 6)}, "LOAD t: task 't', step 3", "raised RuntimeError: Given normalized_shape=[4]"),
        ({"x": torch.zeros(4, 4, dtype=torch.float64)}, "wave 0, FORWARD s0", "raised RuntimeError: mixed dtype"),
    ],
    ids=["field missing", "no tensor", "shape", "dtype"],
)
def test_a_batch_that_the_user_s_code_cannot_take(last: object, where: str, words: str) -> None:
    """The error is that of the user's own code, with its line, where it is recorded or, at the latest, computes."""
    error = failure(workload_of(good_then(last)), "threads")
    assert type(error) is RunError
    first, *others = str(error).splitlines()
    assert re.match(rf"rank \d, {re.escape(where)}", first)
    assert words in str(error)
    assert re.search(r"breaking\.py:\d+ in (task|forward): y: Tensor = ", others[-1])


@pytest.mark.parametrize(
    "last",
    [
        rows(3.0, samples=3),
        rows(3.0, samples=1),
        rows(3.0, samples=7),
        rows(3.0) | {"y": torch.zeros(4), "name": "more"},
    ],
    ids=["fewer samples", "one sample", "more samples", "fields more"],
)
def test_a_batch_that_capture_did_not_see(last: dict[str, Tensor]) -> None:
    """Other numbers of samples, and more fields, train like in one process."""
    check_trains(workload_of(good_then(last)), last)


def test_a_batch_of_another_inner_shape() -> None:
    """Five rows a sample where two were captured: the model takes them, so they train like in one process."""
    given = [torch.zeros(4, 2, 4), torch.zeros(4, 2, 4), torch.linspace(0.0, 3.0, 80).view(4, 5, 4)]
    check_trains(workload_of(lambda: iter([{"x": x} for x in given])), {"x": given[-1]})


def check_trains(workload: Workload, last: dict[str, Tensor]) -> None:
    """Two good batches, then `last`, over and over: its loss is that of one process."""
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    alone = workload.tasks["t"].function(last).item()
    result = spindle.train(
        workload, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), steps=4, launcher="threads", timeout_s=30.0
    )
    losses = [step["t"] for step in result.losses]
    assert losses[2] == pytest.approx(alone, rel=1e-5)
    assert losses[2] != pytest.approx(losses[1], rel=1e-3)
    assert losses[3] == losses[0]


def test_data_that_ends_with_an_error() -> None:
    """`on_end="error"`: after two batches, with what to do."""
    error = failure(workload_of(lambda: iter([rows(), rows()]), on_end="error"), "threads")
    assert type(error) is WorkloadError
    assert "task 't': its data ended after 2 batches" in str(error)


def test_data_that_starts_over_is_no_fault() -> None:
    """Two batches last for five steps when the data restarts."""
    workload = workload_of(lambda: iter([rows(), rows(2.0)]))
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    result = spindle.train(workload, plan, optimizer=sgd, steps=5, launcher="threads")
    assert len(result.losses) == 5


@pytest.mark.gloo
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """kill -9: the rank and its exit code are told, and the other rank does not wait for it."""
    error = failure(breaking_block(Killed, tmp_path / "flag"), "processes")
    assert type(error) is LostRankError
    assert str(error) == (
        "rank 0 died (exit code -9) in step 1, wave 0, FORWARD s0 (t.net.0): killed, as a machine out of memory does. "
        "The run ended"
    )


@pytest.mark.gloo
def test_a_worker_that_exits(tmp_path: Path) -> None:
    """One rank of two leaves in the middle of a step: it is named, not the one that then lost its peer."""
    error = failure(breaking_block(Exiting, tmp_path / "flag"), "processes")
    assert type(error) is LostRankError
    assert str(error).startswith("rank 0 died (exit code 7) in step 1, wave 0, FORWARD s0 (t.net.0). The run ended")


@both
def test_a_worker_that_stalls(launcher: Launcher, tmp_path: Path) -> None:
    """Rank 0 does not come back from a layer: it is named with its instruction, not rank 1, which waits for it."""
    error = failure(breaking_block(Stalling, tmp_path / "flag"), launcher, timeout_s=TIMEOUT_S)
    assert type(error) is LostRankError
    assert re.match(
        r"rank 0 hangs in step 1, wave 0, FORWARD s0 \(t\.net\.0\), for \d\.\d s now; rank 1 waited for it in step 1, ",
        str(error),
    )
    assert not RELEASE.is_set()


@both
def test_a_lone_worker_that_stalls(launcher: Launcher, tmp_path: Path) -> None:
    """No other rank waits for it, so the driver does not for ever."""
    error = failure(breaking_block(Stalling, tmp_path / "flag"), launcher, num_ranks=1, timeout_s=TIMEOUT_S)
    assert str(error).startswith("rank 0 hangs in step 1, wave 0, FORWARD s0 (t.net.0), for ")


def test_a_loader_that_stalls() -> None:
    """No batch in time: the task is named, and what to raise."""

    def endless() -> Iterator[dict[str, torch.Tensor]]:
        yield rows()
        RELEASE.wait(60.0)
        yield rows()

    error = failure(workload_of(endless), "threads", timeout_s=TIMEOUT_S)
    assert type(error) is WorkloadError
    assert "task 't': its loader gave no batch within 2 s" in str(error)


def test_a_feed_that_was_closed_lets_nobody_wait_regression() -> None:
    """When one rank fails the feeds of all are closed, while another rank may just be asking for its next batch."""
    feed = Feed(workload_of(marked).tasks["t"], 0, timeout_s=60.0)
    assert feed.next().units.num_samples == 4
    feed.close()
    started_s = time.monotonic()
    with pytest.raises(CancelledError):
        feed.next()
    assert time.monotonic() - started_s < LIMIT_S


def test_loaders_that_disagree() -> None:
    """Batches that differ between two passes are found before the first step, where ranks would train on them."""
    passes = iter(range(100))

    def other_each_time() -> Iterator[dict[str, torch.Tensor]]:
        mark = float(next(passes))
        while True:
            yield rows(mark)

    error = failure(workload_of(other_each_time), "threads")
    assert type(error) is WorkloadError
    assert "task 't': ranks 0 and 1 read different batches" in str(error)


def test_loaders_that_disagree_later_on() -> None:
    """Batches of other shapes in the third step: found before one rank waits for what another never sends."""
    passes = iter(range(100))

    def other_in_the_end() -> Iterator[dict[str, torch.Tensor]]:
        samples = 4 + next(passes)
        yield rows()
        yield rows()
        while True:
            yield rows(samples=samples)

    error = failure(workload_of(other_in_the_end), "threads")
    assert type(error) is WorkloadError
    words = (
        r"rank \d, AGREE \(with all ranks\): task 't', step 3: ranks 0 and 1 read batches of different shapes or rows; "
    )
    assert re.match(words, str(error))
    assert "every pass over its data must give the same batches in every process" in str(error)


def test_a_function_of_the_user_that_raises_in_the_driver() -> None:
    """An exception of `on_step` comes through as it is, and the workers end."""

    def on_step(step: int, losses: dict[str, float]) -> None:
        raise KeyError(step)

    workload = workload_of(marked)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    with pytest.raises(KeyError):
        spindle.train(workload, plan, optimizer=sgd, steps=50, launcher="threads", on_step=on_step)


def test_an_optimizer_that_cannot_be_made() -> None:
    """The factory runs on the ranks; its error comes back."""

    def broken(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        raise TypeError("no such optimizer")

    workload = workload_of(marked)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    with pytest.raises(RunError, match="no such optimizer"):
        spindle.train(workload, plan, optimizer=broken, steps=1, launcher="threads")


def test_the_next_run_is_not_harmed(tmp_path: Path) -> None:
    """After a failure the same workload trains, once what broke it is gone; the failed run changed no weight."""
    flag = tmp_path / "flag"
    workload = breaking_block(Raising, flag)
    before = {name: p.detach().clone() for name, p in workload.named_parameters()}
    failure(workload, "threads")
    assert all(torch.equal(before[name], p) for name, p in workload.named_parameters())
    flag.unlink()
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    result = spindle.train(workload, plan, optimizer=sgd, steps=3, launcher="threads")
    assert len(result.losses) == 3
