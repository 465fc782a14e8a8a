"""Parts of an operator: weights that run one after another in; parameters, FLOPs and kept elements by what learns out.

Backward follows the gradient through the parts of an operator in order: a part that learns multiplies for its weights'
gradients; a part behind something that learns multiplies for its input's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from spindle.spec.blocks import Block, Component, Transformer, Weight
from spindle.spec.values import WorkloadSpec
from spindle.values.graph import Parameter


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
    adapted: bool = False  # adapters of another operator learn beside its weights


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


def skipped_part(c: Transformer, index: int) -> Part:
    """What stays of a layer that does not run: with LoRA one adapter around it, else nothing."""
    if not c.lora_rank:
        return Part([], trained=False)
    rows = float(rows_of(c))
    weights = [
        Weight(f"{index}.skipped.lora_a", (c.lora_rank, c.hidden), rows),
        Weight(f"{index}.skipped.lora_b", (c.hidden, c.lora_rank), rows),
    ]
    return Part(weights, trained=True, kept_trained=rows * (c.hidden + c.lora_rank), inner=True)


def task_adapters(parts: Sequence[Part], rank: int, task: str) -> Part:
    """Adapters of one task beside the matrices of layers that other tasks share."""
    weights = [
        replace(weight, name=f"{task}.{weight.name}", adaptable=False)
        for part in parts
        for weight in adapters_of(replace(part, lora_rank=rank))
    ]
    kept = sum(weight.rows * weight.shape[0] for weight in weights if weight.name.endswith("lora_a"))
    return Part(weights, trained=True, kept_trained=kept)


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
        learns = part.trained or part.adapted or bool(adapters)
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
