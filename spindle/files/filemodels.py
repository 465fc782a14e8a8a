"""File models: what the files of `formats` hold, as pydantic models made of values and back."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from spindle.errors import FormatError
from spindle.files.filetypes import Amount, Bytes, Count, Number, Seconds, Text
from spindle.values.calibration import Calibration, Constant, MeasuredStep
from spindle.values.cluster import Cluster, Collective, Device, Link, Protocol
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points
from spindle.values.outlook import Gain, Moves, Outlook, Proof
from spindle.values.plan import (
    BUCKET_BYTES,
    Alternative,
    Certificate,
    Memory,
    Plan,
    SetStep,
    SizeRange,
    Slice,
    StepSpread,
    StepWork,
    TimePrices,
    Wave,
    sorted_pairs,
)
from spindle.values.profile import LinkEntry, LinkLevel, LinkOperation, LoadEntry, Profile, ProfileEntry
from spindle.values.trace import Span, SpanKind, Trace


class StrictModel(BaseModel):
    """What all file models share: unknown fields and loose types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, from_attributes=True)


class _JsonModel(StrictModel):
    """JSON has no NaN and no infinity; Python's parser would let them in."""

    model_config = ConfigDict(allow_inf_nan=False)


def _table(values: object) -> object:
    """Values hold tables as pairs, files as objects."""
    return dict(values) if isinstance(values, tuple) else values


def _count(key: object) -> object:
    """JSON keys are strings; "01" would be a second name for "1" and hide its value."""
    if isinstance(key, str) and not (key.isdecimal() and str(int(key)) == key):
        raise ValueError("keys should be device counts, for instance 4")
    return key


_Devices = Annotated[Count, BeforeValidator(_count), Field(strict=False)]
SecondsTable = Annotated[dict[_Devices, Seconds], BeforeValidator(_table)]
BytesTable = Annotated[dict[_Devices, Bytes], BeforeValidator(_table)]
DegreeTable = Annotated[dict[_Devices, Count], BeforeValidator(_table)]
NameTable = Annotated[dict[Text, Seconds], BeforeValidator(_table)]


class _MetaOpModel(_JsonModel):
    name: Text
    task: Text
    component: Text
    layers: Count
    layer_time_s: SecondsTable
    memory_bytes: BytesTable = {}
    layer_param_bytes: Bytes = 0.0
    layer_state_bytes: Bytes = 0.0
    kept_bytes: Bytes = 0.0
    recomputed_bytes: Bytes = 0.0
    gathered_bytes: Bytes = 0.0
    layer_update_s: Seconds = 0.0
    load_s: Seconds = 0.0
    output_bytes: Bytes = 0.0
    parameters: Text = ""
    forward_fraction: Number = 1 / 3
    tensor_parallel: DegreeTable = {}

    def value(self) -> MetaOp:
        if not self.layer_time_s:
            raise FormatError(f"MetaOp {self.name!r}: layer_time_s is empty; give a time for at least one device count")
        tables = {"layer_time_s": points(self.layer_time_s), "memory_bytes": points(self.memory_bytes)}
        degrees = tuple(sorted(self.tensor_parallel.items()))
        return MetaOp(**{**dict(self), **tables, "tensor_parallel": degrees})


class MetaGraphModel(_JsonModel):
    """A MetaGraph file."""

    format: Literal["spindle.metagraph"] = "spindle.metagraph"
    version: Literal[1] = 1
    metaops: tuple[_MetaOpModel, ...]
    flows: tuple[tuple[Text, Text], ...] = ()
    flow_bytes: tuple[Bytes | None, ...] = ()
    shard_optimizer: bool = False

    @classmethod
    def of(cls, graph: MetaGraph) -> "MetaGraphModel":
        """The model of a value."""
        return cls(
            metaops=tuple(_MetaOpModel.model_validate(metaop) for metaop in graph.metaops),
            flows=tuple((flow.source, flow.target) for flow in graph.flows),
            flow_bytes=tuple(flow.num_bytes for flow in graph.flows),
            shard_optimizer=graph.shard_optimizer,
        )

    def value(self) -> MetaGraph:
        """The value, checked."""
        payloads = self.flow_bytes or (None,) * len(self.flows)
        if len(payloads) != len(self.flows):
            raise FormatError(f"flow_bytes has {len(payloads)} values for {len(self.flows)} flows; give one each")
        flows = (Flow(*pair, payload) for pair, payload in zip(self.flows, payloads, strict=True))
        return MetaGraph(tuple(metaop.value() for metaop in self.metaops), tuple(flows), self.shard_optimizer)


