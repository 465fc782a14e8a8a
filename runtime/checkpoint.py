"""Checkpoint: what a run holds, on disk under the user's own parameter names, whatever the plan.

    step-00000400/
      spindle.json                              what it is: steps done, seed, files and their checksums
      progress.pt                               where loaders and schedules stand
      shard-00001-model-00001-of-00001.safetensors, one a rank

- Tensors are written by torch.distributed.checkpoint, each by one rank, as safetensors: a parameter or buffer as
  `component.path`, an optimizer state as `optimizer:component.path:key`; what tensor parallelism cuts goes by pieces,
  `component.path@index/count/dimension`. Nothing in a checkpoint is unpickled code.
- A checkpoint is written beside its place and renamed into it when it is whole, so that what has its name is complete.
"""

import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor

from spindle.errors import CheckpointError
from spindle.runtime.parallel.names import joined_pieces, whole_name
from spindle.runtime.progress import Progress
from spindle.workload import Workload

_ABOUT, _PROGRESS = "spindle.json", "progress.pt"
_VERSION = 2  # parameter groups by position; 1 had them by component
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where a run keeps its checkpoints, how often it writes one, and how many it keeps (None: all)."""

    directory: Path
    every: int
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.keep is not None and self.keep < 1):
            raise CheckpointError(f"checkpoints every {self.every} steps, keeping {self.keep}; both must be at least 1")


class _About(BaseModel):
    """`spindle.json`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: str = Field(pattern=r"^spindle\.checkpoint$")
    version: int
    step: int = Field(ge=0)
    seed: int
    files: dict[str, tuple[int, int]] = Field(strict=False)  # bytes and crc32

    @field_validator("version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version != _VERSION:
            raise ValueError(
                f"it is of version {version} and this Spindle reads {_VERSION}: go on with the one that wrote it"
            )
        return version


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    step: int
    seed: int
    progress: Progress


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands."""
    return directory / f"step-{step:08}"


def latest(directory: Path) -> Path | None:
    """The checkpoint of the most steps in a directory, if there is one."""
    return max(_complete(directory), default=None, key=_step_of)


def _complete(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step-*") if _STEP.fullmatch(path.name) and (path / _ABOUT).is_file()]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# -- writing ----------------------------------------------------------------------------------------------------------


def unfinished_of(path: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def begin(path: Path) -> Path:
    """An empty directory beside `path` to write into."""
    unfinished = unfinished_of(path)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{unfinished} cannot be made ({error}); choose a directory that you may write") from None
    return unfinished


def finish(unfinished: Path, path: Path, *, step: int, seed: int, progress: Progress, keep: int | None = None) -> None:
    """Complete what the ranks wrote into `unfinished` and give it its name; drop the oldest beyond `keep`."""
    torch.save(progress, unfinished / _PROGRESS)
    files = {file.name: _sum_of(file) for file in sorted(unfinished.iterdir())}
    about = _About(format="spindle.checkpoint", version=_VERSION, step=step, seed=seed, files=files)
    (unfinished / _ABOUT).write_text(about.model_dump_json(indent=1))
    for file in unfinished.iterdir():
        _synced(file)
    _synced(unfinished)
    if path.exists():
        shutil.rmtree(path)
    unfinished.rename(path)
    _synced(path.parent)
    for old in sorted(_complete(path.parent), key=_step_of)[: -keep if keep else 0]:
        shutil.rmtree(old)


def _synced(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sum_of(file: Path) -> tuple[int, int]:
    total = 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            total = zlib.crc32(chunk, total)
    return file.stat().st_size, total


# -- reading ----------------------------------------------------------------------------------------------------------


Share = tuple[int, int]
"""Which of how many processes that check a checkpoint's files between them; each takes its own part of the files."""


def read(path: Path, share: Share = (0, 1)) -> Checkpoint:
    """Read what a checkpoint says of itself. Raises CheckpointError when it is missing, or where a file of `share` is
    not as it was written.
    """
    try:
        about = _About.model_validate_json((path / _ABOUT).read_text())
    except OSError as error:
        raise CheckpointError(
            f"{path} is no checkpoint ({error.strerror}: {_ABOUT}); give a step-... directory"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = (
            error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else str(error)
        )
        raise CheckpointError(f"{path / _ABOUT} cannot be read ({first}); take an older checkpoint") from None
    for name, expected in sorted(about.files.items())[share[0] :: share[1]]:
        file = path / name
        if Path(name).name != name or not file.is_file() or _sum_of(file) != expected:
            raise CheckpointError(
                f"{file} is not the file that was written ({'changed or cut short' if file.is_file() else 'missing'}); "
                "take an older checkpoint"
            )
    if _PROGRESS not in about.files:
        raise CheckpointError(f"{path} lists no {_PROGRESS}; take an older checkpoint")
    try:
        progress = torch.load(path / _PROGRESS, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path / _PROGRESS} holds more than plain values and tensors ({type(error).__name__}); loaders and "
            "schedulers must keep their state in those"
        ) from None
    return Checkpoint(path, about.step, about.seed, progress)


def tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Tensors of a checkpoint whose names are `wanted`, on the CPU; pieces of one are put together."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as held:
            found |= {name: held.get_tensor(name) for name in held.keys() if wanted(whole_name(name))}  # noqa: SIM118 - no dict
    return joined_pieces(found)


def fill(path: Path, places: Mapping[str, Tensor]) -> None:
    """Read the named tensors of a checkpoint into place. Raises CheckpointError, before anything is changed, where one
    is missing or of another shape.
    """
    held = tensors(path, lambda name: name in places)
    for name, place in places.items():
        if name not in held:
            raise CheckpointError(
                f"{path} has no {name!r}; the model has changed since, so load what fits with load_state_dict yourself"
            )
        if held[name].shape != place.shape:
            raise CheckpointError(
                f"{path}: {name!r} is {tuple(held[name].shape)} there and {tuple(place.shape)} in the model; "
                "make the model as it was"
            )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(held[name])


def load_weights(workload: Workload, path: Path, share: Share = (0, 1)) -> Checkpoint:
    """Put the parameters and buffers of a checkpoint into the user's modules."""
    checkpoint = read(path, share)
    fill(path, dict((*workload.named_parameters(), *workload.named_buffers())))
    return checkpoint


def to_resume(
    workload: Workload, checkpoints: Checkpoints | None, resume: bool | Path | str, share: Share = (0, 1)
) -> Checkpoint | None:
    """The checkpoint to go on from, its weights in the user's modules; None to begin afresh."""
    if resume is False:
        return None
    if resume is not True:
        return load_weights(workload, Path(resume), share)
    if checkpoints is None:
        raise CheckpointError(
            "resume is True but no directory of checkpoints is given; give one, or a checkpoint's path"
        )
    newest = latest(checkpoints.directory)
    return load_weights(workload, newest, share) if newest else None


def export(workload: Workload, directory: Path) -> dict[str, Path]:
    """Write each component as its library does: `save_pretrained` where the module has it, else safetensors of its
    state dict. The directories by component.
    """
    written: dict[str, Path] = {}
    for name, component in workload.components.items():
        written[name] = directory / name
        written[name].mkdir(parents=True, exist_ok=True)
        save_pretrained = getattr(component.module, "save_pretrained", None)
        if callable(save_pretrained):
            save_pretrained(written[name])
        else:
            save_model(component.module, str(written[name] / "model.safetensors"))
    return written
