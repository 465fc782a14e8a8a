"""Start-up: seconds of what happens before the first step, by phase, and how many others each rank has to do with.

A run of many ranks that starts slowly says here what it waits for: phases of the driver one after another, and in
brackets those of the slowest rank while the driver waits for all.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spindle.runtime.programs.program import Program

MANY_GROUPS = 32
"""Process groups from which their cost is said: all ranks make all of them, one after another."""


@dataclass
class Phases:
    """Seconds by phase, in order; `of_ranks` are those of the slowest rank in each phase of its own."""

    seconds: dict[str, float] = field(default_factory=dict)
    of_ranks: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begun(cls) -> "Phases":
        """Phases that begin now. Where a launcher started this process for the run, the first is what it did until
        now: to import, and to make the models.
        """
        return cls({"script and imports": age_of_process()} if "TORCHELASTIC_RUN_ID" in os.environ else {})

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is done while open."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began_s

    def slowest(self, found: Sequence[Mapping[str, float]]) -> None:
        """Take in what ranks report of their own phases."""
        for own in found:
            for name, seconds in own.items():
                self.of_ranks[name] = max(seconds, self.of_ranks.get(name, 0.0))

    def __str__(self) -> str:
        inner = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.of_ranks.items())
        parts = [
            f"{name} {seconds:.1f}" + (f" (slowest: {inner})" if name == "ranks" and inner else "")
            for name, seconds in self.seconds.items()
        ]
        return f"start-up {sum(self.seconds.values()):.1f} s: {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Links:
    """Process groups in all, the most of one rank, and the most others with which one rank exchanges messages."""

    groups: int
    groups_of_rank: int
    peers_of_rank: int

    @classmethod
    def of(cls, program: Program) -> "Links":
        """Those of a whole program."""
        groups = [0] * program.num_ranks
        peers: list[set[int]] = [set() for _ in range(program.num_ranks)]
        for ranks in program.groups:
            for rank in ranks:
                groups[rank] += 1
        for message in (message for transfer in program.transfers for message in transfer.messages):
            peers[message.source].add(message.target)
            peers[message.target].add(message.source)
        for hand in program.handovers:
            for rank in hand.targets:
                peers[hand.source].add(rank)
                peers[rank].add(hand.source)
        return cls(len(program.groups), max(groups), max(map(len, peers)))

    def __str__(self) -> str:
        text = (
            f"process groups: {self.groups}, at most {self.groups_of_rank} of a rank; "
            f"peers of a rank: at most {self.peers_of_rank}"
        )
        if self.groups > MANY_GROUPS:
            text += " (all ranks make all groups one after another, so start-up takes longer with each)"
        return text


def age_of_process(pid: int | None = None) -> float:
    """Seconds since a process, by default this one, began; 0.0 where the system does not say."""
    try:
        ticks = float(Path(f"/proc/{pid or 'self'}/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, up_s - ticks / os.sysconf("SC_CLK_TCK"))
