"""Blocks: a model in, its repeated layers out, and a way to trace around them.

- A block is a child of the top-most list (ModuleList, Sequential) whose children are of one class and hold parameters.
- While a task is exported each block call becomes one opaque operator, so that blocks may do what export cannot trace
  and stay the user's own eager modules at run time. The operator's fake kernel runs the block on fake tensors, which
  yields the output shapes without computing anything.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spindle.capture.caches import caches_off, caching_configs
from spindle.capture.draws import Site, shapes_only
from spindle.capture.randomness import Drawing
from spindle.capture.signature import module_signature, structure_signature
from spindle.capture.slots import filled, with_slots
from spindle.errors import WorkloadError

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


@dataclass(frozen=True, slots=True)
class Results:
    """What a call gives: nested results with Slots, fake tensors for these, and what was drawn on the way."""

    structure: Any
    tensors: list[Tensor]
    sites: tuple[Site, ...]
    written_out: bool


class Recorded(Protocol):
    """Results of calls of the blocks at `paths`, which fake tensors cannot run through."""

    paths: frozenset[str]

    def results(self, call: "BlockCall", rows: int) -> Results:
        """What a call gives for `rows` samples."""


class Scopes:
    """Names for calls of blocks, in the order in which a task makes them: `path`, then `path@1` and so on."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def next(self, path: str) -> str:
        """The name of the next call of a block."""
        self.count[path] += 1
        return path if self.count[path] == 1 else f"{path}@{self.count[path] - 1}"


@dataclass(slots=True)
class BlockCall:
    """One call of a block during export: its arguments and results, with Slots where tensors stand.

    `scope` names the call among those of its task; `sites` are what it draws, `written_out` whether attention among it.
    `failed`: it could not run on fake tensors.
    """

    path: str
    module: nn.Module
    scope: str
    arguments: Any
    results: Any = None
    sites: tuple[Site, ...] = ()
    written_out: bool = False
    failed: bool = False


