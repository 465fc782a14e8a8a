"""Checkpoint: what a run holds, on disk under the user's own parameter names, whatever the plan.

    step-00000400/
      spindle.json                              what it is: run, steps done, seed, files and their checksums
      progress.pt                               where loaders and schedules stand
      shard-00001.safetensors                   one a rank

- Tensors are written each by one rank, one after the other, as safetensors: a parameter or buffer as
  `component.path`, an optimizer state or a master as `optimizer:component.path:key`, a running average as
  `ema:component.path`; what tensor parallelism cuts has pieces, `component.path@index/count/dimension`. Nothing
  in a checkpoint is unpickled code.
- A checkpoint is written beside its place and renamed into it when it is whole, so that what has its name is complete;
  one that stood there goes only then.
- Every byte that is read is under a checksum: files under those in `spindle.json`, and this file under its own. Files
  that it does not list are not read.
"""

import hashlib
import math
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import safe_open
from torch import Tensor

from spindle.errors import CheckpointError, SpindleWarning
from spindle.runtime.checkpoints.tensor_files import ABOUT, listed_in, sources_in
from spindle.runtime.checkpoints.weights import sources_of
from spindle.runtime.parallel.names import joined_pieces, whole_name
from spindle.runtime.updates.averages import PREFIX as AVERAGE
from spindle.runtime.updates.averages import Averages
from spindle.runtime.updates.progress import Progress
from spindle.words.whole_numbers import check_whole
from spindle.workload import Workload