class _SliceModel(_JsonModel):
    metaop: Text
    first_layer: Count
    num_layers: Count
    devices: tuple[Count, ...]
    start_s: Seconds
    end_s: Seconds
    tensor_parallel: Count = 1


class _WaveModel(_JsonModel):
    index: Count
    start_s: Seconds
    end_s: Seconds
    slices: tuple[_SliceModel, ...]

    def value(self) -> Wave:
        return Wave(**{**dict(self), "slices": tuple(Slice(**dict(s)) for s in self.slices)})


class _MemoryModel(_JsonModel):
    peak_bytes_per_device: tuple[Bytes, ...] = ()
    fits: bool = True


class _TimePricesModel(_JsonModel):
    edges_s: tuple[Seconds, ...]
    device_prices: tuple[Number, ...]
    wait_prices: tuple[tuple[Text, Text, tuple[Number, ...]], ...] = ()


class _CertificateModel(_JsonModel):
    area_price: Number = 0.0
    paths: tuple[tuple[Number, tuple[Text, ...]], ...] = ()
    through: Text = ""
    head: "_CertificateModel | None" = None
    tail: "_CertificateModel | None" = None
    over_time: _TimePricesModel | None = None

    def value(self) -> Certificate:
        ends = {name: part.value() if part else None for name, part in (("head", self.head), ("tail", self.tail))}
        over_time = TimePrices(**dict(self.over_time)) if self.over_time else None
        return Certificate(**{**dict(self), **ends, "over_time": over_time})


class _DeviceModel(_JsonModel):
    name: Text
    memory_bytes: Bytes
    peak_flops: Number
    memory_bytes_per_s: Number
    matmul_efficiency: Number = 0.8
    attention_efficiency: Number = 0.3
    elementwise_traffic: Number = 5.0
    eager_traffic: Number = 0.0
    kernels_per_matmul: Number = 3.5
    overlap_cost: Number = 1.0
    launch_s: Seconds = 2.5e-6
    parallel_units: Count = 108
    float32_rate: Number = 0.5
    full_float32_rate: Number = 0.0625
    host_bytes_per_s: Number = 25e9
    reserved_bytes: Bytes = 0.0


class _ProtocolModel(_JsonModel):
    latency_s: Seconds
    hop_s: Seconds
    bytes_per_s: Number
    in_network: bool = False
    operation: Collective | None = None
    from_bytes: Bytes = 0.0


class _LinkModel(_JsonModel):
    bytes_per_s: Number
    latency_s: Seconds
    protocols: tuple[_ProtocolModel, ...] = ()
    node_bytes_per_s: Number | None = None

    def value(self) -> Link:
        return Link(**{**dict(self), "protocols": tuple(Protocol(**dict(p)) for p in self.protocols)})


class _ClusterModel(_JsonModel):
    nodes: Count
    devices_per_node: Count
    device: _DeviceModel
    intra_node: _LinkModel
    inter_node: _LinkModel

    def value(self) -> Cluster:
        links = {"intra_node": self.intra_node.value(), "inter_node": self.inter_node.value()}
        return Cluster(**{**dict(self), "device": Device(**dict(self.device)), **links})


class _SetStepModel(_JsonModel):
    share: Number
    tasks: tuple[Text, ...]
    step_s: Seconds
    sequential_s: Seconds = 0.0


