"""Names: parameters in pieces, each piece a parameter of its own with a name of its own.

- Tensor parallelism cuts along a dimension. A rank holds the pieces that its slices need, each with its own group of
  ranks: so gradients are reduced, clipped, updated and saved as those of any parameter, whatever the layouts of the
  slices that share it.
- Where parameters are sharded a rank keeps a range of their numbers, which is a piece of one dimension.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spindle.capture.codes import Captured, OperatorCode
from spindle.runtime.programs.program import Program
from spindle.values.graph import Parameter, PiecePlace, parse_piece

_PIECE = re.compile(r"@(\d+)/(\d+)/(\d+)(?:x(\d+))?")
_RANGE = re.compile(r"@\d+-\d+/[\dx]*")


def joined_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with pieces put together under the parameter's own name. A number a piece, as Adam's step, is one."""
    whole: dict[str, Tensor] = {}
    parts: dict[tuple[str, int, int], dict[int, Tensor]] = {}
    ranges: dict[str, list[tuple[PiecePlace, Tensor]]] = {}
    for name, tensor in tensors.items():
        found, span = _PIECE.search(name), _RANGE.search(name)
        if span is not None:
            ranges.setdefault(whole_name(name), []).append((parse_piece(span[0]), tensor))
        elif found is None:
            whole[name] = tensor
        else:
            index, _, dim, packs = map(int, found.groups(default=1))
            parts.setdefault((whole_name(name), dim, packs), {})[index] = tensor
    for (name, dim, packs), pieces in parts.items():
        ordered = [pieces[index] for index in sorted(pieces)]
        whole[name] = join(ordered, dim, packs) if ordered[0].ndim > dim else ordered[0]
    return whole | {name: _in_a_row(found) for name, found in ranges.items()}


def _in_a_row(found: Sequence[tuple[PiecePlace, Tensor]]) -> Tensor:
    """Ranges of one tensor as the whole of it."""
    ordered = sorted(found, key=lambda pair: pair[0].span or ())
    place, first = ordered[0]
    return torch.cat([part for _, part in ordered]).reshape(place.shape) if first.ndim else first


def join(pieces: Sequence[Tensor], dim: int, packs: int) -> Tensor:
    """Pieces side by side along `dim`, or where it holds `packs` tensors, each piece's part of the first, then of the
    next.
    """
    return torch.cat([torch.unflatten(piece, dim, (packs, -1)) for piece in pieces], dim + 1).flatten(dim, dim + 1)


def whole_name(name: str) -> str:
    """Parameter name without its shard suffix."""
    return _RANGE.sub("", _PIECE.sub("", name))


def piece_of(whole: Tensor, name: str) -> Tensor:
    """The part of a parameter, or of a state of its shape, that `name` names."""
    piece = parse_piece(name)
    if piece.span is not None:
        return whole.reshape(-1)[slice(*piece.span)] if whole.ndim or not piece.shape else whole
    if piece.count == 1 or whole.ndim <= piece.dim:
        return whole
    dim, size = piece.dim, whole.shape[piece.dim] // piece.packs // piece.count
    parts = torch.unflatten(whole, dim, (piece.packs, -1)).narrow(dim + 1, piece.index * size, size)
    return parts.flatten(dim, dim + 1)


def put_piece(whole: Tensor, name: str, value: Tensor) -> None:
    """Write the part of a parameter that `name` names in its place."""
    piece = parse_piece(name)
    if piece.span is not None:
        row = whole.detach().reshape(-1)  # a copy where it does not lie in a row
        row[slice(*piece.span)] = value.to(row.device)
        whole.copy_(row.view(whole.shape))
        return
    if piece.count == 1 or whole.ndim <= piece.dim:
        whole.copy_(value)
        return
    dim, size = piece.dim, whole.shape[piece.dim] // piece.packs // piece.count
    parts = torch.unflatten(whole, dim, (piece.packs, -1)).narrow(dim + 1, piece.index * size, size)
    parts.copy_(torch.unflatten(value, dim, (piece.packs, -1)))


@dataclass(frozen=True, slots=True)
class Held:
    """Which pieces of a parameter that is cut a rank holds."""

    parameter: Parameter
    indices: tuple[int, ...]

    def names(self) -> list[tuple[int, str]]:
        """Index and name of each."""
        every = self.parameter.names()
        return [(index, every[index]) for index in self.indices]


def held_by_rank(program: Program, captured: Captured) -> list[dict[str, Held]]:
    """For each rank the pieces that its slices need of each parameter that is cut; one pass over the slices."""
    indices: list[dict[str, set[int]]] = [{} for _ in range(program.num_ranks)]
    cut: dict[str, Parameter] = {}
    for run in program.slices:
        here = {p.name: p for name in run.operators for p in captured.graph.by_name[name].parameters if p.pieces > 1}
        cut |= here
        for place, rank in enumerate(run.ranks) if here else ():
            for parameter in here.values():
                indices[rank].setdefault(parameter.name, set()).update(
                    parameter.indices(place % run.tensor_parallel, run.tensor_parallel)
                )
    return [{name: Held(cut[name], tuple(sorted(found))) for name, found in held.items()} for held in indices]


def held_names(
    codes: Iterable[OperatorCode], pieces: Mapping[str, Held], ranges: Mapping[str, Sequence[str]]
) -> list[str]:
    """Parameters, pieces of parameters and buffers that a rank with these codes and pieces holds; of sharded ones the
    `ranges` that it keeps.
    """
    names: dict[str, None] = {}
    for code in codes:
        for _, name in (*code.parameters, *code.buffers):
            held = [own for _, own in pieces[name].names()] if name in pieces else ranges.get(name, [name])
            names.update(dict.fromkeys(held))
    return list(names)
