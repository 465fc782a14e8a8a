"""What tasks keep from call to call outside of modules: refused where it changes what they compute, by its name; left
alone where it does not, and as it was when capture is through.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spindle
from spindle.capture.look.kept import State
from spindle.errors import WorkloadError

Batch = dict[str, Tensor]
Keeps = Callable[["Kept", Batch], Tensor]


class Meter:
    """A running mean, whose numbers are of its class until it has counted."""

    total: float = 0
    count = 0

    def mean(self, value: float) -> float:
        self.total += value
        self.count += 1
        return self.total / self.count


class Kept:
    """Whatever a task may keep."""

    def __init__(self) -> None:
        self.meter, self.seen = Meter(), set[int]()
        self.last: Tensor | None = None
        self.first: Tensor | None = None
        self.numbers, self.largest, self.table = [0], np.zeros(5), {"largest": 0.0}
        self.recent, self.mean, self.log = deque([1.0], maxlen=3), torch.zeros(5), list[Tensor]()
        self.cache = dict[int, Tensor]()


def running_mean(kept: Kept, batch: Batch) -> Tensor:
    return batch["x"] / kept.meter.mean(len(batch["x"]))


def seen(kept: Kept, batch: Batch) -> Tensor:
    ids = batch["id"].tolist()
    share = sum(i not in kept.seen for i in ids) / len(ids)
    kept.seen.update(ids)
    return batch["x"] * (1 + share)


def first(kept: Kept, batch: Batch) -> Tensor:
    kept.first = batch["x"].mean(0) if kept.first is None else kept.first
    return batch["x"] - kept.first


def last(kept: Kept, batch: Batch) -> Tensor:
    before, kept.last = kept.last, batch["x"].mean(0)
    return batch["x"] if before is None else batch["x"] - before


def largest(kept: Kept, batch: Batch) -> Tensor:
    np.maximum(kept.largest, batch["x"].max(0).values.numpy(), out=kept.largest)
    return batch["x"] - torch.from_numpy(kept.largest.copy()).float()


def largest_number(kept: Kept, batch: Batch) -> Tensor:
    kept.table["largest"] = max(kept.table["largest"], float(batch["x"].max()))
    return batch["x"] / kept.table["largest"]


def recent(kept: Kept, batch: Batch) -> Tensor:
    kept.recent.append(float(batch["x"].mean()))
    return batch["x"] - sum(kept.recent) / len(kept.recent)


def every_seventh(kept: Kept, batch: Batch) -> Tensor:
    kept.numbers[0] += 1
    return -batch["x"] if kept.numbers[0] % 7 == 0 else batch["x"]


def after_twelve(kept: Kept, batch: Batch) -> Tensor:
    kept.meter.count += 1
    return 2 * batch["x"] if kept.meter.count > 12 else batch["x"]


REFUSED: dict[str, Keeps] = {
    "meter": running_mean,
    "call to call": seen,
    r"kept\.first": first,
    "call to call|last": last,
    "kept.largest": largest,
    "kept.table": largest_number,
    "call to call|recent": recent,
    "kept.numbers": every_seventh,
    "kept.meter.count": after_twelve,
}


def counted(kept: Kept, batch: Batch) -> Tensor:
    kept.numbers[0] += 1
    kept.log.append(batch["x"].mean())
    kept.seen.update(batch["id"].tolist())
    if kept.numbers[0] % 100 == 0:
        kept.meter.mean(1.0)
    return batch["x"]


def cached(kept: Kept, batch: Batch) -> Tensor:
    size = batch["x"].shape[1]
    if size not in kept.cache:
        kept.cache[size] = torch.arange(size) / size
    return batch["x"] + kept.cache[size]


def overwritten(kept: Kept, batch: Batch) -> Tensor:
    kept.mean.copy_(batch["x"].sum(0) * 0 + 1)
    return batch["x"] - kept.mean


EXACT: dict[str, Keeps] = {"counted": counted, "cached": cached, "overwritten": overwritten}


def rows() -> list[Batch]:
    """Three batches of other sizes and numbers."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(n, 5, generator=generator) + n, "y": torch.arange(n) % 3, "id": torch.arange(n) + n}
        for n in (6, 3, 4)
    ]


def workload(keeps: Keeps, kept: Kept) -> spindle.Workload:
    torch.manual_seed(0)
    made = spindle.Workload("w")
    head = made.component("head", nn.Linear(5, 3))
    made.task("t", batch_size=6, data=rows())(lambda batch: F.cross_entropy(head(keeps(kept, batch)), batch["y"]))
    return made


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_steers_a_task_is_refused_by_its_name(name: str) -> None:
    """Nothing of it is left in what the user keeps."""
    kept = Kept()
    before = State(lambda: kept, ())
    with pytest.raises(WorkloadError, match=rf"task 't'.*({name}).*let it follow from the batch alone"):
        spindle.make_metagraph(workload(REFUSED[name], kept))
    assert before.changed() == {}


