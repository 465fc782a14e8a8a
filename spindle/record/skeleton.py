"""Skeleton: the user's modules as a recording needs them, with meta parameters, and repeated layers as single calls.

- While a skeleton is open its meta parameters stand in the modules. Buffers stay real. Buffers that change
  while the model runs (running statistics) are meta too, since only the run knows their values.
- A block (a repeated layer) is one call: its `forward` is replaced, so that hooks around it stay outside of it. It runs
  on the meta device to tell the shapes of its results, once for each kind of layer and shapes of arguments.
- A skeleton travels without weights: parameters are sent as their shapes.
"""

import contextlib
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spindle.record.calls import NO_FORWARD, block_call, component_call, forwards_replaced
from spindle.record.changes.fingerprints import OF_MODULES, Leaves
from spindle.record.changes.steady import Steady
from spindle.record.functions import counts_batches
from spindle.record.lazy import Forbidden, memory_of
from spindle.record.on_meta.made_up import MadeUpProducts, stand_in
from spindle.record.recorder import Recorder
from spindle.record.recording import Recording
from spindle.record.replay import RealCalls
from spindle.record.shapes import Habit, Results, ShapeRule
from spindle.record.sites import Sites
from spindle.record.substitutes.caches import caches_off, caching_configs
from spindle.record.substitutes.draws import drawing_unseen
from spindle.record.substitutes.patches import recorded_calls, watched_modules
from spindle.record.travel import let_record, recordable_outputs


@dataclass(slots=True)
class BlockInfo:
    """A block: its path ("vision.layers.3"), module, and kind, equal for layers that do the same work."""

    path: str
    module: nn.Module
    kind: str


