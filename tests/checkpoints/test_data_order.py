"""Order of data: what a feed gives is what `for batch in loader` gives in one process, pass after pass."""

import io
import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import spindle
from spindle.errors import WorkloadError
from spindle.inputs.loaders import set_epoch
from spindle.runtime.loading.data import Feed
from spindle.workload import Task

ROWS, SIZE, PASSES = 12, 3, 3
WAIT_S = 20.0
Loader = Any
Made = tuple[Loader, list[Any]]
"""What a task is given, and what a script calls `set_epoch` of."""


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((1,), float(index))}


class Epochs(Rows):
    """A data set that gives other samples in each epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((1,), 100.0 * self.epoch + index)}


class Stream(IterableDataset[dict[str, Tensor]]):
    """As a streaming data set of Hugging Face: the number of the epoch is in shared memory."""

    def __init__(self) -> None:
        self._epoch = torch.tensor(-1).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        self._epoch += epoch - self._epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = np.random.default_rng(int(self._epoch) + 5).permutation(ROWS)
        return ({"x": torch.full((1,), float(index))} for index in order)


class Drawing(Sampler[int]):
    """Draws its order from a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        order = list(range(ROWS))
        self.generator.shuffle(order)
        return iter(order)


class Counting(Sampler[int]):
    """Counts its passes, and shuffles by their number."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(np.random.default_rng(self.passes).permutation(ROWS).tolist())


class Batched(BatchSampler):
    """Batches of which the epoch decides the first."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng(self.epoch + 5).permutation(ROWS).tolist()
        return iter([order[start : start + SIZE] for start in range(0, ROWS, SIZE)])


class Shard(DataLoader[Any]):
    """A loader with `set_epoch`, which passes it on, as accelerate's do."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(7 * epoch)  # type: ignore[attr-defined]


class Stateful:
    """A loader that keeps its place, as torchdata's StatefulDataLoader."""

    def __init__(self) -> None:
        self.epoch, self.place = -1, {"start": 0, "now": 0}

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.place["start"] = epoch, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = np.random.default_rng(self.epoch + 5).permutation(ROWS)
        self.place["now"], self.place["start"] = self.place["start"], 0
        while self.place["now"] < ROWS // SIZE:
            start, self.place["now"] = self.place["now"] * SIZE, self.place["now"] + 1
            yield {"x": torch.tensor(order[start : start + SIZE], dtype=torch.float32)[:, None]}

    def state_dict(self) -> dict[str, int]:
        return {"now": self.place["now"]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place["start"] = state["now"]


class Own:
    """An iterable of the user's, with a generator of its own."""

    def __init__(self) -> None:
        self.random = np.random.RandomState(4)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"x": torch.tensor(self.random.rand(SIZE, 1))} for _ in range(ROWS // SIZE))


OF_MODULE = torch.Generator()
SAMPLER: Any = DistributedSampler(Rows(), 1, 0)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def distributed(loader: Callable[..., Any] = DataLoader, **options: Any) -> Made:
    sampler: Any = DistributedSampler(Rows(), 1, 0)
    return loader(Rows(), batch_size=SIZE, sampler=sampler, **options), [sampler]


def within_batches() -> Made:
    sampler: Any = DistributedSampler(Rows(), 1, 0)
    return DataLoader(Rows(), batch_sampler=BatchSampler(sampler, SIZE, drop_last=True)), [sampler]


def batched() -> Made:
    sampler = Batched(range(ROWS), SIZE, drop_last=True)
    return DataLoader(Rows(), batch_sampler=sampler), [sampler]


def shard() -> Made:
    loader = distributed(Shard)[0]
    return loader, [loader]


def stateful() -> Made:
    loader = Stateful()
    return loader, [loader]


def of_dataset(dataset: Any, **options: Any) -> Made:
    return DataLoader(dataset, SIZE, **options), [dataset]


def inside_a_subset() -> Made:
    rows = Epochs()
    return DataLoader(Subset(rows, range(ROWS)), SIZE), [rows]


def wrapped() -> Made:
    """A loader of the user's around torch's."""

    class Around:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Iterator[Any]:
            yield from self.loader

    loader, told = distributed()
    return Around(loader), told


def fresh() -> Made:
    """A function that makes a loader around a global sampler."""
    return lambda: DataLoader(Rows(), SIZE, sampler=SAMPLER), [SAMPLER]


def closed_over() -> Made:
    generator = seeded()
    return lambda: DataLoader(Rows(), SIZE, shuffle=True, generator=generator), []


def the_same_loader() -> Made:
    loader = DataLoader(Rows(), SIZE, shuffle=True, generator=seeded())
    return lambda: loader, []


def by_function_of_module() -> Made:
    OF_MODULE.manual_seed(11)
    return lambda: DataLoader(Rows(), SIZE, shuffle=True, generator=OF_MODULE), []


def accelerated() -> Made:
    shards = pytest.importorskip("accelerate.data_loader")
    loader = distributed(shards.DataLoaderShard, rng_types=None)[0]
    loader.batch_sampler.sampler = loader.sampler
    return loader, [loader]


def shuffled(**options: Any) -> Made:
    return DataLoader(Rows(), SIZE, shuffle=True, generator=seeded(), **options), []


def sampled_by(sampler: Any) -> Made:
    return DataLoader(Rows(), SIZE, sampler=sampler), []


class Sized12(Sized):
    def __len__(self) -> int:
        return ROWS


# Forked from a server of their own: this process may have threads and locks of whatever was tested before.
WORKERS: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "forkserver"}
PERSISTENT: dict[str, Any] = {**WORKERS, "persistent_workers": True}


