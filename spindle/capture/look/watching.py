"""Watching: a block that runs on some samples in; what it changes besides its results out.

- Buffers change in place or are put in anew; each call of a layer may read what the one before has left.
- Running statistics of torch's norm layers are written and not read: what each batch adds to them can be found.
- A state that is no buffer (a number, a plain tensor) belongs to one process alone, and is refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spindle.inputs.same import same_numbers
from spindle.inputs.usercode import line_of
from spindle.record.changes.copies import Attributes
from spindle.record.changes.fingerprints import OF_MODULES, Leaves
from spindle.record.functions import counts_batches, writes_first
from spindle.record.lazy import SET_DATA, memory_of
from spindle.record.on_meta.made_up import own_numbers
from spindle.record.recording import takes_gradient, tensors_in
from spindle.record.sites import innermost_line

Run = Callable[[], list[Tensor] | None]


@dataclass(frozen=True, slots=True)
class Changes:
    """What a call changes, by name: `statistics` are norm layers whose running statistics it changes and does not read,
    `buffers` all others. `again`: these change once more in backward, under a checkpoint of the block's own.
    """

    statistics: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    again: bool = False

    def below(self, path: str) -> "Changes":
        """The same by names that begin with the block's own path."""
        statistics, buffers = (
            frozenset(f"{path}.{name}" if name else path for name in names) for names in (self.statistics, self.buffers)
        )
        return Changes(statistics, buffers, self.again)

    def __bool__(self) -> bool:
        return bool(self.statistics or self.buffers)


class OwnState(Exception):
    """A block keeps a state that no planned run can follow; the message names it."""


class WritesParameter(OwnState):
    """A block writes to one of its parameters; the message names it."""


def statistics_of(layer: str, module: nn.Module) -> list[str]:
    """Names of a layer's running statistics."""
    return [f"{layer}.{name}" if layer else name for name, value in module._buffers.items() if value is not None]


