"""Watching: a block that runs on some samples in; what it changes besides its results out.

- Buffers change in place or are put in anew; each call of a layer may read what the one before has left.
- Running statistics of torch's norm layers are written and not read: what each batch adds to them can be told apart.
- A state that is no buffer (a number, a plain tensor) belongs to one process alone, and is refused.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spindle.record.functions import counts_batches

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
        self._attributes = [{name: _kept(value) for name, value in vars(m).items()} for _, m in self.modules]
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
            if value is not was or value._version != before[0] or not _equal(value, before[1]):
                found[full] = value.detach().clone()
        return found

    def written_parameters(self) -> list[str]:
        """Parameters that have changed since the start."""
        now = self._parameter_sums()
        return [name for name, known in self._sums.items() if now.get(name) != known]

    def attributes(self) -> dict[str, Any]:
        """Numbers and tensors of the modules that are neither parameters nor buffers of the start, and not as then."""
        found: dict[str, Any] = {}
        for (path, module), before in zip(self.modules, self._attributes, strict=True):
            for name, value in vars(module).items():
                if _tells(value) and not _same_value(value, before.get(name)):
                    found[_joined(path, name)] = value
            for name, value in module._buffers.items():
                full = _joined(path, name)
                if value is not None and self._held.get(full) is None:
                    found[full] = value
        return {name: _kept(value) for name, value in found.items()}

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
                name: (value._version, float(torch.nan_to_num(value.float()).sum()))
                for name, value in self.module.named_parameters()
                if value.is_floating_point()
            }


def examined(watched: Watched, first: list[Tensor], run: Run, run_other: Run) -> Changes:
    """What a block has changed that has run once, and gave `first`; it runs again, after a run on other numbers, to see
    what it reads of that.

    Raises OwnState where it keeps a state that is no buffer, or writes to a parameter.
    """
    changed = watched.changed()
    written = watched.written_parameters()
    if written:
        line = _line_that_writes(watched, written[0].rpartition(".")[2])
        raise WritesParameter(f"writes to its parameter {written[0]!r} in its forward{f' ({line})' if line else ''}")
    attributes = watched.attributes()
    if not changed and not attributes:
        return Changes()
    run_other()
    watched.rewind()
    again = run()
    differing = list(_differing(attributes, watched.attributes()))
    if differing or not _all_equal(first, again):
        names = differing or list(attributes) or ["?"]
        if differing or attributes:
            raise OwnState(_own_state(watched, names[0]))
    return _sorted_out(watched, first, run, changed)


def changes_in_backward(watched: Watched, results: list[Tensor] | None) -> bool:
    """Whether buffers change once more while `results`, which a block has just given, are differentiated."""
    ends = [result for result in results or () if result.requires_grad]
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


def _own_state(watched: Watched, name: str) -> str:
    path, _, attribute = name.rpartition(".")
    owner = type(watched.module.get_submodule(path))
    line = line_of(owner, attribute)
    return (
        f"keeps a state of its own in attribute {attribute!r}{f' ({line})' if line else ''}, which changes from call "
        "to call and which no plan can follow; make it a buffer that __init__ registers, with its first value"
    )


def _line_that_writes(watched: Watched, attribute: str) -> str:
    """Where code of the block, or of a module in it, that is not torch's writes to an attribute."""
    kinds = dict.fromkeys(type(module) for _, module in watched.modules)
    own = (kind for kind in kinds if kind.__module__.partition(".")[0] != "torch")
    return next(filter(None, (line_of(kind, attribute) for kind in own)), "")


def line_of(owner: type, attribute: str) -> str:
    """Where the class sets an attribute, outside of __init__ if it does."""
    try:
        source, first = inspect.getsourcelines(owner)
        file = inspect.getsourcefile(owner) or ""
    except (OSError, TypeError):
        return ""
    sets = re.compile(
        rf"\.{re.escape(attribute)}\b(\.data|\.detach\(\))*((\[.*\])?\s*([-+*/|&]|//|\*\*)?=[^=]|\.\w+_\()"
    )
    lines = [first + index for index, text in enumerate(source) if sets.search(text)]
    return f"line {lines[-1]} of {os.path.basename(file)}" if lines else ""


def _differing(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    yield from (name for name in {**one, **other} if not _same_value(one.get(name), other.get(name)))


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _tells(value: Any) -> bool:
    return isinstance(value, Tensor) or type(value) in (int, float)


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
