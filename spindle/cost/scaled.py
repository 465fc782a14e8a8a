"""Scaled: a MetaGraph and a factor in, the same on batches of that many times the samples out.

FLOPs, bytes and rows of tensors grow with the batch. A kind names its batch, so a scaled operator has a kind of its
own, and a profile tells its time by its family.
"""

from dataclasses import replace
from fractions import Fraction

from spindle.values.graph import Operator, TensorSpec
from spindle.values.metagraph import Flow, MetaGraph, MetaOp


def scaled(metagraph: MetaGraph, factor: Fraction) -> MetaGraph | None:
    """None where a batch would be no whole number, its samples have rows of their own, or only times are known."""
    if factor == 1:
        return metagraph
    operators = [operator for metaop in metagraph for operator in metaop.operators]
    if any((factor * operator.batch_size).denominator != 1 or operator.units is not None for operator in operators):
        return None
    if not all(metaop.operators for metaop in metagraph):
        return None
    metaops = tuple(_metaop(metaop, factor) for metaop in metagraph)
    flows = tuple(
        Flow(f.source, f.target, None if f.num_bytes is None else float(f.num_bytes * factor)) for f in metagraph.flows
    )
    return replace(metagraph, metaops=metaops, flows=flows)


def _metaop(metaop: MetaOp, factor: Fraction) -> MetaOp:
    operators = tuple(_operator(operator, factor) for operator in metaop.operators)
    return replace(metaop, operators=operators, output_bytes=float(max(op.output_bytes for op in operators)))


def _operator(operator: Operator, factor: Fraction) -> Operator:
    return replace(
        operator,
        kind=f"{operator.kind} scaled by {factor}",
        batch_size=int(factor * operator.batch_size),
        outputs=tuple(_tensor(tensor, factor) for tensor in operator.outputs),
        forward_flops=float(factor) * operator.forward_flops,
        backward_flops=float(factor) * operator.backward_flops,
        input_bytes=round(factor * operator.input_bytes),
        activation_bytes=round(factor * operator.activation_bytes),
    )


def _tensor(tensor: TensorSpec, factor: Fraction) -> TensorSpec:
    if not tensor.rows:
        return tensor
    rows = max(round(factor * tensor.shape[tensor.row_dim]), 1)
    return replace(tensor, shape=(*tensor.shape[: tensor.row_dim], rows, *tensor.shape[tensor.row_dim + 1 :]))
