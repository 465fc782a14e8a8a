"""Loaders: every reader of a task's data gets a copy of what changes as it is read, and each pass gets its number.

- What changes is the loader, its samplers, its random generators, and any data set that holds some of these or has
  `set_epoch`. Everything else, the samples above all, is shared with the user's own loader. Thus planning, one
  process and every rank begin where that loader stands, and none of them moves it.
- A generator that is a global of the user's classes has no copy; it is put back where it stood after reading.
- Before each pass `set_epoch` is called with its number (0, 1, 2, ...), as training scripts do by hand.
- A sampler that gives each process only its share of the data is refused: here one loader gives whole batches.
"""

import functools
import logging
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from spindle.errors import WorkloadError
from spindle.inputs.generators import Random, cloned, everyones, set_state, state_of
from spindle.inputs.usercode import is_own_file, names_used

_PARTS = ("dataset", "datasets", "sampler", "samplers", "batch_sampler", "collate_fn")
_WRAPPED = ("loader", "loaders", "dataloader", "dataloaders", "base_dataloader")
_SHARES = ("num_replicas", "num_processes", "world_size")

_MOST_ENTRIES, _MOST_OBJECTS, _DEEPEST = 1024, 20_000, 12  # of a container that is looked into; of all; of a nest
_STAYS = (Tensor, nn.Module, np.ndarray, type, types.ModuleType, threading.Thread, BaseProcess, logging.Logger)
_PLAIN = (str, bytes, int, float, complex, type(None))


