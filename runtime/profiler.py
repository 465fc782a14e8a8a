"""Profiler: a workload and what is known already in; a Profile with all that was missing out.

All ranks measure the same thing at once, so that cores, caches and memory are as busy as in a run. What is known is not
measured again: a profile goes on where it was interrupted, and serves other workloads with layers in common.
"""

import contextlib
import functools
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from spindle.capture.codes import Captured
from spindle.contract import contract
from spindle.errors import ProfileError, SpindleWarning
from spindle.profile import LinkEntry, LinkOperation, LoadEntry, Profile
from spindle.runtime.launch.crew import threads_of_rank
from spindle.runtime.launch.processes import ProcessCrew
from spindle.runtime.measure import Bench, BenchJob, Timing, spread, steady
from spindle.runtime.rounds import kinds_of, other_work, room_bytes, rounds_of
from spindle.runtime.worker import OptimizerFactory
from spindle.workload import Batch, Task, Workload

MESSAGE_BYTES = tuple(4 << shift for shift in range(10, 24, 2))  # 4 KiB to 16 MiB
TIMEOUT_S = 120.0
KEEP_S = 1.0

Progress = Callable[[int, int], None]
Keep = Callable[[Profile], None]


@dataclass(frozen=True, slots=True)
class Todo:
    """One entry to measure: a method of Bench and its arguments; `samples` of a batch that is loaded."""

    method: str
    arguments: tuple[Any, ...]
    samples: int = 0

    def added_to(self, profile: Profile, timings: Sequence[Timing]) -> Profile:
        """The profile with the ranks' timings as one more entry: their mean, of those that took part; what several
        ranks share takes as long as the slowest of them.
        """
        took = [timing for timing in timings if timing.seconds]
        if self.method == "load":
            return replace(profile, loads=(*profile.loads, self._load_entry(took)))
        return replace(profile, links=(*profile.links, self._link_entry(took)))

    def _load_entry(self, took: Sequence[Timing]) -> LoadEntry:
        return LoadEntry(
            task=self.arguments[0],
            batch_size=self.samples,
            seconds=statistics.fmean(timing.seconds for timing in took),
            spread=statistics.fmean(timing.spread for timing in took),
        )

    def _link_entry(self, took: Sequence[Timing]) -> LinkEntry:
        """Of a sum from when the last rank had begun until the last had ended."""
        together = list(zip(*(timing.runs for timing in took), strict=True))
        if self.method == "transfer":
            seconds = [(arrived - began) + (posted - began) for (began, posted), (arrived, _) in together]
        else:
            seconds = [max(end for _, end in runs) - max(start for start, _ in runs) for runs in together]
        members, num_bytes = (2, *self.arguments)[-2:]
        return LinkEntry(
            operation=cast(LinkOperation, self.method),
            level="intra_node",
            members=members,
            num_bytes=num_bytes,
            seconds=steady(seconds),
            spread=spread(seconds),
        )


