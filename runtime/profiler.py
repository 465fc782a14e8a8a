"""Profiler: a workload and what is known already in; a Profile with all that was missing out.

All ranks measure the same thing at once, so that cores, caches and memory are as busy as in a run. What is known is not
measured again: a profile goes on where it was interrupted, and serves other workloads with layers in common.
"""

import contextlib
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from spindle.capture.codes import Captured
from spindle.contract import contract
from spindle.errors import ProfileError, SpindleWarning
from spindle.metagraph import MetaGraph
from spindle.profile import LinkEntry, LinkOperation, LoadEntry, Profile, ProfileEntry
from spindle.runtime.launch.crew import Crew, threads_of_rank
from spindle.runtime.launch.processes import ProcessCrew
from spindle.runtime.measure import Bench, BenchJob, Timing, spread, steady
from spindle.runtime.worker import OptimizerFactory
from spindle.workload import Batch, Task, Workload

CHAIN = 4  # layers of a kind that run one after the other
MANY = 6  # a kind with more valid counts is measured at powers of two and its largest
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
        took = [timing for timing in timings if timing.forward_s]
        if self.method == "operator":
            return replace(profile, entries=(*profile.entries, self._operator_entry(took)))
        if self.method == "load":
            return replace(profile, loads=(*profile.loads, self._load_entry(took)))
        return replace(profile, links=(*profile.links, self._link_entry(took)))

    def _operator_entry(self, took: Sequence[Timing]) -> ProfileEntry:
        names = ("forward_s", "backward_s", "bare_forward_s", "update_s", "spread")
        mean = {name: statistics.fmean(getattr(t, name) for t in took) for name in names}
        kind, count = self.arguments
        if count > 1 and mean["backward_s"]:
            together = list(zip(*(timing.runs for timing in took[:count]), strict=False))
            for index, name in enumerate(names[:3]):
                mean[name] = steady([max(run[index] for run in runs) for runs in together])
        return ProfileEntry(kind=kind, num_devices=count, **mean)

    def _load_entry(self, took: Sequence[Timing]) -> LoadEntry:
        return LoadEntry(
            task=self.arguments[0],
            batch_size=self.samples,
            seconds=statistics.fmean(timing.forward_s for timing in took),
            spread=statistics.fmean(timing.spread for timing in took),
        )

    def _link_entry(self, took: Sequence[Timing]) -> LinkEntry:
        """From when the last rank had begun until the last had ended."""
        together = list(zip(*(timing.runs for timing in took), strict=True))
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

    `num_ranks` processes of this machine measure at once; 1: this process does. `most_devices`: counts go up to there
    instead, as smaller local batches. `progress(done, total)` is called after each entry, `keep(profile)` about once a
    second and at the end. Raises ProfileError when `known` is of another device or was measured otherwise.
    """
    here = _conditions(captured, num_ranks, optimizer)
    found = _merged(known, here)
    metagraph = contract(captured.graph)
    todo = list(_missing(metagraph, workload.tasks.values(), found, most_devices or num_devices, num_ranks))
    if not todo:
        return found
    job = BenchJob(
        captured=captured,
        tasks={name: replace(task, function=_stayed_behind) for name, task in workload.tasks.items()},
        batches={name: task.first_batch() for name, task in workload.tasks.items()},
        chains={kind: names for kind, (names, _) in _kinds(metagraph).items()},
        optimizer=optimizer,
        num_threads=threads_of_rank(num_ranks) if num_ranks > 1 else None,
        seconds=seconds_per_entry,
    )
    kept_s = time.monotonic()
    with _crew(job, num_ranks) as crew:
        for done, item in enumerate(todo, 1):
            found = item.added_to(found, crew.call(item.method, *item.arguments))
            if keep is not None and (time.monotonic() - kept_s > KEEP_S or done == len(todo)):
                keep(found)
                kept_s = time.monotonic()
            if progress is not None:
                progress(done, len(todo))
    return found


def ranks_here(num_devices: int) -> int:
    """Ranks that measure at once for a cluster of so many devices: those of this machine that take part in a run."""
    gpus = torch.cuda.device_count()
    return min(num_devices, gpus) if gpus else num_devices


def _conditions(captured: Captured, num_ranks: int, optimizer: OptimizerFactory | None) -> Profile:
    """An empty profile that names this hardware, the versions and how it will measure."""
    threads = threads_of_rank(num_ranks) if num_ranks > 1 else torch.get_num_threads()
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


def _kinds(metagraph: MetaGraph) -> Mapping[str, tuple[tuple[str, ...], int]]:
    """For each kind some operators of it in a chain, and the most devices that they can run on."""
    found: dict[str, tuple[tuple[str, ...], int]] = {}
    for metaop in metagraph:
        operators = metaop.operators[:CHAIN]
        first, names = operators[0], tuple(op.name for op in operators)
        if len(names) > len(found.get(first.kind, ((), 0))[0]):
            found[first.kind] = names, first.batch_size if first.splittable else 1
    return found


def _missing(
    metagraph: MetaGraph, tasks: Iterable[Task], known: Profile, num_devices: int, num_ranks: int
) -> Iterator[Todo]:
    for kind, (_, limit) in _kinds(metagraph).items():
        for count in counts_to_measure(limit, num_devices):
            if count not in known.by_kind.get(kind, {}):
                yield Todo("operator", (kind, count))
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


def counts_to_measure(batch_size: int, num_devices: int) -> list[int]:
    """Counts that divide a batch; where they are many, one, powers of two and the largest.

    >>> counts_to_measure(12, 4), counts_to_measure(60, 60)
    ([1, 2, 3, 4], [1, 2, 4, 60])
    """
    valid = [n for n in range(1, min(num_devices, batch_size) + 1) if batch_size % n == 0]
    return valid if len(valid) <= MANY else [n for n in valid if n & (n - 1) == 0 or n == valid[-1]]


class _Alone:
    """A crew of this process."""

    leads = True

    def __init__(self, job: BenchJob) -> None:
        self.bench = Bench(job)

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [getattr(self.bench, method)(*args, **kwargs)]

    def close(self) -> None:
        self.bench.close()


@contextlib.contextmanager
def _crew(job: BenchJob, num_ranks: int) -> Iterator[Crew]:
    crew: Crew = _Alone(job) if num_ranks == 1 else ProcessCrew([job] * num_ranks, timeout_s=TIMEOUT_S, worker=Bench)
    try:
        yield crew
    finally:
        crew.close()
