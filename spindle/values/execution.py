"""Execution: how a program runs its layers, as far as their time depends on it; a spec says it, plans are costed by it.
Parallel: how a run that Spindle does not plan divides its devices.

A layer costs the same FLOPs however it is run, but not the same time: eager PyTorch starts every norm, rotary embedding
and activation as kernels of their own, each of which waits for Python and moves the layer's tensors once more.
"""

from dataclasses import dataclass, replace
from typing import Literal

from spindle.errors import WorkloadError
from spindle.values.cluster import Cluster, Device

LayerStyle = Literal["fused", "eager", "compiled"]
Kernels = Literal["fused", "plain"]
Attention = Literal["fused", "flash2", "fused_softmax", "plain"]
GradientType = Literal["parameters", "float32"]

COMPILED: LayerStyle = "compiled"
"""The style of compiled layers, and the word in the kind of an operator whose component is compiled."""
EAGER_TRAFFIC = 3.1
"""How many times the elementwise traffic of fused layers separate operators move: 15.7 passes over the products'
operands beside 5, fitted on half of the step times of benchmarks/data/alephalpha_llama_a100_layouts.csv."""
EAGER_KERNELS = 9.0
"""Kernels a matrix product of eager PyTorch: a layer of a Hugging Face language model with seven products starts about
60 in forward."""
EAGER_LAUNCH = 2.7
"""How many times what a kernel costs in eager PyTorch it costs when a fused layer starts it: fitted with EAGER_KERNELS
on the 54 ms of benchmarks/data/qwen35vl_4b_h200_step.csv that do not depend on the batch."""
COMPILED_LAUNCH = 0.4
"""The same of compiled layers: one call starts them all, without Python in between. Not fitted."""
PLAIN_UPDATE = 2.9
"""How many times the bytes of a fused step an optimizer moves that runs an operation for each term: AdamW's eight
operations read or write 20 numbers a parameter where the fused one does seven. Counted, not fitted."""
PLAIN_ATTENTION = 0.5
"""Share of `matmul_efficiency` that the two products of plain attention reach: they skip nothing under a mask."""
FLASH2_ATTENTION = 0.7
"""Share of the peak that FlashAttention 2 reaches on an A100 (its authors: up to 0.73); fitted with EAGER_TRAFFIC."""
FUSED_NORM_TRAFFIC = 0.47
"""What fused norms leave of the elementwise traffic of eager layers; fitted with EAGER_TRAFFIC."""
PLAIN_NORM_COPIES, FUSED_NORM_COPIES = 10.0, 2.0
"""Elements a hidden unit that the two RMS norms of a layer keep besides their inputs and outputs: separate operators
keep float32 copies. Fitted on the out-of-memory rows of benchmarks/data/alephalpha_llama_a100_layouts.csv."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How layers, attention, optimizer and reductions are run.

    layers       fused: norms, rotary embeddings and activations run as few kernels (Megatron, Apex, Liger);
                 eager: as PyTorch modules usually run; compiled: torch.compile or XLA
    norms        RMS norms as one kernel or as PyTorch operators; None: as the layers
    attention    fused: scores stay on the chip (SDPA, FlashAttention 1); flash2: FlashAttention 2 or later, where it is
                 quicker than what the device type says; fused_softmax, plain: scores are written to memory
    optimizer    fused: one pass over the states; plain: an operation for each term
    tf32         float32 matrix products run in TF32 (torch.backends.cuda.matmul.allow_tf32)
    gradients    type in which gradients are reduced: that of the parameters, or float32
    overlap      reductions run beside backward
    """

    layers: LayerStyle = "fused"
    norms: Kernels | None = None
    attention: Attention = "fused"
    optimizer: Kernels = "fused"
    tf32: bool = True
    gradients: GradientType = "parameters"
    overlap: bool = True


