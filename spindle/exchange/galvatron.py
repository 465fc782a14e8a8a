"""Galvatron profiles in, with a YAML file that says which layer type is which component; a MetaGraph with costs out.

Galvatron (PKU-DAIR/Hetu-Galvatron) writes two JSON files for each model:

- computation: "layertype_0_bsz8_seq2048": milliseconds of the forward of ONE layer for ONE sample, measured with eight
  samples on one device; "layertype_other_bsz8_seq2048": the same of all that is no layer (embedding, head).
- memory: "layertype_0" or "layertype_0_sp", then by sequence length: `parameter_size`, a quarter of a layer's weights,
  gradients and optimizer states, and `tp_activation_per_bsz_dict`, activations of a sample by tensor-parallel degree;
  "other_memory_pp_off" or "..._sp": `model_states` and `activation` of all that is no layer. All in MiB.

Times on several devices are those of data parallelism: each device computes its share of the batch.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from spindle.errors import FormatError
from spindle.files.clusterfile import read_yaml
from spindle.files.filemodels import StrictModel
from spindle.files.filetypes import Text
from spindle.files.formats import explain_validation, parse_json, read_text
from spindle.spec.values import stages_to_edges
from spindle.values.metagraph import Flow, MetaGraph, MetaOp, points

MIB = 2.0**20
STATE_COPIES = 4.0  # Galvatron: weights, gradients, optimizer states are four times parameter_size
PARAMETER_BYTES = 4.0  # and parameter_size has four bytes for a parameter
_MOST = 1e12  # milliseconds, or MiB
_TIME = re.compile(r"layertype_(?P<layertype>\d{1,9}|other)_bsz(?P<batch>\d{1,9})_seq(?P<seq>\d{1,12})")


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value  # YAML has lists only


class _Component(StrictModel):
    """layers of one type: which files measured them, and what the files do not say."""

    computation: Text
    memory: Text | None = None
    layertype: int = Field(0, ge=0, le=10**7)
    layers: int = Field(ge=1, le=10**7)
    seq: int = Field(ge=1, le=2**40)
    hidden: int = Field(0, ge=0, le=2**40)
    other: Literal["before", "after", "none"] = "after"


class _Task(StrictModel):
    batch_size: int = Field(ge=1, le=2**20)
    flow: Annotated[tuple[tuple[Text, ...], ...], BeforeValidator(_tuple), Field(min_length=1)]


class _Mapping(StrictModel):
    format: Literal["spindle.galvatron"]
    version: Literal[1]
    backward_over_forward: float = Field(2.0, gt=0, le=1e6)
    value_bytes: int = Field(2, ge=1, le=64)
    components: dict[Text, _Component] = Field(min_length=1)
    tasks: dict[Text, _Task] = Field(min_length=1)


def read_galvatron(path: str | Path) -> MetaGraph:
    """The MetaGraph that a mapping file describes; profiles stand beside it.

    Raises FormatError that names the file and the key for whatever is missing, unknown or no positive number.
    """
    try:
        mapping = _Mapping.model_validate(read_yaml(path))
    except ValidationError as error:
        raise FormatError(f"{path}: {explain_validation(error, _Mapping)}") from None
    pieces = {name: _pieces(name, c, Path(path).parent) for name, c in mapping.components.items()}
    metaops: list[MetaOp] = []
    flows: list[Flow] = []
    for name, task in mapping.tasks.items():
        components = [component for stage in task.flow for component in stage]
        for component in components:
            if component not in pieces:
                known = ", ".join(pieces)
                raise FormatError(f"{path}: tasks.{name}.flow names {component!r}; the components are {known}")
            if components.count(component) > 1:
                rule = "a component stands once in a task"
                raise FormatError(f"{path}: tasks.{name}.flow names {component!r} twice; {rule}")
        ends = {}
        for component in components:
            chain = [piece.metaop(name, task.batch_size, mapping) for piece in pieces[component]]
            metaops += chain
            flows += [Flow(a.name, b.name) for a, b in pairwise(chain)]
            ends[component] = chain[0].name, chain[-1].name
        flows += [Flow(ends[edge.source][1], ends[edge.target][0]) for edge in stages_to_edges(task.flow)[1]]
    return MetaGraph(tuple(metaops), tuple(flows))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Layers of one type, or all that is no layer, as measured.

    total_ms         (samples, milliseconds): forward of one layer, samples rising
    values           numbers of a sample that one layer hands to the next
    state_mib        weights, gradients and optimizer states of a layer; 0: not known
    activation_mib   of a layer and a sample
    """

    component: str
    name: str
    layers: int
    total_ms: tuple[tuple[int, float], ...]
    values: int
    state_mib: float = 0.0
    activation_mib: float = 0.0

    def forward_ms(self, samples: int) -> float:
        """One layer's forward of a number of samples: between measured batches on a line, beyond them in proportion."""
        at = bisect_left(self.total_ms, (samples, 0.0))
        if at == len(self.total_ms) or at == 0:
            batch, total = self.total_ms[min(at, len(self.total_ms) - 1)]
            return total * samples / batch
        (low, low_ms), (high, high_ms) = self.total_ms[at - 1 : at + 1]
        return low_ms + (high_ms - low_ms) * (samples - low) / (high - low)

    def metaop(self, task: str, batch_size: int, mapping: _Mapping) -> MetaOp:
        """Its MetaOp in a task: on every number of devices that divides the batch."""
        both = 1 + mapping.backward_over_forward
        counts = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        memory = {n: (self.state_mib + self.activation_mib * (batch_size // n)) * self.layers * MIB for n in counts}
        return MetaOp(
            name=f"{task}.{self.name}",
            task=task,
            component=self.component,
            layers=self.layers,
            layer_time_s=points({n: self.forward_ms(batch_size // n) * both / 1e3 for n in counts}),
            memory_bytes=points(memory if self.state_mib else {}),
            layer_param_bytes=self.state_mib * MIB / STATE_COPIES / PARAMETER_BYTES * mapping.value_bytes,
            layer_state_bytes=self.state_mib * MIB,
            output_bytes=float(batch_size * self.values * mapping.value_bytes),
            parameters=self.name,
            forward_fraction=1 / both,
        )


def _pieces(name: str, component: _Component, folder: Path) -> list[_Piece]:
    """A component's layers, and what is no layer before or after them."""
    layers = _piece(name, name, str(component.layertype), component, folder)
    if component.other == "none":
        return [layers]
    other = _piece(name, f"{name}.other", "other", component, folder)
    return [other, layers] if component.other == "before" else [layers, other]


def _piece(name: str, title: str, layertype: str, component: _Component, folder: Path) -> _Piece:
    times = _times(folder / component.computation, layertype, component.seq)
    state_mib, activation_mib = 0.0, 0.0
    if component.memory is not None:
        state_mib, activation_mib = _memory(folder / component.memory, layertype, str(component.seq))
    return _Piece(
        component=name,
        name=title,
        layers=1 if layertype == "other" else component.layers,
        total_ms=tuple(sorted((batch, batch * per_sample_ms) for batch, per_sample_ms in times.items())),
        values=component.seq * component.hidden,
        state_mib=state_mib,
        activation_mib=activation_mib,
    )


def _times(path: Path, layertype: str, seq: int) -> dict[int, float]:
    """Milliseconds of a sample's forward by the batch they were measured with."""
    data = _object(path)
    matches = [found for key in data if (found := _TIME.fullmatch(key)) and found["layertype"] == layertype]
    times = {int(m["batch"]): _number(data[m[0]], path, m[0]) for m in matches if int(m["seq"]) == seq}
    for batch, per_sample_ms in times.items():
        if not (batch and per_sample_ms):
            what = f"layertype_{layertype}_bsz{batch}_seq{seq}"
            remedy = "; or give the component other: none" if layertype == "other" else ""
            raise FormatError(f"{path}: {what} is {per_sample_ms!r}; measure a batch of one sample or more{remedy}")
    if times:
        return times
    seqs = ", ".join(sorted({m["seq"] for m in matches}, key=int))
    has = f"it has seq {seqs}; give one of these" if seqs else "let Galvatron process its measurements"
    remedy = ", or the component other: none" if layertype == "other" else ""
    raise FormatError(f"{path}: no key layertype_{layertype}_bsz*_seq{seq}; {has}{remedy}")


def _memory(path: Path, layertype: str, seq: str) -> tuple[float, float]:
    """MiB of a layer's states, and of its activations for a sample, without tensor parallelism."""
    data = _object(path)
    if layertype == "other":
        other = ("other_memory_pp_off", seq)
        return _at(data, path, *other, "model_states", "1"), _at(data, path, *other, "activation", "1")
    own = (f"layertype_{layertype}", seq)
    states_mib = STATE_COPIES * _at(data, path, *own, "parameter_size")
    return states_mib, _at(data, path, *own, "tp_activation_per_bsz_dict", "1")


def _at(data: Mapping[str, Any], path: Path, name: str, *keys: str) -> float:
    """A number in nested objects; the first name may end in _sp, for sequence parallelism."""
    first = name if name in data else f"{name}_sp"
    value: Any = data
    for depth, key in enumerate((first, *keys)):
        if not isinstance(value, Mapping) or key not in value:
            where = ".".join((name, *keys)[: depth + 1])
            has = ", ".join(value) if depth and isinstance(value, Mapping) else ""
            raise FormatError(f"{path}: no key {where}; {f'it has {has}' if has else 'check layertype and seq'}")
        value = value[key]
    return _number(value, path, ".".join((first, *keys)))


def _object(path: Path) -> Mapping[str, Any]:
    data = parse_json(read_text(path), source=str(path))
    if not isinstance(data, Mapping):
        raise FormatError(f"{path}: is a {type(data).__name__}, not an object of measurements; give Galvatron's file")
    return data


def _number(value: Any, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise FormatError(f"{path}: {key} is {value!r}; it must be a number from 0 to {_MOST:g}, measure it again")
    return float(value)