_PROGRESS = "progress.pt"
_VERSION = 3  # 3 names the run and has a checksum of its own; 2 had parameter groups by position, 1 by component
_STEP = re.compile(r"step-(\d{8,15})")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where a run keeps its checkpoints, how often it writes one, and how many of its own it keeps (None: all). Of
    older ones it keeps one each `keep_every_s` seconds. `later`: they are written beside the steps that follow. `best`:
    the checkpoint after this number of steps stays too.
    """

    directory: Path
    every: int
    keep: int | None = None
    run: str = ""
    keep_every_s: float | None = None
    later: bool = False
    best: int | None = None

    def __post_init__(self) -> None:
        if self.keep_every_s is not None and not (
            self.keep is not None and isinstance(self.keep_every_s, int | float) and 0 < self.keep_every_s < math.inf
        ):
            raise CheckpointError(
                f"keep_checkpoints_every_s is {self.keep_every_s!r}, keep_checkpoints {self.keep}; give both, above 0: "
                "beside the newest keep_checkpoints one older one stays for each keep_checkpoints_every_s seconds"
            )
        check_whole({"checkpoint_every": self.every, "keep_checkpoints": self.keep}, error=CheckpointError)


class Damaged(CheckpointError):
    """A checkpoint that is not as it was written."""


class _Version(BaseModel):
    """What a `spindle.json` of any version says first."""

    version: int


class About(BaseModel):
    """`spindle.json`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: str = Field(pattern=r"^spindle\.checkpoint$")
    version: int
    run: str
    step: int = Field(ge=0)
    seed: int
    files: dict[str, tuple[int, int]] = Field(strict=False)  # bytes and crc32
    checksum: str = ""  # of all above

    @field_validator("files")
    @classmethod
    def _are_here(cls, files: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        for name in files:
            if Path(name).name != name:
                raise ValueError(f"it lists {name!r}, which is no file of this folder")
        if _PROGRESS not in files:
            raise ValueError(f"it lists no {_PROGRESS}")
        return files

    def signed(self) -> Self:
        """The same with its checksum."""
        text = self.model_copy(update={"checksum": ""}).model_dump_json()
        return self.model_copy(update={"checksum": hashlib.sha256(text.encode()).hexdigest()})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    run: str
    step: int
    seed: int
    progress: Progress


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands."""
    return directory / f"step-{step:08}"


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints in a directory, whole or not, by steps."""
    return sorted((path for path in directory.glob("step-*") if _STEP.fullmatch(path.name)), key=step_of)


def latest(directory: Path) -> Path | None:
    """The checkpoint of the most steps in a directory, if there is one."""
    found = checkpoints_in(directory)
    return found[-1] if found else None


def step_of(path: Path) -> int:
    """After how many steps a checkpoint was written, by its name."""
    return int(path.name.removeprefix("step-"))


# -- writing ----------------------------------------------------------------------------------------------------------


def unfinished_of(path: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def _replaced_of(path: Path) -> Path:
    """Where a checkpoint waits until its successor has its name."""
    return path.with_name(f".{path.name}.old")


def begin(path: Path) -> Path:
    """An empty directory beside `path` to write into."""
    unfinished = unfinished_of(path)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{unfinished} cannot be made ({error}); choose a directory that you may write") from None
    return unfinished


def put_progress(unfinished: Path, progress: Progress) -> None:
    """Write what ranks hold beside tensors."""
    torch.save(progress, unfinished / _PROGRESS)


def finish(unfinished: Path, checkpoints: Checkpoints, *, step: int, seed: int) -> None:
    """Complete what was written into `unfinished` and give it its name; of this run, the newest `keep` and the best
    one stay, and of the others one each `keep_every_s` seconds.
    """
    files = {file.name: _sum_of(file) for file in sorted(unfinished.iterdir())}
    about = About(format="spindle.checkpoint", version=_VERSION, run=checkpoints.run, step=step, seed=seed, files=files)
    (unfinished / ABOUT).write_text(about.signed().model_dump_json(indent=1))
    for file in unfinished.iterdir():
        _synced(file)
    _synced(unfinished)
    path = path_of(checkpoints.directory, step)
    if path.exists():
        path.rename(_replaced_of(path))
    unfinished.rename(path)
    _synced(path.parent)
    shutil.rmtree(_replaced_of(path), ignore_errors=True)
    if checkpoints.keep:
        own = [old for old in checkpoints_in(checkpoints.directory) if _run_of(old) == checkpoints.run]
        for old in _surplus(own[: -checkpoints.keep], checkpoints.keep_every_s):
            if step_of(old) != checkpoints.best:
                shutil.rmtree(old)


def _surplus(older: Sequence[Path], every_s: float | None) -> Iterator[Path]:
    """Of checkpoints that are not among the newest, those between two that stay."""
    kept_s = -math.inf
    for path in older:
        written_s = (path / ABOUT).stat().st_mtime
        if every_s is not None and written_s >= kept_s + every_s:
            kept_s = written_s
        else:
            yield path


def clear(directory: Path) -> None:
    """Remove what a run that was killed left half written; what it was about to replace is as it was."""
    for unfinished in directory.glob(".step-*.part"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for replaced in directory.glob(".step-*.old"):
        path = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(path)


def _run_of(path: Path) -> str | None:
    try:
        return about_of(path).run
    except CheckpointError:
        return None


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


def about_of(path: Path) -> About:
    """What a checkpoint says of itself."""
    try:
        text = (path / ABOUT).read_bytes()
    except OSError as error:
        kind = Damaged if path.is_dir() else CheckpointError
        raise kind(f"{path} is no checkpoint ({error.strerror}: {ABOUT}); give a step-... directory") from None
    try:
        version = _Version.model_validate_json(text).version
        if version != _VERSION:
            raise CheckpointError(
                f"{path / ABOUT} is of version {version} and this Spindle reads {_VERSION}: go on with the one that "
                "wrote it"
            )
        about = About.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise Damaged(f"{path / ABOUT} cannot be read ({first}); take an older checkpoint") from None
    if about.signed() != about:
        raise Damaged(f"{path / ABOUT} is not as it was written; take an older checkpoint")
    return about


def read(path: Path, share: Share = (0, 1)) -> Checkpoint:
    """Read what a checkpoint says of itself. Raises CheckpointError when it is missing; Damaged, which is one, where a
    file of `share` is not as it was written.
    """
    about = about_of(path)
    for name, expected in sorted(about.files.items())[share[0] :: share[1]]:
        file = path / name
        if not file.is_file() or _sum_of(file) != expected:
            raise Damaged(
                f"{file} is not the file that was written ({'changed or cut short' if file.is_file() else 'missing'}); "
                "take an older checkpoint"
            )
    return Checkpoint(path, about.run, about.step, about.seed, progress_in(path))


def progress_in(path: Path) -> Progress:
    """What a checkpoint holds beside its tensors."""
    try:
        found: Progress = torch.load(path / _PROGRESS, weights_only=True)
    except Exception as error:
        raise Damaged(
            f"{path / _PROGRESS} holds more than plain values and tensors ({type(error).__name__}); loaders and "
            "schedulers must keep their state in those"
        ) from None
    return found


def tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Tensors of a checkpoint whose names are `wanted`, on the CPU; pieces of one are put together."""
    found: dict[str, Tensor] = {}
    for file in listed_in(path):
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


def put_weights(
    workload: Workload, checkpoint: Checkpoint, *, ema: bool = False, initial: dict[str, Tensor] | None = None
) -> None:
    """Put the parameters and buffers of a checkpoint into the user's modules; ranks read the ones on the meta
    device themselves. `ema`: the running average of them, where it has one. `initial`: let components that the
    checkpoint does not have begin at their own values, which it keeps for a second call; None refuses them.
    """
    every: dict[str, Tensor] = dict((*workload.named_parameters(), *workload.named_buffers()))
    _check_names(workload, checkpoint.path, set(every))
    new = new_components(workload, checkpoint.path)
    if new and initial is None:
        name = next(name for name in every if name.partition(".")[0] == new[0])
        raise CheckpointError(
            f"{checkpoint.path} has no {name!r}, nor anything else of component {new[0]!r}; where that is new, a "
            "training goes on with allow_changes=True (--allow-changes), else make the model as it was"
        )
    held = averages_in(checkpoint) if ema else ()
    real = {name: tensor for name, tensor in every.items() if not tensor.is_meta}
    added = {name: tensor for name, tensor in real.items() if name.partition(".")[0] in new}
    fill(checkpoint.path, {AVERAGE + n if n in held else n: tensor for n, tensor in real.items() if n not in added})
    with torch.no_grad():
        for name, tensor in added.items():
            assert initial is not None
            tensor.copy_(initial.setdefault(name, tensor.detach().clone()))
    sources_of(workload, checkpoint.path)


def new_components(workload: Workload, path: Path) -> list[str]:
    """Components of a workload with parameters or buffers of which a checkpoint has none."""
    held = {name.partition(".")[0] for name in sources_in(path) if ":" not in name}
    own = {name.partition(".")[0] for name, _ in (*workload.named_parameters(), *workload.named_buffers())}
    return [name for name in workload.components if name in own - held]


def load_weights(
    workload: Workload,
    path: Path,
    share: Share = (0, 1),
    *,
    ema: bool = False,
    initial: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """Read a checkpoint, and put its weights where `put_weights` does."""
    checkpoint = read(path, share)
    put_weights(workload, checkpoint, ema=ema, initial=initial)
    return checkpoint


def averages_in(checkpoint: Checkpoint) -> set[str]:
    """The parameters and buffers whose running average a checkpoint holds; none before the first step that counts,
    when the average is the weights. Raises CheckpointError for one of a run without.
    """
    if checkpoint.progress.get("ema") is None:
        raise CheckpointError(
            f"{checkpoint.path} is of a run that kept no average of its weights; leave ema out, or train with "
            "Workload(ema=0.999)"
        )
    return set(Averages.among(sources_in(checkpoint.path)))


def _check_names(workload: Workload, path: Path, names: set[str]) -> None:
    """Raises CheckpointError where a component has lost parameters; warns of components that are gone."""
    more = sorted(name for name in sources_in(path) if ":" not in name and name not in names)
    left = sorted({name.partition(".")[0] for name in more} - workload.components.keys())
    for name in more:
        if name.partition(".")[0] not in left:
            raise CheckpointError(
                f"{path} has {name!r}, which the model has no longer; make the model as it was, or load what fits with "
                "load_state_dict yourself"
            )
    if left:
        warnings.warn(
            SpindleWarning(
                f"{path} has components that this workload does not have ({', '.join(left)}): their weights are left "
                "out, and are not in checkpoints that are written from here on"
            ),
            stacklevel=3,
        )
