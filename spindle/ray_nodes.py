"""Ray nodes: on which nodes of a Ray cluster a run's ranks may be, and how long it waits for nodes that are to come."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from spindle.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNodes:
    """What a run asks of the nodes of a Ray cluster, beside room for its ranks.

    `wait_s`: seconds that it waits for room, while an autoscaler starts nodes; None waits as long as `timeout_s`. A run
    that waits wants GPUs of the plan's type, which need not be there yet. `accelerator_type`: GPUs of this type alone,
    as Ray names them ("H100", "A100-80G"). `label_selector`: labels of nodes, as Ray selects by them: a value, "!spot"
    for all others, or "in(us-east4, us-west1)".

    >>> RayNodes(wait_s=1800, label_selector={"market-type": "!spot"}).wait_s
    1800
    """

    wait_s: float | None = None
    accelerator_type: str | None = None
    label_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.wait_s is not None and not 0 < self.wait_s < float("inf"):
            raise InputError(f"wait_s is {self.wait_s!r}; give seconds, above 0")
        if self.accelerator_type is not None and not (isinstance(self.accelerator_type, str) and self.accelerator_type):
            raise InputError(
                f"accelerator_type is {self.accelerator_type!r}; give a type as Ray names it, such as H100"
            )
        pairs = self.label_selector.items() if isinstance(self.label_selector, Mapping) else [(None, None)]
        if not all(isinstance(each, str) and each for pair in pairs for each in pair):
            raise InputError(
                f"label_selector is {self.label_selector!r}; give labels of nodes with values, such as "
                "{'market-type': '!spot'}"
            )
