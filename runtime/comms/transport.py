"""Transport: how ranks exchange tensors. One interface; gloo and NCCL processes behind it, or threads of one process.

- `start` posts all sends and receives of a transfer at once and does not wait.
- Groups are made once, by every rank, in one order. A rank that waits gives up after `timeout_s`.
- Beside NCCL, what stands in main memory goes over gloo, so that nobody waits for a GPU to read it.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.rendezvous import rendezvous

from spindle.errors import LostPeerError, RunError
from spindle.runtime.comms.backend import agreed_gpu, own_gpu
from spindle.runtime.comms.host import (
    SocketThreads,
    interface_to,
    keep_freed_memory,
    own_cores,
    threads_of_rank,
    usable_cores,
)
from spindle.runtime.comms.pulse import LONG, Pulse
from spindle.runtime.devices import Streams, gpu_count, gpu_id, streams_of

Post = tuple[int, Tensor]
"""A peer, and the tensor that goes to it or is to be filled from it. Contiguous."""

Wait = Callable[[], None]
T = TypeVar("T")


def serve_store(host: str) -> TCPStore:
    """The store through which ranks find each other, listening on `host` alone; it lives as long as it is held."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen()
    port = listener.getsockname()[1]
    return TCPStore(host, port, None, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """A store served elsewhere."""
    return TCPStore(host, port, None, is_master=False, timeout=timedelta(seconds=timeout_s))


def is_loopback(store: Store | None) -> bool:
    """Whether a store is reached over loopback, so that its ranks are all on this machine."""
    return isinstance(store, TCPStore) and ipaddress.ip_address(store.host).is_loopback


def _interface(store: Store | None) -> str | None:
    """Where gloo is to listen. By itself it takes what the machine's own name stands for: on many loopback, where ranks
    of other machines do not find it.
    """
    if is_loopback(store):
        return "lo0" if sys.platform == "darwin" else "lo"
    host = store.host if isinstance(store, TCPStore) else os.environ.get("MASTER_ADDR")
    return interface_to(host) if host else None


class Transport(Protocol):
    """What the executor asks of a transport."""

    rank: int
    num_ranks: int
    ranks_here: int
    """Ranks that share this machine's cores; all, where that is not known."""
    num_threads: int
    """That this rank computes with on a CPU: its share of them."""
    cores: Sequence[int]
    """Cores that the ranks of this machine share."""
    device: torch.device
    streams: Streams
    """In what order the device does what it is given."""
    pulse: Pulse
    """Where this rank says where it is, and whether it waits for others."""

    def make_groups(self, groups: Sequence[tuple[int, ...]], links: Sequence[tuple[int, int]] = ()) -> None:
        """Make the process groups of a program, and the links (source, target) of its messages; called once, by all
        ranks, with the same lists.
        """

    def start(self, sends: Sequence[Post], receives: Sequence[Post]) -> tuple[Wait, Wait]:
        """Post messages; functions that wait until the sends have left and the receives have arrived."""

    def all_reduce(self, values: Tensor, ranks: tuple[int, ...]) -> Wait:
        """Start to sum `values` in place over `ranks`, this one among them; a function that waits for the sum."""

    def reduce(self, values: Tensor, ranks: tuple[int, ...], owner: int) -> Wait:
        """Start to sum `values` over `ranks` into those of `owner`; what the others hold afterwards means nothing."""

    def broadcast(self, values: Tensor, ranks: tuple[int, ...], owner: int) -> Wait:
        """Start to copy `values` of `owner` to all `ranks`."""

    def all_gather(self, whole: Tensor, own: Tensor, ranks: tuple[int, ...]) -> Wait:
        """Start to fill `whole` with the parts `own` of all `ranks`, one after the other; of one dimension."""

    def reduce_scatter(self, own: Tensor, whole: Tensor, ranks: tuple[int, ...]) -> Wait:
        """Start to fill `own` with this rank's part of the sum of `whole` over `ranks`; `whole` stays as it is."""

    def close(self) -> None:
        """Leave; peers that still wait for this rank fail soon."""


class ProcessTransport:
    """Ranks as processes: NCCL where each has a GPU of its own, else gloo, which passes all through main memory."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        num_ranks: int,
        *,
        timeout_s: float = 60.0,
        device: torch.device | None = None,
        place: tuple[int, int] | None = None,
        sees_own_gpu: bool = False,
        lost_gpus: Collection[int] = (),
        pulse: Pulse | None = None,
    ) -> None:
        """Join the process group through `store` (None: from the environment, as torchrun sets it up).

        `device`: where to compute, when ranks are to share one; None takes a GPU each where there are enough, or the
        CPU. `place`: this rank's number among those of this machine, and how many these are; None: all are here, where
        the store is on loopback. `sees_own_gpu`: of the machine's GPUs this rank sees one, which no other does.
        `lost_gpus`: numbers of GPUs that no rank takes.
        """
        self.rank, self.num_ranks = rank, num_ranks
        self.pulse = pulse or Pulse()
        self.peers = Peers(self.pulse, timeout_s)
        backend = "gloo"
        if store is None:
            store, _, _ = next(rendezvous("env://", rank, num_ranks, timeout=timedelta(seconds=timeout_s)))
        if device is None:
            among = (0, 1) if sees_own_gpu else place or (rank, num_ranks)
            own = own_gpu(among, [n for n in range(gpu_count()) if n not in lost_gpus])
            if num_ranks > 1:
                own = agreed_gpu(store, rank, num_ranks, own, "" if own is None else gpu_id(own.index), timeout_s)
            device, backend = own, "gloo" if own is None else "nccl"
        self.device = device or torch.device("cpu")
        self.streams = streams_of(self.device)
        self._gloo = backend == "gloo"
        if self.device.type == "cpu":
            keep_freed_memory()
        here = place or ((rank, num_ranks) if is_loopback(store) else None)
        self.ranks_here = here[1] if here else num_ranks
        self.num_threads, self._threads_before = threads_of_rank(self.ranks_here), torch.get_num_threads()
        self.cores: Sequence[int] = usable_cores()
        if here is not None and self.device.type == "cpu" and hasattr(os, "sched_setaffinity"):
            # before gloo's threads start, which inherit it: a rank woken on a core where another computes waits 2-6 ms
            os.sched_setaffinity(0, own_cores(here, self.cores))
        if (interface := _interface(store)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        # NCCL counts from when an operation is given to the GPU, which may be steps behind
        self.timeout = timedelta(seconds=timeout_s if self._gloo else LONG * timeout_s)
        with self.peers:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=num_ranks,
                timeout=self.timeout,
                # connected at once: NCCL wants all ranks in a group's first operation, which may be a message of two
                device_id=self.device if backend == "nccl" else None,
            )
            beside = timedelta(seconds=timeout_s)
            self._beside = None if self._gloo else dist.new_group(backend="gloo", timeout=beside)
        self._socket_threads = SocketThreads()
        self._socket_threads.find()
        self._everyone = tuple(range(num_ranks))
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {self._everyone: dist.group.WORLD}
        self._links: dict[tuple[int, int], dist.ProcessGroup | None] = {}

    def make_groups(self, groups: Sequence[tuple[int, ...]], links: Sequence[tuple[int, int]] = ()) -> None:
        """Ordered `new_group` on all ranks: members-only creation hangs when their histories differ. NCCL alone needs
        links: what it does in one group it does in one order, so that a message that is late would hold up all others.
        """
        with self.peers:
            for ranks in groups:
                if ranks not in self._groups:
                    self._groups[ranks] = dist.new_group(list(ranks), timeout=self.timeout)
            for link in () if self._gloo else links:
                self._links[link] = dist.new_group(list(link), timeout=self.timeout)
        self._socket_threads.find()

    def start(self, sends: Sequence[Post], receives: Sequence[Post]) -> tuple[Wait, Wait]:
        """Post messages in one batch; within a pair of ranks they stand in the order of the transfer on both sides.
        Beside NCCL tensors in main memory go over gloo, so that their reader waits for no GPU.
        """
        if self._gloo:
            return self._start_on_host(sends, receives)
        on_gpu = self._start_on_links(*([(p, t) for p, t in posts if t.is_cuda] for posts in (sends, receives)))
        beside = [[(p, t) for p, t in posts if not t.is_cuda] for posts in (sends, receives)]
        if not any(beside):
            return on_gpu
        departed, arrived = (_both(*waits) for waits in zip(on_gpu, self._start_on_host(*beside), strict=True))
        return departed, arrived

    def _start_on_host(self, sends: Sequence[Post], receives: Sequence[Post]) -> tuple[Wait, Wait]:
        """Over gloo, which takes nothing that lies on a GPU."""
        outgoing = [(peer, tensor.cpu()) for peer, tensor in sends]
        incoming = [(peer, _place_for(tensor, _CPU)) for peer, tensor in receives]
        with self._socket_threads, self.peers:
            works = self._posted(outgoing, incoming)
        arrivals = [(tensor, arrived) for (_, tensor), (_, arrived) in zip(receives, incoming, strict=True)]
        return self._wait_for(works[: len(sends)]), self._wait_for(works[len(sends) :], arrivals)

    def _start_on_links(self, sends: Sequence[Post], receives: Sequence[Post]) -> tuple[Wait, Wait]:
        """Each link by itself, in the order of the transfer, sends apart from receives."""
        waits = []
        for operation, posts in ((dist.isend, sends), (dist.irecv, receives)):
            works: list[dist.Work] = []
            for peer in dict.fromkeys(peer for peer, _ in posts):
                link = (self.rank, peer) if operation is dist.isend else (peer, self.rank)
                group = self._links.get(link, dist.group.WORLD)
                own = [dist.P2POp(operation, tensor, peer, group=group) for to, tensor in posts if to == peer]
                with self.peers:
                    works += dist.batch_isend_irecv(own)
            waits.append(self._wait_for(works))
        return waits[0], waits[1]

    def _posted(self, outgoing: Sequence[Post], incoming: Sequence[Post]) -> list[dist.Work]:
        """As `batch_isend_irecv` posts over gloo, in half the time: messages are many and small."""
        over = self._beside or dist.group.WORLD
        assert over is not None
        works = [over.send([tensor], peer, 0) for peer, tensor in outgoing]
        return [*works, *(over.recv([tensor], peer, 0) for peer, tensor in incoming)]

    def all_reduce(self, values: Tensor, ranks: tuple[int, ...]) -> Wait:
        """Sum over a group made before; of all ranks, numbers in main memory go over gloo."""
        beside = self._beside if values.device.type == "cpu" and ranks == self._everyone else None
        group = beside or self._groups[ranks]
        shared = values if beside else self._outward(values)
        return self._waited(lambda: dist.all_reduce(shared, group=group, async_op=True), values, shared)

    def reduce(self, values: Tensor, ranks: tuple[int, ...], owner: int) -> Wait:
        """Sum to one rank of a group made before."""
        shared, group = self._outward(values), self._groups[ranks]
        return self._waited(lambda: dist.reduce(shared, owner, group=group, async_op=True), values, shared)

    def broadcast(self, values: Tensor, ranks: tuple[int, ...], owner: int) -> Wait:
        """Copy from one rank of a group made before."""
        shared, group = self._outward(values), self._groups[ranks]
        return self._waited(lambda: dist.broadcast(shared, owner, group=group, async_op=True), values, shared)

    def all_gather(self, whole: Tensor, own: Tensor, ranks: tuple[int, ...]) -> Wait:
        """Gather over a group made before."""
        place, sent, group = _place_for(whole, self._takes), self._outward(own), self._groups[ranks]
        return self._waited(lambda: _gather(place, sent, group=group, async_op=True), whole, place)

    def reduce_scatter(self, own: Tensor, whole: Tensor, ranks: tuple[int, ...]) -> Wait:
        """Sum over a group made before, a part to each."""
        place, sent, group = _place_for(own, self._takes), self._outward(whole), self._groups[ranks]
        return self._waited(lambda: _scatter(place, sent, group=group, async_op=True), own, place)

    def _waited(self, begin: Callable[[], dist.Work], values: Tensor, arrived: Tensor) -> Wait:
        threads = self._socket_threads if self._gloo else contextlib.nullcontext()
        with threads:
            with self.peers:
                work = begin()
            wait = self._wait_for([work], [(values, arrived)])

        def waited() -> None:
            with threads:
                wait()

        return waited

    def _wait_for(self, works: Sequence[dist.Work], arrivals: Sequence[tuple[Tensor, Tensor]] = ()) -> Wait:
        """Wait for all works; then copy what arrived elsewhere to where it belongs. Over NCCL the stream of this thread
        waits, not the process.
        """

        def wait() -> None:
            with self.peers:
                for work in works:
                    work.wait()
            for tensor, arrived in arrivals:
                if arrived is not tensor:
                    tensor.copy_(arrived)

        return wait

    @property
    def _takes(self) -> torch.device:
        """Where the backend takes tensors from."""
        return _CPU if self._gloo else self.device

    def _outward(self, tensor: Tensor) -> Tensor:
        """What the backend can send."""
        return tensor.to(self._takes)

    def exchanged(self, own: T) -> list[T]:
        """What each rank brings, by rank; all ranks call this together. Not for what is wanted in each step."""
        found: list[Any] = [None] * self.num_ranks
        with self.peers:
            dist.all_gather_object(found, own, group=self._beside)
        return found

    def close(self) -> None:
        """Tear the process group down: peers in a collective with this rank fail within milliseconds. While an error is
        on its way NCCL is not let finish what peers may never answer.
        """
        if dist.is_initialized():
            if self._gloo or sys.exception() is None:
                dist.destroy_process_group()
            else:
                _abort_process_group()
        if hasattr(os, "sched_setaffinity"):  # the next run of this process shares them out anew
            os.sched_setaffinity(0, self.cores)
        torch.set_num_threads(self._threads_before)


_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # which torch calls deprecated from 2.13 on
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def sum_over_all(values: Tensor, transport: Transport) -> None:
    """Sum `values` in place over all ranks, which call this together, and wait for the sum."""
    if transport.num_ranks > 1:
        transport.all_reduce(values, tuple(range(transport.num_ranks)))()


_CPU = torch.device("cpu")


def _place_for(tensor: Tensor, device: torch.device) -> Tensor:
    """Where a backend that takes tensors from a device can receive what belongs into `tensor`."""
    return tensor if tensor.device == device else torch.empty_like(tensor, device=device)


def _both(one: Wait, other: Wait) -> Wait:
    def wait() -> None:
        one()
        other()

    return wait


class Peers:
    """While entered, this rank waits for others; what goes wrong with them meanwhile is a LostPeerError."""

    def __init__(self, pulse: Pulse, timeout_s: float) -> None:
        self._pulse, self._timeout_s = pulse, timeout_s

    def __enter__(self) -> None:
        self._pulse.wait(True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._pulse.wait(False)
        elif isinstance(error, RuntimeError) and (reason := self._lost(error)):
            raise LostPeerError(reason) from error  # the backend's own words are its cause

    def _lost(self, error: RuntimeError) -> str:
        """Nothing for an error that is not of peers: of the size of a tensor, for instance."""
        text = str(error).lower()
        if any(sign in text for sign in ("timed out", "timeout")):
            return f"a rank that it waits for did not come within {self._timeout_s:g} s"
        if isinstance(error, dist.DistError) or any(sign in text for sign in _GONE):
            return "a rank that it waits for is gone"
        return ""


_GONE = ("connection closed", "connection reset", "connection refused", "connection was", "broken pipe", "socket")


class _Exchange:
    """What all threads of a thread transport share: mail by sender, receiver and number, and who has left."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.mail: dict[tuple[int, int, int], Tensor] = {}
        self.gone: set[int] = set()
        self.parts: dict[tuple[tuple[int, ...], int, int], Tensor] = {}
        self.taken: Counter[tuple[tuple[int, ...], int]] = Counter()


class ThreadTransport:
    """Ranks as threads of one process: nothing to start, and every failure in one place. For tests, and to debug."""

    device = torch.device("cpu")
    make_streams: Callable[[torch.device], Streams] = Streams

    def __init__(self, shared: _Exchange, rank: int, num_ranks: int, *, timeout_s: float = 60.0) -> None:
        """Use `connect`."""
        self.rank, self.num_ranks, self.ranks_here = rank, num_ranks, num_ranks
        self.num_threads, self._threads_before = threads_of_rank(num_ranks), torch.get_num_threads()
        self.cores: Sequence[int] = usable_cores()
        self._shared, self._timeout_s = shared, timeout_s
        self.streams, self.pulse = self.make_streams(self.device), Pulse()
        self._sent, self._expected = Counter[int](), Counter[int]()
        self._reduced = Counter[tuple[int, ...]]()

    @classmethod
    def connect(cls, num_ranks: int, *, timeout_s: float = 60.0) -> "list[ThreadTransport]":
        """Transports of all ranks, connected to each other."""
        shared = _Exchange()
        return [cls(shared, rank, num_ranks, timeout_s=timeout_s) for rank in range(num_ranks)]

    def make_groups(self, groups: Sequence[tuple[int, ...]], links: Sequence[tuple[int, int]] = ()) -> None:
        """Threads need none."""

    def start(self, sends: Sequence[Post], receives: Sequence[Post]) -> tuple[Wait, Wait]:
        """Copies go into the peers' mail at once."""
        with self._shared.changed:
            for peer, tensor in sends:
                self._shared.mail[self.rank, peer, self._sent[peer]] = tensor.clone()
                self._sent[peer] += 1
            self._shared.changed.notify_all()
        awaited = []
        for peer, tensor in receives:
            awaited.append((peer, self._expected[peer], tensor))
            self._expected[peer] += 1

        def arrive() -> None:
            for peer, number, tensor in awaited:
                self._receive(peer, number, tensor)

        return (lambda: None), arrive

    def _receive(self, peer: int, number: int, tensor: Tensor) -> None:
        key, shared = (peer, self.rank, number), self._shared
        self.pulse.wait(True)
        with shared.changed:
            shared.changed.wait_for(lambda: key in shared.mail or shared.gone, self._timeout_s)
            sent = shared.mail.pop(key, None)
        if sent is None:
            raise LostPeerError(f"nothing arrived from rank {peer}: {self._why()}")
        self.pulse.wait(False)
        if sent.shape != tensor.shape or sent.dtype != tensor.dtype:
            raise RunError(
                f"rank {peer} sent {tuple(sent.shape)} {sent.dtype}, not {tuple(tensor.shape)} {tensor.dtype}"
            )
        tensor.copy_(sent)

    def all_reduce(self, values: Tensor, ranks: tuple[int, ...]) -> Wait:
        """Sum in the order of the ranks, so that all get the same bits."""
        return self._together(values, values, ranks, lambda parts: torch.stack(parts).sum(0))

    def reduce(self, values: Tensor, ranks: tuple[int, ...], owner: int) -> Wait:
        """As a sum for all, but nobody else is to rely on it."""
        mine = self.rank == owner
        return self._together(
            values, values, ranks, lambda p: torch.stack(p).sum(0) if mine else torch.full_like(p[0], torch.nan)
        )

    def broadcast(self, values: Tensor, ranks: tuple[int, ...], owner: int) -> Wait:
        """All come, and take the owner's."""
        return self._together(values, values, ranks, lambda parts: parts[ranks.index(owner)])

    def all_gather(self, whole: Tensor, own: Tensor, ranks: tuple[int, ...]) -> Wait:
        """In the order of the ranks."""
        return self._together(own, whole, ranks, torch.cat)

    def reduce_scatter(self, own: Tensor, whole: Tensor, ranks: tuple[int, ...]) -> Wait:
        """All sum, and take their own part."""
        index = ranks.index(self.rank)
        return self._together(whole, own, ranks, lambda parts: torch.stack(parts).sum(0).chunk(len(ranks))[index])

    def _together(
        self,
        values: Tensor,
        place: Tensor,
        ranks: tuple[int, ...],
        made_of: Callable[[list[Tensor]], Tensor],
    ) -> Wait:
        """What is made of the `values` of all ranks goes to `place`."""
        shared = self._shared
        number = self._reduced[ranks] = self._reduced[ranks] + 1
        with shared.changed:
            shared.parts[ranks, number, self.rank] = values.clone()
            shared.changed.notify_all()

        def arrive() -> None:
            keys = [(ranks, number, rank) for rank in ranks]
            self.pulse.wait(True)
            with shared.changed:
                shared.changed.wait_for(lambda: all(k in shared.parts for k in keys) or shared.gone, self._timeout_s)
                missing = [key[2] for key in keys if key not in shared.parts]
                if missing:
                    raise LostPeerError(
                        f"ranks {missing} did not come to a reduction over ranks {ranks}: {self._why()}"
                    )
                parts = [shared.parts[key] for key in keys]
                shared.taken[ranks, number] += 1
                if shared.taken[ranks, number] == len(ranks):
                    del shared.taken[ranks, number]
                    for key in keys:
                        del shared.parts[key]
            self.pulse.wait(False)
            place.copy_(made_of(parts))

        return arrive

    def _why(self) -> str:
        return "it left" if self._shared.gone else f"not in {self._timeout_s:g} s"

    def close(self) -> None:
        """Say so, so that nobody waits for a rank that is gone."""
        with self._shared.changed:
            self._shared.gone.add(self.rank)
            self._shared.changed.notify_all()
        torch.set_num_threads(self._threads_before)  # MKL has one number for all threads of a process
