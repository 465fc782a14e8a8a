"""Blocks: a model in, its repeated layers out.

A block is a child of the top-most list (ModuleList, Sequential) whose children are of one class and hold parameters.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from spindle.errors import WorkloadError
from spindle.workload import Workload

MIN_SUBMODULES = 4  # a list of plain Linear or Conv layers is not a list of blocks


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated layer: its dotted path below the component, and the module."""

    path: str
    module: nn.Module


def find_blocks(component: str, module: nn.Module, layers: str | Iterable[str] | None = None) -> list[Block]:
    """The blocks of a component, in order; `layers` names their lists and single blocks (dotted paths) when they are
    not found by rule.

    Raises WorkloadError when a named module does not exist.
    """
    if layers is None:
        return list(_search(module, ""))
    paths = [layers] if isinstance(layers, str) else list(layers)
    found: list[Block] = []
    for path in paths:
        try:
            container = module.get_submodule(path)
        except AttributeError:
            lists = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList | nn.Sequential)]
            raise WorkloadError(
                f"component {component!r} has no list {path!r}; its lists are {', '.join(lists) or 'none'}"
            ) from None
        if isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            found.extend(Block(f"{path}.{name}", child) for name, child in container.named_children())
        else:
            found.append(Block(path, container))
    return found


def _search(module: nn.Module, prefix: str) -> Iterator[Block]:
    found = _is_block_list(module)
    for name, child in module.named_children():
        if found:
            yield Block(f"{prefix}{name}", child)
        else:
            yield from _search(child, f"{prefix}{name}.")


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
        return False
    children = list(module)
    return (
        len({type(child) for child in children}) == 1
        and all(next(child.parameters(), None) is not None for child in children)
        and sum(1 for _ in children[0].modules()) >= MIN_SUBMODULES
    )


def blocks_of(workload: Workload) -> list[Block]:
    """All blocks of all components, their paths beginning with the component's name."""
    from spindle.capture.parallel import cut_outside

    return [
        Block(f"{component.name}.{block.path}" if block.path else component.name, block.module)
        for component in workload.components.values()
        for block in (
            *find_blocks(component.name, component.module, component.layers),
            *cut_outside(component, workload),
        )
    ]
