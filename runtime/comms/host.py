"""Host: what a rank asks of the machine that it runs on: its cores, its memory, who may take a core from it, and the
network interface that leads to others.
"""

import contextlib
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MADV_HUGEPAGE = -1, -3, 14  # of malloc.h and mman.h
MAPPED_APART = 32 * 2**20  # from here on malloc maps memory of its own for a tensor: the most it takes
MARKED = 60 * MAPPED_APART  # of the heap; its free end is kept up to 2 GiB
PAGE = 4096
SIOCGIFADDR = 0x8915  # of linux/sockios.h


def usable_cores() -> list[int]:
    """Cores on which this process may run: fewer than there are where a job has a part of a machine."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def own_cores(place: tuple[int, int], cores: Sequence[int]) -> list[int]:
    """The share of `cores` of one rank, neighbors of each other; all where there are fewer than ranks.

    >>> own_cores((1, 2), [0, 1, 2, 3]), own_cores((0, 2), [5])
    ([2, 3], [5])
    """
    number, num_ranks = place
    share = len(cores) // num_ranks
    return sorted(cores)[number * share : (number + 1) * share] if share else sorted(cores)


@contextlib.contextmanager
def running_on(cores: Sequence[int]) -> Iterator[None]:
    """Let this thread run on any of these cores, and so for ever the threads and processes that it starts meanwhile."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def threads_of_rank(ranks_here: int) -> int:
    """Threads that each of `ranks_here` ranks on this machine computes with on its CPU: its share of the cores that
    this process may use, which is not one of them yet.
    """
    return max(1, len(usable_cores()) // ranks_here)


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next step, in large pages; whether this system's can.

    By itself glibc gives it back, or not, by what was freed first: then thousands of pages are faulted in again each
    step, which made steps of one model 84 or 119 ms long.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    kept = libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(M_MMAP_THRESHOLD, MAPPED_APART)
    if kept and hasattr(libc, "madvise"):
        _prefer_large_pages(libc)
    return bool(kept)


def _prefer_large_pages(libc: ctypes.CDLL) -> None:
    """Have the heap grow once and mark it: it is made of pages of 2 MiB then, where the system gives them to who asks,
    and an optimizer's step over all parameters is up to a tenth shorter. What is never used takes no memory.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes, libc.madvise.argtypes = (ctypes.c_void_p,), (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = MAPPED_APART - 2**20
    blocks = [block for block in (libc.malloc(size) for _ in range(MARKED // size)) if block]
    begin, end = -(-min(blocks, default=0) // PAGE) * PAGE, (max(blocks, default=0) + size) // PAGE * PAGE
    if end - begin <= MARKED:  # side by side: the heap alone
        libc.madvise(begin, end - begin, MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)


class SocketThreads:
    """gloo's threads that watch its sockets. While this is entered they wake up without taking the core from a rank.

    Such a thread passes by a connection whose lock somebody holds, and looks again at once. Where it wakes up on the
    core of the one that holds it, it spins there until its time slice ends: 3 ms, in one of six exchanges and in most
    sums (docs/log.md). Elsewhere than on Linux nothing happens.
    """

    def __init__(self) -> None:
        self._threads: list[int] = []

    def find(self) -> None:
        """Look for the threads of all groups made so far."""
        self._threads = []
        if sys.platform != "linux":
            return
        with contextlib.suppress(OSError):  # none at all, where a sandbox forbids it
            tasks = Path("/proc/self/task").iterdir()
            found = [int(task.name) for task in tasks if (task / "comm").read_text().strip() == "gloo_tcp_loop"]
            ordinary = [thread for thread in found if os.sched_getscheduler(thread) == os.SCHED_OTHER]
            for policy in (os.SCHED_BATCH, os.SCHED_OTHER):
                _schedule(ordinary, policy)
            self._threads = ordinary

    def __enter__(self) -> None:
        if sys.platform == "linux":
            _schedule(self._threads, os.SCHED_BATCH)

    def __exit__(self, *error: object) -> None:
        if sys.platform == "linux" and self._threads:
            _schedule(self._threads, os.SCHED_OTHER)
            os.sched_yield()  # one that woke up meanwhile works now


def _schedule(threads: Sequence[int], policy: int) -> None:
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):  # of a group that is no more
            os.sched_setscheduler(thread, policy, os.sched_param(0))


def interface_to(host: str) -> str | None:
    """The network interface that leads to a host, or has its address; None where that is not known.

    >>> interface_to("127.0.0.1") in ("lo", None)
    True
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return interfaces().get(probe.getsockname()[0])
    return None


def interfaces() -> dict[str, str]:
    """Names of this machine's network interfaces by IPv4 address (Linux tells it; elsewhere none)."""
    if sys.platform != "linux":
        return {}
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[socket.inet_ntoa(answer[20:24])] = name
    return found
