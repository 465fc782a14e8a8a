"""History: one task in; an error where what earlier calls left, its own or another task's, changes what it computes."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn

from spindle.capture.look.kept import State, turned
from spindle.capture.look.refusals import own_generator, unlike
from spindle.capture.look.repeats import Place, other_line
from spindle.capture.look.samples import moved
from spindle.capture.look.watching import Held, made_by_first, own_state
from spindle.errors import WorkloadError
from spindle.inputs.batch import SampledBatch
from spindle.record.changes.copies import Attributes
from spindle.record.changes.fingerprints import OF_MODULES
from spindle.record.run import Recorded
from spindle.values.units import Bounds, Units

if TYPE_CHECKING:
    from spindle.capture.look.looker import Looker


class History:
    """What one task keeps from call to call. `sets`: what its calls set, by id, and how code calls it."""

    def __init__(self, looker: "Looker") -> None:
        """`looker` records the task's samples."""
        self.looker = looker
        self.modules = [module for c in looker.workload.components.values() for module in c.module.modules()]
        self.state: State
        self.kept: list[Place] = []
        self.start: list[Any] = []  # what stands there before any call
        self.sets: dict[int, str] = {}
        self.sets_in_modules: list[str] = []  # attributes of modules that its calls set

    def begin(self) -> None:
        """Note what is kept now."""
        self.state = State(self.looker.task.function, self.modules)
        self.kept = self.state.places
        self.start = [place.get() for place in self.kept]

    def put_back(self) -> None:
        """Let what calls of the task count and keep be as it was; modules are left to others."""
        for place, value in zip(self.kept, self.start, strict=True):
            if place.is_changed(value) and not isinstance(place.holder, nn.Module):
                place.put(value)
        self.state.put_back()

    def refuse_unlike(self, batch: SampledBatch) -> None:
        """Raise WorkloadError where the task computes something else of the same batch when it is called again, or
        would after many calls.
        """
        bounds = self.looker.few[0][0]
        kept, held = self.kept, Held(self.modules)
        self.state.put_back()
        attributes = self._attributes()
        with self.state.marked() as found:
            first = self.looker.record_samples(batch, bounds)
        self.sets |= found | self.state.changed()
        for key, (name, value) in self._attributes().items():
            if key not in attributes or attributes[key][1] is not value:
                self.sets_in_modules.append(name)
        before = [place.get() for place in kept]
        second = self.looker.record_samples(batch, bounds)
        line = other_line(first, second)
        if line is not None and not any(p.draws and p.is_changed(v) for p, v in zip(kept, before, strict=True)):
            self._refuse_own_state(batch, (first, second), held, [*zip(kept, before, strict=True)])
            raise unlike(self.looker.task, line)
        for place, value, begun in zip(kept, before, self.start, strict=True):
            if place.is_changed(value) or place.is_changed(begun):
                if place.draws:
                    raise own_generator(self.looker.task, place.name)
                self._refuse_steering(batch, bounds, second, place, held, value)
        if self.state.changed():
            self._refuse_history(batch, bounds, first)

    def _refuse_history(self, batch: SampledBatch, bounds: Bounds, usual: Recorded) -> None:
        """Raise WorkloadError where what the task keeps of other samples changes what it computes of these."""
        names = [*self.sets.values(), *self.state.changed().values()]
        self.state.put_back()
        own = batch.part(*bounds)
        far = {name: moved(value) for name, value in own.items()}
        units = Units({unit: counts[slice(*bounds)] for unit, counts in batch.units.counts.items()})
        others = [(batch, part) for part in self.looker.few[0][1][::-1]]
        others += [(SampledBatch(far, units, batch.places), (0, units.num_samples))]
        others += [(other, few) for other, (few, _) in zip(self.looker.batches[1:], self.looker.few[1:], strict=True)]
        for other, samples in others:
            with suppress(Exception):
                self.looker.record_samples(other, samples)
        self.looker.writes = None
        line = other_line(usual, self.looker.record_samples(batch, bounds))
        self.state.put_back()
        if line is not None:
            raise unlike(self.looker.task, line, names[0])

    def lacking(self, other: "History") -> WorkloadError | None:
        """The error for a task that raises where `other`, another task, has not set what both know; None where none is
        such.
        """
        common = other.sets.keys() & self.state.reached
        return self._handed(other, other.sets[min(common)], "its function, which raises without") if common else None

    def _attributes(self) -> dict[tuple[int, str], tuple[str, Any]]:
        """Attributes of modules beside what torch keeps: how to call each, and its value."""
        return {
            (number, name): (f"{type(module).__name__}.{name}", value)
            for number, module in enumerate(self.modules)
            for name, value in vars(module).items()
            if name not in OF_MODULES
        }

    def _handed(self, other: "History", name: str, line: str) -> WorkloadError:
        return WorkloadError(
            f"task {other.looker.task.name!r} sets {name!r}, and task {self.looker.task.name!r} computes "
            f"with it ({line}), which may run on another device; let each task compute from its own batch, or make one "
            "task of the two"
        )

    def refuse_what_others_set(self, other: "History") -> None:
        """Raise WorkloadError where what `other`, another task, keeps changes what this one computes."""
        common = other.sets.keys() & self.state.reached
        own = set(self.sets_in_modules)  # what it sets itself it has been seen to set before it reads it
        names = [other.sets[min(common)]] if common else [name for name in other.sets_in_modules if name not in own]
        if not names:
            return
        batch, bounds = self.looker.batches[0], self.looker.few[0][0]
        usual, held = self.looker.record_samples(batch, bounds), Attributes(self.modules)
        lines: list[str | None] = []
        for its, (few, parts) in zip(other.looker.batches, other.looker.few, strict=True):
            for samples in (few, parts[0]):
                with suppress(Exception):
                    other.looker.record_samples(its, samples)
                    lines.append(other_line(usual, self.looker.record_samples(batch, bounds)))
        other.state.put_back()
        held.put_back()
        for place in self.state.among(common):
            for other_number in (place.far(), turned(place, place.get())):
                with other_number, suppress(WorkloadError):
                    lines.append(other_line(usual, self.looker.record_samples(batch, bounds)))
        line = next((line for line in lines if line is not None), None)
        if line is not None:
            raise self._handed(other, names[0], line)

    def _refuse_own_state(
        self, batch: SampledBatch, usual: tuple[Recorded, Recorded], held: Held, kept: Sequence[tuple[Place, Any]]
    ) -> None:
        """Raise WorkloadError where what a module holds makes the difference between two recordings of a batch."""
        bounds, own = self.looker.few[0][0], list(held.changed())
        lists = [(place, value, place.owner(held.modules)) for place, value in kept if place.is_changed(value)]
        owners = [owner for _, _, owner in lists if owner is not None]
        for place, value, owner in lists:
            if owner is not None:
                place.put(value)
        if owners and other_line(usual[1], self.looker.record_samples(batch, bounds)) is None:
            raise self._own_state(*owners[0])
        held.put_back()
        if own and other_line(usual[0], self.looker.record_samples(batch, bounds)) is None:
            raise self._own_state(*held.owner(own[0]))

    def _own_state(self, owner: type, attribute: str) -> WorkloadError:
        return WorkloadError(f"task {self.looker.task.name!r}: a {owner.__name__} {own_state(owner, attribute)}")

    def refuse_made_by_first(self, batch: SampledBatch, held: Held) -> None:
        """Raise WorkloadError where code outside of layers keeps in a module what it made of the first batch."""
        made, parts = held.changed(), self.looker.few[0][1]
        if not made or len(parts) < 2 or len(batch.units.counts) > 1:  # of packed fields what is kept follows sizes
            return
        self.looker.record_samples(batch, parts[1])
        kept = held.same(made)
        held.put_back()
        self.looker.record_samples(batch, parts[1])
        for name in kept - held.same(made):
            raise WorkloadError(f"task {self.looker.task.name!r}: {held.path(name)} {made_by_first(*held.owner(name))}")

    def _refuse_steering(
        self, batch: SampledBatch, bounds: Bounds, usual: Recorded, place: Place, held: Held, value: Any
    ) -> None:
        """Raise WorkloadError where a number steers what is computed, which was `value` before the usual call."""
        line = None
        for other_number in (place.far(), turned(place, value)):
            with other_number:
                try:
                    line = line or other_line(usual, self.looker.record_samples(batch, bounds))
                except WorkloadError:
                    line = line or "its function"
        if line is not None:
            owner = place.owner(held.modules)
            if owner is not None:
                raise self._own_state(*owner)
            raise unlike(self.looker.task, line, place.name)
