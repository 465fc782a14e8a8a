"""Profile: measured times of operator kinds and of links, to price a MetaGraph with and to plan on.

An entry is one operator kind on so many devices: seconds of its forward and of its backward on each device's share.
A link entry is one collective or transfer of so many bytes by a group. Profiles are a database: `merge` adds what
another workload has measured on the same device type.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from spindle.errors import ProfileError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEntry:
    """Operator `kind` on `num_devices` devices, each holding its share of the batch."""

    kind: str
    num_devices: int
    forward_s: float
    backward_s: float
    peak_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ProfileError(f"profile entry {self.kind!r}: {self.num_devices} devices; counts start at 1")
        if not (0 < self.forward_s < float("inf") and 0 <= self.backward_s < float("inf")):
            raise ProfileError(
                f"profile entry {self.kind!r} on {self.num_devices} devices: forward {self.forward_s!r} s, "
                f"backward {self.backward_s!r} s; forward must be positive, backward zero or more. Measure it again"
            )


LinkOperation = Literal["all_reduce", "transfer"]
LinkLevel = Literal["intra_node", "inter_node"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEntry:
    """An all-reduce of `num_bytes` by `members` devices, or a transfer between two, over one level of links.

    At level inter_node each member stands in a node of its own.
    """

    operation: LinkOperation
    level: LinkLevel
    members: int
    num_bytes: int
    seconds: float

    def __post_init__(self) -> None:
        if self.members < 2 or self.num_bytes < 1 or not 0 < self.seconds < float("inf"):
            raise ProfileError(
                f"link entry: {self.operation} of {self.num_bytes} bytes by {self.members} devices took "
                f"{self.seconds!r} s; give at least two devices, one byte and a positive time. Measure it again"
            )


@dataclass(frozen=True)
class Profile:
    """Measured entries, and the hardware and versions they were measured on."""

    device: str
    versions: tuple[tuple[str, str], ...] = ()
    entries: tuple[ProfileEntry, ...] = ()
    links: tuple[LinkEntry, ...] = ()

    @cached_property
    def by_kind(self) -> dict[str, dict[int, ProfileEntry]]:
        """Entries by operator kind and device count; raises ProfileError when one is given twice."""
        found: dict[str, dict[int, ProfileEntry]] = {}
        for entry in self.entries:
            by_count = found.setdefault(entry.kind, {})
            if entry.num_devices in by_count:
                raise ProfileError(
                    f"profile entry {entry.kind!r} on {entry.num_devices} devices is given twice; keep one"
                )
            by_count[entry.num_devices] = entry
        return found

    def merge(self, other: "Profile") -> "Profile":
        """Both profiles' entries; where both measured the same, the other's. Raises ProfileError for unlike devices."""
        if self.device != other.device:
            raise ProfileError(
                f"profiles of {self.device!r} and {other.device!r} do not merge; measure both on one device type"
            )
        entries = {(entry.kind, entry.num_devices): entry for entry in (*self.entries, *other.entries)}
        links = {(e.operation, e.level, e.members, e.num_bytes): e for e in (*self.links, *other.links)}
        versions = tuple(sorted({**dict(self.versions), **dict(other.versions)}.items()))
        return Profile(self.device, versions, tuple(entries.values()), tuple(links.values()))
