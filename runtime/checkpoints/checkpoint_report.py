"""Reports on checkpoints: what a folder holds, whether it is whole, and how two checkpoints differ, by tensor."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from spindle.errors import CheckpointError
from spindle.inputs.same import same_numbers
from spindle.runtime.checkpoints.checkpoint import about_of, checkpoints_in, read, step_of
from spindle.runtime.checkpoints.tensor_files import Source, sources_in


@dataclass(frozen=True, slots=True)
class Row:
    """A checkpoint of a folder. `problem`: why it is not whole, or ""; `written_s`: since 1970."""

    path: Path
    step: int
    run: str = ""
    seed: int = 0
    num_files: int = 0
    num_bytes: int = 0
    written_s: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that two checkpoints do not have alike: the largest distance of two numbers, where both have it."""

    name: str
    kind: Literal["differs", "only in the first", "only in the second", "another shape"]
    largest: float = 0.0


def rows_of(directory: Path, *, verify: bool = False) -> list[Row]:
    """The checkpoints of a folder, by steps; every byte of their files is checked when `verify`.

    Raises CheckpointError for a folder without any.
    """
    found = checkpoints_in(directory)
    if not found:
        raise CheckpointError(f"{directory} holds no checkpoints; give the folder of a run, with step-... in it")
    return [_row(path, verify=verify) for path in found]


def _row(path: Path, *, verify: bool) -> Row:
    try:
        said = about_of(path)
        if verify:
            read(path)
    except CheckpointError as error:
        return Row(path, step_of(path), problem=str(error).removesuffix("; take an older checkpoint"))
    problem = ""
    for name, (size, _) in said.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            problem = f"{file} is {'changed or cut short' if file.is_file() else 'missing'}"
    num_bytes = sum(size for size, _ in said.files.values())
    return Row(path, said.step, said.run, said.seed, len(said.files), num_bytes, path.stat().st_mtime, problem)


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """Tensors that two whole checkpoints do not have alike, one after the other in memory; NaN equals NaN.

    Raises CheckpointError where one of them is not whole.
    """
    for path in (first, second):
        read(path)
    ours, theirs = sources_in(first), sources_in(second)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            yield Difference(name, "only in the first")
        elif name not in ours:
            yield Difference(name, "only in the second")
        else:
            yield from _difference(name, ours[name], theirs[name])


def _difference(name: str, ours: Source, theirs: Source) -> Iterator[Difference]:
    if ours.shape != theirs.shape:
        yield Difference(name, "another shape")
        return
    one, other = ours.read(name), theirs.read(name)
    if not same_numbers(one, other):
        wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
        one, other = one.to(wide), other.to(wide)
        far = (one - other).abs().masked_fill((one == other) | (one.isnan() & other.isnan()), 0.0)
        far = far.nan_to_num(nan=math.inf, posinf=math.inf)  # a number where the other has none
        yield Difference(name, "differs", float(far.max()) if far.numel() else 0.0)


def count_tensors(path: Path) -> int:
    """Tensors that a checkpoint holds."""
    return len(sources_in(path))