Shard = Literal["nothing", "optimizer", "gradients", "parameters"]
"""What replicas divide among them: ZeRO's stages 0 to 3. The last one is FSDP's FULL_SHARD too."""
STAGES: tuple[Shard, ...] = ("nothing", "optimizer", "gradients", "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How a run divides its devices.

    tensor, pipeline     devices that share each layer; stages of layers, one after another
    micro_batch          samples of a replica that pass through at once; None: its whole share of the batch
    sequence_parallel    a tensor-parallel group divides what stands between its products too
    shard                what replicas divide among them
    keeps_gathered       gathered parameters stay until backward (FSDP's SHARD_GRAD_OP)
    """

    tensor: int = 1
    pipeline: int = 1
    micro_batch: int | None = None
    sequence_parallel: bool = False
    shard: Shard = "nothing"
    keeps_gathered: bool = False

    def __post_init__(self) -> None:
        counts = {"tensor": self.tensor, "pipeline": self.pipeline, "micro_batch": self.micro_batch or 1}
        for name, count in counts.items():
            if count < 1:
                raise WorkloadError(f"layout: {name} is {count}; it must be at least one")

    def __str__(self) -> str:
        parts = [f"tensor {self.tensor}" * (self.tensor > 1), f"pipeline {self.pipeline}" * (self.pipeline > 1)]
        parts += ["sequence parallel" * self.sequence_parallel, f"{self.shard} sharded" * (self.shard != "nothing")]
        parts += [f"micro-batches of {self.micro_batch}" if self.micro_batch else ""]
        return ", ".join(filter(None, parts)) or "data parallel"

    def replicas(self, cluster: Cluster) -> int:
        """Copies of the model. Raises WorkloadError when the cluster cannot be divided so."""
        devices = self.tensor * self.pipeline
        if cluster.num_devices % devices or cluster.devices_per_node % self.tensor:
            raise WorkloadError(
                f"{cluster.num_devices} devices, {cluster.devices_per_node} a node, are not divided by tensor "
                f"{self.tensor} and pipeline {self.pipeline}; choose degrees whose product divides the devices, with "
                "tensor-parallel groups inside a node"
            )
        return cluster.num_devices // devices


USUAL = Execution()
"""Of a program that says nothing."""


def as_run(cluster: Cluster, execution: Execution) -> Cluster:
    """The cluster with its device's constants as the program that runs on it finds them, but for the style of its
    layers, which may differ between components: `as_styled`.
    """
    device = cluster.device
    if execution.attention == "flash2":
        device = replace(device, attention_efficiency=max(device.attention_efficiency, FLASH2_ATTENTION))
    elif writes_scores(execution):
        device = replace(device, attention_efficiency=PLAIN_ATTENTION * device.matmul_efficiency)
    if not execution.tf32:
        device = replace(device, float32_rate=device.full_float32_rate)
    if not execution.overlap:
        device = replace(device, overlap_cost=max(device.overlap_cost, 1.0))
    return replace(cluster, device=device)


def as_styled(device: Device, execution: Execution, kind: str) -> Device:
    """The constants of a device of `as_run` as layers of a kind find them: compiled ones, and those of the program's
    own style.
    """
    layers = COMPILED if COMPILED in kind.split() else execution.layers
    if layers == "eager":
        return replace(
            device,
            elementwise_traffic=(device.eager_traffic or EAGER_TRAFFIC * device.elementwise_traffic)
            * (FUSED_NORM_TRAFFIC if execution.norms == "fused" else 1.0),
            kernels_per_matmul=EAGER_KERNELS,
            launch_s=EAGER_LAUNCH * device.launch_s,
        )
    return replace(device, launch_s=COMPILED_LAUNCH * device.launch_s) if layers == COMPILED else device


def writes_scores(execution: Execution) -> bool:
    """Whether attention writes its scores to memory."""
    return execution.attention in ("plain", "fused_softmax")


def norm_copies(execution: Execution) -> float:
    """Elements a hidden unit that a gated layer's norms keep besides their inputs and outputs."""
    plain = execution.norms == "plain" or (execution.norms is None and execution.layers == "eager")
    return PLAIN_NORM_COPIES if plain else FUSED_NORM_COPIES
