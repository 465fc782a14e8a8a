"""Weights: a folder of safetensors in; where each parameter of a module lies in it out. No tensor is read here.

The layout is that of `save_pretrained`: `model.safetensors`, or `model.safetensors.index.json` that names several
files; or a folder with one other file or index of these kinds, as other libraries write them.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spindle.errors import WorkloadError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types as the headers of safetensors call them."""

_MOST = 2**60  # numbers in a shape, multiplied: torch counts them in 64 bits
LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself takes

Rename = Mapping[str, str | None] | Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Weights:
    """Files that hold the weights of a component.

    `folder`: as `save_pretrained` writes it. `prefix`: only keys that begin with it count, and go on without it
    ("vision_tower."). `rename`: the module's name for a key, where they differ: a dict for the keys it holds, or a
    function for all keys; None leaves a key out.
    """

    folder: Path | str
    prefix: str = ""
    rename: Rename | None = None

    def name_of(self, key: str) -> str | None:
        """The module's name for a key of the files; None where it is left out."""
        if not key.startswith(self.prefix):
            return None
        own = key[len(self.prefix) :]
        if self.rename is None:
            return own
        return self.rename(own) if callable(self.rename) else self.rename.get(own, own)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: bytes of a file from `offset` on."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(file: Path) -> dict[str, Stored]:
    """The tensors of one file by key. Raises WorkloadError where it is not whole, or no safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise ValueError("its header does not fit into it")
            header: Mapping[str, Any] = json.loads(stream.read(length))
        found = {key: _stored(str(file), key, entry, 8 + length) for key, entry in header.items() if key[:2] != "__"}
    except OSError as error:
        raise WorkloadError(f"{file}: cannot be read ({error.strerror}); give a folder of safetensors") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WorkloadError(f"{file}: is no safetensors file ({error}); write it again with save_pretrained") from None
    end = max((stored.offset + stored.num_bytes for stored in found.values()), default=0)
    if end > size:
        raise WorkloadError(f"{file}: has {size} bytes of {end}; it was cut short, so fetch or write it again")
    return found


def _stored(file: str, key: str, entry: Mapping[str, Any], start: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{key!r} is of type {entry['dtype']}")
    low, high = entry["data_offsets"]
    shape = entry["shape"]
    whole = all(type(number) is int and number >= 0 for number in (*shape, low, high))
    if not whole or math.prod(filter(None, shape)) >= _MOST:
        raise ValueError(f"{key!r} has shape {shape} and lies at {low} to {high}, which no tensor does")
    found = Stored(file, key, tuple(shape), DTYPES[entry["dtype"]], start + low)
    if found.num_bytes != high - low:
        raise ValueError(f"{key!r} has {high - low} bytes, and {found.num_bytes} by its shape")
    return found


def stored_in(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by key.

    Raises WorkloadError where it holds no weights, or not all that its index names.
    """
    if not folder.is_dir():
        raise WorkloadError(
            f"weights {str(folder)!r} is no folder on this machine; give one that save_pretrained wrote (a model of "
            "the hub is fetched first: huggingface_hub.snapshot_download)"
        )
    index = _only(folder, "model.safetensors.index.json", "*.safetensors.index.json")
    if index is None:
        file = _only(folder, "model.safetensors", "*.safetensors")
        if file is None:
            raise WorkloadError(
                f"weights {str(folder)!r} holds no model.safetensors and no index of several; give a folder that "
                "save_pretrained wrote (other kinds of files, such as .bin, are written anew by it)"
            )
        return header_of(file)
    try:
        places: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkloadError(f"{index}: cannot be read ({error}); write it again with save_pretrained") from None
    found = {}
    for name in files:
        if Path(name).name != name:
            raise WorkloadError(f"{index}: names {name!r}, which is outside of its folder; write it again")
        held = header_of(folder / name)
        missing = next((key for key, file in places.items() if file == name and key not in held), None)
        if missing is not None:
            raise WorkloadError(f"{folder / name}: lacks {missing!r}, which {index.name} promises; fetch it again")
        found.update(held)
    return found


def _only(folder: Path, usual: str, pattern: str) -> Path | None:
    """The file of the usual name, or the only one of a pattern."""
    if (folder / usual).is_file():
        return folder / usual
    found = sorted(folder.glob(pattern))
    return found[0] if len(found) == 1 else None


