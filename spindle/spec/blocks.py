"""Blocks: the components a workload spec may name, in; what one layer of each holds and does, out.

- Counts are per sample and exact where the architecture says all (Transformer, Mlp, Embedding, LmHead); `Other` divides
  given totals evenly over its layers.
- A multiply-add counts as two FLOPs; attention counts every pair of tokens, causal or not. `causal` is recorded for the
  cost model, which knows whether the kernel skips the masked half. Linear attention instead keeps a state of head_dim
  by head_dim for each head: two products a token, whatever the number of tokens (Katharopoulos et al. 2020).
- Activations kept for backward are those of a fused-attention layer: inputs of matrix products, of norms and of the
  activation function (after Korthikanti et al. 2022, without dropout masks and score matrices). Root-mean-square norms,
  which gated layers use, keep more where they are plain PyTorch operators (`spindle.values.execution.norm_copies`).
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

from spindle.errors import WorkloadError
from spindle.values.execution import PLAIN_NORM_COPIES

Trained = Literal["all", "none", "ends", "lora"]
"""What of a component learns: everything, nothing, only what stands before and after its layers, or LoRA adapters."""

Update = Literal["gradient", "zeroth_order"]
"""How weights learn: by backward, or by the losses of two forwards with noise added and taken off (MeZO, ZO2)."""

Payload = Literal["last_hidden", "per_layer_hidden", "per_layer_kv"]
"""What a component hands on: its last hidden state, that of every layer, or the keys and values of every layer."""

FLOATING = ("float64", "float32", "bfloat16", "float16")
BASE_DTYPES = ("int4", "nf4", "int8", "fp8", *FLOATING)
"""Types that frozen weights are stored in; those of fewer bits are unpacked before they are multiplied."""

CrossAttention = Literal["none", "separate", "joint"]
"""Reads a context: not at all, by an attention of its own, or by its self-attention (keys and values are handed in)."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter tensor and how many rows of one sample it multiplies (0: it is looked up or added)."""

    name: str
    shape: tuple[int, ...]
    rows: float = 0.0
    adaptable: bool = True  # LoRA puts adapters beside it

    @property
    def flops(self) -> float:
        """FLOPs per sample of multiplying by it."""
        return 2.0 * self.rows * prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One layer. FLOPs and elements are per sample.

    kept_trained / kept_frozen   elements kept for backward when its weights learn / when only its input gradient is due
    kept_boundary                those of kept_trained that stand at the layer's boundary (norms): tensor parallelism
                                 divides them only together with sequence parallelism
    """

    kind: str
    weights: tuple[Weight, ...] = ()
    attention_flops: float = 0.0
    kept_trained: float = 0.0
    kept_frozen: float = 0.0
    kept_boundary: float = 0.0

    @property
    def forward_flops(self) -> float:
        """FLOPs of one forward, per sample."""
        return sum(weight.flops for weight in self.weights) + self.attention_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """What all components have.

    tokens          sequence length of one instance; a task may say otherwise
    instances       sequences per sample (cameras, frames, noise draws), processed as one batch
    repeats         passes through the layers one after another (denoising steps)
    dtype, base_dtype   of parameters and activations, and of frozen weights where these are stored in fewer bits
    output_tokens   tokens handed on, per instance; None: `tokens`
    tokens_p99      99th percentile of the sequence length when samples differ; None: all are `tokens` long
    update          zeroth_order: runs forward twice, has no backward, keeps nothing, and reduces no gradients
    tensor_parallel, min_tensor_parallel   most and fewest devices of a node that a layer may be spread over; None: as
                    the workload says
    """

    name: str
    tokens: int = 1
    instances: int = 1
    repeats: int = 1
    trained: Trained = "all"
    lora_rank: int = 0
    dtype: str | None = None
    base_dtype: str | None = None
    output_tokens: int | None = None
    tokens_p99: int | None = None
    update: Update = "gradient"
    tensor_parallel: int | None = None
    min_tensor_parallel: int | None = None

    def __post_init__(self) -> None:
        for label in ("tokens", "instances", "repeats"):
            _require_count(self.name, label, getattr(self, label))
        self._check_types()
        if (self.trained == "lora") != (self.lora_rank > 0):
            raise WorkloadError(
                f"component {self.name!r}: trained is {self.trained!r} with lora_rank {self.lora_rank}; "
                "write trained: lora together with a positive lora_rank"
            )
        if self.tokens_p99 is not None and self.tokens_p99 < self.tokens:
            raise WorkloadError(
                f"component {self.name!r}: tokens_p99 is {self.tokens_p99}, below the mean of {self.tokens} tokens; "
                "give the length that 99 of 100 samples stay under"
            )

    def _check_types(self) -> None:
        """Weights that learn have a floating-point type; those of fewer bits are stored, not trained."""
        if self.dtype is not None:
            check_dtype(f"component {self.name!r}", self.dtype)
        if self.base_dtype is None:
            return
        if self.base_dtype not in BASE_DTYPES:
            raise WorkloadError(
                f"component {self.name!r}: base_dtype {self.base_dtype!r} is not one of {', '.join(BASE_DTYPES)}"
            )
        if self.trained == "all":
            raise WorkloadError(
                f"component {self.name!r}: base_dtype {self.base_dtype} stores frozen weights, and all of these are "
                "trained; write trained: lora with a lora_rank, trained: ends, or trained: none"
            )

    def splits_over(self, degree: int) -> bool:
        """Whether tensor parallelism of that degree cuts a layer into equal parts."""
        return degree >= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer(Component):
    """A stack of equal Transformer layers, with what stands before and after it.

    linear            attention is linear in the tokens
    positions         a stem has learned positions
    skipped_layers    indices of layers that do not run; with LoRA an adapter around each stays in their place
    input_features    raw features per token that a linear stem projects to `hidden` (image patches); 0: no stem
    output_features   width that a linear projection hands on; 0: `hidden`
    layer_extra_parameters, extra_parameters   further parameters per layer / once, that no token is multiplied by
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool = False
    causal: bool = False
    linear: bool = False
    positions: bool = True
    skipped_layers: tuple[int, ...] = ()
    vocab: int = 0
    tied: bool = True
    logits: bool = False
    input_features: int = 0
    output_features: int = 0
    extra_parameters: int = 0
    layer_extra_parameters: int = 0
    cross_attention: CrossAttention = "none"
    context_hidden: int = 0
    payload: Payload = "last_hidden"

    def __post_init__(self) -> None:
        super(Transformer, self).__post_init__()  # slots: the bare super() would look in the class before it had them
        for label in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn"):
            _require_count(self.name, label, getattr(self, label))
        if self.heads % self.kv_heads:
            raise WorkloadError(
                f"component {self.name!r}: {self.heads} heads share {self.kv_heads} kv_heads; "
                "kv_heads must divide heads"
            )
        for index in self.skipped_layers:
            if not 0 <= index < self.layers:
                raise WorkloadError(
                    f"component {self.name!r}: skipped_layers names layer {index}; its layers are 0 to "
                    f"{self.layers - 1}"
                )
        if len(set(self.skipped_layers)) == self.layers:
            raise WorkloadError(f"component {self.name!r}: skipped_layers names all layers; leave one to run")
        if self.linear and self.cross_attention != "none":
            raise WorkloadError(
                f"component {self.name!r}: linear attention reads its own tokens only; leave cross_attention out"
            )
        if self.logits and not self.vocab:
            raise WorkloadError(f"component {self.name!r}: logits need a vocabulary; give vocab")

    def splits_over(self, degree: int) -> bool:
        """Heads are divided; key and value heads too, or each is held by as many devices."""
        shared = self.kv_heads % degree == 0 or degree % self.kv_heads == 0
        return degree >= 1 and self.heads % degree == 0 and shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp(Component):
    """Linear layers of the given widths with a nonlinearity between them, as one operator."""

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        super(Mlp, self).__post_init__()
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise WorkloadError(
                f"component {self.name!r}: widths are {list(self.widths)}; give at least two, each >= 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(Component):
    """A lookup table."""

    vocab: int
    hidden: int
    extra_parameters: int = 0

    def __post_init__(self) -> None:
        super(Embedding, self).__post_init__()
        for label in ("vocab", "hidden"):
            _require_count(self.name, label, getattr(self, label))


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead(Component):
    """Projection to a vocabulary; `tied_to` names the component whose table it uses, "" has a matrix of its own."""

    vocab: int
    hidden: int
    tied_to: str = ""

    def __post_init__(self) -> None:
        super(LmHead, self).__post_init__()
        for label in ("vocab", "hidden"):
            _require_count(self.name, label, getattr(self, label))


@dataclass(frozen=True, slots=True, kw_only=True)
class Other(Component):
    """Anything else, by its totals: parameters, and FLOPs per sample (all instances) of one forward.

    hidden   width of what it hands on, and of its matrices as far as their efficiency goes
    """

    layers: int = 1
    hidden: int
    parameters: float
    forward_flops: float

    def __post_init__(self) -> None:
        super(Other, self).__post_init__()
        for label in ("layers", "hidden"):
            _require_count(self.name, label, getattr(self, label))
        if self.parameters < 0 or self.forward_flops < 0:
            raise WorkloadError(
                f"component {self.name!r}: {self.parameters} parameters, {self.forward_flops} FLOPs; "
                "give zero or more of each"
            )


def check_dtype(owner: str, dtype: str) -> None:
    """Raise WorkloadError when parameters of that type could not be trained."""
    if dtype not in FLOATING:
        remedy = "; for frozen weights of fewer bits write base_dtype" if dtype in BASE_DTYPES else ""
        raise WorkloadError(f"{owner}: dtype {dtype!r} is not one of {', '.join(FLOATING)}{remedy}")


def _require_count(owner: str, label: str, count: int) -> None:
    if count < 1:
        raise WorkloadError(f"component {owner!r}: {label} is {count}; it must be at least one")


def transformer_block(
    component: Transformer, *, context_tokens: int = 0, norm_copies: float = PLAIN_NORM_COPIES
) -> Block:
    """One layer of a Transformer whose (cross-)attention reads `context_tokens` tokens per instance besides its own.

    `norm_copies`: elements per hidden unit that the norms of a gated layer keep besides inputs and outputs.
    """
    c, rows = component, float(component.tokens * component.instances)
    inner, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    up = 2 * c.ffn if c.gated else c.ffn
    vectors = 2 * c.hidden if c.gated else inner + 2 * kv + up + 6 * c.hidden  # norms; without a gate also biases
    weights = [
        Weight("qkv", (inner + 2 * kv, c.hidden), rows),
        Weight("out", (c.hidden, inner), rows),
        Weight("up", (up, c.hidden), rows),
        Weight("down", (c.hidden, c.ffn), rows),
        Weight("vectors", (vectors,), adaptable=False),
    ]
    if c.layer_extra_parameters:
        weights.append(Weight("extra", (c.layer_extra_parameters,), adaptable=False))
    pairs = float(c.tokens * (c.head_dim if c.linear else c.tokens))
    if c.cross_attention == "separate":
        context_rows = float(context_tokens * c.instances)
        weights += [
            Weight("cross_q", (inner, c.hidden), rows),
            Weight("cross_kv", (2 * kv, c.context_hidden or c.hidden), context_rows),
            Weight("cross_out", (c.hidden, inner), rows),
        ]
    if c.cross_attention != "none":
        pairs += c.tokens * context_tokens
    # per token: two norm inputs and outputs, q k v, attention's output; up's output, activation (gate: product too)
    activation = (2 if c.gated else 1) * c.ffn + up
    frozen = rows * (2 * c.hidden + 2 * inner + 2 * kv + up)
    copies = norm_copies if c.gated else 0.0
    boundary = rows * (4 + copies) * c.hidden
    cross = rows * (2 * c.hidden + 2 * inner) if c.cross_attention == "separate" else 0.0
    return Block(
        kind=_transformer_kind(c, context_tokens),
        weights=tuple(weights),
        attention_flops=4.0 * pairs * c.instances * inner,
        kept_trained=boundary + rows * (2 * inner + 2 * kv + activation) + cross,
        kept_frozen=frozen + cross,
        kept_boundary=boundary,
    )


def _transformer_kind(c: Transformer, context_tokens: int) -> str:
    context = f" {c.cross_attention}{context_tokens}" if c.cross_attention != "none" else ""
    mask = " linear" if c.linear else " causal" if c.causal else ""  # a linear kernel has no half to skip
    gate = " gated" if c.gated else ""
    return (
        f"transformer h{c.hidden} a{c.heads}/{c.kv_heads}x{c.head_dim} f{c.ffn}{gate}{mask} "
        f"t{c.tokens}x{c.instances}{context}"
    )


def mlp_block(component: Mlp) -> Block:
    """The whole multi-layer perceptron as one layer."""
    rows = float(component.tokens * component.instances)
    weights = tuple(
        Weight(f"linear{index}", (wide, narrow), rows)
        for index, (narrow, wide) in enumerate(pairwise(component.widths))
    )
    biases = Weight("biases", (sum(component.widths[1:]),), adaptable=False)
    return Block(
        kind=f"mlp {'x'.join(map(str, component.widths))} t{component.tokens}x{component.instances}",
        weights=(*weights, biases),
        kept_trained=rows * (sum(component.widths[:-1]) + sum(component.widths[1:-1])),
        kept_frozen=rows * sum(component.widths[1:-1]),
    )


def other_block(component: Other) -> Block:
    """One of the equal layers of a component given by totals.

    Its parameters stand as two matrices as wide as `hidden`, so that the cost model sees sizes; the rows that give the
    stated FLOPs need not be the tokens (convolutions use a weight at many positions).
    """
    c = component
    per_layer = c.parameters / c.layers
    half = max(int(per_layer / c.hidden / 2), 1)
    rest = Weight("rest", (max(round(per_layer) - 2 * half * c.hidden, 0),), adaptable=False)
    rows = c.forward_flops / c.layers / (4.0 * half * c.hidden)
    tokens = float(c.tokens * c.instances)
    return Block(
        kind=f"other h{c.hidden} p{round(per_layer)} f{c.forward_flops / c.layers:.6g} t{c.tokens}x{c.instances}",
        weights=(Weight("into", (half, c.hidden), rows), Weight("out_of", (c.hidden, half), rows), rest),
        kept_trained=8.0 * tokens * c.hidden,
        kept_frozen=4.0 * tokens * c.hidden,
    )
