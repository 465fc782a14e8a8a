"""Workload specs as users write them: YAML in (`read_workload`), a checked WorkloadSpec out.

    from spindle.spec.file import read_workload
    from spindle.spec.graph import build_graph
    graph = build_graph(read_workload("benchmarks/workloads/multitask_clip.yaml"))

Stable names: `read_workload(path)`, `parse_workload(text)`. docs/cost-model.md describes every field; units stand in
the names. Unknown fields, kinds and versions are refused by name.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError

from spindle.errors import FormatError, InputError
from spindle.files.clusterfile import parse_yaml, read_yaml
from spindle.files.filemodels import StrictModel
from spindle.files.filetypes import Amount, Count, Number, Prose, Text
from spindle.files.formats import explain_validation
from spindle.spec.blocks import (
    Component,
    CrossAttention,
    Embedding,
    LmHead,
    Mlp,
    Other,
    Payload,
    Trained,
    Transformer,
    Update,
)
from spindle.spec.values import Edge, LossKind, Task, WorkloadSpec, stages_to_edges
from spindle.values.cost_options import Optimizer
from spindle.values.execution import Attention, Execution, GradientType, Kernels, LayerStyle, Parallel, Shard

FORMAT = "spindle.workload"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _ComponentModel(StrictModel):
    tokens: Amount = 1
    instances: Count = 1
    repeats: Count = 1
    trained: Trained = "all"
    lora_rank: Amount = 0
    dtype: Text | None = None
    base_dtype: Text | None = None
    output_tokens: Amount | None = None
    tokens_p99: Amount | None = None
    update: Update = "gradient"
    tensor_parallel: Count | None = None
    min_tensor_parallel: Count | None = None


class _LayersModel(_ComponentModel):
    """Of softmax and of linear attention."""

    kind: Text
    layers: Count
    hidden: Amount
    heads: Amount
    kv_heads: Amount | None = None
    head_dim: Amount | None = None
    ffn: Amount | None = None
    gated: bool = False
    causal: bool = False
    positions: bool = True
    skipped_layers: Annotated[tuple[Count, ...], BeforeValidator(_as_tuple)] = ()
    vocab: Amount = 0
    tied: bool = True
    logits: bool = False
    input_features: Amount = 0
    output_features: Amount = 0
    extra_parameters: Amount = 0
    layer_extra_parameters: Amount = 0
    cross_attention: CrossAttention = "none"
    context_hidden: Amount = 0
    payload: Payload = "last_hidden"

    def value(self, name: str) -> Component:
        fields = dict(self)
        del fields["kind"]
        if self.head_dim is None and self.heads > 0 and self.hidden % self.heads:
            raise FormatError(
                f"component {name!r}: {self.heads} heads do not divide hidden {self.hidden}; give head_dim"
            )
        fields["kv_heads"] = self.heads if self.kv_heads is None else self.kv_heads
        fields["head_dim"] = self.hidden // max(self.heads, 1) if self.head_dim is None else self.head_dim
        fields["ffn"] = 4 * self.hidden if self.ffn is None else self.ffn
        return Transformer(name=name, linear=self.kind == "linear_attention", **fields)


class _TransformerModel(_LayersModel):
    kind: Literal["transformer"] = "transformer"


class _LinearAttentionModel(_LayersModel):
    kind: Literal["linear_attention"]


class _MlpModel(_ComponentModel):
    kind: Literal["mlp"]
    widths: Annotated[tuple[Amount, ...], BeforeValidator(_as_tuple)]

    def value(self, name: str) -> Component:
        return Mlp(name=name, **{key: value for key, value in self if key != "kind"})


class _EmbeddingModel(_ComponentModel):
    kind: Literal["embedding"]
    vocab: Amount
    hidden: Amount
    extra_parameters: Amount = 0

    def value(self, name: str) -> Component:
        return Embedding(name=name, **{key: value for key, value in self if key != "kind"})


class _LmHeadModel(_ComponentModel):
    kind: Literal["lm_head"]
    vocab: Amount
    hidden: Amount
    tied_to: Text = ""

    def value(self, name: str) -> Component:
        return LmHead(name=name, **{key: value for key, value in self if key != "kind"})


class _OtherModel(_ComponentModel):
    kind: Literal["other"]
    layers: Count = 1
    hidden: Amount
    parameters_millions: Number
    forward_gflops_per_sample: Number

    def value(self, name: str) -> Component:
        renamed = ("kind", "parameters_millions", "forward_gflops_per_sample")
        return Other(
            name=name,
            parameters=self.parameters_millions * 1e6,
            forward_flops=self.forward_gflops_per_sample * 1e9,
            **{key: value for key, value in self if key not in renamed},
        )


def _kind(data: Any) -> str:
    return str(data.get("kind", "transformer")) if isinstance(data, dict) else "transformer"


_AnyComponent = Annotated[
    Annotated[_TransformerModel, Tag("transformer")]
    | Annotated[_LinearAttentionModel, Tag("linear_attention")]
    | Annotated[_MlpModel, Tag("mlp")]
    | Annotated[_EmbeddingModel, Tag("embedding")]
    | Annotated[_LmHeadModel, Tag("lm_head")]
    | Annotated[_OtherModel, Tag("other")],
    Discriminator(_kind),
]


def _as_stage(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


_Stage = Annotated[tuple[Text, ...], BeforeValidator(_as_stage)]
_Stages = Annotated[tuple[_Stage, ...], BeforeValidator(_as_tuple)]


class _EdgeModel(StrictModel):
    source: Text
    target: Text
    payload_kib_per_sample: Number | None = None

    def value(self) -> Edge:
        kib = self.payload_kib_per_sample
        return Edge(self.source, self.target, None if kib is None else kib * 1024)


def _as_edge(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 2:
        return {"source": value[0], "target": value[1]}
    return value


_Edges = Annotated[
    tuple[Annotated[_EdgeModel, BeforeValidator(_as_edge)], ...],
    BeforeValidator(_as_tuple),
]


_PLAIN = ("batch_size", "loss", "weight", "probability", "every", "rate", "forward_only")
"""Fields of a task that its value takes as they are."""


class _TaskModel(StrictModel):
    batch_size: Count
    flow: _Stages | None = None
    edges: _Edges | None = None
    loss: LossKind = "other"
    weight: Number = 1.0
    probability: Number = 1.0
    every: Count = 1
    rate: Count = 1
    forward_only: bool = False
    tokens: dict[Text, Amount] = Field(default_factory=dict)
    tokens_p99: dict[Text, Amount] = Field(default_factory=dict)
    instances: dict[Text, Count] = Field(default_factory=dict)
    context_tokens: dict[Text, Amount] = Field(default_factory=dict)
    lora_rank: dict[Text, Amount] = Field(default_factory=dict)

    def value(self, name: str) -> Task:
        if (self.flow is None) == (self.edges is None):
            raise FormatError(
                f"task {name!r}: give either flow (stages in order) or edges (pairs), not both or neither"
            )
        if self.flow is not None:
            components, edges = stages_to_edges(self.flow)
        else:
            edges = tuple(edge.value() for edge in self.edges or ())
            components = tuple(dict.fromkeys(end for edge in edges for end in (edge.source, edge.target)))
        return Task(
            name=name,
            components=components,
            edges=edges,
            tokens=tuple(self.tokens.items()),
            tokens_p99=tuple(self.tokens_p99.items()),
            instances=tuple(self.instances.items()),
            context_tokens=tuple(self.context_tokens.items()),
            lora_rank=tuple(self.lora_rank.items()),
            **{key: getattr(self, key) for key in _PLAIN},
        )


class _ExecutionModel(StrictModel):
    layers: LayerStyle = "fused"
    norms: Kernels | None = None
    attention: Attention = "fused"
    optimizer: Kernels = "fused"
    tf32: bool = True
    gradients: GradientType = "parameters"
    overlap: bool = True


class _LayoutModel(StrictModel):
    tensor: Count = 1
    pipeline: Count = 1
    micro_batch: Count | None = None
    sequence_parallel: bool = False
    shard: Shard = "nothing"
    keeps_gathered: bool = False


class _WorkloadModel(StrictModel):
    format: Literal["spindle.workload"]
    version: Literal[1]
    name: Text
    title: Text = ""
    source: Annotated[Prose, Field(description="where shapes and batches come from; for readers only")] = ""
    dtype: Text = "bfloat16"
    optimizer: Optimizer = "adamw"
    recompute: bool = False
    shard_optimizer: bool = False
    shard_parameters: Annotated[tuple[str, ...], Field(strict=False)] = ()
    execution: _ExecutionModel = _ExecutionModel()
    layout: _LayoutModel | None = None
    may_offload: bool = False
    tensor_parallel: Count = 1
    min_tensor_parallel: Count = 1
    components: dict[Text, _AnyComponent]
    tasks: dict[Text, _TaskModel]

    def value(self) -> WorkloadSpec:
        return WorkloadSpec(
            name=self.name,
            title=self.title,
            dtype=self.dtype,
            optimizer=self.optimizer,
            recompute=self.recompute,
            shard_optimizer=self.shard_optimizer,
            shard_parameters=self.shard_parameters,
            execution=Execution(**dict(self.execution)),
            layout=Parallel(**dict(self.layout)) if self.layout else None,
            may_offload=self.may_offload,
            tensor_parallel=self.tensor_parallel,
            min_tensor_parallel=self.min_tensor_parallel,
            components=tuple(model.value(name) for name, model in self.components.items()),
            tasks=tuple(model.value(name) for name, model in self.tasks.items()),
        )


def read_workload(path: str | Path) -> WorkloadSpec:
    """Read a workload spec from a YAML file.

    Raises FormatError when the file is malformed or of another version, WorkloadError when a value breaks a rule; both
    name the file.
    """
    return _checked(read_yaml(path), str(path))


def parse_workload(text: str, *, source: str = "text") -> WorkloadSpec:
    """Read a workload spec from YAML text; `source` names the text in errors, which are those of `read_workload`."""
    return _checked(parse_yaml(text, source=source), source)


def _checked(data: Any, source: str) -> WorkloadSpec:
    name = data.get("format") if isinstance(data, dict) else None
    if name != FORMAT:
        raise FormatError(f"{source}: format is {name!r}; a workload spec begins with format: {FORMAT}")
    if data.get("version") != 1:
        raise FormatError(
            f"{source}: {FORMAT} version {data.get('version')!r}; this Spindle reads version 1, write the spec for it"
        )
    try:
        return _WorkloadModel.model_validate(data).value()
    except ValidationError as error:
        raise FormatError(f"{source}: {explain_validation(error, _WorkloadModel)}") from None
    except InputError as error:
        raise type(error)(f"{source}: {error}") from None
