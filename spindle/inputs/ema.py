"""EMA: how a running average of the weights is kept while they are trained."""

from dataclasses import dataclass
from typing import Literal, get_args

from spindle.errors import WorkloadError
from spindle.words.whole_numbers import is_whole

Buffers = Literal["copy", "average"]


@dataclass(frozen=True, slots=True)
class EMA:
    """An exponential moving average of all weights, as `torch.optim.swa_utils.AveragedModel` with `get_ema_avg_fn`.

    `decay`: after a step the average is decay times itself and 1 - decay times the weights. `start`: steps before the
    first one that counts, which the average is a copy of; until then it is the weights. `every`: only every `every`-th
    step after that. `buffers`: "copy" takes them as they stand, "average" averages the floating point ones.

    >>> EMA(0.999, start=100).counts(100), EMA(0.999, start=100).counts(101), EMA(0.9, every=2).counts(2)
    (False, True, False)
    """

    decay: float = 0.999
    start: int = 0
    every: int = 1
    buffers: Buffers = "copy"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise WorkloadError(f"ema: decay is {self.decay!r}; give a number from 0 up and below 1, such as 0.999")
        if not is_whole(self.start, 0) or not is_whole(self.every, 1):
            raise WorkloadError(
                f"ema: start is {self.start!r}, every {self.every!r}; give whole numbers, from 0 and from 1 up"
            )
        if self.buffers not in get_args(Buffers):
            raise WorkloadError(f"ema: buffers is {self.buffers!r}; choose one of {', '.join(get_args(Buffers))}")

    @classmethod
    def of(cls, given: "EMA | float | None") -> "EMA | None":
        """What a workload is given: an EMA, or its decay alone."""
        if given is None or isinstance(given, EMA):
            return given
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise WorkloadError(f"ema is {given!r}; give a decay such as 0.999, or spindle.EMA(decay=..., start=...)")
        return cls(float(given))

    def counts(self, step: int) -> bool:
        """Whether the weights after this step, counted from 1, go into the average."""
        return step > self.start and (step - self.start - 1) % self.every == 0
