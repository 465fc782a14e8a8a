"""Checkpoints: what they hold of the weights, into a user's modules, or into folders that other libraries read."""

from pathlib import Path
from typing import TYPE_CHECKING

from spindle.errors import InputError

if TYPE_CHECKING:
    from spindle.workload import Workload


def load_checkpoint(workload: "Workload", path: Path | str, *, ema: bool = False) -> int:
    """Put the weights of a checkpoint into the user's modules, where these are in memory; the steps it was trained for.
    `ema`: the running average of the weights, which a run of `Workload(ema=...)` keeps.

    Raises CheckpointError when it is not whole or of another model, or holds no average.
    """
    from spindle.runtime.checkpoints.checkpoint import load_weights

    return load_weights(workload, Path(path), ema=ema).step


def export(
    workload: "Workload", directory: Path | str, *, checkpoint: Path | str | None = None, ema: bool = False
) -> dict[str, Path]:
    """Write each component to `directory`/NAME: by its own `save_pretrained` where it has one, else as safetensors.

    `checkpoint`: its weights, which are put into the user's modules first. Those of modules on the meta device go from
    file to file, one tensor at a time. `ema`: the running average of the weights in the checkpoint.

    Raises CheckpointError as `load_checkpoint` does, and where it lacks weights that no module holds.
    """
    from spindle.runtime.checkpoints.export import export as export_components

    if checkpoint is not None:
        load_checkpoint(workload, checkpoint, ema=ema)
    elif ema:
        raise InputError("ema is asked for without a checkpoint, which holds it; give checkpoint=, a step-... folder")
    return export_components(workload, Path(directory), None if checkpoint is None else Path(checkpoint), ema=ema)
