"""Drift: batches of a run in; a sentence where the size of one lies outside the range its plan was made for, out."""

from collections.abc import Iterable

from spindle.inputs.batch import SampledBatch
from spindle.values.plan import SizeRange
from spindle.values.units import SAMPLES

TOLERANCE = 0.1  # how far outside of what was seen a size may lie: some dozens of batches do not show the largest


class Drift:
    """Compares batches with the sizes in a plan. `found`: a sentence for each task that left them, the first time."""

    def __init__(self, sizes: Iterable[SizeRange]) -> None:
        self.found: dict[str, str] = {}
        self._sizes: dict[str, list[SizeRange]] = {}
        for size in sizes:
            self._sizes.setdefault(size.task, []).append(size)

    def look(self, task: str, step: int, batch: SampledBatch) -> None:
        """Note whether the batch of a task in a step, counted from 1, lies outside. Fields that it lacks count as
        inside, and so does a last batch that is not full.
        """
        if task in self.found or task not in self._sizes:
            return
        entries = batch.entries
        is_full = all(entries[SAMPLES] >= size.least for size in self._sizes[task] if size.field == SAMPLES)
        for size in self._sizes[task]:
            count = entries.get(size.field, size.least)
            is_small = is_full and count < (1 - TOLERANCE) * size.least
            if is_small or count > (1 + TOLERANCE) * size.most:
                seen = f"{size.least}" if size.least == size.most else f"{size.least} to {size.most}"
                what = "samples" if size.field == SAMPLES else f"entries of {size.field!r}"
                self.found[task] = (
                    f"task {task!r}, step {step}: the batch has {count} {what}, where the batches that the plan was "
                    f"made for had {seen}; steps may take longer and need more memory than planned. If such batches "
                    "are usual, plan again with some of them among the first of the data"
                )
                return
