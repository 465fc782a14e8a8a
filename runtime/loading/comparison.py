"""Comparison: what a rank takes of its part of a batch beside what the whole takes; a sentence where they differ.

Capture saw where calls take something else for a part, and that it does not matter. All else must be alike.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spindle.capture.codes import TaskCode
from spindle.capture.facts import Fact, Samples, facts
from spindle.capture.operators.parts import TaskPart
from spindle.record.recording import Aux, Recording, leaves_of
from spindle.values.units import Units

MOST_KNOWN = 64  # pairs of recordings

OF_THE_WHOLE = "Compute it in the loader, of the whole batch, and give each sample its value in a field"
"""What to do where a part of a batch asks something else of its samples than the whole batch does."""

SHOWN = "or begin with a batch, or give a list of batches, in which samples differ in it"
"""The same, where code that all samples run computes with what they differ in."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Recordings of a whole and of a part, which are kept so that no id is used twice, and what can differ in them;
    whether a tensor of the whole that follows entry by entry from fields is compared with one that does not.
    """

    whole: Recording
    part: Recording
    facts: Sequence[Fact]
    needs_entries: bool


class Comparison:
    """Compares recordings of parts with recordings of wholes. `codes`: of the tasks, by name."""

    def __init__(self, codes: Mapping[str, TaskCode]) -> None:
        self.codes = codes
        self._known: OrderedDict[object, _Pair] = OrderedDict()

    def difference(self, whole: TaskPart, part: TaskPart, units: Units, operators: Sequence[str]) -> str:
        """What calls of these operators take of a part that they do not take of the whole, in words; "" for nothing."""
        of_whole, of_part = Samples(whole.aux, units, whole.bounds), Samples(part.aux, units, part.bounds)
        for fact in self._pair(whole, part, tuple(operators)).facts:
            if not fact.is_alike(of_whole, of_part):
                return (
                    f"{fact.text(of_whole, of_part)}; at capture both were alike in all that was looked at, so nothing "
                    f"shows whether a device may use its own. {OF_THE_WHOLE}{'' if fact.is_of_a_call else f'; {SHOWN}'}"
                )
        return ""

    def needs_entries(self, whole: TaskPart, part: TaskPart, operators: Sequence[str]) -> bool:
        """Whether a tensor of the whole that follows entry by entry from fields is compared with one that does not."""
        return self._pair(whole, part, tuple(operators)).needs_entries

    def _pair(self, whole: TaskPart, part: TaskPart, operators: tuple[str, ...]) -> _Pair:
        key = (id(whole.recording), id(part.recording), operators)
        if key not in self._known:
            found = self._found(whole, part, operators)
            needs = any(aux.index in whole.by_entry for fact in found for aux in leaves_of(fact.whole, Aux))
            self._known[key] = _Pair(whole.recording, part.recording, found, needs)
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return self._known[key]

    def _found(self, whole: TaskPart, part: TaskPart, operators: Sequence[str]) -> list[Fact]:
        """What can differ between the same calls of a batch and of a part of it, and did not at capture."""
        code = self.codes[part.task]
        (start, end), (low, high) = whole.bounds, part.bounds

        def by_entry(fact: Fact) -> bool:
            own, other = fact.part, fact.whole
            if not (isinstance(own, Aux) and isinstance(other, Aux) and own.index in part.by_entry):
                return False
            return part.by_entry[own.index] == whole.by_entry.get(other.index)

        return [
            fact
            for name in operators
            if name in part.operators and name in whole.operators
            for fact in facts(whole.operators[name].nodes, part.operators[name].nodes)
            if fact.slot not in code.apart
            and not by_entry(fact)
            and not fact.may_be_absent(code.by_sample, (end - start) - (high - low))
        ]