class Watched:
    """A module whose state is watched while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = list(module.named_modules())
        self._start = Attributes(m for _, m in self.modules)
        self._leaves = Leaves()
        self._owners: dict[str, tuple[type, str]] = {}  # class and attribute that a leaf belongs to
        self._attributes = self._held_leaves()[0]
        self._places = [(_joined(path, name), m._buffers, name) for path, m in self.modules for name in m._buffers]
        self._held = {full: held[name] for full, held, name in self._places}
        self._before = {full: None if b is None else (b._version, b.clone()) for full, b in self._held.items()}
        self._sums = self._parameter_sums()

    def changed(self) -> dict[str, Tensor]:
        """Buffers that have changed since the start, and what they hold."""
        found: dict[str, Tensor] = {}
        for full, held, name in self._places:
            was, value = self._held[full], held.get(name)
            before = self._before[full]
            if value is None or before is None:
                continue
            if value is not was or value._version != before[0] or not same_numbers(value, before[1]):
                found[full] = value.detach().clone()
        for path, module in self.modules:
            names = statistics_of(path, module) if counts_batches(module) else []
            if not found.keys().isdisjoint(names):  # a mean of zeros moves none, and those of other batches do
                held = module._buffers.values()
                found.update({n: b.detach().clone() for n, b in zip(names, held, strict=True) if b is not None})
        return found

    def written_parameters(self) -> list[str]:
        """Parameters that have changed since the start."""
        now = self._parameter_sums()
        return [name for name, known in self._sums.items() if now.get(name) != known]

    def attributes(self) -> dict[str, Any]:
        """Numbers and tensors that the modules hold, that are neither parameters nor buffers of the start, and not as
        then.
        """
        found, _ = self._held_leaves()
        changed = {name: v for name, v in found.items() if not _same_value(v, self._attributes.get(name))}
        for path, module in self.modules:
            for name, value in module._buffers.items():
                full = _joined(path, name)
                if value is not None and self._held.get(full) is None:
                    changed[full] = _kept(value)
                    self._owners[full] = type(module), name
        return changed

    def grown(self) -> set[str]:
        """Lists of the modules that are not as long as they were."""
        return self._held_leaves()[1]

    def owner(self, name: str) -> tuple[type, str]:
        """The class, and its attribute, that something found here belongs to."""
        of = max((known for known in self._owners if name.startswith(known)), key=len)
        return self._owners[of]

    def _held_leaves(self) -> tuple[dict[str, Any], set[str]]:
        named: dict[str, object] = {}
        for path, module in self.modules:
            for kind in type(module).__mro__:
                if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
                    self._note(named, kind.__name__, kind, vars(kind))
            self._note(named, path, type(module), vars(module))
        return self._leaves.of(named)

    def _note(self, named: dict[str, object], path: str, kind: type, held: Mapping[str, object]) -> None:
        for name, value in held.items():
            if name not in OF_MODULES and not name.startswith("__"):
                named[_joined(path, name)] = value
                self._owners[_joined(path, name)] = kind, name

    def forget(self) -> None:
        """Give the modules the attributes and buffers of the start."""
        self._start.put_back()
        self.rewind()

    def rewind(self) -> None:
        """Give the buffers of the start their values back."""
        with torch.no_grad():
            for full, held, name in self._places:
                was, before = self._held[full], self._before[full]
                if was is not None and before is not None:
                    held[name] = was.copy_(before[1])
                    self._before[full] = (was._version, before[1])

    def _parameter_sums(self) -> dict[str, tuple[int, float]]:
        with torch.no_grad():
            return {
                name: (value._version, float(torch.nan_to_num(own_numbers(value).float()).sum()))
                for name, value in self.module.named_parameters()
                if value.is_floating_point()
            }


class Held:
    """What modules hold beside parameters and buffers, while code between layers runs."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules, self.start, self.leaves = modules, Attributes(modules), Leaves()
        self.before = self._now()

    def _now(self) -> dict[str, Any]:
        named = {
            f"{index}.{name}": value
            for index, module in enumerate(self.modules)
            for name, value in vars(module).items()
            if name not in OF_MODULES
        }
        found, _ = self.leaves.of(named)
        return {name: v for name, v in found.items() if not (isinstance(v, Tensor) and v.is_meta)}

    def changed(self) -> dict[str, Any]:
        """What is not as at the start."""
        return {name: v for name, v in self._now().items() if not _same_value(v, self.before.get(name))}

    def same(self, values: Mapping[str, Any]) -> set[str]:
        """Names of these values that are held now; a tensor of another size tells nothing: it follows from sizes."""
        now = self._now()
        return {name for name, value in values.items() if _same_value(value, now.get(name), of_any_size=True)}

    def put_back(self) -> None:
        """Let modules hold what they held at the start."""
        self.start.put_back()

    def path(self, name: str) -> str:
        """How to call the class that something belongs to."""
        return f"a {self.owner(name)[0].__name__}"

    def owner(self, name: str) -> tuple[type, str]:
        """The class, and its attribute, that something belongs to."""
        index, _, attribute = name.partition(".")
        return type(self.modules[int(index)]), re.split(r"[.\[]", attribute)[0]


def examined(watched: Watched, first: list[Tensor], run: Run, run_other: Run) -> Changes:
    """What a block has changed that has run once, and gave `first`; it runs again, after a run on other numbers, to see
    what it reads of that.

    Raises OwnState where it keeps a state that is no buffer, or writes to a parameter.
    """
    changed = watched.changed()
    written = watched.written_parameters()
    if written:
        with _Writes(watched.module) as seen:
            run()
        line = seen.line or _line_that_writes(watched, written[0].rpartition(".")[2])
        raise WritesParameter(f"writes to its parameter {written[0]!r} in its forward{f' ({line})' if line else ''}")
    attributes, grown = watched.attributes(), watched.grown()
    if not changed and not attributes and not grown:
        return Changes()
    run_other()
    _refuse_made_by_first(watched, attributes, run_other)
    watched.rewind()
    again = run()
    differing = list(_differing(attributes, watched.attributes()))
    if differing or not _all_equal(first, again):
        names = differing or [*attributes, *sorted(grown)]
        if names:
            raise OwnState(own_state(*watched.owner(names[0])))
    return _sorted_out(watched, first, run, changed)


