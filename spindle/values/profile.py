"""Profile: measured times of operator kinds, links and loaders, for the costs of a MetaGraph and for plans.

An entry is one operator kind on a number of devices: seconds of its forward and of its backward on each device's share.
A link entry is one collective or transfer of some bytes by a group, a load entry one batch of a task. Profiles are a
database: `merge` adds what another workload has measured on the same device type, and `unlike` says why two do not
belong together.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from spindle.errors import ProfileError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEntry:
    """Operator `kind` on `num_devices` devices, each holding its share of the batch; means of repeated runs.

    tensor_parallel  devices that hold one copy of the layer between them; the copies share the batch
    bare_forward_s   forward that keeps nothing, as where activations are computed again (0: not measured)
    update_s         the optimizer's step over the trained parameters of one layer (0: none, or not measured)
    spread           distance of the quartiles of forward and backward together, over their median
    family, size     operators that do the same on other batches, and how much work the whole batch was (0: not known)
    """

    kind: str
    num_devices: int
    forward_s: float
    backward_s: float
    peak_bytes: float = 0.0
    bare_forward_s: float = 0.0
    update_s: float = 0.0
    spread: float = 0.0
    tensor_parallel: int = 1
    family: str = ""
    size: float = 0.0

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ProfileError(f"profile entry {self.kind!r}: {self.num_devices} devices; counts start at 1")
        if self.tensor_parallel < 1 or self.num_devices % self.tensor_parallel:
            raise ProfileError(
                f"profile entry {self.kind!r}: tensor_parallel is {self.tensor_parallel} on {self.num_devices} "
                "devices; it must divide their number"
            )
        if not (0 < self.forward_s < float("inf") and 0 <= self.backward_s < float("inf")):
            raise ProfileError(
                f"profile entry {self.kind!r} on {self.num_devices} devices: forward {self.forward_s!r} s, "
                f"backward {self.backward_s!r} s; forward must be positive, backward zero or more. Measure it again"
            )
        amounts = (self.bare_forward_s, self.update_s, self.spread, self.size)
        if not all(0 <= value < float("inf") for value in amounts):
            raise ProfileError(
                f"profile entry {self.kind!r} on {self.num_devices} devices: bare forward {self.bare_forward_s!r} s, "
                f"update {self.update_s!r} s, spread {self.spread!r}, size {self.size!r}; all are zero or more. "
                "Measure it again"
            )


LinkOperation = Literal["all_reduce", "reduce", "broadcast", "transfer"]
LinkLevel = Literal["intra_node", "inter_node"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEntry:
    """A collective of `num_bytes` by `members` devices, or a transfer between two, over one level of links.

    A transfer's seconds are the seconds until the receiver has it and what posting it takes from the sender's own work.
    At level inter_node each member stands in a node of its own.
    """

    operation: LinkOperation
    level: LinkLevel
    members: int
    num_bytes: int
    seconds: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.members < 2 or self.num_bytes < 1 or not 0 < self.seconds < float("inf"):
            raise ProfileError(
                f"link entry: {self.operation} of {self.num_bytes} bytes by {self.members} devices took "
                f"{self.seconds!r} s; give at least two devices, one byte and a positive time. Measure it again"
            )

    @property
    def key(self) -> tuple[LinkOperation, LinkLevel, int, int]:
        """What was measured: operation, level, members and bytes."""
        return self.operation, self.level, self.members, self.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEntry:
    """One batch of a task, as a rank's loader gives it."""

    task: str
    batch_size: int
    seconds: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 < self.seconds < float("inf"):
            raise ProfileError(
                f"load entry {self.task!r}: a batch of {self.batch_size} samples took {self.seconds!r} s; give at "
                "least one sample and a positive time. Measure it again"
            )


CONDITIONS = ("ranks", "threads", "optimizer")
"""What, beside the device, changes measured times so much that profiles which differ in it do not merge."""