class _StepSpreadModel(_JsonModel):
    steps: Count
    mean_s: Seconds
    p10_s: Seconds
    p90_s: Seconds
    baselines_s: NameTable = {}

    def value(self) -> StepSpread:
        return StepSpread(**{**dict(self), "baselines_s": sorted_pairs(self.baselines_s)})


class _SizeRangeModel(_JsonModel):
    task: Text
    field: Text
    least: Amount
    most: Amount


class _AlternativeModel(_JsonModel):
    name: Text
    step_s: Seconds = 0.0
    choice: Text = ""
    peak_bytes: Bytes = 0.0
    fits: bool = True
    recompute: bool = False
    shard_optimizer: bool = False


class _StepWorkModel(_JsonModel):
    samples: Number = 0.0
    tokens: Number = 0.0
    flops: Number = 0.0


class _MovesModel(_JsonModel):
    name: Text
    half: Number | None = None
    as_is: Number
    double: Number | None = None


class _GainModel(_JsonModel):
    baseline: Text
    share: Number
    low: Number
    high: Number
    weakest: Text = ""
    proof: Proof = ""
    moves: tuple[_MovesModel, ...] = ()

    def value(self) -> Gain:
        return Gain(**{**dict(self), "moves": tuple(Moves(**dict(each)) for each in self.moves)})


class _OutlookModel(_JsonModel):
    source: Text
    low_s: Seconds
    high_s: Seconds
    gain: _GainModel | None = None

    def value(self) -> Outlook:
        return Outlook(**{**dict(self), "gain": self.gain.value() if self.gain else None})


class PlanModel(_JsonModel):
    """A plan file."""

    format: Literal["spindle.plan"] = "spindle.plan"
    version: Literal[1] = 1
    num_devices: Count
    devices_per_node: Count
    method: Text
    makespan_s: Seconds
    lower_bound_s: Seconds = 0.0
    planner_s: Seconds = 0.0
    baselines_s: NameTable = {}
    reduction_s: Seconds = 0.0
    update_s: Seconds = 0.0
    step_s: Seconds = 0.0
    baseline_steps_s: NameTable = {}
    memory: _MemoryModel = _MemoryModel()
    recompute: bool = False
    shard_optimizer: bool = False
    shard_parameters: tuple[Text, ...] = ()
    waves: tuple[_WaveModel, ...]
    certificate: _CertificateModel | None = None
    cluster: _ClusterModel | None = None
    spread: _StepSpreadModel | None = None
    sizes: tuple[_SizeRangeModel, ...] = ()
    alternatives: tuple[_AlternativeModel, ...] = ()
    work: _StepWorkModel | None = None
    fixed_s: Seconds = 0.0
    outlook: _OutlookModel | None = None
    task_sets: tuple[_SetStepModel, ...] = ()
    turns: tuple[tuple[Text, ...], ...] = ()
    bucket_bytes: Amount = BUCKET_BYTES
    workload: Text = ""
    metagraph: MetaGraphModel | None = None

    @classmethod
    def of(cls, plan: Plan) -> "PlanModel":
        """The model of a value."""
        names = [name for name in cls.model_fields if name not in ("format", "version", "metagraph")]
        metagraph = MetaGraphModel.of(plan.metagraph) if plan.metagraph else None
        return cls(**{name: getattr(plan, name) for name in names}, metagraph=metagraph)

    def value(self) -> Plan:
        """The value, checked."""
        fields = {name: value for name, value in self if name not in ("format", "version")}
        fields |= {
            "baselines_s": sorted_pairs(self.baselines_s),
            "baseline_steps_s": sorted_pairs(self.baseline_steps_s),
            "memory": Memory(**dict(self.memory)),
            "waves": tuple(wave.value() for wave in self.waves),
            "certificate": self.certificate.value() if self.certificate else None,
            "cluster": self.cluster.value() if self.cluster else None,
            "spread": self.spread.value() if self.spread else None,
            "sizes": tuple(SizeRange(**dict(size)) for size in self.sizes),
            "alternatives": tuple(Alternative(**dict(other)) for other in self.alternatives),
            "work": StepWork(**dict(self.work)) if self.work else None,
            "outlook": self.outlook.value() if self.outlook else None,
            "task_sets": tuple(SetStep(**dict(each)) for each in self.task_sets),
            "metagraph": self.metagraph.value() if self.metagraph else None,
        }
        return Plan(**fields)


