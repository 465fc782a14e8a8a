"""Clusters as users write them: `4x8`, `4x8:a100-80g`, or a YAML file, in; a checked Cluster out."""

from collections.abc import Hashable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError

from spindle.errors import ClusterError, FormatError
from spindle.files.filemodels import StrictModel
from spindle.files.filetypes import MOST_YAML_BYTES, Count, Text
from spindle.files.formats import explain_validation, read_text
from spindle.values.cluster import Cluster, Collective, Device, Link, Protocol
from spindle.words.nearest import did_you_mean

DEFAULT_DEVICE = "a100-80g"
_MOST_VALUES = 100_000
_DEEPEST, _LONGEST = 100, 10_000


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # YAML has lists only


# Numbers further apart than that are mistakes of unit, and times that differ by more than 16 digits cannot be added.
_Rate = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=1e-6, le=1, allow_inf_nan=False)]
_Micros = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
_Times = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


class _DeviceModel(StrictModel):
    name: Text
    memory_gib: _Rate
    reserved_gib: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    peak_tflops: _Rate
    memory_bandwidth_gbps: _Rate
    matmul_efficiency: _Share = 0.8
    attention_efficiency: _Share = 0.3
    elementwise_traffic: _Times = 5.0
    eager_traffic: _Times = 0.0
    kernels_per_matmul: _Times = 3.5
    overlap_cost: _Times = 1.0
    launch_us: _Micros = 2.5
    parallel_units: Annotated[int, Field(ge=0, le=10**6)] = 108
    float32_rate: Annotated[float, Field(ge=1e-3, le=1, allow_inf_nan=False)] = 0.5
    full_float32_rate: Annotated[float, Field(ge=1e-3, le=1, allow_inf_nan=False)] = 0.0625
    host_bandwidth_gbps: _Rate = 25.0

    def value(self) -> Device:
        if self.reserved_gib >= self.memory_gib:
            raise ClusterError(
                f"device {self.name!r}: reserved_gib is {self.reserved_gib:g} of {self.memory_gib:g} in memory_gib, "
                "which leaves nothing for tensors; give less"
            )
        same = ["matmul_efficiency", "attention_efficiency", "elementwise_traffic", "eager_traffic", "overlap_cost"]
        same += ["kernels_per_matmul", "parallel_units", "float32_rate", "full_float32_rate"]
        return Device(
            name=self.name,
            memory_bytes=(self.memory_gib - self.reserved_gib) * 2**30,
            reserved_bytes=self.reserved_gib * 2**30,
            peak_flops=self.peak_tflops * 1e12,
            memory_bytes_per_s=self.memory_bandwidth_gbps * 1e9,
            launch_s=self.launch_us * 1e-6,
            host_bytes_per_s=self.host_bandwidth_gbps * 1e9,
            **{name: getattr(self, name) for name in same},
        )


class _ProtocolModel(StrictModel):
    latency_us: _Micros
    hop_us: _Micros = 0.0
    bandwidth_gbps: _Rate
    in_network: bool = False
    operation: Collective | None = None
    from_kib: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] = 0.0

    def value(self) -> Protocol:
        return Protocol(
            latency_s=self.latency_us * 1e-6,
            hop_s=self.hop_us * 1e-6,
            bytes_per_s=self.bandwidth_gbps * 1e9,
            in_network=self.in_network,
            operation=self.operation,
            from_bytes=self.from_kib * 2**10,
        )


class _LinkModel(StrictModel):
    bandwidth_gbps: _Rate
    node_bandwidth_gbps: _Rate | None = None
    latency_us: _Micros = 0.0
    protocols: Annotated[tuple[_ProtocolModel, ...], BeforeValidator(_as_tuple)] = ()

    def value(self) -> Link:
        return Link(
            bytes_per_s=self.bandwidth_gbps * 1e9,
            node_bytes_per_s=None if self.node_bandwidth_gbps is None else self.node_bandwidth_gbps * 1e9,
            latency_s=self.latency_us * 1e-6,
            protocols=tuple(protocol.value() for protocol in self.protocols),
        )


class _DeviceTypeModel(StrictModel):
    """A built-in device type: the device, and the links it usually comes with."""

    device: _DeviceModel
    intra_node: _LinkModel
    inter_node: _LinkModel


class _ClusterModel(StrictModel):
    nodes: Count = 1
    devices_per_node: Count
    device: Annotated[
        Annotated[_DeviceModel, Tag("(type)")] | Annotated[Text, Tag("(name)")],
        Discriminator(lambda value: "(type)" if isinstance(value, dict) else "(name)"),
    ]
    intra_node: _LinkModel | None = None
    inter_node: _LinkModel | None = None