@dataclass(slots=True)
class _Session:
    """Calls so far, the blocks' own forwards, and the results of calls that later ones may equal."""

    calls: list[BlockCall] = field(default_factory=list)
    own_by_module: dict[nn.Module, tuple[str, Callable[..., Any]]] = field(default_factory=dict)
    signature_by_module: dict[nn.Module, str] = field(default_factory=dict)
    known: dict[str, Results] = field(default_factory=dict)
    scopes: Scopes = field(default_factory=Scopes)
    recorded: Recorded | None = None
    rows: int = 0  # the batch size as the trace knows it

    def outputs(self, call: BlockCall, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Fake results of a call; a layer like one before, on inputs of the same shapes, is not run again."""
        if call.module not in self.signature_by_module:
            self.signature_by_module[call.module] = module_signature(call.module)
        inputs = [f"{tuple(tensor.shape)}{tensor.dtype}{tensor.device}" for tensor in tensors]
        key = "\n".join([self.signature_by_module[call.module], structure_signature(call.arguments), *inputs])
        if key not in self.known:
            if self.recorded is not None and call.path in self.recorded.paths:
                self.known[key] = self.recorded.results(call, self.rows)
            else:
                self.known[key] = self._results(call, tensors)
        found = self.known[key]
        call.results, call.sites, call.written_out = found.structure, found.sites, found.written_out
        return [torch.empty_like(output, memory_format=torch.contiguous_format) for output in found.tensors]

    def _results(self, call: "BlockCall", tensors: Sequence[Tensor]) -> Results:
        args, kwargs = filled(call.arguments, tensors)
        token = INSIDE_BLOCK.set(True)
        try:
            with shapes_only(), Drawing(call.scope, None) as drawing:
                structure, outputs = with_slots(self.own_by_module[call.module][1](*args, **kwargs))
            return Results(structure, outputs, tuple(drawing.found), drawing.writes_out_attention)
        except Exception:
            call.failed = True
            raise
        finally:
            INSIDE_BLOCK.reset(token)


INSIDE_BLOCK: ContextVar[bool] = ContextVar("spindle_inside_block", default=False)
"""Whether a block's own code is running, which may do what glue may not."""

_SESSION: ContextVar[_Session] = ContextVar("spindle_block_session")


@torch.library.custom_op("spindle::block", mutates_args=())
def opaque_block(tensors: list[Tensor], call: int) -> list[Tensor]:
    """Stand-in for a block while a task is exported; it never runs on real tensors."""
    raise AssertionError(f"opaque block {call} ran on real tensors; it exists only while a task is exported")


@opaque_block.register_fake
def _(tensors: list[Tensor], call: int) -> list[Tensor]:
    session = _SESSION.get()
    return session.outputs(session.calls[call], tensors)


@contextlib.contextmanager
def opaque_blocks(blocks: Iterable[Block], recorded: Recorded | None = None) -> Iterator[list[BlockCall]]:
    """While open, calls of `blocks` are recorded and traced as one operator each. Yields the calls, by their number.

    `recorded` knows the results of blocks that cannot run on fake tensors. What a block's forward hooks do belongs to
    the block, so there the whole call is recorded, not just `forward`.
    """
    session = _Session(recorded=recorded)
    token = _SESSION.set(session)
    try:
        with replaced(blocks, lambda block, own: _recorder(block, session)) as session.own_by_module:
            yield session.calls
    finally:
        _SESSION.reset(token)


Forward = Callable[..., Any]


@contextlib.contextmanager
def replaced(
    blocks: Iterable[Block], make: Callable[[Block, Forward], Forward]
) -> Iterator[dict[nn.Module, tuple[str, Forward]]]:
    """While open, calls of `blocks` go to what `make(block, own)` gives. Yields the methods replaced, and the own."""
    own_by_module: dict[nn.Module, tuple[str, Forward]] = {}
    try:
        for block in blocks:
            if block.module not in own_by_module:  # components may overlap
                name = "_call_impl" if block.module._forward_hooks or block.module._forward_pre_hooks else "forward"
                own = getattr(block.module, name)
                own_by_module[block.module] = name, own
                setattr(block.module, name, make(block, own))
        yield own_by_module
    finally:
        for module, (name, own) in own_by_module.items():
            if getattr(own, "__func__", None) is getattr(type(module), name):
                delattr(module, name)  # it was the class's own; the instance attribute was ours
            else:
                setattr(module, name, own)  # the user had patched the instance


def trace_for(rows: int) -> None:
    """Tell the open `opaque_blocks` the batch size as the trace knows it."""
    _SESSION.get().rows = rows


def _recorder(block: Block, session: _Session) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        if INSIDE_BLOCK.get():  # a block in a block is part of it
            return session.own_by_module[block.module][1](*args, **kwargs)
        arguments, tensors = with_slots((args, kwargs))
        call = BlockCall(block.path, block.module, session.scopes.next(block.path), arguments)
        session.calls.append(call)
        outputs = torch.ops.spindle.block(tensors, len(session.calls) - 1)
        return filled(call.results, outputs)

    return recorded


class BlockModule(nn.Module):
    """A block behind the signature of its recorded call: tensors in, tuple of tensors out. What the runtime runs."""

    def __init__(self, call: BlockCall) -> None:
        super().__init__()
        self.module = call.module
        self.arguments = call.arguments
        self.draws = BlockDraws(call.scope, call.sites)
        self.configs = [] if "." in call.path else caching_configs(call.module)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the block on its tensors; constants are those of the recorded call."""
        args, kwargs = filled(self.arguments, tensors)
        if self.draws.sites or self.configs:
            with self.draws.opened(), caches_off(self.configs):
                results = self.module(*args, **kwargs)
        else:
            results = self.module(*args, **kwargs)
        return tuple(with_slots(results)[1])


@dataclass(frozen=True)
class BlockDraws:
    """What a call of a block draws."""

    scope: str
    sites: tuple[Site, ...]

    def opened(self) -> contextlib.AbstractContextManager[object]:
        """Context in which the call draws from the present stream; calls that draw nothing need none."""
        return Drawing(self.scope, self.sites) if self.sites else contextlib.nullcontext()
