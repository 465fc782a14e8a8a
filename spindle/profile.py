"""Profile: measured times of operator kinds, to price a MetaGraph with.

An entry is one operator kind on so many devices: seconds of its forward and of its backward on each device's share.
"""

from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class Profile:
    """Measured entries, and the hardware and versions they were measured on."""

    device: str
    versions: tuple[tuple[str, str], ...] = ()
    entries: tuple[ProfileEntry, ...] = ()

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
