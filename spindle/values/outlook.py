"""Outlook: how sure a plan's prediction is, as a value that the plan carries.

- A band holds nine of ten measured steps whose predictions have the same source of costs.
- A gain is the share of a step that the plan saves against the quickest baseline. Both come from one cost model and
  share most of its error, so the band of a gain is that of its change when the costs change.
"""

from dataclasses import dataclass
from typing import Literal

from spindle.errors import PlanError

Proof = Literal["", "profile", "batches", "devices", "runs"]
"""What would prove a gain: a profile of the workload, measured steps of two batches or on two numbers of devices to
calibrate on, or runs of both plans; empty where it is beyond the errors of costs.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """The gain when one thing is halved, as it is, and doubled; None where the plan cannot run so."""

    name: str
    half: float | None
    as_is: float
    double: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """The share of a step saved against `baseline`, and the band of it that costs allow.

    weakest    the factor (compute, host or network) under which the least is saved
    proof      what would show that there is a gain at all, where the band leaves it open
    moves      how it changes with the host's time, with the network's, and with the batch
    """

    baseline: str
    share: float
    low: float
    high: float
    weakest: str = ""
    proof: Proof = ""
    moves: tuple[Moves, ...] = ()

    def __post_init__(self) -> None:
        if not self.low <= self.share <= self.high < 1:
            raise PlanError(
                f"a gain of {self.share!r} lies in a band from {self.low!r} to {self.high!r}; bands hold their value"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known of a plan's step: `low_s` to `high_s` holds nine of ten steps that were predicted like this one.

    source      of its costs: predicted, calibrated, profiled, given, or several of them
    gain        None where no baseline is known whose step can be costed again
    """

    source: str
    low_s: float
    high_s: float
    gain: Gain | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low_s <= self.high_s < float("inf"):
            raise PlanError(f"a band of a step goes from {self.low_s!r} to {self.high_s!r} s; its ends must rise")
