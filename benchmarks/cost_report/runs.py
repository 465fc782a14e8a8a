"""Published runs as specs: what a user would write of them, and what the product says that they take."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from spindle.cost.parallel import ParallelCost, parallel_cost
from spindle.spec.blocks import Component, Transformer
from spindle.spec.graph import build_graph
from spindle.spec.values import LossKind, Task, WorkloadSpec, stages_to_edges
from spindle.values.cluster import Cluster
from spindle.values.execution import USUAL, Execution, Parallel, as_run
from spindle.values.graph import TaskGraph


def language_model(
    *,
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    tokens: int,
    vocab: int = 0,
    gated: bool = False,
    causal: bool = True,
    tied: bool = False,
    name: str = "model",
) -> Transformer:
    """A decoder-only (or, with causal=False, encoder-only) model at one sequence length."""
    return Transformer(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=ffn,
        gated=gated,
        causal=causal,
        tokens=tokens,
        vocab=vocab,
        logits=vocab > 0,
        tied=tied,
    )


def one_task(
    *stages: Sequence[Component],
    batch: int,
    execution: Execution = USUAL,
    recompute: bool = False,
    loss: LossKind = "cross_entropy",
) -> WorkloadSpec:
    """One task of components in stages."""
    components, edges = stages_to_edges([[component.name for component in stage] for stage in stages])
    return WorkloadSpec(
        name="run",
        components=tuple(component for stage in stages for component in stage),
        tasks=(Task(name="task", components=components, edges=edges, batch_size=batch, loss=loss),),
        recompute=recompute,
        execution=execution,
    )


def cost(spec: WorkloadSpec, cluster: Cluster, layout: Parallel) -> ParallelCost:
    """What the product says of a run in a layout."""
    cost_options = spec.cost_options
    return parallel_cost(_graph(spec), as_run(cluster, cost_options.execution), cost_options, layout)


@cache
def _graph(spec: WorkloadSpec) -> TaskGraph:
    return build_graph(spec)  # many rows are one model in other layouts


def on_peak(cluster: Cluster, *, peak: float, efficiency: float) -> Cluster:
    """The cluster with another type of products, of `peak` times the rate; attention stays as quick as it was."""
    device = cluster.device
    return replace(
        cluster,
        device=replace(
            device,
            peak_flops=peak * device.peak_flops,
            matmul_efficiency=efficiency,
            attention_efficiency=device.attention_efficiency / peak,
        ),
    )
