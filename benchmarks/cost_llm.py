"""A training step of one language model on many devices, composed of the product's cost functions.

What Spindle plans is made of the same layers; sharded parameters, pipelines and micro-batches exist only in the
published tables, so their composition lives here.
"""

from dataclasses import dataclass, replace

from spindle.cluster import Cluster, Device
from spindle.cost.layout import sharded_s, tensor_parallel_s, update_s
from spindle.cost.links import collective_s
from spindle.cost.roofline import OperatorTime, Work, time_operator
from spindle.spec.blocks import Block, Transformer, transformer_block


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder-only (or, with causal=False, encoder-only) model at one sequence length."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    tokens: int
    vocab: int = 0
    gated: bool = False
    causal: bool = True

    @property
    def block(self) -> Block:
        """One layer of it."""
        return transformer_block(
            Transformer(
                name="model",
                layers=self.layers,
                hidden=self.hidden,
                heads=self.heads,
                kv_heads=self.heads,
                head_dim=self.hidden // self.heads,
                ffn=self.ffn,
                gated=self.gated,
                causal=self.causal,
                tokens=self.tokens,
            )
        )

    @property
    def layer_parameters(self) -> float:
        """Parameters in the matrices of a layer."""
        return sum(weight.shape[0] * weight.shape[1] for weight in self.block.weights if len(weight.shape) == 2)


def block_work(
    block: Block,
    samples: float,
    *,
    causal: bool,
    passes: float = 2.0,
    recompute: bool = False,
    moved_bytes: float = 0.0,
) -> Work:
    """The work of one layer on `samples` samples, as the planner would see it."""
    return Work(
        matmuls=tuple((w.rows * samples, w.shape[0], w.shape[1]) for w in block.weights if w.rows),
        attention_flops=block.attention_flops * samples * (0.5 if causal else 1.0),
        passes=passes,
        recompute=recompute,
        moved_bytes=moved_bytes,
    )


def layer_time(model: Model, device: Device, samples: float, *, recompute: bool = False) -> OperatorTime:
    """Forward and backward of one layer on one device."""
    work = block_work(model.block, samples, causal=model.causal, recompute=recompute)
    return time_operator(work, device, data_parallel=1)


def head_time(model: Model, device: Device, samples: float) -> OperatorTime:
    """Vocabulary projection and loss."""
    work = Work(matmuls=((samples * model.tokens, model.vocab, model.hidden),))
    return time_operator(work, device, data_parallel=1)


def sharded_step_s(
    model: Model, cluster: Cluster, micro_batch: int, micro_batches: int, *, recompute: bool, regather: bool
) -> float:
    """A step with fully sharded parameters (FSDP) on all devices of the cluster."""
    devices = cluster.num_devices
    time = layer_time(model, cluster.device, micro_batch, recompute=recompute)
    layer = sharded_s(time, 2 * model.layer_parameters, cluster, devices, regather=regather)
    head = head_time(model, cluster.device, micro_batch).total_s if model.vocab else 0.0
    parameters = model.layers * model.layer_parameters + model.vocab * model.hidden
    return micro_batches * (model.layers * layer.total_s + head) + update_s(parameters / devices, cluster.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a pipeline and tensor parallel run divides its devices."""

    micro_batch: int
    micro_batches: int
    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool = False
    recompute: bool = False


def pipelined_step_s(model: Model, cluster: Cluster, layout: Layout, *, moved_bytes: float = 0.0) -> float:
    """A step of the one-forward-one-backward pipeline: (m + p - 1) stages, gradients reduced once, optimiser sharded.

    `moved_bytes`: of one layer's forward besides its products, on each device (score matrices of unfused attention).
    """
    device, tp = cluster.device, layout.tensor
    work = block_work(
        model.block, layout.micro_batch, causal=model.causal, recompute=layout.recompute, moved_bytes=moved_bytes
    )
    time = time_operator(work, device, data_parallel=1, tensor_parallel=tp, sequence_parallel=layout.sequence_parallel)
    boundary = 2.0 * layout.micro_batch * model.tokens * model.hidden
    traffic = tensor_parallel_s(boundary, cluster, tp) * (3 if layout.recompute else 2)
    stage = model.layers / layout.pipeline * (time.total_s + traffic)
    head = replace_vocab(model, tp)
    last = stage + head_time(head, device, layout.micro_batch).total_s
    parameters = (model.layers * model.layer_parameters + 2 * model.vocab * model.hidden) / (tp * layout.pipeline)
    reduced = collective_s("all_reduce", 2 * parameters, cluster, data_group(cluster, layout))
    return (
        layout.micro_batches * last
        + (layout.pipeline - 1) * stage
        + reduced
        + update_s(parameters / layout.data, device)
    )


def replace_vocab(model: Model, tensor: int) -> Model:
    """The model with the share of the vocabulary that one of `tensor` devices projects to."""
    return replace(model, vocab=model.vocab // tensor)


def data_group(cluster: Cluster, layout: Layout) -> tuple[int, ...]:
    """Members in each node of a group of data-parallel replicas; tensor parallelism has the neighbours."""
    per_node = max(1, min(cluster.devices_per_node // layout.tensor, layout.data))
    return (per_node,) * max(1, layout.data // per_node)