def _refuse_made_by_first(watched: Watched, first: dict[str, Any], run_other: Run) -> None:
    """Raise OwnState where the first call has made an attribute that later ones keep, and made it of its numbers.

    `first`: attributes that it changed; one on other numbers has run since.
    """
    after = watched.attributes()
    kept = {name: value for name, value in first.items() if _same_value(value, after.get(name))}
    if not kept:
        return
    watched.forget()
    run_other()
    fresh = watched.attributes()
    differing = [name for name, value in kept.items() if not _same_value(value, fresh.get(name))]
    if differing:
        raise OwnState(made_by_first(*watched.owner(differing[0])))
    watched.forget()
    run_other()


def made_by_first(owner: type, attribute: str) -> str:
    """What to say of an attribute that is made of the first batch."""
    line = line_of(owner, attribute)
    return (
        f"keeps in attribute {attribute!r}{f' ({line})' if line else ''} what it made of the first batch, which every "
        "rank would make of its own; make it a buffer that __init__ registers, with its first value"
    )


def changes_in_backward(watched: Watched, results: list[Tensor] | None) -> bool:
    """Whether buffers change once more while `results`, which a block has just given, are differentiated."""
    ends = [result for result in results or () if takes_gradient(result)]
    if not ends:
        return False
    before = watched.changed()
    try:
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
    except RuntimeError:  # what draws under a checkpoint, which is refused elsewhere
        return True
    watched.module.zero_grad()
    after = watched.changed()
    return before.keys() != after.keys() or not all(_equal(value, after[name]) for name, value in before.items())


def _sorted_out(watched: Watched, first: list[Tensor], run: Run, changed: dict[str, Tensor]) -> Changes:
    """Changed buffers by whether the block reads them."""
    layers = {
        path: names
        for path, module in watched.modules
        if counts_batches(module) and (names := statistics_of(path, module)) and set(names) <= changed.keys()
    }
    if layers:
        watched.rewind()
        with torch.no_grad():
            for path in layers:
                norm = watched.module.get_submodule(path)
                for buffer in norm._buffers.values():
                    if buffer is not None and buffer.is_floating_point():
                        buffer.mul_(0.5).add_(0.7)
        if not _all_equal(first, run()):
            layers = {}
    of_layers = {name for names in layers.values() for name in names}
    return Changes(frozenset(layers), frozenset(changed.keys() - of_layers))


def own_state(owner: type, attribute: str) -> str:
    """What to say of an attribute that changes from call to call."""
    line = line_of(owner, attribute)
    return (
        f"keeps a state of its own in attribute {attribute!r}{f' ({line})' if line else ''}, which changes from call "
        "to call and which no plan can follow; make it a buffer that __init__ registers, with its first value"
    )


class _Writes(TorchFunctionMode):
    """While open, `line` becomes that of the first call which writes to memory of a module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.line, self._memory = "", {memory_of(parameter) for parameter in module.parameters()}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Look and go on."""
        kwargs = kwargs or {}
        writes = func == SET_DATA or writes_first(func, args, kwargs)
        if writes and not self.line and not self._memory.isdisjoint(map(memory_of, tensors_in(args[:1]))):
            self.line = innermost_line()
        return func(*args, **kwargs)


def _line_that_writes(watched: Watched, attribute: str) -> str:
    """Where code of the block, or of a module in it, that is not torch's writes to an attribute."""
    kinds = dict.fromkeys(type(module) for _, module in watched.modules)
    own = (kind for kind in kinds if kind.__module__.partition(".")[0] != "torch")
    return next(filter(None, (line_of(kind, attribute) for kind in own)), "")


def _differing(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    yield from (name for name in {**one, **other} if not _same_value(one.get(name), other.get(name)))


def _same_value(a: Any, b: Any, *, of_any_size: bool = False) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _equal(a, b) or (of_any_size and a.shape != b.shape)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _all_equal(one: list[Tensor], other: list[Tensor] | None) -> bool:
    return other is not None and len(one) == len(other) and all(map(_equal, one, other))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree up to the rounding that threads bring."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.detach().double(), b.detach().double()
    return torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)