@dataclass(frozen=True)
class Profile:
    """Measured entries, and the hardware and versions they were measured on.

    `versions` names those of torch and Python, the precision, and the conditions: how many ranks measured at once, with
    how many threads each, and the optimizer.
    """

    device: str
    versions: tuple[tuple[str, str], ...] = ()
    entries: tuple[ProfileEntry, ...] = ()
    links: tuple[LinkEntry, ...] = ()
    loads: tuple[LoadEntry, ...] = ()

    @cached_property
    def by_kind(self) -> dict[str, dict[int, ProfileEntry]]:
        """Data-parallel entries by operator kind and device count; raises ProfileError when one is given twice."""
        return {
            kind: {count: entry for (count, parts), entry in by_layout.items() if parts == 1}
            for kind, by_layout in self.by_layout.items()
        }

    @cached_property
    def by_layout(self) -> dict[str, dict[tuple[int, int], ProfileEntry]]:
        """Entries by operator kind, and by device count and degree of tensor parallelism; raises ProfileError when one
        is given twice.
        """
        found: dict[str, dict[tuple[int, int], ProfileEntry]] = {}
        for entry in self.entries:
            by_layout = found.setdefault(entry.kind, {})
            layout = entry.num_devices, entry.tensor_parallel
            if layout in by_layout:
                raise ProfileError(
                    f"profile entry {entry.kind!r} on {entry.num_devices} devices is given twice; keep one"
                )
            by_layout[layout] = entry
        return found

    @cached_property
    def by_family(self) -> dict[str, tuple[ProfileEntry, ...]]:
        """Data-parallel entries by operator family, where the family is known."""
        found: dict[str, tuple[ProfileEntry, ...]] = {}
        for entry in self.entries:
            if entry.family and entry.tensor_parallel == 1:
                found[entry.family] = (*found.get(entry.family, ()), entry)
        return found

    @cached_property
    def link_keys(self) -> frozenset[tuple[LinkOperation, LinkLevel, int, int]]:
        """(operation, level, members, bytes) of every link entry."""
        return frozenset(entry.key for entry in self.links)

    @cached_property
    def load_s(self) -> dict[tuple[str, int], float]:
        """Seconds of a batch by (task, batch size)."""
        return {(entry.task, entry.batch_size): entry.seconds for entry in self.loads}

    @property
    def size(self) -> int:
        """Entries of all sorts."""
        return len(self.entries) + len(self.links) + len(self.loads)

    def describe(self, known: "Profile | None" = None) -> str:
        """One line on what there is, how far repeated runs lie apart, and what of it was `known` before."""
        spreads = [entry.spread for entry in self.entries] + [entry.spread for entry in self.links]
        spreads = sorted(spreads + [entry.spread for entry in self.loads])
        versions = dict(self.versions)
        terms = ", ".join(f"{name} {versions[name]}" for name in ("dtype", *CONDITIONS) if name in versions)
        return (
            f"{len(self.entries)} times of {len(self.by_kind)} operator kinds, {len(self.links)} of messages "
            f"and {len(self.loads)} of loaders on {self.device} ({terms}), "
            f"{self.size - (known.size if known else 0)} of them new, median spread "
            f"{spreads[len(spreads) // 2] if spreads else 0.0:.0%}"
        )

    def unlike(self, other: "Profile") -> tuple[str, ...]:
        """In what two profiles differ that must agree for their times to belong together, in words."""
        ours, theirs = dict(self.versions), dict(other.versions)
        found = [] if self.device == other.device else [f"{self.device!r} and {other.device!r}"]
        found += [
            f"{name} {ours[name]} and {theirs[name]}"
            for name in CONDITIONS
            if name in ours and name in theirs and ours[name] != theirs[name]
        ]
        return tuple(found)

    def merge(self, other: "Profile") -> "Profile":
        """Both profiles' entries; where both measured the same, the other's. Raises ProfileError for unlike ones."""
        if unlike := self.unlike(other):
            raise ProfileError(
                f"profiles of {'; '.join(unlike)} do not merge; measure both alike, or each into a file of its own"
            )
        entries = {(e.kind, e.num_devices, e.tensor_parallel): e for e in (*self.entries, *other.entries)}
        links = {entry.key: entry for entry in (*self.links, *other.links)}
        loads = {(entry.task, entry.batch_size): entry for entry in (*self.loads, *other.loads)}
        versions = tuple(sorted({**dict(self.versions), **dict(other.versions)}.items()))
        return Profile(self.device, versions, tuple(entries.values()), tuple(links.values()), tuple(loads.values()))
