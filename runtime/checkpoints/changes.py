"""Changes: a checkpoint and the workload that goes on from it in; what its user has changed since then out, in words.

What was changed holds from the first step on. What cannot hold is refused where it is loaded: parameters that are
missing or of another shape (`checkpoint`), other groups (`progress`), other optimizers and schedules (`made`).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spindle.runtime.updates.progress import Progress
from spindle.words.whole_numbers import is_whole
from spindle.workload import Task, Workload

if TYPE_CHECKING:
    from spindle.runtime.checkpoints.checkpoint import Checkpoint

Facts = dict[str, Any]
"""Plain values that tell how a workload is trained, as a checkpoint keeps them."""

KEY = "workload"  # of the facts in a checkpoint's progress
_TASK = ("weight", "batch_size", "every", "probability")
_SETTINGS = ("accumulate", "max_grad_norm", "precision", "master_weights", "reduce_dtype")


def facts_of(workload: Workload) -> Facts:
    """How a workload is trained, as far as its user may change it between two runs."""
    return {
        "stage": workload.stage,
        "tasks": {name: _facts_of_task(task) for name, task in workload.tasks.items()},
        "frozen": [name for name, parameter in workload.named_parameters() if not parameter.requires_grad],
        "settings": {name: _plain(getattr(workload, name)) for name in _SETTINGS},
    }


def _facts_of_task(task: Task) -> Facts:
    mixed = task.mixture
    drawn = [list(mixed.tasks), list(map(float, mixed.weights)), int(mixed.count)] if mixed else None
    return {name: _plain(getattr(task, name)) for name in _TASK} | {"mixture": drawn}


def _plain(value: object) -> int | float | str | None:
    """The same as a value of Python: a checkpoint that held one of NumPy could not be read."""
    if value is None or isinstance(value, str):
        return value
    return int(value) if is_whole(value, 0) else float(value)  # type: ignore[call-overload,arg-type]


def changes(checkpoint: "Checkpoint", workload: Workload) -> list[str]:
    """A sentence for each change of a workload since a checkpoint was written; none of one that does not say how its
    workload was trained. Between two stages of a training tasks change as the stages say, which is no news.
    """
    from spindle.runtime.checkpoints.checkpoint import new_components

    now, before = facts_of(workload), checkpoint.progress.get(KEY)
    sentences = [
        f"component {name!r} is new: it begins at its own values from step {checkpoint.step + 1} on, without states of "
        "the optimizer"
        for name in new_components(workload, checkpoint.path)
    ]
    if before is None:
        return sentences
    if before["stage"] == now["stage"]:
        sentences += _of_tasks(before["tasks"], now["tasks"], checkpoint.step, checkpoint.progress)
    sentences += _of_frozen(set(before["frozen"]), workload)
    return sentences + list(_of_values("the workload", before["settings"], now["settings"]))


def _of_tasks(before: Mapping[str, Facts], now: Mapping[str, Facts], step: int, progress: Progress) -> Iterator[str]:
    for name in before.keys() - now.keys():
        yield f"task {name!r} has left; where its data stand is kept, for when it joins again"
    for name, facts in now.items():
        if name in before:
            yield from _of_values(f"task {name!r}", before[name], facts)
        else:
            begin = "where they stood when it left" if name in progress["feeds"] else "at their start"
            yield f"task {name!r} joins from step {step + 1} on; its data begin {begin}"


def _of_values(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            if name == "mixture":
                yield f"the mixture of {what} is another from here on"
                continue
            more = "; its data go on after as many batches as were read" if name == "batch_size" else ""
            yield f"{name} of {what} was {_as_text(before[name])} and is {_as_text(now[name])} from here on{more}"


def _as_text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of_frozen(before: set[str], workload: Workload) -> Iterator[str]:
    """By component: parameters that are trained no longer, and parameters that are trained again."""
    named = dict(workload.named_parameters())
    now = {name for name, parameter in named.items() if not parameter.requires_grad}
    for component in workload.components:
        own = {name for name in named if name.partition(".")[0] == component}
        for changed, words in (
            (own & now - before, "frozen from here on; states of the optimizer are kept"),
            (own & before - now, "trained from here on"),
        ):
            if changed:
                part = "" if changed == own else f"{len(changed)} parameters of "
                yield f"{part}component {component!r} {'is' if not part else 'are'} {words}"