@pytest.mark.parametrize("name", list(EXACT))
def test_what_steers_nothing_stays(name: str) -> None:
    report = spindle.verify(workload(EXACT[name], Kept()), num_workers=2, steps=3, launcher="threads")
    assert report.ok, report


def test_what_a_module_calls_is_seen() -> None:
    """A global of the file that the forward of a module uses."""
    torch.manual_seed(0)
    made = spindle.Workload("w")
    scaled, head = made.component("scaled", Scaled()), made.component("head", nn.Linear(5, 3))
    made.task("t", batch_size=6, data=rows())(lambda batch: F.cross_entropy(head(scaled(batch["x"])), batch["y"]))
    with pytest.raises(WorkloadError, match="LARGEST"):
        spindle.make_metagraph(made)
    assert LARGEST == {"of": 0.0}


LARGEST = {"of": 0.0}


class Scaled(nn.Module):
    """Divides by the largest number that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        LARGEST["of"] = max(LARGEST["of"], float(x.max()))
        found: Tensor = self.line(x / LARGEST["of"])
        return found


# -- what one task leaves for another ---------------------------------------------------------------------------------


def number(shared: dict[str, Any], batch: Batch) -> None:
    shared["scale"] = 1.0 if len(batch["x"]) == 6 else 2.0


def tensor(shared: dict[str, Any], batch: Batch) -> None:
    shared["scale"] = batch["x"].mean()


SETS: dict[str, Callable[[dict[str, Any], Batch], None]] = {"an equal number": number, "a tensor": tensor}


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("kind", list(SETS))
def test_what_one_task_sets_for_another_is_refused(kind: str, is_there: bool) -> None:
    """Whichever comes first; also where nothing is there before, without which the other raises."""
    shared: dict[str, Any] = {"scale": 1.0} if is_there else {}
    made = spindle.Workload("w")
    head, other = made.component("head", nn.Linear(5, 3)), made.component("other", nn.Linear(5, 3))

    @made.task("sets", batch_size=6, data=rows())
    def sets(batch: Batch) -> Tensor:
        SETS[kind](shared, batch)
        return F.cross_entropy(head(batch["x"]), batch["y"])

    @made.task("reads", batch_size=6, data=rows())
    def reads(batch: Batch) -> Tensor:
        loss: Tensor = F.cross_entropy(other(batch["x"]), batch["y"]) * shared["scale"]
        return loss

    with pytest.raises(WorkloadError, match=r"task 'sets' sets .*shared.*, and task 'reads' computes with it"):
        spindle.make_metagraph(made)


class Scaling(nn.Module):
    """A layer with a number that tasks may set."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.scale = nn.Linear(5, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.line(x * self.scale)
        return found


@pytest.mark.parametrize("both_set", [True, False])
def test_an_attribute_of_a_module_that_one_task_sets_for_another_is_refused(both_set: bool) -> None:
    """Unless the other sets it too, before it computes with it."""
    torch.manual_seed(0)
    made = spindle.Workload("w")
    head = made.component("head", Scaling())

    @made.task("sets", batch_size=6, data=rows())
    def sets(batch: Batch) -> Tensor:
        head.scale = 1.0 + (len(batch["x"]) == 3)
        return F.cross_entropy(head(batch["x"]), batch["y"])

    @made.task("reads", batch_size=6, data=rows())
    def reads(batch: Batch) -> Tensor:
        if both_set:
            head.scale = 2.0
        return F.cross_entropy(head(batch["x"]), batch["y"])

    if both_set:
        assert len(spindle.make_metagraph(made)) > 0
        return
    with pytest.raises(WorkloadError, match=r"task 'sets' sets 'Scaling\.scale', and task 'reads' computes with it"):
        spindle.make_metagraph(made)


SMOOTHING = 0.1


def smoothed(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores, y, label_smoothing=SMOOTHING)


def test_what_tasks_share_and_only_read_is_theirs() -> None:
    """A number that both compute with, in two functions each, and a list that both append to."""
    shared: dict[str, Any] = {"scale": 2.0, "log": []}
    made = spindle.Workload("w")
    for name in ("a", "b"):
        head = made.component(name, nn.Linear(5, 3))

        def task(batch: Batch, head: nn.Module = head) -> Tensor:
            shared["log"].append(len(batch["x"]))
            loss: Tensor = smoothed(head(batch["x"]), batch["y"]) * shared["scale"] * (1 - SMOOTHING)
            return loss

        made.task(name, batch_size=6, data=rows())(task)
    assert len(spindle.make_metagraph(made)) > 1
    assert shared == {"scale": 2.0, "log": []}
