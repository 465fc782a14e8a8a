"""Profiler: a workload and what is known already in; a Profile with all that was missing out.

All ranks measure the same thing at once, so that cores, caches and memory are as busy as in a run. What is known is not
measured again: a profile goes on where it was interrupted, and serves other workloads with layers in common.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from spindle.capture.codes import Captured
from spindle.capture.sizes import sizes_of
from spindle.cost.measured.links import COLLECTIVES, check_device
from spindle.errors import ProfileError, SpindleWarning
from spindle.inputs.batch import SampledBatch
from spindle.runtime.launch.worker_group import WorkerGroup
from spindle.runtime.loading.recordings import Recipe
from spindle.runtime.profiling.bench_target import BenchTarget
from spindle.runtime.profiling.hardware import Hardware
from spindle.runtime.profiling.measure import MAX_REPEATS, MIN_REPEATS, BenchSpec, Moments, link_groups, spread, steady
from spindle.runtime.profiling.rounds import Round, kinds_of, other_work, rounds_of
from spindle.runtime.updates.masters import Numbers
from spindle.runtime.updates.optimizers import OptimizerFactory, described, rank_optimizer
from spindle.values.cluster import Cluster
from spindle.values.contract import contract, contract_like
from spindle.values.graph import base_task
from spindle.values.metagraph import MetaGraph
from spindle.values.profile import LinkEntry, LinkLevel, LinkOperation, LoadEntry, Profile
from spindle.workload import Batch, Task, Workload

MESSAGE_BYTES = tuple(4 << shift for shift in range(10, 24, 2))  # 4 KiB to 16 MiB
MESSAGES_S = 2.0
KEEP_S = 1.0

Progress = Callable[[int, int], None]
Keep = Callable[[Profile], None]


@dataclass(frozen=True, slots=True)
class Load:
    """One batch to load: its task and samples."""

    task: str
    samples: int

    def added_to(self, profile: Profile, workers: WorkerGroup) -> Profile:
        """The profile with one more entry: the mean of the ranks."""
        timings = workers.call("load", self.task)
        entry = LoadEntry(
            task=self.task,
            batch_size=self.samples,
            seconds=statistics.fmean(timing.seconds for timing in timings),
            spread=statistics.fmean(timing.spread for timing in timings),
        )
        return replace(profile, loads=(*profile.loads, entry))


@dataclass(frozen=True, slots=True)
class Message:
    """One message to time: who takes part."""

    operation: LinkOperation
    level: LinkLevel
    ranks: tuple[int, ...]
    num_bytes: int

    @property
    def key(self) -> tuple[LinkOperation, LinkLevel, int, int]:
        """As profiles know it."""
        return self.operation, self.level, len(self.ranks), self.num_bytes

    def added_to(self, profile: Profile, workers: WorkerGroup) -> Profile:
        """The profile with one more entry."""
        moments = workers.call(self.operation, self.ranks, self.num_bytes, self.repeats(profile))
        return replace(profile, links=(*profile.links, self.entry(moments)))

    def repeats(self, profile: Profile) -> int:
        """As many as take a second or two, by what the next smaller one took: over slow links few."""
        alike = (e for e in profile.links if e.key[:3] == self.key[:3])
        before = max((e for e in alike if e.num_bytes < self.num_bytes), key=lambda e: e.num_bytes, default=None)
        if before is None:
            return MAX_REPEATS
        estimate_s = before.seconds * self.num_bytes / before.num_bytes
        return max(MIN_REPEATS, min(MAX_REPEATS, round(MESSAGES_S / estimate_s)))

    def entry(self, moments: Sequence[Moments]) -> LinkEntry:
        """Of all ranks' moments; of a sum from when the last had begun until the last had ended."""
        together = list(zip(*(moments[rank] for rank in self.ranks), strict=True))
        if self.operation == "transfer":
            seconds = [(arrived - began) + (posted - began) for (began, posted), (arrived, _) in together]
        else:
            seconds = [max(end for _, end in runs) - max(start for start, _ in runs) for runs in together]
        return LinkEntry(
            operation=self.operation,
            level=self.level,
            members=len(self.ranks),
            num_bytes=self.num_bytes,
            seconds=steady(seconds),
            spread=spread(seconds),
        )


