"""Counts: samples and tokens of each task that a run has trained with; whether they are enough.

Every rank counts the tasks that it loads. Only where there is a limit do ranks add up, once a step, so that all stop
before the same one.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spindle.errors import PlanError, WorkloadError
from spindle.runtime.comms.transport import Transport, sum_over_all
from spindle.words.whole_numbers import check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The samples and the tokens of all tasks after which a training stops; None: any number."""

    samples: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_whole({"max_samples": self.samples, "max_tokens": self.tokens}, error=PlanError)

    @property
    def any(self) -> bool:
        """Whether there is a limit."""
        return self.samples is not None or self.tokens is not None


class Counts:
    """What one rank has counted. `before`: samples and tokens by task, of the run that this one goes on with."""

    def __init__(self, tasks: Collection[str], loads: Collection[str], limits: Limits, transport: Transport) -> None:
        """`tasks`: the trained tasks; `loads`: the tasks that this rank reads."""
        self.tasks, self.loads = sorted(tasks), set(loads)
        self.limits, self.transport = limits, transport
        self.samples, self.tokens = Counter[str](), Counter[str]()
        self.before: dict[str, list[int]] = {}

    def take(self, samples: Mapping[str, int], tokens: Mapping[str, int]) -> None:
        """Take in what a step has read."""
        self.samples.update(samples)
        self.tokens.update(tokens)

    def state(self) -> dict[str, list[int]]:
        """Samples and tokens so far of the tasks that the rank loads; on rank 0 also of tasks that are here no more."""
        gone = {name: found for name, found in self.before.items() if name not in self.tasks}
        own = {name: self._total(name) for name in self.tasks if name in self.loads}
        return {**({} if self.transport.rank else gone), **own}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of all tasks."""
        self.before = {name: [int(number) for number in found] for name, found in state.items()}
        self.samples.clear()
        self.tokens.clear()

    def _total(self, name: str) -> list[int]:
        samples, tokens = self.before.get(name, (0, 0))
        return [samples + self.samples[name], tokens + self.tokens[name]]

    def reached(self) -> str:
        """Which limit is reached, in a sentence; "": none. All ranks give the same answer.

        Raises WorkloadError where tokens are limited, and no task has any.
        """
        if not self.limits.any:
            return ""
        rows = [
            [1.0, float(self.samples[name]), float(self.tokens[name])] if name in self.loads else [0.0, 0.0, 0.0]
            for name in self.tasks
        ]
        found = torch.tensor(rows, dtype=torch.float64)
        sum_over_all(found, self.transport)
        samples, tokens = (sum(each[index] for each in self.before.values()) for index in (0, 1))
        for loading, own_samples, own_tokens in found.tolist():
            samples += round(own_samples / max(loading, 1))  # ranks that load a task have counted alike
            tokens += round(own_tokens / max(loading, 1))
        if self.limits.tokens is not None and not tokens and all(row[1] for row in found.tolist()):
            raise WorkloadError(
                f"max_tokens is {self.limits.tokens}, but no batch of tasks {', '.join(self.tasks)} has tokens (a "
                "field attention_mask or input_ids), so that it is never reached; give max_samples=, or such a field"
            )
        for name, count, most in (("samples", samples, self.limits.samples), ("tokens", tokens, self.limits.tokens)):
            if most is not None and count >= most:
                return f"{count} {name} are trained (max_{name} is {most})"
        return ""
