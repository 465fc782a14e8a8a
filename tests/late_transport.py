"""A transport and a device that are as late as GPUs may be: what is used before it was waited for is wrong.

- What is to be received holds NaN until it is waited for; a send reads its buffer only then.
- A sum, and what is gathered, holds NaN from its start until it is waited for. What is gathered, or summed into another
  tensor, is read then too.
- A copy that a stream was given holds NaN until somebody waits for it: it is made at the last moment that waits allow,
  or, with a seed, at any moment that they allow. It reads its source then.
- Memory of one stream that another one reads has to be kept; the end of `late` tells of what was not.

Not covered: what is computed is computed at once, so that nothing notices a stream that copies what is not computed
yet; copies out are refused on any stream but the one that computes. Memory of copies is not used again early: that it
was kept is counted. Streams of NCCL are not there; each message and each sum is by itself.
"""

import contextlib
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from spindle.errors import RunError
from spindle.runtime.comms.transport import Post, ThreadTransport, Wait
from spindle.runtime.devices import GpuStreams, Streams
from spindle.runtime.launch import worker_group as workers


class LateTransport(ThreadTransport):
    """Ranks as threads, each message as late as its waits allow."""

    def make_groups(self, groups: Sequence[tuple[int, ...]], links: Sequence[tuple[int, int]] = ()) -> None:
        """See Transport."""
        super().make_groups(groups, links)
        self._links = set(links)

    def start(self, sends: Sequence[Post], receives: Sequence[Post]) -> tuple[Wait, Wait]:
        """The mail leads to the tensors themselves, which the sender has to hold until they have left."""
        shared, keys = self._shared, []
        used = {(self.rank, peer) for peer, _ in sends} | {(peer, self.rank) for peer, _ in receives}
        assert used <= self._links, f"messages pass where no link was made: {sorted(used - self._links)}"
        with shared.changed:
            for peer, tensor in sends:
                keys.append((self.rank, peer, self._sent[peer]))
                shared.mail[keys[-1]] = weakref.ref(tensor)  # type: ignore[assignment]
                self._sent[peer] += 1
            shared.changed.notify_all()
        for _, tensor in receives:
            spoil(tensor)
        _, arrive = super().start([], receives)

        def depart() -> None:
            with shared.changed:
                if not shared.changed.wait_for(
                    lambda: shared.gone or not any(key in shared.mail for key in keys), self._timeout_s
                ):
                    raise RunError(f"nobody took what rank {self.rank} sent")

        return depart, arrive

    def _receive(self, peer: int, number: int, tensor: Tensor) -> None:
        key, shared = (peer, self.rank, number), self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: key in shared.mail or shared.gone, self._timeout_s)
            if key not in shared.mail:
                raise RunError(f"nothing arrived from rank {peer}: {self._why()}")
            sent = shared.mail.pop(key)()  # type: ignore[operator]
            if sent is None:  # nobody held it until it had left
                spoil(tensor)
            else:
                tensor.copy_(sent)
            shared.changed.notify_all()

    def _together(
        self,
        values: Tensor,
        place: Tensor,
        ranks: tuple[int, ...],
        made_of: Callable[[list[Tensor]], Tensor],
    ) -> Wait:
        arrive, shared = super()._together(values, place, ranks, made_of), self._shared
        number = self._reduced[ranks]
        keys = {(ranks, number, rank) for rank in ranks}
        if values is not place:
            with shared.changed:
                shared.parts[ranks, number, self.rank] = values
        spoil(place)

        def arrive_late() -> None:
            with shared.changed:
                shared.changed.wait_for(lambda: shared.parts.keys() >= keys or shared.gone, self._timeout_s)
                if (ranks, number, -1) not in shared.parts and shared.parts.keys() >= keys:
                    shared.parts.update({key: shared.parts[key].clone() for key in keys})  # read once, for all
                    shared.parts[ranks, number, -1] = place
            arrive()

        return arrive_late


@dataclass
class LateStream:
    """What a stream was given and has not done yet; `given`: how much in all. One that computes does so at once: what
    waits in it are copies to main memory, of what was there when they were given.
    """

    computes: bool = False
    given: int = 0
    left: "deque[Callable[[], None]]" = field(default_factory=deque)

    @property
    def done(self) -> int:
        """How much it has done."""
        return self.given - len(self.left)

    def give(self, work: Callable[[], None]) -> None:
        """Give it something to do."""
        self.left.append(work)
        self.given += 1

    def go_on(self, until: int) -> None:
        """Do what was given first."""
        while self.done < until:
            self.left.popleft()()


