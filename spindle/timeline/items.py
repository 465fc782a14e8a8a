"""Items: what stands in one row of the timeline. A row is one device in one step; its items lie in order of start.

- A kind says how an item is drawn; a cause says where its time went in the accounts. Waiting has two parts: `blocked_s`
  seconds at its beginning in which what it waits for was not made (or not all members of a reduction had come), then
  the rest, in which the data was under way.
- Times are seconds from the first moment of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from spindle.values.trace import SpanKind

OWN_AXIS_RATIO = 2.0  # on one axis a step far shorter than the other would be a sliver


class Kind(StrEnum):
    """How an item is drawn."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WORK = "work"  # forward and backward of a slice together, as plans hold them
    ISSUE = "issue"  # starts messages or a reduction, does not wait
    WAIT = "wait"  # waits until a transfer has arrived
    REDUCE = "reduce"
    STEP = "step"
    LOAD = "load"
    IDLE = "idle"


class Cause(StrEnum):
    """Where a device's time went. Where causes overlap, the first in this order counts."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WORK = "work"
    STEP = "step"
    REDUCE = "reduce"
    ISSUE = "issue"
    LOAD = "load"
    PEERS = "peers"  # in a reduction, until its last member came
    UNDERWAY = "underway"  # what it waits for is on its way
    UNMADE = "unmade"  # what it waits for is still being computed
    OTHER = "other"  # at the step before or after: no rank waits for the others to end a step
    OVERHEAD = "overhead"  # between two instructions
    NOTHING = "nothing"


COMPUTING = (Cause.FORWARD, Cause.BACKWARD, Cause.WORK, Cause.STEP)
COMMUNICATING = (Cause.REDUCE, Cause.ISSUE)
IDLING = (Cause.UNMADE, Cause.UNDERWAY, Cause.PEERS, Cause.LOAD, Cause.OVERHEAD, Cause.NOTHING)

CAUSE_TITLES = {
    Cause.FORWARD: "forward",
    Cause.BACKWARD: "backward",
    Cause.WORK: "forward and backward",
    Cause.STEP: "optimizer step",
    Cause.REDUCE: "gradient reduction",
    Cause.ISSUE: "starts transfers and reductions",
    Cause.LOAD: "loads a batch",
    Cause.PEERS: "waits for the last of a reduction",
    Cause.UNDERWAY: "waits for a transfer under way",
    Cause.UNMADE: "waits for a result not made yet",
    Cause.OTHER: "at the step before or after",
    Cause.OVERHEAD: "between instructions",
    Cause.NOTHING: "nothing to do (imbalance)",
}

COMPUTE_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.WORK)

_CAUSE_BY_KIND = {
    Kind.FORWARD: Cause.FORWARD,
    Kind.BACKWARD: Cause.BACKWARD,
    Kind.WORK: Cause.WORK,
    Kind.ISSUE: Cause.ISSUE,
    Kind.WAIT: Cause.UNDERWAY,
    Kind.REDUCE: Cause.REDUCE,
    Kind.STEP: Cause.STEP,
    Kind.LOAD: Cause.LOAD,
}
_BLOCKED_CAUSE = {Kind.WAIT: Cause.UNMADE, Kind.REDUCE: Cause.PEERS}


@dataclass(frozen=True, slots=True)
class What:
    """What an item is, apart from when: many items share one.

    slice      index among the plan's slices in order of start; -1 when it belongs to none
    planned_s  seconds that the plan gives it; 0 when the plan says nothing
    why        what was waited for, in words; empty when nothing was
    idle       the cause of an IDLE item
    """

    kind: Kind
    name: str
    task: str = ""
    component: str = ""
    metaop: str = ""
    wave: int = -1
    num_bytes: int = 0
    slice: int = -1
    planned_s: float = 0.0
    why: str = ""
    idle: Cause = Cause.NOTHING

    @property
    def cause(self) -> Cause:
        """Where its time is booked, apart from `blocked_s`."""
        return self.idle if self.kind is Kind.IDLE else _CAUSE_BY_KIND[self.kind]

    @property
    def is_slowing(self) -> bool:
        """Predicted: what all of backward loses to reductions beside it, so that it belongs to no slice."""
        return self.kind is Kind.BACKWARD and self.slice < 0 and not self.component

    @property
    def blocked_cause(self) -> Cause:
        """Where its `blocked_s` are booked."""
        return _BLOCKED_CAUSE.get(self.kind, self.cause)


class Item(NamedTuple):
    """A piece of a row."""

    what: What
    start_s: float
    end_s: float
    blocked_s: float = 0.0


class Link(NamedTuple):
    """Data passes from one item to another; items by row and by place in the row."""

    source_rank: int
    source_item: int
    target_rank: int
    target_item: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """One step as rows of items, one row a device; `step_s` seconds from its first to its last moment."""

    step: int
    step_s: float
    rows: tuple[tuple[Item, ...], ...]
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All steps of one trace (or the plan's own slices), and the one to look at first."""

    source: str  # "plan", "predicted" or "measured"
    steps: tuple[StepView, ...]
    first: int = 0  # index into steps
    num_steps: int = 1  # of the trace; more than len(steps) when some were left out
    total_s: float = 0.0  # of all steps; steps overlap, as no rank waits for the others to end one
    peak_bytes: tuple[int, ...] = ()  # measured on each device over the whole run; empty where it was not

    @property
    def shown(self) -> StepView:
        """The step to look at first."""
        return self.steps[self.first]


def have_own_axes(views: Sequence[View]) -> bool:
    """Whether each view has a time axis of its own, since one shown step lasts over OWN_AXIS_RATIO times the other."""
    lengths_s = [view.shown.step_s for view in views]
    return min(lengths_s) > 0 and max(lengths_s) > OWN_AXIS_RATIO * min(lengths_s)


def kind_of(kind: SpanKind, name: str) -> Kind:
    """The kind of a span: a transfer that bears the name of a TRANSFER instruction only starts messages."""
    if kind is SpanKind.TRANSFER:
        return Kind.ISSUE if name.startswith("TRANSFER ") else Kind.WAIT
    return Kind(kind.value)