class _EntryModel(_JsonModel):
    kind: Text
    num_devices: Count
    forward_s: Seconds
    backward_s: Seconds
    peak_bytes: Bytes = 0.0
    bare_forward_s: Seconds = 0.0
    update_s: Seconds = 0.0
    spread: Number = 0.0
    tensor_parallel: Count = 1
    family: Text = ""
    size: Number = 0.0


class _LinkEntryModel(_JsonModel):
    operation: LinkOperation
    level: LinkLevel
    members: Count
    num_bytes: Amount
    seconds: Seconds
    spread: Number = 0.0


class _LoadEntryModel(_JsonModel):
    task: Text
    batch_size: Amount
    seconds: Seconds
    spread: Number = 0.0


class ProfileModel(_JsonModel):
    """A profile file."""

    format: Literal["spindle.profile"] = "spindle.profile"
    version: Literal[1] = 1
    device: Text
    versions: Annotated[dict[Text, Text], BeforeValidator(_table)] = {}
    entries: tuple[_EntryModel, ...]
    links: tuple[_LinkEntryModel, ...] = ()
    loads: tuple[_LoadEntryModel, ...] = ()

    @classmethod
    def of(cls, profile: Profile) -> "ProfileModel":
        """The model of a value."""
        return cls.model_validate(profile)

    def value(self) -> Profile:
        """The value, checked."""
        entries = tuple(ProfileEntry(**dict(entry)) for entry in self.entries)
        links = tuple(LinkEntry(**dict(entry)) for entry in self.links)
        loads = tuple(LoadEntry(**dict(entry)) for entry in self.loads)
        return Profile(self.device, tuple(sorted(self.versions.items())), entries, links, loads)


class _MeasuredStepModel(_JsonModel):
    gpus: Count
    per_gpu_batch: Amount
    seconds: Seconds
    predicted_s: Seconds = 0.0


class CalibrationModel(_JsonModel):
    """A calibration file."""

    format: Literal["spindle.calibration"] = "spindle.calibration"
    version: Literal[1] = 1
    device: Text
    compute: Number = 1.0
    host: Number = 1.0
    network: Number = 1.0
    step_s: Seconds = 0.0
    source: Text = ""
    method: Text = ""
    rows: tuple[_MeasuredStepModel, ...] = ()
    undetermined: tuple[Constant, ...] = ()
    inseparable: tuple[tuple[Constant, Constant], ...] = ()

    @classmethod
    def of(cls, calibration: Calibration) -> "CalibrationModel":
        """The model of a value."""
        return cls.model_validate(calibration)

    def value(self) -> Calibration:
        """The value, checked."""
        fields = {name: value for name, value in self if name not in ("format", "version")}
        return Calibration(**{**fields, "rows": tuple(MeasuredStep(**dict(row)) for row in self.rows)})


class _SpanModel(_JsonModel):
    rank: Count
    kind: SpanKind
    name: Text
    start_s: Seconds
    end_s: Seconds
    task: Text = ""
    component: Text = ""
    metaop: Text = ""
    wave: Count = -1
    num_bytes: Amount = 0
    step: Count = 0


class TraceModel(_JsonModel):
    """A trace file."""

    format: Literal["spindle.trace"] = "spindle.trace"
    version: Literal[1] = 1
    num_ranks: Count
    source: Text
    spans: tuple[_SpanModel, ...]
    peak_bytes: tuple[Amount, ...] = ()

    @classmethod
    def of(cls, trace: Trace) -> "TraceModel":
        """The model of a value."""
        return cls.model_validate(trace)

    def value(self) -> Trace:
        """The value, checked."""
        spans = tuple(Span(**dict(span)) for span in self.spans)
        return Trace(num_ranks=self.num_ranks, source=self.source, spans=spans, peak_bytes=self.peak_bytes)
