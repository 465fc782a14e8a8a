"""Weights: which files a run's weights come from in; ranks' own tensors, in place of those on the meta device, out.

The driver reads headers alone, and refuses before ranks start what does not fit. Each rank opens the files and reads
what its operators need, one tensor at a time; of one that tensor parallelism cuts, no more than its pieces.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from spindle.capture.codes import OperatorCode
from spindle.errors import CheckpointError, WorkloadError
from spindle.inputs.weights import is_exact, places_of
from spindle.runtime.checkpoints.tensor_files import Source, sources_in
from spindle.values.graph import parse_piece
from spindle.workload import Workload


def require_values(workload: Workload) -> None:
    """Raise WorkloadError where a parameter has no values in this process."""
    name = next((name for name, parameter in workload.named_parameters() if parameter.is_meta), None)
    if name is not None:
        raise WorkloadError(
            f"component {name.partition('.')[0]!r} is on the meta device, and one process, with which runs are "
            "compared, would need all of its weights; verify a smaller model of the same kind, built in memory"
        )


def sources_of(workload: Workload, checkpoint: Path | None = None) -> dict[str, Source]:
    """Where the parameters of a workload lie that are on the meta device: in a checkpoint, or in the files that the
    components name.

    Raises WorkloadError for a component without files, and where these do not fit; CheckpointError for a checkpoint of
    another model.
    """
    empty = {name: value for name, value in workload.named_parameters() if value.is_meta}
    found: dict[str, Source] = {}
    if checkpoint is not None and empty:
        held = {name.partition(".")[0] for name in sources_in(checkpoint)}
        known = {name: value for name, value in empty.items() if name.partition(".")[0] in held}
        found = _in_checkpoint(checkpoint, known)
        empty = {name: value for name, value in empty.items() if name not in known}  # of components that are new
    names = {id(value): name for name, value in empty.items()}
    for component in workload.components.values():
        own = [name for name in empty if name.partition(".")[0] == component.name]
        if component.weights is None:
            if own:
                raise WorkloadError(
                    f"component {component.name!r} is on the meta device ({own[0]!r} has no values), and nothing tells "
                    f"where its weights are; give component({component.name!r}, ..., weights=FOLDER), as "
                    "save_pretrained writes it"
                )
            continue
        places = places_of(component.name, component.module, component.weights)
        for path, parameter in component.module.named_parameters():
            name = names.get(id(parameter))
            if name is not None and path in places:
                found.setdefault(name, Source({name: places[path]}, parameter.dtype))
    return found


def weights_of_run(workload: Workload, checkpoint: Path | None, *, saves: bool) -> dict[str, Source]:
    """See `sources_of`. Raises WorkloadError where trained weights would have no place to go to."""
    found = sources_of(workload, checkpoint)
    if found and not saves:
        name = next(iter(found))
        raise WorkloadError(
            f"component {name.partition('.')[0]!r} is on the meta device, so that this process cannot hold its trained "
            "weights; give checkpoints=FOLDER for them (spindle.export writes one of these as save_pretrained does)"
        )
    return found


def _in_checkpoint(path: Path, empty: Mapping[str, nn.Parameter]) -> dict[str, Source]:
    held = sources_in(path)
    for name, parameter in empty.items():
        if name not in held:
            raise CheckpointError(f"{path} has no {name!r}; the model has changed since, so build it as it was")
        stored = next(iter(held[name].parts.values()))
        if held[name].shape != tuple(parameter.shape) or not is_exact(stored.dtype, parameter.dtype):
            raise CheckpointError(
                f"{path}: {name!r} is {held[name].shape} of {stored.dtype} there and {tuple(parameter.shape)} of "
                f"{parameter.dtype} in the model; make the model as it was"
            )
    return {name: replace(held[name], dtype=value.dtype) for name, value in empty.items()}


def own_sources(sources: Mapping[str, Source], codes: Iterable[OperatorCode]) -> dict[str, Source]:
    """Those of the parameters that some codes hold."""
    names = {name for code in codes for _, name in code.parameters}
    return {name: source for name, source in sources.items() if name in names}


class Readable(Protocol):
    """What gives a tensor, or a piece of it, by its name."""

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU."""

    @property
    def identity(self) -> str:
        """What must be alike on all machines."""


def fill(codes: Iterable[OperatorCode], sources: Mapping[str, Readable], device: torch.device) -> None:
    """Put real parameters in place of those of some codes that are on the meta device, one after the other."""
    codes = list(codes)
    real: dict[int, nn.Parameter] = {}
    for code in codes:
        for inner, name in code.parameters:
            parameter = code.module.get_parameter(inner)
            if parameter.is_meta and id(parameter) not in real:
                value: Tensor = sources[parse_piece(name).whole].read(name).to(device)
                real[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    put_parameters(codes, real)


def put_parameters(codes: Iterable[OperatorCode], real: Mapping[int, nn.Parameter]) -> None:
    """Put parameters in place of those of some codes, by the ids of these."""
    for module in (part for code in codes if real for part in code.module.modules()):
        for name, held in module._parameters.items():
            if held is not None and id(held) in real:
                module._parameters[name] = real[id(held)]