@dataclass
class Reading:
    """A task's data as one reader has it. `generators`, `samplers` and `loaders` are the copied ones, in a fixed order.

    `given`: the user's own generators that those stand for. `outside`: generators that are read without a copy.
    """

    data: Any
    generators: list[Random] = field(default_factory=list)
    samplers: list[Any] = field(default_factory=list)
    loaders: list[DataLoader[Any]] = field(default_factory=list)
    given: list[Random] = field(default_factory=list)
    outside: list[Random] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._outside = [state_of(generator) for generator in self.outside]
        self._counted = [_counters(sampler) for sampler in self.samplers]

    def state(self) -> dict[str, Any]:
        """Where generators stand, and whole numbers of samplers that have changed: plain values and tensors."""
        counted = [
            {name: number for name, number in _counters(sampler).items() if before.get(name) != number}
            for sampler, before in zip(self.samplers, self._counted, strict=True)
        ]
        return {"generators": [state_of(generator) for generator in self.generators], "samplers": counted}

    def load(self, where: str, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises WorkloadError when it is another loader's."""
        for what, own in (("generators", self.generators), ("samplers", self.samplers)):
            if len(state[what]) != len(own):
                raise WorkloadError(
                    f"{where}: the checkpoint holds the states of {len(state[what])} {what} of its loader, which has "
                    f"{len(own)}; resume with the loader that it was written with"
                )
        for generator, one in zip(self.generators, state["generators"], strict=True):
            set_state(generator, one)
        for sampler, before, counted in zip(self.samplers, self._counted, state["samplers"], strict=True):
            vars(sampler).update({**before, **counted})

    def close(self) -> None:
        """End worker processes that persist, and put generators that have no copy back where they stood."""
        for loader in self.loaders:
            vars(loader)["_iterator"] = None
        for generator, state in zip(self.outside, self._outside, strict=True):
            set_state(generator, state)

    def kept(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; closes when no more are wanted."""
        try:
            yield from batches
        finally:
            self.close()


def persisting(loader: DataLoader[Any]) -> bool:
    """Whether its worker processes outlive a pass."""
    return loader.persistent_workers and loader.num_workers > 0


def deaf(loader: DataLoader[Any]) -> bool:
    """Whether its worker processes hold a data set that does not hear of later passes: they have a copy of it, and
    only numbers in shared memory, as Hugging Face's data sets have, reach that.
    """
    dataset: Any = loader.dataset
    shared = (one for one in getattr(dataset, "__dict__", {}).values() if isinstance(one, Tensor))
    return (
        persisting(loader) and hasattr(dataset, "set_epoch") and not any(one.is_shared() for one in shared)  # type: ignore[no-untyped-call]
    )


def reading(data: Any) -> Reading:
    """A task's data for one reader, who may read it as he likes: the given one stays as it is."""
    copies = _Copies()
    found = copies.of(data, whole=True)
    if copies.outside:  # what classes use themselves, nobody may use a copy of
        copies = _Copies(copies.outside)
        found = copies.of(data, whole=True)
    generators, given = [*copies.generators, *copies.outside], [*copies.given, *copies.outside]
    return Reading(found, generators, copies.samplers, copies.loaders, given, copies.outside)


def check_apart(where: str, data: Any, others: Mapping[str, Any]) -> None:
    """Raise WorkloadError when data draw from a generator that those of another task draw from, too: `others`, by
    name. Who reads first would decide what each gets.
    """
    own = {id(generator) for generator in reading(data).given}
    for name, other in others.items() if own else ():
        if any(id(generator) in own for generator in reading(other).given):
            raise WorkloadError(
                f"{where}: its data draw random numbers from the same generator as those of task {name!r}, so what "
                "each gets would depend on which is read first; give the data of each task a generator of their own"
            )


def set_epoch(where: str, source: Any, epoch: int) -> None:
    """Tell a loader and its parts that pass `epoch` begins, each once, and inner ones first: outer ones may overrule
    them. Raises WorkloadError when one of them gives only a share of the data, or does not take it.
    """
    for part in parts(source):
        _refuse_share(where, part)
        method = getattr(part, "set_epoch", None)
        if callable(method):
            try:
                method(epoch)
            except Exception as error:
                raise WorkloadError(
                    f"{where}: set_epoch({epoch}) of its {type(part).__name__} raised {type(error).__name__}: {error}; "
                    "mend it: it is called with the number of each pass before it begins"
                ) from error


def parts(source: Any) -> list[Any]:
    """A loader, and the samplers, data sets and loaders that it is made of, each once and after those inside it."""
    found: dict[int, Any] = {}
    if type(source) not in (list, tuple):
        _look_for_parts(source, found, set())
    return list(found.values())


def _look_for_parts(part: Any, found: dict[int, Any], seen: set[int]) -> None:
    if id(part) in seen or isinstance(part, (*_STAYS, *_PLAIN)):
        return
    seen.add(id(part))
    if type(part) in (list, tuple, dict):
        inner = list(part.values() if isinstance(part, dict) else part) if len(part) <= _MOST_ENTRIES else []
    else:
        held = getattr(part, "__dict__", None)
        names = (*_PARTS, *_WRAPPED)
        inner = [one for name, one in held.items() if name.strip("_") in names] if isinstance(held, dict) else []
    for one in inner:
        _look_for_parts(one, found, seen)
    if type(part) not in (list, tuple, dict):
        found[id(part)] = part


def _refuse_share(where: str, part: Any) -> None:
    """Refuse what gives each process only its share: the rest would never be trained on."""
    for holder in (part, getattr(part, "_distributed", None)):  # the latter of `datasets.split_dataset_by_node`
        for name in _SHARES:
            count = getattr(holder, "__dict__", {}).get(name)
            if isinstance(count, int) and not isinstance(count, bool) and count > 1:
                raise WorkloadError(
                    f"{where}: its {type(part).__name__} has {name}={count}, so it gives only one of {count} shares of "
                    "the data, and the others would never be trained on; here one loader gives the whole batches of "
                    "all ranks: use a plain sampler, or num_replicas=1, rank=0"
                )


# -- copies ------------------------------------------------------------------------------------------------------------


class _Copies:
    """Copies of what changes as it is read; whatever holds none of it stays itself."""

    def __init__(self, outside: Sequence[Random] = ()) -> None:
        """`outside`: generators that are known to be used without a copy."""
        self.outside = list(outside)
        stay = (*everyones(), *outside)
        self.memo: dict[int, tuple[Any, Any]] = {id(one): (one, one) for one in stay}  # the original and its copy
        self.known = set(self.memo)  # generators that classes may use as they like
        self.globals: dict[int, dict[str, Any]] = {}
        self.generators: list[Random] = []
        self.given: list[Random] = []
        self.samplers: list[Any] = []
        self.loaders: list[DataLoader[Any]] = []
        self.depth = 0

    def of(self, value: Any, *, whole: bool = False) -> Any:
        """The copy of a value, or the value itself. `whole`: an object is copied even if it holds nothing to copy."""
        if isinstance(value, type):
            self._look_at(value)
        if isinstance(value, (*_PLAIN, *_STAYS)):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)][1]
        if len(self.memo) > _MOST_OBJECTS or self.depth > _DEEPEST:
            return value
        self.memo[id(value)] = value, value
        self.depth += 1
        try:
            found = self._copied(value, whole)
        finally:
            self.depth -= 1
        self.memo[id(value)] = value, found
        return found

    def _copied(self, value: Any, whole: bool) -> Any:
        if isinstance(value, Random):
            return self._generator(value)
        if type(value) in (list, tuple, dict):
            return self._container(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            owner = self.of(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if type(value) is functools.partial:
            inside = (value.func, value.args, value.keywords)
            func, args, keywords = map(self.of, inside)
            changed = func is not value.func or args is not value.args or keywords is not value.keywords
            return functools.partial(func, *args, **keywords) if changed else value
        return self._object(value, whole and not callable(value))

    def _generator(self, value: Random) -> Random:
        try:
            copy = cloned(value)
        except Exception:  # one without a state, as that of the operating system
            return value
        self.generators.append(copy)
        self.given.append(value)
        return copy

    def _container(self, value: Any, *, always: bool = False) -> Any:
        if len(value) > _MOST_ENTRIES:
            return value
        old = list(value.values() if isinstance(value, dict) else value)
        new = [self.of(one) for one in old]
        if not always and all(a is b for a, b in zip(old, new, strict=True)):
            return value
        return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)

    def _object(self, value: Any, whole: bool) -> Any:
        """An object of Python with other attributes; one that ends something when it is deleted stays itself."""
        kind, held = type(value), getattr(value, "__dict__", None)
        if not isinstance(held, dict) or hasattr(kind, "__del__"):
            return value
        self._look_at(kind)
        stateful = all(hasattr(kind, name) for name in ("state_dict", "load_state_dict"))
        moves = isinstance(value, DataLoader | Sampler | IterableDataset) or hasattr(kind, "set_epoch") or stateful
        try:
            copy = object.__new__(kind)
        except TypeError:  # a list with attributes, say
            return value
        self.memo[id(value)] = value, copy  # for what refers back to it
        attributes = {
            name: self._kept(one) if stateful or hasattr(kind, "set_epoch") else self.of(one)
            for name, one in list(held.items())
            if not (name == "_iterator" and isinstance(value, DataLoader))  # worker processes belong to one reader
        }
        if not (whole or moves or any(one is not held.get(name) for name, one in attributes.items())):
            return value
        vars(copy).update(attributes)
        for name in {name for base in kind.__mro__ for name in _slots(base)}:
            if hasattr(value, name):
                object.__setattr__(copy, name, self.of(getattr(value, name)))
        if isinstance(value, DataLoader):
            vars(copy)["_iterator"] = None
            self.loaders.append(copy)
        elif isinstance(value, Sampler) or hasattr(kind, "set_epoch"):
            self.samplers.append(copy)
        return copy

    def _look_at(self, kind: type) -> None:
        """Find generators that are globals of a class of the user's."""
        if id(kind) in self.memo:
            return
        self.memo[id(kind)] = kind, kind
        methods = [m for base in kind.__mro__ for m in vars(base).values() if isinstance(m, types.FunctionType)]
        for method in methods:
            for name in sorted(_globals(method)):
                one = method.__globals__[name]
                if isinstance(one, Random) and id(one) not in self.known:
                    self.known.add(id(one))
                    self.outside.append(one)

    def _kept(self, value: Any) -> Any:
        """An attribute of what keeps a state, which may stand in a container or in a tensor of one number."""
        if type(value) in (list, dict) and id(value) not in self.memo:
            return self._container(value, always=True)
        if type(value) is Tensor and value.ndim == 0 and not value.requires_grad:
            copy = value.clone()
            if value.device.type == "cpu" and value.is_shared():  # type: ignore[no-untyped-call]
                copy.share_memory_()  # type: ignore[no-untyped-call]
            return copy
        return self.of(value)

    def _function(self, value: types.FunctionType) -> Any:
        """A function that uses copies in place of what it is closed over, and of globals where it is the user's."""
        cells = value.__closure__ or ()
        closed = tuple(self._cell(cell) for cell in cells)
        defaults = self.of(value.__defaults__)
        used = value.__globals__
        replaced = {name: new for name in sorted(_globals(value)) if (new := self.of(used[name])) is not used[name]}
        if not replaced and defaults is value.__defaults__ and all(a is b for a, b in zip(cells, closed, strict=True)):
            return value
        if replaced:
            used = self.globals.setdefault(id(used), dict(used))
            used.update(replaced)
        copy = types.FunctionType(value.__code__, used, value.__name__, defaults, closed)
        copy.__kwdefaults__ = self.of(value.__kwdefaults__)
        functools.update_wrapper(copy, value, updated=("__dict__",))
        vars(copy).pop("__wrapped__", None)
        return copy

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            copy = self.of(cell.cell_contents)
        except ValueError:  # not filled yet
            return cell
        return cell if copy is cell.cell_contents else types.CellType(copy)


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return (name for name in names if name not in ("__dict__", "__weakref__"))


def _globals(function: types.FunctionType) -> set[str]:
    """Globals that a function of the user's may read."""
    code = function.__code__
    return function.__globals__.keys() & names_used(code) if is_own_file(code.co_filename) else set()


def _counters(sampler: Any) -> dict[str, int]:
    """Its whole numbers, some of which may count passes."""
    return {name: value for name, value in vars(sampler).items() if type(value) is int}
