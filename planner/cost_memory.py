"""Memory: a chain of operators and a layout in, bytes on each of its devices out.

Per device over a whole step: parameters, their gradients and optimiser states, activations kept for backward, and a
buffer for what one layer boundary hands over, twice (an activation and the gradient of the one before).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spindle.graph import Operator

Optimizer = Literal["adamw", "adam", "sgd", "sgd_momentum"]
_STATES: dict[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "sgd_momentum": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRule:
    """How training state is kept.

    Sixteen-bit parameters have a master copy and states of four bytes beside them (mixed precision: 2 + 2 + 12 bytes a
    parameter with Adam); wider ones have states of their own width. `shard_optimizer` spreads master copy and states
    over the data-parallel devices (ZeRO stage 1).
    """

    optimizer: Optimizer = "adamw"
    shard_optimizer: bool = False


def chain_bytes(
    operators: Sequence[Operator], rule: MemoryRule, *, data_parallel: int, tensor_parallel: int = 1
) -> float:
    """Bytes on each device that runs the whole chain."""
    states = _STATES[rule.optimizer]
    fixed = sharded = 0.0
    seen: set[str] = set()
    for operator in operators:
        for parameter in operator.parameters:
            if parameter.name in seen:
                continue
            seen.add(parameter.name)
            fixed += parameter.num_bytes
            if parameter.trainable:
                itemsize = parameter.num_bytes / max(_elements(parameter.shape), 1)
                fixed += parameter.num_bytes
                master = 4.0 if itemsize < 4 else 0.0
                sharded += _elements(parameter.shape) * (master + states * max(itemsize, 4.0))
    if rule.shard_optimizer:
        sharded /= data_parallel
    activations = sum(operator.activation_bytes for operator in operators)
    boundary = 2 * max(operator.output_bytes for operator in operators)
    return (fixed + sharded) / tensor_parallel + (activations / tensor_parallel + boundary) / data_parallel


def _elements(shape: tuple[int, ...]) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return elements
