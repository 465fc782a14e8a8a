"""Execution: how a program runs its layers, as far as their time depends on it; a spec says it, plans are priced by it.

A layer costs the same FLOPs however it is run, but not the same time: eager PyTorch starts every norm, rotary embedding
and activation as kernels of their own, each of which waits for Python and moves the layer's tensors once more.
"""

from dataclasses import dataclass, replace
from typing import Literal

from spindle.cluster import Cluster

LayerStyle = Literal["fused", "eager", "compiled"]
Kernels = Literal["fused", "plain"]
GradientType = Literal["parameters", "float32"]

EAGER_TRAFFIC = 3.5
"""How many times the elementwise traffic of fused layers separate operators move: 17.5 passes over the products'
operands beside 5, fitted on half of the step times of benchmarks/data/alephalpha_llama_a100_layouts.csv."""
EAGER_KERNELS = 9.0
"""Kernels a matrix product of eager PyTorch: a layer of a Hugging Face language model with seven products starts about
60 in forward."""
EAGER_LAUNCH = 2.7
"""How many times what a kernel costs in eager PyTorch it costs when a fused layer starts it: fitted with EAGER_KERNELS
on the 54 ms of benchmarks/data/qwen35vl_4b_h200_step.csv that do not depend on the batch."""
COMPILED_LAUNCH = 0.4
"""The same of compiled layers: one call starts them all, without Python in between. Not fitted."""
PLAIN_UPDATE = 2.5
"""How many times the bytes of a fused step an optimizer moves that runs an operation for each term: Adam's eleven
operations read and write 28 times the parameter where the fused step does so 10 to 12 times. Counted, not fitted."""
PLAIN_ATTENTION = 0.5
"""Share of `matmul_efficiency` that the two products of plain attention reach: they skip nothing under a mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How layers, attention, optimizer and reductions are run.

    layers       fused: norms, rotary embeddings and activations run as few kernels (Megatron, Apex, Liger);
                 eager: as PyTorch modules usually run; compiled: torch.compile or XLA
    attention    fused: scores stay on the chip (FlashAttention, SDPA); plain: they are written to memory
    optimizer    fused: one pass over the states; plain: an operation for each term
    tf32         float32 matrix products run in TF32 (torch.backends.cuda.matmul.allow_tf32)
    gradients    type in which gradients are reduced: that of the parameters, or float32
    overlap      reductions run beside backward
    """

    layers: LayerStyle = "fused"
    attention: Kernels = "fused"
    optimizer: Kernels = "fused"
    tf32: bool = True
    gradients: GradientType = "parameters"
    overlap: bool = True


USUAL = Execution()
"""Of a program that says nothing."""


def as_run(cluster: Cluster, execution: Execution) -> Cluster:
    """The cluster with its device's constants as the program that runs on it finds them."""
    device = cluster.device
    if execution.layers == "eager":
        device = replace(
            device,
            elementwise_traffic=device.eager_traffic or EAGER_TRAFFIC * device.elementwise_traffic,
            kernels_per_matmul=EAGER_KERNELS,
            launch_s=EAGER_LAUNCH * device.launch_s,
        )
    elif execution.layers == "compiled":
        device = replace(device, launch_s=COMPILED_LAUNCH * device.launch_s)
    if execution.attention == "plain":
        device = replace(device, attention_efficiency=PLAIN_ATTENTION * device.matmul_efficiency)
    if not execution.tf32:
        device = replace(device, float32_rate=device.full_float32_rate)
    if not execution.overlap:
        device = replace(device, overlap_cost=max(device.overlap_cost, 1.0))
    return replace(cluster, device=device)