def measure_profile(
    workload: Workload,
    captured: Captured,
    *,
    num_devices: int,
    target: BenchTarget | None = None,
    cluster: Cluster | None = None,
    most_devices: int | None = None,
    known: Profile | None = None,
    optimizer: OptimizerFactory | None = None,
    seconds_per_entry: float = 0.3,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Profile:
    """`known` and what it lacks: each operator kind on counts up to `num_devices` that divide its batch, a batch of
    each task, and messages between the ranks of `target` (None: one rank here).

    All ranks measure at once. `most_devices`: counts go up to there instead, as smaller local batches. `progress(done,
    total)` tells of entries; `keep(profile)` is called between rounds of layers, later about once a second, and at the
    end. Raises ProfileError when `known` is of another device or measured otherwise, when devices of the target differ,
    or are of another sort than those of `cluster`.
    """
    target = target or BenchTarget()
    graphs = _graphs(workload, captured)
    kinds = {name: kind for metagraph, _ in reversed(graphs) for name, kind in kinds_of(metagraph).items()}
    batch_by_kind = {
        name: batches[kind.operators[0].task]
        for metagraph, batches in reversed(graphs)
        for name, kind in kinds_of(metagraph).items()
    }
    numbers = Numbers.of(workload)
    spec = BenchSpec(
        captured=captured,
        recipe=Recipe.of(workload, captured),
        tasks={name: replace(task, function=_stayed_behind) for name, task in workload.tasks.items()},
        batches=batch_by_kind,
        chains={name: kind.names for name, kind in kinds.items()},
        ranks_per_node=target.ranks_per_node,
        parameters=numbers.stepped(described(workload.named_parameters())),
        numbers=numbers,
        settings=workload.optimizer_settings,
        optimizer=optimizer,
        seconds=seconds_per_entry,
    )

    def work(hardware: Hardware, started: Callable[[], WorkerGroup]) -> Profile:
        here = _conditions(captured, hardware, spec)
        if cluster is not None:
            check_device(cluster, here)
        found = _merged(known, here)
        most = most_devices or num_devices
        rounds: list[Round] = []
        for metagraph, _ in graphs:
            known_kinds = {name for item in rounds for name in item.kinds}
            own, room_bytes = kinds_of(metagraph), hardware.room_bytes
            rounds += rounds_of(metagraph, own, found, most, target.ranks_per_node, room_bytes, known_kinds)
        others: list[Load | Message] = [*_loads(workload.tasks.values(), found), *_messages(target, found)]
        steps = _Steps(sum(len(item.new) for item in rounds) + len(others), progress, keep)
        if not steps.total:
            return found
        workers = started()
        for item in rounds:
            within = functools.partial(steps.within, len(item.new))
            entries = item.measured(workers, seconds_per_entry * len(item.new), within)
            found = replace(found, entries=(*found.entries, *entries))
            steps.done(found, len(item.new))
        workers.call("prepare", other_work(kinds, target.num_ranks), 0)
        for one in others:
            found = one.added_to(found, workers)
            steps.done(found, 1)
        return found

    return target.measured(spec, work)


def _graphs(workload: Workload, captured: Captured) -> list[tuple[MetaGraph, Mapping[str, SampledBatch]]]:
    """The MetaGraph on the batches to measure, each with the batch of each task: the first, or where batches differ in
    size a small, a middle and a large one.
    """
    metagraph, sizes = contract(captured.graph), sizes_of(workload, captured)
    telling = sizes.telling()
    if telling:
        return [(contract_like(metagraph, sizes.steps[index]), sizes.batches[index]) for index in telling]
    first = {name: task.sampled(task.first_batch()) for name, task in workload.tasks.items()}
    return [(metagraph, {name: first[base_task(name)] for name in captured.tasks})]


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


def _conditions(captured: Captured, hardware: Hardware, spec: BenchSpec) -> Profile:
    """An empty profile that names the hardware, the versions and how it will be measured."""
    versions = {
        "dtype": captured.precision,
        "python": hardware.python,
        "ranks": str(hardware.ranks),
        "torch": hardware.torch,
    }
    if hardware.threads is not None:
        versions["threads"] = str(hardware.threads)
    if spec.optimizer is not None:
        made = rank_optimizer(spec.optimizer, spec.parameters, (), spec.settings, torch.device("cpu"))
        versions["optimizer"] = type(made.optimizer).__name__
    return Profile(hardware.device, tuple(sorted(versions.items())))


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


def _loads(tasks: Iterable[Task], known: Profile) -> Iterator[Load]:
    for task in tasks:
        if (task.name, task.batch_size) not in known.load_s:
            yield Load(task.name, task.batch_size)


def _messages(target: BenchTarget, known: Profile) -> Iterator[Message]:
    for level, groups in link_groups(target.num_ranks, target.ranks_per_node).items():
        for num_bytes in MESSAGE_BYTES:
            wanted = [Message(operation, level, ranks, num_bytes) for operation in COLLECTIVES for ranks in groups]
            wanted += [Message("transfer", level, ranks, num_bytes) for ranks in groups[:1]]
            yield from (message for message in wanted if message.key not in known.link_keys)
