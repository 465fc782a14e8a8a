"""Parts of an operator: weights that run one after another in; parameters, FLOPs and kept elements by what learns out.

Backward follows the gradient through the parts of an operator in order: a part that learns multiplies for its weights'
gradients; a part behind something that learns multiplies for its input's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from spindle.graph import Parameter
from spindle.spec.blocks import Block, Component, Transformer, Weight
from spindle.spec.values import WorkloadSpec


@dataclass(slots=True)
class Part:
    """Weights that run one after another in an operator, and the elements per sample it keeps for backward."""

    weights: Sequence[Weight]
    trained: bool
    lora_rank: int = 0
    attention_flops: float = 0.0
    kept_trained: float = 0.0
    kept_frozen: float = 0.0
    inner: bool = False  # has products between its own, so learning needs input gradients inside


@dataclass(slots=True)
class Cost:
    """Sum over the parts of an operator: FLOPs and kept elements per sample, and whether a gradient passes through."""

    parameters: list[Parameter] = field(default_factory=list)
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    kept_elements: float = 0.0
    needs_grad: bool = False


def rows_of(c: Component) -> int:
    """Rows of one sample: tokens of all its instances."""
    return c.tokens * c.instances


def part_of(block: Block, c: Component, *, trained: bool | None = None, prefix: str = "") -> Part:
    """A layer as a part; `prefix` numbers its weights, `trained` overrules what the component says."""
    return Part(
        weights=[replace(weight, name=f"{prefix}{weight.name}") for weight in block.weights],
        trained=c.trained == "all" if trained is None else trained,
        lora_rank=c.lora_rank,
        attention_flops=block.attention_flops,
        kept_trained=block.kept_trained,
        kept_frozen=block.kept_frozen,
        inner=True,
    )


def stem_of(c: Transformer) -> Part:
    """Linear patch embedding, and learned positions where it has any."""
    rows = float(rows_of(c))
    weights = [Weight("stem", (c.hidden, c.input_features), rows)]
    if c.positions:
        weights.append(Weight("positions", (c.tokens, c.hidden)))
    return Part(weights, c.trained in ("all", "ends"), kept_trained=rows * c.input_features)


def tail_of(c: Transformer) -> list[Part]:
    """Output projection and what else stands once in a component."""
    parts = []
    if c.output_features:
        rows = float((c.output_tokens or c.tokens) * c.instances)
        weight = Weight("projection", (c.output_features, c.hidden), rows)
        parts.append(Part([weight], c.trained in ("all", "ends"), kept_trained=rows * c.hidden))
    if c.extra_parameters:
        parts.append(Part([Weight("extra", (c.extra_parameters,))], c.trained in ("all", "ends")))
    return parts


def sum_parts(
    parts: Sequence[Part], c: Component, spec: WorkloadSpec, *, due: bool, frozen: bool, own_names: bool
) -> Cost:
    """Sum over parts in order; `due`: a gradient is due for the operator's input."""
    cost = Cost(needs_grad=due)
    dtype = c.dtype or spec.dtype
    for part in parts:
        linear = sum(weight.flops for weight in part.weights)
        adapters = adapters_of(part)
        learns = part.trained or bool(adapters)
        cost.forward_flops += linear + part.attention_flops + sum(weight.flops for weight in adapters)
        if not frozen:
            if part.trained:
                cost.backward_flops += linear
            if cost.needs_grad or (learns and part.inner):
                cost.backward_flops += linear + 2 * part.attention_flops
            cost.backward_flops += 2 * sum(weight.flops for weight in adapters)
            if learns:
                cost.kept_elements += part.kept_trained
            elif cost.needs_grad:
                cost.kept_elements += part.kept_frozen
        cost.needs_grad = cost.needs_grad or learns
        for weight, trainable in [*((w, part.trained) for w in part.weights), *((w, True) for w in adapters)]:
            name = weight.name if own_names else f"{c.name}.{weight.name}"
            stored = dtype if trainable else c.base_dtype or dtype
            cost.parameters.append(Parameter(name=name, shape=weight.shape, dtype=stored, trainable=trainable))
    return cost


def adapters_of(part: Part) -> list[Weight]:
    """LoRA (Hu et al. 2021): beside each matrix two of rank r."""
    adapters: list[Weight] = []
    for weight in part.weights:
        if part.lora_rank and weight.adaptable and len(weight.shape) == 2:
            wide, narrow = weight.shape
            adapters.append(Weight(f"{weight.name}.lora_a", (part.lora_rank, narrow), weight.rows))
            adapters.append(Weight(f"{weight.name}.lora_b", (wide, part.lora_rank), weight.rows))
    return adapters
