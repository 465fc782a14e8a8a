"""Weighing: what the losses of a task's batches count in a step, by what each of them is a mean of."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from spindle.errors import WorkloadError
from spindle.inputs.batch import SampledBatch
from spindle.inputs.nested import nested

Weigh = Literal["micro-batches", "samples"] | str | Callable[[dict[str, Any]], Any]
"""What the losses of a step's batches of a task are weighted by: each batch alike, by its samples, by the field of this
name, or by what a function of the batch counts.
"""


def check_weigh(where: str, weigh: object) -> None:
    """Raise WorkloadError for what is no Weigh."""
    if not (isinstance(weigh, str) and weigh) and not callable(weigh):
        raise WorkloadError(
            f"{where}: weigh is {weigh!r}; give 'micro-batches', 'samples', the name of a field, or a function that "
            "counts what a batch's loss is a mean of"
        )


def counted(where: str, weigh: Weigh, batch: SampledBatch) -> float:
    """What a batch counts. Raises WorkloadError where that is no number from zero up."""
    if weigh == "micro-batches":
        return 1.0
    if weigh == "samples":
        return float(batch.units.num_samples)
    found = _asked(where, weigh, batch.fields)
    if isinstance(found, Tensor):
        found = found.sum().item() if isinstance(weigh, str) or found.numel() == 1 else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise WorkloadError(f"{where}: weigh= gave {what} for a batch; it must give one number, zero or more")
    return float(found)


def shares(counts: Sequence[float]) -> list[float]:
    """What the loss of each batch of a step is multiplied by so that their mean is the weighted mean; 0 for all where
    they count nothing together.

    >>> shares([4, 24]), shares([1, 1]), shares([0, 0])
    ([0.2857142857142857, 1.7142857142857142], [1.0, 1.0], [0.0, 0.0])
    """
    total = math.fsum(counts)
    return [count * len(counts) / total if total else 0.0 for count in counts]


def _asked(where: str, weigh: Weigh, fields: Mapping[str, Any]) -> Any:
    if isinstance(weigh, str):
        if weigh not in fields:
            raise WorkloadError(
                f"{where}: weigh is {weigh!r}, which is no field of its batch ({', '.join(fields)}); give a field that "
                "holds a count, 'samples', 'micro-batches', or a function that counts, such as lambda batch: "
                "(batch['labels'] != -100).sum()"
            )
        return fields[weigh]
    try:
        return weigh(nested(fields))
    except Exception as error:
        raise WorkloadError(f"{where}: weigh= raised {type(error).__name__}: {error}; correct weigh=") from error