def places_of(component: str, module: nn.Module, weights: Weights) -> dict[str, Stored]:
    """Where each parameter of a module that is on the meta device lies, and each buffer that the files hold; by the
    name under which `named_parameters` and `named_buffers` list it.

    Raises WorkloadError where a parameter is missing, a key belongs to nothing, or a shape or type does not fit.
    """
    held = _by_name(component, weights)
    aliases = _aliases(module)
    known = {name for names in aliases.values() for name in names}
    _refuse_surplus(component, weights, [name for name in held if name not in known])
    found: dict[str, Stored] = {}
    missing: list[str] = []
    for first, value in (*module.named_parameters(), *module.named_buffers()):
        stored = [held[name] for name in aliases[id(value)] if name in held]
        if not stored:
            missing += [first] if value.is_meta and isinstance(value, nn.Parameter) else []
            continue
        if isinstance(value, nn.Parameter) and not value.is_meta:
            raise WorkloadError(
                f"component {component!r}: {first!r} has values of its own and stands in {weights.folder}, too; build "
                f"the module with parameters on the meta device, or leave it out: rename={{{first!r}: None}}"
            )
        for each in stored:
            _check_fits(component, first, value, each)
        if any(not _same_bytes(stored[0], each) for each in stored[1:]):
            names = [name for name in aliases[id(value)] if name in held]
            raise WorkloadError(
                f"component {component!r}: {names[0]!r} and {names[1]!r} are one tensor in the module and two "
                f"different ones in {weights.folder}; untie them (tie_word_embeddings=False), or leave one out by "
                "rename="
            )
        found[first] = stored[0]
    if missing:
        raise WorkloadError(
            f"component {component!r}: {weights.folder} lacks {_listed(missing)}, which are on the meta device; give a "
            "folder that holds all of them, prefix= or rename= where its keys have other names, or build what is new "
            "outside of the meta device"
        )
    return found


def _by_name(component: str, weights: Weights) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for key, stored in stored_in(Path(weights.folder)).items():
        name = weights.name_of(key)
        if name is None:
            continue
        if name in found:
            raise WorkloadError(
                f"component {component!r}: {found[name].key!r} and {key!r} of {weights.folder} both become {name!r}; "
                "correct rename="
            )
        found[name] = stored
    return found


def _aliases(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by id."""
    found: dict[int, list[str]] = {}
    for name, value in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        found.setdefault(id(value), []).append(name)
    return found


def _refuse_surplus(component: str, weights: Weights, names: list[str]) -> None:
    if names:
        raise WorkloadError(
            f"component {component!r}: {weights.folder} holds {_listed(names)}, which the module does not have; give "
            "prefix= or rename= where its keys have other names, or leave them out: rename={KEY: None}"
        )


def _check_fits(component: str, name: str, value: Tensor, stored: Stored) -> None:
    if stored.shape != tuple(value.shape):
        raise WorkloadError(
            f"component {component!r}: {name!r} is {tuple(value.shape)} in the module and {stored.shape} in "
            f"{stored.file}; build the module by the config that the files were written with"
        )
    if stored.dtype != value.dtype and not is_exact(stored.dtype, value.dtype):
        raise WorkloadError(
            f"component {component!r}: {name!r} is {_called(value.dtype)} in the module and {_called(stored.dtype)} in "
            f"{stored.file}, which it cannot hold exactly; build the module in {_called(stored.dtype)} "
            "(torch.set_default_dtype, dtype= in its config), or write the files in its type"
        )


def is_exact(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a type holds all numbers of another."""
    both = stored.is_floating_point and wanted.is_floating_point
    return stored == wanted or (both and torch.promote_types(stored, wanted) == wanted)


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    every = [repr(name) for name in names]
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def _same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two places hold the same bytes, read in parts."""
    if (one.dtype, one.num_bytes) != (other.dtype, other.num_bytes):
        return False
    with open(one.file, "rb") as a, open(other.file, "rb") as b:
        a.seek(one.offset)
        b.seek(other.offset)
        left = one.num_bytes
        while left > 0:
            size = min(left, 2**22)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True