def measure_profile(
    workload: Workload,
    captured: Captured,
    *,
    num_devices: int,
    num_ranks: int = 1,
    most_devices: int | None = None,
    known: Profile | None = None,
    optimizer: OptimizerFactory | None = None,
    seconds_per_entry: float = 0.3,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Profile:
    """`known` and what it lacks: each operator kind on counts up to `num_devices` that divide its batch, a batch of
    each task, and messages between `num_ranks` ranks.

    `num_ranks` processes of this machine measure at once. `most_devices`: counts go up to there instead, as smaller
    local batches. `progress(done, total)` tells of entries; `keep(profile)` is called between rounds of layers, later
    about once a second, and at the end. Raises ProfileError when `known` is of another device or measured otherwise.
    """
    here = _conditions(captured, num_ranks, optimizer)
    found = _merged(known, here)
    metagraph = contract(captured.graph)
    kinds = kinds_of(metagraph)
    rounds = list(rounds_of(metagraph, kinds, found, most_devices or num_devices, num_ranks, room_bytes(num_ranks)))
    todo = list(_missing(workload.tasks.values(), found, num_ranks))
    total = sum(len(item.new) for item in rounds) + len(todo)
    if not total:
        return found
    job = BenchJob(
        captured=captured,
        tasks={name: replace(task, function=_stayed_behind) for name, task in workload.tasks.items()},
        batches={name: task.first_batch() for name, task in workload.tasks.items()},
        chains={name: kind.names for name, kind in kinds.items()},
        optimizer=optimizer,
        num_threads=threads_of_rank(num_ranks),
        seconds=seconds_per_entry,
    )
    steps = _Steps(total, progress, keep)
    with contextlib.closing(ProcessCrew([job] * num_ranks, timeout_s=TIMEOUT_S, worker=Bench)) as crew:
        for item in rounds:
            entries = item.measured(
                crew, seconds_per_entry * len(item.new), functools.partial(steps.within, len(item.new))
            )
            found = replace(found, entries=(*found.entries, *entries))
            steps.done(found, len(item.new))
        crew.call("prepare", other_work(kinds, num_ranks), 0)
        for one in todo:
            found = one.added_to(found, crew.call(one.method, *one.arguments))
            steps.done(found, 1)
    return found


class _Steps:
    """Tells how far a profile is, and has it kept about once a second and at the end."""

    def __init__(self, total: int, progress: Progress | None, keep: Keep | None) -> None:
        self.count, self.total, self.progress, self.keep = 0, total, progress, keep
        self.kept_s = time.monotonic()

    def within(self, entries: int, share: float) -> None:
        """So much of the next entries is done."""
        if self.progress is not None:
            self.progress(self.count + int(share * entries), self.total)

    def done(self, found: Profile, entries: int) -> None:
        """The next entries are."""
        self.count += entries
        if self.keep is not None and (time.monotonic() - self.kept_s > KEEP_S or self.count == self.total):
            self.keep(found)
            self.kept_s = time.monotonic()
        if self.progress is not None:
            self.progress(self.count, self.total)


def ranks_here(num_devices: int) -> int:
    """Ranks that measure at once for a cluster of so many devices: those of this machine that take part in a run."""
    gpus = torch.cuda.device_count()
    return min(num_devices, gpus) if gpus else num_devices


def _conditions(captured: Captured, num_ranks: int, optimizer: OptimizerFactory | None) -> Profile:
    """An empty profile that names this hardware, the versions and how it will measure."""
    threads = threads_of_rank(num_ranks)
    versions = {
        "dtype": captured.precision,
        "python": platform.python_version(),
        "ranks": str(num_ranks),
        "torch": torch.__version__,
    }
    if threads is not None:
        versions["threads"] = str(threads)
    if optimizer is not None:
        versions["optimizer"] = type(optimizer([torch.nn.Parameter(torch.zeros(1))])).__name__
    return Profile(device_name(), tuple(sorted(versions.items())))


def device_name() -> str:
    """What this machine computes on, as profiles name it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"cpu {model}"


def _merged(known: Profile | None, here: Profile) -> Profile:
    if known is None:
        return here
    if unlike := known.unlike(here):
        raise ProfileError(
            f"the profile was measured on other terms than it would be here: {'; '.join(unlike)}. Give another output "
            "file, or measure as it was"
        )
    then, now = dict(known.versions), dict(here.versions)
    if then.get("torch", now["torch"]) != now["torch"]:
        warnings.warn(
            f"the profile was measured with torch {then['torch']}, what it lacks will be with {now['torch']}; measure "
            "all into a new file to compare like with like",
            SpindleWarning,
            stacklevel=3,
        )
    dtypes = sorted({*then.get("dtype", now["dtype"]).split(", "), now["dtype"]})
    versions = {**then, **now, "dtype": ", ".join(dtypes)}
    return replace(known, versions=tuple(sorted(versions.items())))


def _stayed_behind(batch: Batch) -> torch.Tensor:
    raise AssertionError("loaders are measured without their tasks' functions, and the modules these bring along")


def _missing(tasks: Iterable[Task], known: Profile, num_ranks: int) -> Iterator[Todo]:
    for task in tasks:
        if (task.name, task.batch_size) not in known.load_s:
            yield Todo("load", (task.name,), task.batch_size)
    groups = sorted({*(2**i for i in range(1, num_ranks.bit_length())), num_ranks} - {1})
    for num_bytes in MESSAGE_BYTES if num_ranks > 1 else ():
        for members in (count for count in groups if count <= num_ranks):
            if ("all_reduce", "intra_node", members, num_bytes) not in known.link_keys:
                yield Todo("all_reduce", (members, num_bytes))
        if ("transfer", "intra_node", 2, num_bytes) not in known.link_keys:
            yield Todo("transfer", (num_bytes,))