@dataclass(frozen=True, eq=False)
class LateMark:
    """A moment of a stream."""

    stream: LateStream
    at: int
    at_s: float


class LateDriver:
    """A GPU whose streams do nothing before they have to, or when a seed says so."""

    def __init__(self, seed: int | None = None) -> None:
        self._draw = None if seed is None else random.Random(seed)
        self._computing, self._others = LateStream(computes=True), list[LateStream]()
        self._lock = threading.RLock()
        self._entered = threading.local()
        self._strangers: set[str] = set()  # threads that use the first device of the machine
        self._made, self._kept = (
            set[int](),
            list[Tensor](),
        )  # memory of other streams, by id
        self._read = 0  # waits of the stream that computes, one for each copy

    @contextlib.contextmanager
    def _called(self) -> Iterator[None]:
        with self._lock:
            if not hasattr(self._entered, "is_there"):
                self._strangers.add(threading.current_thread().name)
            for stream in (self._computing, *self._others) if self._draw is not None else ():
                stream.go_on(stream.done + self._draw.randint(0, len(stream.left)))  # type: ignore[union-attr]
            yield

    def enter(self) -> None:
        """See Driver."""
        self._entered.is_there = True

    def computing(self) -> LateStream:
        """See Driver."""
        return self._computing

    def new_stream(self) -> LateStream:
        """See Driver."""
        self._others.append(LateStream())
        return self._others[-1]

    def staged(self, tensor: Tensor) -> Tensor:
        """See Driver."""
        with self._called():
            return tensor.detach().clone()

    def copy(self, source: Tensor, stream: LateStream, *, to_host: bool = False) -> Tensor:
        """See Driver."""
        with self._called():
            assert stream.computes or not to_host, "what is computed is copied beside it, without a wait"
            read, target = source.clone() if stream.computes else source, torch.empty_like(source)
            spoil(target)
            stream.give(lambda: fill(target, read))
            if not stream.computes:
                self._made.add(id(target))
            return target

    def keep(self, tensor: Tensor, stream: LateStream) -> None:
        """See Driver."""
        with self._called():
            assert stream.computes, "memory is kept for another stream than the one that reads it"
            self._made.remove(id(tensor))
            self._kept.append(tensor)  # so that no other gets its id

    def mark(self, stream: LateStream) -> LateMark:
        """See Driver."""
        with self._called():
            stream.give(lambda: None)  # it has not come there before somebody waits
            return LateMark(stream, stream.given, time.perf_counter())

    def wait(self, stream: LateStream, mark: LateMark) -> None:
        """See Driver."""
        with self._called():
            assert stream.computes, "no other stream waits for one"
            self._read += 1
            mark.stream.go_on(mark.at)

    def settle(self, mark: LateMark) -> None:
        """See Driver."""
        with self._called():
            mark.stream.go_on(mark.at)

    def passed(self, mark: LateMark) -> bool:
        """See Driver."""
        with self._called():
            return mark.stream.done >= mark.at

    def between_s(self, begun: LateMark, ended: LateMark) -> float:
        """See Driver."""
        assert self.passed(begun), "the device has not come to a moment whose time is asked"
        assert self.passed(ended), "the device has not come to a moment whose time is asked"
        return ended.at_s - begun.at_s

    def held_bytes(self, *, most: bool) -> int:
        """See Driver."""
        del most
        return 1

    def complain(self) -> None:
        """Raise AssertionError where memory was read that may be used again, or a thread is on another device."""
        assert not self._strangers, f"threads {self._strangers} use the first device of the machine"
        assert self._read == len(self._kept), f"{self._read - len(self._kept)} copies were read and not kept"


def fill(target: Tensor, values: Tensor) -> None:
    """Copy a tensor into another without the watching mode seeing it."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        target.copy_(values)


def spoil(tensor: Tensor) -> None:
    """What nobody may read yet."""
    with torch.no_grad():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


@contextlib.contextmanager
def late(seed: int | None = None) -> Iterator[None]:
    """While open, ranks that are threads talk through late transports and compute on late devices."""
    drivers: list[LateDriver] = []

    def make_streams(device: torch.device) -> Streams:
        drivers.append(LateDriver(None if seed is None else seed + len(drivers)))
        return GpuStreams(device, drivers[-1])

    made = type("LateRank", (LateTransport,), {"make_streams": staticmethod(make_streams)})
    with mock.patch.object(workers, "ThreadTransport", made):
        yield
    for driver in drivers:
        driver.complain()
