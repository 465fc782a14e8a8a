"""What a run and its ranks hold: memory, open files, threads, processes, names and files; and what of it has grown.

- Ranks are compared within one life, which is an attempt of the run: the median of the second eighth of its samples
  with that of the last eighth. So is the driver, whose losses of each step are a part of its result.
- The driver is compared between two legs too, when it has no ranks, in the same way over the whole run.
- Memory is resident memory. Its tolerance is below the 33 MB by which a rank once grew in 4,000 steps, and above what
  large pages take as they are touched one by one (benchmarks/results/soak.md).
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

RANK_BYTES = 16 * 2**20  # a life of a rank: what malloc holds stays where it is, but begins other pages of 2 MiB
DRIVER_BYTES = 24 * 2**20  # of the whole run
LEG_DRIVER_BYTES = 8 * 2**20  # within a run, of which it keeps the losses of all steps
MORE_FILES = 4
MORE_THREADS = 1
SHORTEST_LIFE = 8  # samples
SHOWN_EVERY = 5


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds."""

    memory_bytes: int
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What is held after a step of a run. `between`: two legs, so without ranks. `ranks` are of the present attempt."""

    step: int
    seconds: float
    attempt: int
    between: bool
    driver: Held
    ranks: tuple[Held, ...]
    children: int
    names: int  # in /dev/shm
    files: int  # temporary ones


def usage(step: int, folder: Path, began_s: float, *, attempt: int = 0, between: bool = False) -> Usage:
    """Count what is held now. `folder`: of the run, with its temporary files below."""
    me = psutil.Process()
    ranks = sorted((c for c in multiprocessing.active_children() if c.name.startswith("spindle-rank")), key=_name)
    return Usage(
        step,
        time.monotonic() - began_s,
        attempt,
        between,
        _held(me),
        tuple(_held(psutil.Process(rank.pid)) for rank in ranks if rank.pid),
        sum(child.status() != psutil.STATUS_ZOMBIE for child in me.children(recursive=True)),
        len(os.listdir("/dev/shm")),
        sum(1 for _ in (folder / "temporary").rglob("*")),
    )


def _name(child: "multiprocessing.process.BaseProcess") -> str:
    return child.name


def _held(process: psutil.Process) -> Held:
    with process.oneshot():
        return Held(process.memory_info().rss, process.num_fds(), process.num_threads())


def grown(usages: Sequence[Usage]) -> list[str]:
    """A sentence for each thing that grew by more than is tolerated."""
    between = [each for each in usages if each.between]
    said = []
    if len(between) >= SHORTEST_LIFE:
        what = [each.driver for each in between]
        said += _more("the driver", between, what, DRIVER_BYTES)
        for name, values in (
            ("child processes", [each.children for each in between]),
            ("names in /dev/shm", [each.names for each in between]),
            ("temporary files", [each.files for each in between]),
        ):
            said += _above(name, between, values, 0)
    for life in _lives(usages):
        said += _more("the driver", life, [each.driver for each in life], LEG_DRIVER_BYTES)
        for rank in range(len(life[0].ranks)):
            said += _more(f"rank {rank}", life, [each.ranks[rank] for each in life], RANK_BYTES)
    return said


def _lives(usages: Sequence[Usage]) -> list[list[Usage]]:
    """Samples of each attempt that is long enough."""
    lives: dict[int, list[Usage]] = {}
    for each in usages:
        if not each.between and each.ranks:
            lives.setdefault(each.attempt, []).append(each)
    return [life for life in lives.values() if len(life) >= SHORTEST_LIFE]


def _more(who: str, usages: Sequence[Usage], held: Sequence[Held], tolerated_bytes: int) -> list[str]:
    return [
        *_above(f"memory of {who} (MiB)", usages, [e.memory_bytes / 2**20 for e in held], tolerated_bytes / 2**20),
        *_above(f"open files of {who}", usages, [e.files for e in held], MORE_FILES),
        *_above(f"threads of {who}", usages, [e.threads for e in held], MORE_THREADS),
    ]


def _above(what: str, usages: Sequence[Usage], values: Sequence[float], tolerated: float) -> list[str]:
    """Compares medians of the second and of the last eighth of the samples."""
    size = max(1, len(values) // 8)
    before, after = statistics.median(values[size : 2 * size]), statistics.median(values[-size:])
    if after - before <= tolerated:
        return []
    steps = f"from step {usages[size].step} to {usages[-1].step}"
    return [f"{what}: {before:.4g} became {after:.4g} {steps}; tolerated are {tolerated:g} more"]


def table_of(usages: Sequence[Usage]) -> str:
    """The samples as a page has them: all between legs, and some of each attempt."""
    head = (
        "| step | s | driver MiB | driver files | driver threads | ranks MiB | ranks' files | ranks' threads "
        "| children | /dev/shm | temporary files |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    shown = [each for each in usages if each.between or each.step % (SHOWN_EVERY * 100) == 0]
    return "\n".join((head, *map(_row, shown)))


def _row(each: Usage) -> str:
    ranks = [
        " ".join(f"{rank.memory_bytes / 2**20:.1f}" for rank in each.ranks),
        " ".join(str(rank.files) for rank in each.ranks),
        " ".join(str(rank.threads) for rank in each.ranks),
    ]
    driver = [f"{each.driver.memory_bytes / 2**20:.1f}", str(each.driver.files), str(each.driver.threads)]
    more = [str(each.children), str(each.names), str(each.files)]
    return f"| {' | '.join([str(each.step), f'{each.seconds:.0f}', *driver, *ranks, *more])} |"
