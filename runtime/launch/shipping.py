"""Shipping: how weights that are in the driver's memory come to the ranks; each gets its own tensors alone.

- To processes of this machine by a file that the driver writes once, one tensor after the other; each rank reads what
  it holds, and the file goes when all have started. Small models travel in the rank specs.
- To other machines in the rank specs, of tensors that tensor parallelism cuts only the rank's pieces.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from spindle.record.travel import meta_parameter
from spindle.runtime.checkpoints.tensor_files import Entry, Source, sources_of_files, write_tensors
from spindle.runtime.parallel.names import piece_of
from spindle.runtime.rank_spec import RankSpec
from spindle.runtime.steps.flats import ranges_by_parameter

SMALL_BYTES = 16 * 2**20  # of weights in all, that travel in the rank specs


@dataclass(frozen=True)
class Carried:
    """The pieces of a parameter that one rank holds, by name."""

    parts: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        """The piece of that name."""
        return self.parts[name]

    @property
    def identity(self) -> str:
        """See Source."""
        return str([(name, tuple(value.shape), str(value.dtype)) for name, value in self.parts.items()])


class _LeavesBehind(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends some parameters, by id, as their shapes."""

    def __init__(self, buffer: io.BytesIO, ids: frozenset[int]) -> None:
        super().__init__(buffer)
        self.ids = ids

    def reducer_override(self, value: Any) -> Any:
        """Those parameters become meta parameters."""
        if isinstance(value, nn.Parameter) and id(value) in self.ids:
            return meta_parameter, (tuple(value.shape), value.dtype, value.requires_grad)
        return super().reducer_override(value)


def dumped(value: Any, ids: frozenset[int]) -> bytes:
    """Anything as bytes for `cloudpickle.loads`, without the numbers of the parameters of these ids."""
    buffer = io.BytesIO()
    _LeavesBehind(buffer, ids).dump(value)
    return buffer.getvalue()


def parameters_of(spec: RankSpec) -> dict[str, nn.Parameter]:
    """The parameters of a rank spec that are in memory, by their whole names."""
    named = (
        (name, code.module.get_parameter(inner)) for code in spec.codes.values() for inner, name in code.parameters
    )
    return {name: parameter for name, parameter in named if not parameter.is_meta}


@contextlib.contextmanager
def on_this_machine(specs: Sequence[Any]) -> Iterator[list[tuple[Any, frozenset[int]]]]:
    """Rank specs that read their weights from a file, with the ids of the parameters that stay behind; while open, the
    file is there. Rank specs of other kinds, those of small models, and all where there is no room for the file, are as
    they were.
    """
    held: dict[str, nn.Parameter] = {}
    for spec in specs if all(isinstance(spec, RankSpec) for spec in specs) else ():
        held |= parameters_of(spec)
    with tempfile.TemporaryDirectory(prefix="spindle-") as folder:
        sources = None
        if sum(value.nbytes for value in held.values()) >= SMALL_BYTES:
            with contextlib.suppress(OSError):
                file = Path(folder) / "weights.safetensors"
                write_tensors(file, {name: Entry.of(value) for name, value in held.items()})
                sources = sources_of_files([file])
        yield [(spec, frozenset()) if sources is None else _reading(spec, sources) for spec in specs]


def _reading(spec: RankSpec, sources: Mapping[str, Source]) -> tuple[RankSpec, frozenset[int]]:
    own = parameters_of(spec)
    light = replace(spec, weights={**spec.weights, **{name: sources[name] for name in own}})
    return light, frozenset(map(id, own.values()))


def carrying(spec: Any) -> tuple[Any, frozenset[int]]:
    """A rank spec that brings along of each parameter that is cut or sharded only what the rank holds."""
    if not isinstance(spec, RankSpec) or not (spec.cuts or spec.program.flats):
        return spec, frozenset()
    held = parameters_of(spec)
    names = {name: [own for _, own in cut.names()] for name, cut in spec.cuts.items()}
    names |= ranges_by_parameter(spec.program, {name: value.shape for name, value in held.items()}, spec.rank)
    cut = {name: parameter for name, parameter in held.items() if name in names}
    carried = {
        name: Carried({own: _copied(piece_of(parameter.detach(), own)) for own in names[name]})
        for name, parameter in cut.items()
    }
    return replace(spec, weights={**spec.weights, **carried}), frozenset(map(id, cut.values()))


def _copied(piece: Tensor) -> Tensor:
    """A piece with memory of its own: a view would bring the whole along."""
    return piece.clone(memory_format=torch.contiguous_format)
