"""Tensor files: safetensors read and written one tensor at a time, so that no more than one is in memory twice.

What a rank needs of a tensor that is cut is read alone: the bytes of its piece, from wherever they lie in the file.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spindle.errors import RunError
from spindle.inputs.weights import DTYPES, Stored, header_of
from spindle.runtime.parallel.names import joined_pieces, piece_of, whole_name
from spindle.values.graph import parse_piece

ABOUT = "spindle.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter lies: as a whole, under its own name, or in pieces under the names of these. `dtype`: the type
    that it has in the model, which holds all that the files do.
    """

    parts: Mapping[str, Stored]
    dtype: torch.dtype

    def read(self, name: str) -> Tensor:
        """The tensor, or the piece of it, of that name, on the CPU. Raises RunError where the file has changed."""
        piece = parse_piece(name)
        if name in self.parts:
            found = read_tensor(self.parts[name])
        elif piece.whole in self.parts:
            found = read_tensor(self.parts[piece.whole], name)
        else:
            whole = joined_pieces({part: read_tensor(stored) for part, stored in self.parts.items()})
            found = piece_of(whole[piece.whole], name).clone()
        return found.to(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        name, stored = next(iter(self.parts.items()))
        piece, shape = parse_piece(name), list(stored.shape)
        if piece.span is not None:
            return piece.shape if shape else ()
        if piece.count > 1 and len(shape) > piece.dim:
            shape[piece.dim] = sum(each.shape[piece.dim] for each in self.parts.values())
        return tuple(shape)

    @property
    def identity(self) -> str:
        """What must be alike on all machines: names and places, not folders."""
        return str([(name, s.key, s.shape, str(s.dtype), s.offset) for name, s in sorted(self.parts.items())])


def read_tensor(stored: Stored, name: str = "") -> Tensor:
    """A stored tensor, or the piece of it that `name` names: only its bytes are read."""
    piece, shape = parse_piece(name), list(stored.shape)
    inner = stored.num_bytes
    outer = packs = 1
    size, start = inner, 0
    if piece.span is not None and (shape or not piece.shape):
        low, high = piece.span
        width = stored.num_bytes // max(1, torch.Size(shape).numel())
        size, start, shape = (high - low) * width, low * width, [high - low]
    elif piece.count > 1 and len(shape) > piece.dim:
        packs, outer = piece.packs, torch.Size(shape[: piece.dim]).numel()
        inner = stored.num_bytes // max(1, outer * packs)
        size = inner // piece.count
        start = piece.index * size
        shape[piece.dim] //= piece.count
    found = torch.empty(shape, dtype=stored.dtype)
    view = memoryview(_bytes_of(found))
    try:
        with open(stored.file, "rb", buffering=0) as file:
            for run in range(outer * packs):
                _read_into(file.fileno(), view[run * size : (run + 1) * size], stored.offset + run * inner + start)
    except (OSError, EOFError) as error:
        raise RunError(
            f"{stored.file}: {stored.key!r} cannot be read ({error}); all machines must see the same files, which stay "
            "as they are while a run starts"
        ) from error
    return found


def _read_into(handle: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if not count:
            raise EOFError("it is shorter than before")
        done += count


def _bytes_of(tensor: Tensor) -> "memoryview | bytearray":
    """The memory of a contiguous tensor on the CPU."""
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return bytearray()
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # of numpy's stubs


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: `get` gives it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Entry":
        """That of a tensor at hand."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @classmethod
    def read_from(cls, source: Source, name: str) -> "Entry":
        """That of a whole tensor that other files hold."""
        return cls(source.shape, source.dtype, lambda: source.read(name))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.num_bytes],
        }
        end += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            tensor = entry.get().detach().to("cpu").contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
            file.write(_bytes_of(tensor))


def listed_in(folder: Path) -> list[Path]:
    """The files of tensors that a checkpoint, found whole before, lists; others may lie beside them."""
    names = json.loads((folder / ABOUT).read_text())["files"]
    return [folder / name for name in sorted(names) if name.endswith(".safetensors")]


def sources_in(folder: Path) -> dict[str, Source]:
    """Where each tensor of a checkpoint lies; what is in pieces, under the name of the whole."""
    return sources_of_files(listed_in(folder))


def sources_of_files(files: Iterable[Path]) -> dict[str, Source]:
    """The same of the tensors in some files."""
    parts: dict[str, dict[str, Stored]] = {}
    for file in files:
        for name, stored in header_of(file).items():
            parts.setdefault(whole_name(name), {})[name] = stored
    return {name: Source(found, next(iter(found.values())).dtype) for name, found in parts.items()}


def in_files(entries: Iterable[tuple[str, Entry]], limit_bytes: int) -> Iterator[dict[str, Entry]]:
    """Entries in groups of up to `limit_bytes`, each for a file of its own; a larger one is alone."""
    group: dict[str, Entry] = {}
    for name, entry in entries:
        if group and sum(each.num_bytes for each in group.values()) + entry.num_bytes > limit_bytes:
            yield group
            group = {}
        group[name] = entry
    if group:
        yield group
