"""Export: trained weights in; folders as libraries write and read them out.

A component in memory is written by its own `save_pretrained`, where it has one. One on the meta device goes from the
checkpoint to its folder one tensor at a time, so that this process needs no more memory than the largest of them.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_model
from torch import nn

from spindle.errors import CheckpointError
from spindle.runtime.checkpoints.tensor_files import Entry, Source, in_files, sources_in, write_tensors
from spindle.runtime.updates.averages import Averages
from spindle.workload import Component, Workload

FILE_BYTES = 5 * 10**9


def export(
    workload: Workload, directory: Path, checkpoint: Path | None = None, *, ema: bool = False
) -> dict[str, Path]:
    """Write each component below `directory`; the directories by component. `checkpoint`: what holds the weights of
    those on the meta device, checked before; with `ema` their running averages.

    Raises CheckpointError where there is none for such a component.
    """
    held = sources_in(checkpoint) if checkpoint else {}
    if ema:
        held |= {name: _renamed(source) for name, source in Averages.among(held).items()}
    written: dict[str, Path] = {}
    for name, component in workload.components.items():
        written[name] = directory / name
        written[name].mkdir(parents=True, exist_ok=True)
        save_pretrained = getattr(component.module, "save_pretrained", None)
        if any(parameter.is_meta for parameter in component.module.parameters()):
            _write_empty(workload, component, held, written[name])
        elif callable(save_pretrained):
            save_pretrained(written[name])
        else:
            save_model(component.module, str(written[name] / "model.safetensors"))
    return written


def _write_empty(workload: Workload, component: Component, held: Mapping[str, Source], folder: Path) -> None:
    """Files of a component on the meta device, and its config, as `save_pretrained` writes them: tied ones once."""
    groups = list(in_files(_entries(workload, component, held).items(), FILE_BYTES))
    names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    if len(groups) < 2:
        write_tensors(folder / "model.safetensors", groups[0] if groups else {})
    else:
        for name, group in zip(names, groups, strict=True):
            write_tensors(folder / name, group)
        places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        size = sum(entry.num_bytes for group in groups for entry in group.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for config in (getattr(component.module, name, None) for name in ("config", "generation_config")):
        save = getattr(config, "save_pretrained", None)
        if callable(save):
            save(folder)


def _renamed(source: Source) -> Source:
    """A running average as if it were the weight itself."""
    return replace(source, parts=Averages.among(source.parts))


def _entries(workload: Workload, component: Component, held: Mapping[str, Source]) -> dict[str, Entry]:
    """Parameters, and buffers that state dicts hold, by the names that the module itself has for them."""
    named = {id(value): name for name, value in (*workload.named_parameters(), *workload.named_buffers())}
    lasting = component.module.state_dict().keys()
    found: dict[str, Entry] = {}
    for path, value in (*component.module.named_parameters(), *component.module.named_buffers()):
        name = named[id(value)]
        if isinstance(value, nn.Parameter) or path in lasting:
            if name in held:
                found[path] = Entry.read_from(replace(held[name], dtype=value.dtype), name)
            elif value.is_meta:
                raise CheckpointError(
                    f"component {component.name!r} is on the meta device and {name!r} is in no checkpoint that was "
                    "given; give checkpoint=, the folder step-... that its training wrote last"
                )
            else:
                found[path] = Entry.of(value)
    return found