@dataclass
class Skeleton:
    """Modules of some components by name, and blocks in them. `stateful`: buffers that change while the model runs.

    `rules` tell, by kind of block, what blocks give that cannot run on the meta device. While `learning`, at capture,
    rules are found and checked by running such blocks for real.
    """

    components: Mapping[str, nn.Module]
    blocks: Sequence[BlockInfo]
    stateful: set[str] = field(default_factory=set)
    rules: dict[str, ShapeRule] = field(default_factory=dict)
    learning: bool = False
    settled: set[str] = field(default_factory=set)  # attributes of layers that code outside of them has set once
    uncounted: set[str] = field(default_factory=set)  # components whose calls are in a loop over samples: all are one
    moving: set[str] = field(default_factory=set)  # attributes of modules outside of layers that were seen to be set

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.changed: set[str] = set()  # buffers that a recording replaced, though taken as constants
        self.read: set[str] = set()  # buffers taken as constants that tasks read outside of blocks
        self._changed_by: dict[str, tuple[str, ...]] = {}
        self.kept: dict[int, str] = {}  # memory of tensors that modules and functions hold besides, and their names
        self.sites = Sites()
        self.known: dict[object, Results] = {}  # by kind of block and arguments with their shapes
        self.habits: dict[object, Habit] = {}  # the same without the shapes
        self.configs = caching_configs(nn.ModuleList(self.components.values()))
        inside = {id(m) for block in self.blocks for m in block.module.modules()}
        self._outside = [
            (name, module)
            for name, root in self.components.items()
            for module in root.modules()
            if id(module) not in inside and type(module).forward is not NO_FORWARD
        ]
        self._modules = [  # and what the names of their parameters and buffers begin with
            (f"{name}.{path}." if path else f"{name}.", module)
            for name, root in self.components.items()
            for path, module in root.named_modules()
        ]
        self.steady = Steady(
            {id(m): prefix[:-1] for prefix, m in reversed(self._modules)}, inside, self.settled, self.moving
        )
        self._metas: dict[int, tuple[str, Tensor]] = {}  # of parameters and stateful buffers, by id of the user's own
        self._collect()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "components": self.components,
            "blocks": self.blocks,
            "stateful": self.stateful,
            "rules": self.rules,
            "learning": False,
            "uncounted": self.uncounted,
            "moving": self.moving,
            "outputs": recordable_outputs(module for root in self.components.values() for module in root.modules()),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        let_record(state.pop("outputs"))
        self.__init__(**state)  # type: ignore[misc]

    def set_stateful(self, names: set[str]) -> None:
        """Take these buffers as ones that change, and those of equal layers, of which one alone is looked at."""
        self.stateful |= names
        for name in names:
            for kind, own in {(b.kind, name[len(b.path) :]) for b in self.blocks if name.startswith(f"{b.path}.")}:
                self.stateful |= {f"{block.path}{own}" for block in self.blocks if block.kind == kind}
        self.known.clear()
        self.habits.clear()
        self._collect()

    def _collect(self) -> None:
        """Meta tensors for all parameters and for stateful buffers, and where they stand."""
        self._places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        for prefix, module in self._modules:
            for own, name in (
                *((module._parameters, name) for name in module._parameters),
                *((module._buffers, name) for name in module._buffers if prefix + name in self.stateful),
            ):
                value = own[name]
                if value is not None:
                    if id(value) not in self._metas:
                        self._metas[id(value)] = (prefix + name, _meta_like(value))
                    self._places.append((own, name, value, self._metas[id(value)][1]))
        self._changed_by.clear()
        self.constants = {id(buffer): name for name, buffer in self.buffers().items() if id(buffer) not in self._metas}
        self.leaves = {number: name for number, (name, _) in enumerate(self._metas.values())}
        self._numbers = {id(meta): number for number, (_, meta) in enumerate(self._metas.values())}
        by_dict: dict[int, list[tuple[dict[str, Any], str, Tensor]]] = {}
        for held, name, _, meta in self._places:
            by_dict.setdefault(id(held), []).append((held, name, meta))
        self._own_of = {
            id(block.module): [
                place
                for module in block.module.modules()
                for held in (module._parameters, module._buffers)
                for place in by_dict.get(id(held), ())
            ]
            for block in self.blocks
        }

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters."""
        return [name for name, meta in self._metas.values() if isinstance(meta, nn.Parameter)]

    def parameters_of(self, path: str) -> set[str]:
        """Names of the parameters that a module holds, while the skeleton is open."""
        numbers = (self._numbers.get(id(meta)) for meta in self.module(path).parameters())
        return {self.leaves[number] for number in numbers if number is not None}

    def changed_by(self, block: BlockInfo) -> tuple[str, ...]:
        """Buffers that a block changes, so that it counts though nobody reads what it gives."""
        if block.path not in self._changed_by:
            found = [
                f"{block.path}.{path}.{name}" if path else f"{block.path}.{name}"
                for path, module in block.module.named_modules()
                for name in module._buffers
                if counts_batches(module)
            ]
            found += sorted(name for name in self.stateful if name.startswith(f"{block.path}."))
            self._changed_by[block.path] = tuple(dict.fromkeys(found))
        return self._changed_by[block.path]

    def keep_apart(self, function: Callable[..., Any]) -> None:
        """Know the plain tensors that modules, and the function of a task, hold: what they hold outlives a batch."""
        held = {f"{prefix}{name}": value for prefix, module in self._modules for name, value in vars(module).items()}
        with contextlib.suppress(TypeError, ValueError):
            seen = inspect.getclosurevars(inspect.unwrap(function))
            held |= {**seen.globals, **seen.nonlocals}
        own = {name: value for name, value in held.items() if name.rpartition(".")[2] not in OF_MODULES}
        found, _ = Leaves(copies=False).of(own)
        tensors = {name: value for name, value in found.items() if type(value) is Tensor and value.is_leaf}
        self.kept = {memory_of(value): name for name, value in tensors.items() if memory_of(value)}

    def module(self, path: str) -> nn.Module:
        """A module by its path, which begins with its component."""
        component, _, inner = path.partition(".")
        return self.components[component].get_submodule(inner)

    def buffers(self) -> dict[str, Tensor]:
        """The modules' buffers by name, as they stand there now."""
        return {
            f"{component}.{path}": buffer
            for component, root in self.components.items()
            for path, buffer in root.named_buffers(remove_duplicate=False)
        }

    @contextlib.contextmanager
    def open(self, start: Any) -> Iterator[Recorder]:
        """A recorder of one call of a task function; while open, only this thread may use the modules."""
        recording = Recording(dict(self.leaves))
        for _, meta in self._metas.values():
            recording.shapes.append(tuple(meta.shape))
            recording.dtypes.append(meta.dtype)
            recording.needs_grad.append(meta.requires_grad)
        own = {number: meta for number, (_, meta) in self._metas.items()}
        with self.lock, contextlib.ExitStack() as stack:
            recorder = Recorder(recording, self._numbers, own, self.sites, start, RealCalls())
            stack.enter_context(caches_off(self.configs))
            stack.enter_context(self._meta_parameters())
            stack.enter_context(self._forwards(recorder))
            stack.enter_context(recorded_calls(recorder))
            stack.enter_context(watched_modules(self.steady.watch(recorder, learning=self.learning)))
            yield recorder

    def check_block(self, block: BlockInfo) -> None:
        """Raise Forbidden where a block is called with other parameters than its own."""
        if self.learning:
            self.steady.called.update(map(id, block.module.modules()))
        for held, name, meta in self._own_of[id(block.module)]:
            if held.get(name) is not meta:
                raise Forbidden(
                    f"it calls layer {block.path!r} with another {name!r} than its own (torch.func.functional_call, "
                    "say), which only code outside of layers can; call it as it is, or register a copy of it as a "
                    "component of its own"
                )

    @contextlib.contextmanager
    def _meta_parameters(self) -> Iterator[None]:
        for own, name, _, meta in self._places:
            own[name] = meta
        self._standing = [
            (prefix + key, module._buffers, key, buffer)
            for prefix, module in self._modules
            for key, buffer in module._buffers.items()
        ]
        try:
            yield
        finally:
            for _, held, key, before in self._standing:
                held[key] = before
            for own, name, value, _ in self._places:
                own[name] = value

    def replaced_buffers(self) -> list[tuple[str, Tensor | None, Tensor]]:
        """Buffers in whose place the code under way has put another tensor: name, buffer, tensor; also new ones."""
        known = {(id(held), key): before for _, held, key, before in self._standing}
        found = []
        for prefix, module in self._modules:
            for key, value in module._buffers.items():
                before = known.get((id(module._buffers), key))
                if value is not before and isinstance(value, Tensor):
                    found.append((prefix + key, before, value))
        return found

    @contextlib.contextmanager
    def real(self, module: nn.Module) -> Iterator[None]:
        """While open, a module below an open skeleton has its own parameters and buffers, and changes none of them.
        Tensors on the meta device are made up.
        """
        inside = {id(m._parameters) for m in module.modules()} | {id(m._buffers) for m in module.modules()}
        places = [place for place in self._places if id(place[0]) in inside]
        with torch._C.DisableTorchFunction(), drawing_unseen():
            real = self._stand_ins([value for _, _, value, _ in places])
        for own, name, value, _ in places:
            own[name] = real.get(id(value), value)
        standing = [(m._buffers, key, buffer) for m in module.modules() for key, buffer in m._buffers.items()]
        with torch._C.DisableTorchFunction():
            before = [None if buffer is None else buffer.clone() for _, _, buffer in standing]
        products = MadeUpProducts() if real else contextlib.nullcontext()
        try:
            with torch._C.DisableTorchFunction(), products:
                yield
        finally:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                for (held, key, buffer), known in zip(standing, before, strict=True):
                    held[key] = buffer if buffer is None or known is None else buffer.copy_(known)
            for own, name, _, meta in places:
                own[name] = meta

    @staticmethod
    def _stand_ins(values: Sequence[Tensor]) -> dict[int, Tensor]:
        """Made-up tensors in place of the ones on the meta device, by id."""
        generator = torch.Generator().manual_seed(0)
        return {id(value): stand_in(value, generator) for value in values if value.is_meta}

    @contextlib.contextmanager
    def _forwards(self, recorder: Recorder) -> Iterator[None]:
        """Blocks as single calls; other modules tell which call of a component is under way."""
        calls = Counter[Any]()
        wanted = [(block.module, block_call(self, block, recorder, calls)) for block in self.blocks]
        wanted += [(module, component_call(self, name, module, recorder, calls)) for name, module in self._outside]
        with forwards_replaced(wanted):
            yield


def _meta_like(value: Tensor) -> Tensor:
    if value.is_meta:
        return value
    meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else meta