def parse_cluster(text: str) -> Cluster:
    """Cluster from `4x8` (nodes x devices per node), `4x8:a100-80g`, `8` (one node), or the path of a YAML file.

    A device type may leave its memory out where there is one of that name only: `h100` is `h100-80g`.

    Raises ClusterError when the text is none of these, FormatError when the file is malformed.
    """
    if text.endswith((".yaml", ".yml")):
        return _read_cluster(text)
    shape, _, device = text.partition(":")
    nodes, _, per_node = shape.rpartition("x")
    try:
        counts = (int(nodes or 1), int(per_node))
    except ValueError:
        raise ClusterError(
            f"cluster {text!r} is not NODESxDEVICES; write 4x8, 4x8:{DEFAULT_DEVICE}, or the name of a .yaml file"
        ) from None
    kind = _device_type(device or DEFAULT_DEVICE)
    return Cluster(
        nodes=counts[0],
        devices_per_node=counts[1],
        device=kind.device.value(),
        intra_node=kind.intra_node.value(),
        inter_node=kind.inter_node.value(),
    )


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file; errors as `parse_yaml`, and FormatError when the file cannot be read."""
    return parse_yaml(read_text(path, MOST_YAML_BYTES), source=str(path))


def parse_yaml(text: str, *, source: str = "text") -> Any:
    """Parse YAML with the safe loader; raises FormatError when it is not YAML, gives one key twice, or would take long:
    libraries need the square of the depth, of the keys of one mapping, and of the digits of a number.
    """
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc, valid-type]
        pass

    def mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):  # a few lines of them make a mapping that takes all memory
                raise FormatError(f"{source}: '<<' stands {_place(node)}; write out what it would merge")
            key = loader.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # others are refused below
                if key in seen:  # YAML would keep the last value and say nothing
                    raise FormatError(f"{source}: key {key!r} stands twice {_place(node)}; keep one")
                seen.add(key)
        return dict(loader.construct_mapping(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        _check_size(yaml.parse(text, base), source)
        value = yaml.load(text, Loader)  # Loader is a SafeLoader
    except FormatError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # numbers of thousands of digits, dates of no calendar
        raise FormatError(f"{source}: not YAML ({' '.join(str(error).split())}); mend that line") from None
    if not _is_small(value):
        raise _too_many(source)
    return value


def _check_size(events: Iterable[Any], source: str) -> None:
    """Raises FormatError as soon as a YAML text has too many values, one that is too long, or is nested too deep."""
    import yaml

    depth = values = 0
    for event in events:
        values += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if values > _MOST_VALUES:
            raise _too_many(source)
        if depth > _DEEPEST:
            raise FormatError(f"{source}: not YAML that can be read (nested deeper than {_DEEPEST}); make it flatter")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LONGEST:
            raise FormatError(
                f"{source}: a value that begins {event.value[:40]!r} has more than {_LONGEST} characters; shorten it"
            )


def _too_many(source: str) -> FormatError:
    return FormatError(
        f"{source}: holds more than {_MOST_VALUES} values, with the values that `*` repeats; write out what is meant"
    )


def _is_small(value: Any) -> bool:
    """Whether a value can be gone through: a few lines of anchors and aliases make one that takes all memory."""
    waiting, count = [value], 0
    while waiting and count <= _MOST_VALUES:
        part = waiting.pop()
        count += 1
        if isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return count <= _MOST_VALUES


def _place(node: Any) -> str:
    return f"in the mapping that begins at line {node.start_mark.line + 1}"


@cache
def device_types() -> Mapping[str, Any]:
    """The built-in device types by name, read once: parsing the file takes tens of milliseconds."""
    return MappingProxyType(read_yaml(Path(__file__).with_name("devices.yaml")))


def _device_type(name: str) -> _DeviceTypeModel:
    types = device_types()
    wanted = name.lower()
    fitting = [wanted] if wanted in types else [each for each in types if each.startswith(f"{wanted}-")]
    if len(fitting) > 1:
        raise ClusterError(f"device type {name!r} has several sizes of memory; write {' or '.join(fitting)}")
    if not fitting:
        stems = (each.partition("-")[0] for each in types)
        hint = did_you_mean(name, [*types, *stems])
        raise ClusterError(f"device type {name!r} is not known{hint}; the types are {', '.join(sorted(types))}")
    return _DeviceTypeModel.model_validate(types[fitting[0]])


def _read_cluster(path: str) -> Cluster:
    data = read_yaml(path)
    try:
        model = _ClusterModel.model_validate(data)
    except ValidationError as error:
        raise FormatError(f"{path}: {explain_validation(error, _ClusterModel)}") from None
    if isinstance(model.device, str):
        kind = _device_type(model.device)
        device, intra, inter = kind.device, model.intra_node or kind.intra_node, model.inter_node or kind.inter_node
    elif model.intra_node is None:
        raise FormatError(f"{path}: intra_node is missing; add intra_node: {{bandwidth_gbps: ..., latency_us: ...}}")
    else:
        device, intra, inter = model.device, model.intra_node, model.inter_node or model.intra_node
    try:
        return Cluster(
            nodes=model.nodes,
            devices_per_node=model.devices_per_node,
            device=device.value(),
            intra_node=intra.value(),
            inter_node=inter.value(),
        )
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from None
