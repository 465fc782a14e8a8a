"""Trace: what each rank did and when, predicted or measured; one type for both, so that they compare.

Names are those of the program: a span of a measured trace bears the name of the instruction that made it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from spindle.errors import InputError


class SpanKind(StrEnum):
    """What a rank was doing."""

    LOAD = "load"
    FORWARD = "forward"
    BACKWARD = "backward"
    TRANSFER = "transfer"
    REDUCE = "reduce"
    STEP = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One piece of work of one rank; times count from the start of the step."""

    rank: int
    kind: SpanKind
    name: str
    start_s: float
    end_s: float
    task: str = ""
    component: str = ""
    metaop: str = ""
    wave: int = -1
    num_bytes: int = 0
    step: int = 0  # of a run, counted from 1; 0: predicted

    def __post_init__(self) -> None:
        if self.rank < 0 or self.end_s < self.start_s:
            raise InputError(
                f"span {self.name!r}: rank {self.rank}, from {self.start_s!r} to {self.end_s!r} s; ranks count from 0 "
                "and times must rise, measure it again"
            )

    def later(self, seconds: float) -> "Span":
        """The same work, so much later."""
        return replace(self, start_s=self.start_s + seconds, end_s=self.end_s + seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Spans of all ranks, in order of start; `source` tells whether they were predicted or measured.

    `peak_bytes`: by rank, the most that it had allocated on its GPU since the run began; empty where not measured.
    """

    num_ranks: int
    source: str
    spans: tuple[Span, ...] = ()
    peak_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.peak_bytes) not in (0, self.num_ranks) or min(self.peak_bytes, default=0) < 0:
            raise InputError(
                f"peak_bytes is {self.peak_bytes!r} for {self.num_ranks} ranks; give a number of bytes for each rank, "
                "or none at all"
            )
        beyond = next((span for span in self.spans if span.rank >= self.num_ranks), None)
        if beyond is not None:
            raise InputError(
                f"span {beyond.name!r} is of rank {beyond.rank}, and the trace has {self.num_ranks} ranks, from 0; "
                "measure it again"
            )

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def from_zero(self) -> "Trace":
        """The same trace with its times counted from its first moment."""
        first_s = min((span.start_s for span in self.spans), default=0.0)
        return replace(self, spans=tuple(span.later(-first_s) for span in self.spans))

    @property
    def num_steps(self) -> int:
        """Steps that the trace covers."""
        return len({span.step for span in self.spans})

    def step_s(self, step: int = 0) -> float:
        """Seconds from the first to the last moment of one step."""
        spans = [span for span in self.spans if span.step == step]
        return max((s.end_s for s in spans), default=0.0) - min((s.start_s for s in spans), default=0.0)

    def busy_s(self, kind: SpanKind, *, step: int | None = None) -> float:
        """Rank-seconds that went into one kind of work, in one step or in all."""
        return sum(s.end_s - s.start_s for s in self.spans if s.kind is kind and step in (None, s.step))
