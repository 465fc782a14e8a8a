"""Signatures: what two modules must agree in to count as the same layer, whatever their weights."""

from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from spindle.capture.slots import Slot

_NUMBERING = ("idx", "index", "layer_id")


def module_signature(module: nn.Module) -> str:
    """Classes, plain settings (heads, windows, training mode) and parameter shapes of a module and all below it."""
    parts = [f"{path}:{type(child).__qualname__}:{_settings(child)}" for path, child in module.named_modules()]
    state = [*module.named_parameters(), *module.named_buffers()]
    parts += [f"{name}:{tuple(value.shape)}{value.dtype}{value.requires_grad}" for name, value in state]
    return "\n".join(parts)


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's own plain attributes, without those that only number it."""
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and not any(word in name for word in _NUMBERING)
    )


def structure_signature(structure: Any) -> str:
    """Nested arguments with Slots: their shape and constants; other objects count by their class."""
    return repr(pytree.tree_map(_plain, structure))


def _plain(leaf: Any) -> Any:
    return leaf if isinstance(leaf, bool | int | float | str | Slot | None) else type(leaf).__qualname__
