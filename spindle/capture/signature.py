"""Signatures: what two modules must agree in to count as the same layer, whatever their weights."""

import functools
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn

from spindle.record.slots import Slot, mapped

_NUMBERING = ("idx", "index", "layer_id", "target_name")  # the last: where peft has put an adapter
_MARKS = ("_is_hf_initialized",)  # which tell how weights came to be
_PLAIN = (bool, int, float, str, Enum, torch.dtype, torch.device, type(None))


def module_signature(module: nn.Module) -> str:
    """Classes, plain settings (heads, windows, training mode) and parameter shapes of a module and all below it."""
    parts = [f"{path}:{type(child).__qualname__}:{_settings(child)}" for path, child in module.named_modules()]
    state = [*module.named_parameters(), *module.named_buffers()]
    parts += [f"{name}:{tuple(value.shape)}{value.dtype}{value.requires_grad}" for name, value in state]
    return "\n".join(parts)


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's own settings, without settings that only number it, and its forward hooks."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    settings = sorted(
        (name, _setting(value))
        for name, value in vars(module).items()
        if (isinstance(value, bool | int | float | str) or not name.startswith("_"))
        and name not in _MARKS
        and not _numbers(name)
    )
    return [*settings, *(("hook", _setting(hook)) for hook in hooks)]


def _numbers(name: object) -> bool:
    """Whether a setting of this name tells which of several equal layers one is."""
    return isinstance(name, str) and any(word in name for word in _NUMBERING)


def _setting(value: Any) -> Any:
    """A setting as text that is equal in every process; objects count by their class, functions by their code."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Mapping):
        return [(repr(key), _setting(item)) for key, item in value.items() if not _numbers(key)]
    if isinstance(value, list | tuple):
        return [_setting(item) for item in value]
    if isinstance(value, functools.partial):
        return [_setting(value.func), _setting(value.args), _setting(value.keywords)]
    code = getattr(value, "__code__", None)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if code is None:
        return name
    return f"{name}:{code.co_code.hex()}:{[const for const in code.co_consts if isinstance(const, _PLAIN)]}"


def structure_signature(structure: Any) -> str:
    """Nested arguments with Slots: their shape and constants; other objects count by their class."""
    return repr(mapped(_plain, structure))


def _plain(leaf: Any) -> Any:
    return leaf if isinstance(leaf, bool | int | float | str | Slot | None) else type(leaf).__qualname__
