"""Buffers: buffers of modules on the meta device that have no values, in; the same modules with real buffers out.

Buffers are small, and code computes with their values while it is recorded (rotary frequencies, positions), so they are
never left on the meta device: what files of weights hold is read, others are computed as their library does it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from spindle.errors import WorkloadError
from spindle.inputs.weights import places_of
from spindle.workload import Component, Workload


def make_buffers_real(workload: Workload) -> None:
    """Give all buffers of a workload that are on the meta device their values, in place.

    Raises WorkloadError that names one whose values nothing tells.
    """
    for component in workload.components.values():
        _read(workload, component)
        if not any(tensor.is_meta for tensor in (*component.module.parameters(), *component.module.buffers())):
            continue
        for path, module in component.module.named_modules():
            names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
            if names and not _computed(component.module, path, module, names):
                raise _unknown(component, path, module, names[0])
        _refuse_attributes(component)


def _read(workload: Workload, component: Component) -> None:
    """Put in the buffers that the files of a component hold, once; without files a workload can still be planned."""
    weights = component.weights
    if weights is None or component.name in workload.filled or not Path(weights.folder).is_dir():
        return
    workload.filled.add(component.name)
    places = places_of(component.name, component.module, weights)
    read: dict[int, Tensor] = {}
    for path, buffer in component.module.named_buffers():
        if path in places:
            with safe_open(places[path].file, framework="pt") as file:
                read[id(buffer)] = file.get_tensor(places[path].key).to(buffer.dtype)
    for module in component.module.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = value if value is None else read.get(id(value), value)


def _computed(root: nn.Module, path: str, module: nn.Module, names: list[str]) -> bool:
    """Compute buffers as the module's own library does; whether that sets all numbers of all of them.

    They are computed on a memory of zeros and on one of ones: what comes out alike was set.
    """
    compute = _initializer(root, path, module)
    if compute is None:
        return False
    before, found = {name: module._buffers[name] for name in names}, list[dict[str, Tensor | None]]()
    for fill in (0, 1):
        for name, buffer in before.items():
            assert buffer is not None
            module._buffers[name] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device="cpu")
        try:
            with torch.no_grad(), torch.device("cpu"), _generator_kept():
                compute(module)
        except Exception:  # code of any library, which may need what is not there
            module._buffers.update(before)
            return False
        found.append({name: module._buffers[name] for name in names})
    first, second = found
    alike = all(_alike(first[name], second[name]) for name in names)
    if not alike:
        module._buffers.update(before)
    return alike


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and not a.is_meta and torch.equal(a, b)


def _initializer(root: nn.Module, path: str, module: nn.Module) -> Callable[[nn.Module], Any] | None:
    """What sets a module's buffers anew: its model's `_init_weights`, as all of transformers have, or torch's own
    `reset_running_stats` and `reset_parameters`; on the meta device these leave parameters as they are.
    """
    steps = path.split(".") if path else []
    for depth in range(len(steps), -1, -1):
        above = root.get_submodule(".".join(steps[:depth]))
        if any(kind.__module__ == "transformers.modeling_utils" for kind in type(above).__mro__):
            return getattr(above, "_init_weights", None)
    name = next((name for name in ("reset_running_stats", "reset_parameters") if hasattr(module, name)), None)
    return None if name is None else lambda each: getattr(each, name)()


@contextlib.contextmanager
def _generator_kept() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def _unknown(component: Component, path: str, module: nn.Module, name: str) -> WorkloadError:
    full = f"{component.name}.{path}.{name}" if path else f"{component.name}.{name}"
    return WorkloadError(
        f"buffer {full!r} of a {type(module).__name__} is on the meta device and nothing tells its values, which tasks "
        f"compute with; register the component with a function that builds it, component({component.name!r}, lambda: "
        f"{type(component.module).__name__}(...)), so that only its parameters are left out"
    )


def _refuse_attributes(component: Component) -> None:
    """Raise WorkloadError for a tensor on the meta device that is neither parameter nor buffer."""
    for path, module in component.module.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise WorkloadError(
                    f"attribute {name!r} of {component.name}.{path} (a {type(module).__name__}) is a tensor on the "
                    f"meta device and no buffer, so nothing tells its values; register the component with a "
                    f"function that builds it, component({component.name!r}, lambda: "
                    f"{type(component.module).__name__}(...)), or make it a buffer"
                )
