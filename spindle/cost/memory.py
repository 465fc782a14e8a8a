"""Memory: a chain of operators and a layout in, bytes on each of its devices out.

Per device over a whole step: parameters, their gradients and optimizer states, activations kept for backward, and a
buffer for what one layer boundary hands over, twice (an activation and the gradient of the one before; the gradient
alone where layers are recomputed).

Sixteen-bit parameters have a master copy and states of four bytes beside them (mixed precision: 2 + 2 + 12 bytes a
parameter with Adam; a captured workload's gradients are summed in four, which makes 18); wider ones have states of
their own width (`spindle.cost.optimizers`). Frozen parameters are parameters only.
"""

from collections.abc import Iterator, Sequence
from math import prod

from spindle.cost.optimizers import kept_bytes_of
from spindle.cost.roofline import chain_rows, num_scores, score_flops
from spindle.values.cost_options import CostOptions
from spindle.values.execution import writes_scores
from spindle.values.graph import Operator, Parameter

SCORE_BYTES = 5.0
"""Kept by plain attention for each score: softmax, dropout mask and result (Korthikanti et al. 2022)."""
FUSED_SOFTMAX_KEEPS = 0.6
"""Of that a fused softmax keeps its result only."""


def chain_bytes(
    operators: Sequence[Operator],
    cost_options: CostOptions,
    *,
    data_parallel: int,
    tensor_parallel: int = 1,
    longest: float = 1.0,
) -> float:
    """Bytes on each device that runs the whole chain; `longest`: a long local batch over a mean one."""
    fixed, sharded = state_bytes(operators, cost_options)
    if cost_options.shard_optimizer:
        sharded /= data_parallel
    waiting = waiting_bytes(
        operators, cost_options, data_parallel=data_parallel, tensor_parallel=tensor_parallel, longest=longest
    )
    return (fixed + sharded) / tensor_parallel + waiting


def waiting_bytes(
    operators: Sequence[Operator],
    cost_options: CostOptions,
    *,
    data_parallel: int,
    tensor_parallel: int = 1,
    longest: float = 1.0,
) -> float:
    """`chain_bytes` without parameters, gradients and states: what waits for backward or is handed over."""
    # recompute keeps the layers' inputs, so what a layer hands over is counted already, as the next one's
    boundary = (1 if cost_options.recompute else 2) * max(operator.output_bytes for operator in operators)
    return longest * (kept_bytes(operators, cost_options) / tensor_parallel + boundary) / data_parallel


def shared_bytes(operators: Sequence[Operator], cost_options: CostOptions, *, data_parallel: int) -> float:
    """Bytes that a second task with the same parameters need not hold: parameters, gradients and optimizer states."""
    fixed, sharded = state_bytes(operators, cost_options)
    return fixed + (sharded / data_parallel if cost_options.shard_optimizer else sharded)


def state_bytes(operators: Sequence[Operator], cost_options: CostOptions) -> tuple[float, float]:
    """(bytes of parameters and gradients, bytes of master copies and optimizer states), each parameter once."""
    fixed = spread = 0.0
    for parameter in _distinct(operators):
        fixed += parameter.num_bytes
        if parameter.trainable:
            fixed += gradient_bytes(parameter, cost_options)
            spread += kept_bytes_of(parameter, cost_options)
            spread += max(parameter.num_bytes, 4 * prod(parameter.shape)) if cost_options.averages else 0
    return fixed, spread


def gradient_bytes(parameter: Parameter, cost_options: CostOptions) -> int:
    """Bytes of a trained parameter's gradient as it waits for the step."""
    wide = cost_options.wide_gradients and cost_options.master_weights
    return max(parameter.num_bytes, 4 * prod(parameter.shape)) if wide else parameter.num_bytes


def kept_bytes(operators: Sequence[Operator], cost_options: CostOptions) -> float:
    """Activations of the whole batch that wait for backward; with recompute the layers' inputs and one layer's all."""
    kept = [layer_bytes(operator, cost_options) for operator in operators]
    if not cost_options.recompute:
        return float(sum(kept))
    inputs = sum(min(operator.input_bytes, operator.activation_bytes) for operator in operators)
    return float(inputs + max(kept))


def recomputed_bytes(operators: Sequence[Operator], cost_options: CostOptions) -> float:
    """Of the bytes kept, those of the whole batch that exist only while backward computes one layer again."""
    return max(layer_bytes(operator, cost_options) for operator in operators) if cost_options.recompute else 0.0


def layer_bytes(operator: Operator, cost_options: CostOptions) -> float:
    """What one layer keeps for backward; scores too where attention writes them."""
    if not writes_scores(cost_options.execution) or not operator.activation_bytes:
        return float(operator.activation_bytes)
    rows = chain_rows([operator])
    kept = SCORE_BYTES * (FUSED_SOFTMAX_KEEPS if cost_options.execution.attention == "fused_softmax" else 1.0)
    return operator.activation_bytes + kept * num_scores(operator, score_flops(operator, rows))


def _distinct(operators: Sequence[Operator]) -> Iterator[Parameter]:
    seen: set[str] = set()
    for operator in operators:
        for parameter in operator.parameters:
            if parameter.name not in seen:
                seen.add(parameter.name)
                yield parameter
