"""Proposals: a component in, what its layers= could name, as paths that exist in the user's model, out."""

from collections.abc import Sequence
from types import TracebackType

from torch import nn

from spindle.capture.blocks import find_blocks
from spindle.workload import Component

MOST = 4  # paths in a message


def in_code(paths: Sequence[str]) -> str:
    """As the user writes it: "layers=['encoder.layers', 'visual']"."""
    return f"layers=[{', '.join(map(repr, paths))}]"


def lists_of(component: Component) -> tuple[str, ...]:
    """Paths of what its blocks are found by: as named by the user, else the lists that hold them."""
    if component.layers is not None:
        return component.layers
    blocks = find_blocks(component.name, component.module)
    return tuple(dict.fromkeys(parent for block in blocks if (parent := block.path.rpartition(".")[0])))


def with_module(component: Component, path: str) -> tuple[str, ...]:
    """The lists of a component, and a module to run as one layer in place of the lists inside it."""
    inside = path + "."
    return (*(name for name in lists_of(component) if name != path and not name.startswith(inside)), path)


def parts_of(component: Component) -> tuple[str, ...]:
    """Its top-most lists of modules with parameters; without any, its children with parameters. At most MOST."""
    lists: list[str] = []
    for path, module in component.module.named_modules():
        if path and _is_list(module) and not any(path.startswith(name + ".") for name in lists):
            lists.append(path)
    return tuple(lists[:MOST] or [name for name, child in component.module.named_children() if _has_some(child)][:MOST])


def running_module(traceback: TracebackType | None, component: Component) -> str:
    """The path of the innermost module of a component, outside of its blocks, whose method raised; "" where that is the
    component's own, or none.
    """
    paths = {id(module): path for path, module in component.module.named_modules()}
    blocks = [block.path for block in find_blocks(component.name, component.module, component.layers)]
    found = ""
    while traceback is not None:
        path = paths.get(id(traceback.tb_frame.f_locals.get("self")), "")
        if any(path == block or path.startswith(block + ".") for block in blocks):
            return found
        found, traceback = path or found, traceback.tb_next
    return found


def collected_outputs(component: Component) -> tuple[str, ...]:
    """Settings of its configs by which models of transformers collect outputs inside of layers, by hooks."""
    configs = [getattr(module, "config", None) for module in component.module.modules()]
    found = {name for config in configs for name, value in getattr(config, "__dict__", {}).items() if value is True}
    return tuple(sorted(name for name in found if name.startswith("output_") and name != "output_hidden_states"))


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and sum(map(_has_some, module.children())) > 1


def _has_some(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