@pytest.fixture(scope="module", autouse=True)
def _quick_workers() -> None:
    """Let the server that workers are forked from import what they need once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", __name__])


MADE: dict[str, Callable[[], Made]] = {
    "DistributedSampler": distributed,
    "DistributedSampler, workers": lambda: distributed(**WORKERS),
    "DistributedSampler, persistent workers": lambda: distributed(**PERSISTENT),
    "sampler of a batch sampler": within_batches,
    "batch sampler": batched,
    "loader": shard,
    "accelerate": accelerated,
    "loader that keeps its place": stateful,
    "data set": lambda: of_dataset(Epochs()),
    "data set, workers": lambda: of_dataset(Epochs(), **WORKERS),
    "data set, persistent workers": lambda: of_dataset(Epochs(), **PERSISTENT),
    "data set inside a subset": inside_a_subset,
    "stream": lambda: of_dataset(Stream()),
    "stream, persistent worker": lambda: of_dataset(Stream(), **{**PERSISTENT, "num_workers": 1}),
    "a loader around the loader": wrapped,
    "function with a sampler": fresh,
    "function with a generator": closed_over,
    "function with a global generator": by_function_of_module,
    "function that gives one loader": the_same_loader,
    "generator": shuffled,
    "generator, workers": lambda: shuffled(**WORKERS),
    "generator, persistent workers": lambda: shuffled(**PERSISTENT),
    "RandomSampler": lambda: sampled_by(RandomSampler(Sized12(), generator=seeded())),
    "WeightedRandomSampler": lambda: sampled_by(WeightedRandomSampler([1.0] * 5, ROWS, generator=seeded())),
    "SubsetRandomSampler": lambda: sampled_by(SubsetRandomSampler(range(ROWS), generator=seeded())),
    "sampler with Python's": lambda: sampled_by(Drawing(random.Random(3))),
    "sampler with numpy's": lambda: sampled_by(Drawing(np.random.default_rng(3))),
    "sampler with numpy's Philox": lambda: sampled_by(Drawing(np.random.Generator(np.random.Philox(3)))),
    "sampler with numpy's RandomState": lambda: sampled_by(Drawing(np.random.RandomState(3))),
    "sampler that counts passes": lambda: sampled_by(Counting()),
    "iterable": lambda: (Own(), []),
}


def values(batch: Any) -> list[float]:
    return [float(value) for value in batch["x"].flatten()]


def one_process(made: Made) -> list[list[float]]:
    """As a training script reads it."""
    data, told = made
    found = []
    for epoch in range(PASSES):
        for one in told:
            one.set_epoch(epoch)
        found += [values(batch) for batch in (data() if callable(data) else data)]
    return found


def task(data: Any, **options: Any) -> Task:
    return Task(name="t", function=lambda batch: batch["x"].sum(), batch_size=SIZE, data=data, **options)


def taken(feed: Feed, count: int) -> list[list[float]]:
    return [values(feed.next().fields) for _ in range(count)]


@pytest.mark.parametrize("kind", MADE)
def test_a_feed_gives_what_one_process_reads(kind: str) -> None:
    """Whatever planning or an earlier run has read; and these leave the loader as it was."""
    expected = one_process(MADE[kind]())
    made = MADE[kind]()
    given = task(made[0])
    for _ in range(2):
        assert next(map(values, given.batches())) == expected[0]  # as planning does
        feed = Feed(given, 0)
        assert taken(feed, len(expected)) == expected
        closed(feed)
    assert one_process(made) == expected


def closed(*feeds: Feed) -> None:
    """Close all feeds and wait until their threads have ended."""
    for feed in feeds:
        feed.close()
    for thread in threading.enumerate():
        if thread.name == "data-t":
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.mark.parametrize("kind", MADE)
def test_a_resumed_feed_goes_on_as_one_process(kind: str) -> None:
    """From each batch of all passes, with the state written to a file and another copy of the loader."""
    expected = one_process(MADE[kind]())
    feed = Feed(task(MADE[kind]()[0], prefetch=2), 0)
    cuts = range(len(expected)) if "worker" not in kind else (1, ROWS // SIZE, ROWS // SIZE + 2)
    states = {}
    for cut in range(len(expected)):
        states[cut] = through_a_file(feed.state())
        feed.next()
    closed(feed)
    for cut in cuts:
        again = Feed(task(MADE[kind]()[0]), 0)
        again.digest()  # reads ahead
        again.resume(states[cut])
        assert taken(again, len(expected) - cut) == expected[cut:], f"from batch {cut}"
        closed(again)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", MADE)
def test_ranks_of_one_process_do_not_share_what_changes(kind: str) -> None:
    """As with the launcher "threads": each reads for itself, one ahead of the other."""
    expected = one_process(MADE[kind]())
    given = task(MADE[kind]()[0])
    one, other = Feed(given, 0), Feed(given, 0)
    ahead = taken(one, 5)
    found = [values(other.next().fields) for _ in range(2)]
    for _ in range(len(expected) - 5):
        ahead += taken(one, 1)
        found += taken(other, 1)
    found += taken(other, 3)
    closed(one, other)
    assert ahead == found == expected


def test_each_part_hears_of_a_pass_once_and_inner_ones_first() -> None:
    """Outer ones may overrule what inner ones were told."""
    heard: list[tuple[str, int]] = []

    class Told:
        def __init__(self, name: str, **held: Any) -> None:
            self.name = name
            vars(self).update(held)

        def set_epoch(self, epoch: int) -> None:
            heard.append((self.name, epoch))

    rows = Told("rows")
    sampler = Told("sampler", dataset=rows)
    batches = Told("batches", sampler=sampler)
    set_epoch("task 't'", Told("loader", dataset=rows, sampler=sampler, batch_sampler=batches), 3)
    assert heard == [("rows", 3), ("sampler", 3), ("batches", 3), ("loader", 3)]


class Refusing(Rows):
    def set_epoch(self, epoch: int) -> None:
        raise ValueError("two epochs at most")


def shared_generators() -> None:
    workload, generator = spindle.Workload("w"), seeded()
    for name in ("a", "b"):
        loader = DataLoader(Rows(), SIZE, shuffle=True, generator=generator)
        workload.task(name, batch_size=SIZE, data=loader)(lambda batch: batch["x"].sum())


def another_loader() -> None:
    state = Feed(task(shuffled()[0]), 0).state()
    Feed(task(distributed()[0]), 0).resume(state)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a share": (
        lambda: task(DataLoader(Rows(), SIZE, sampler=DistributedSampler(Rows(), 2, 0))).first_batch(),
        r"task 't': its DistributedSampler has num_replicas=2, so it gives only one of 2 shares of the data, and the "
        r"others would never be trained on; .* use a plain sampler, or num_replicas=1, rank=0",
    ),
    "a share, of a function": (
        lambda: task(lambda: DataLoader(Rows(), SIZE, sampler=DistributedSampler(Rows(), 2, 0))).first_batch(),
        "num_replicas=2",
    ),
    "set_epoch that raises": (
        lambda: task(DataLoader(Refusing(), SIZE)).first_batch(),
        r"task 't': set_epoch\(0\) of its Refusing raised ValueError: two epochs at most; mend it",
    ),
    "one generator of two tasks": (
        shared_generators,
        r"task 'b': its data draw random numbers from the same generator as those of task 'a'",
    ),
    "a checkpoint of another loader": (another_loader, r"holds the states of 1 generators of its loader, which has 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused(case: str) -> None:
    act, words = REFUSED[case]
    with pytest.raises(WorkloadError, match=words):
        act()


def test_workers_that_do_not_hear_of_epochs_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """As in one process: they hold a copy of the data set; numbers in shared memory do reach them."""
    for rows, told in ((Epochs(), True), (Stream(), False)):
        caplog.clear()
        feed = Feed(task(DataLoader(rows, SIZE, **{**PERSISTENT, "num_workers": 1})), 0)
        taken(feed, ROWS // SIZE + 1)
        closed(feed)
        assert ("set_epoch does not" in caplog.text) == told
