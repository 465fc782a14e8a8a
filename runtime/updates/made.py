"""Made: how a run's optimizer and schedule were made, so that a resumed run knows what its user has changed since.

What a checkpoint holds of them would replace what the user's functions have just made, without a word. So settings that
were changed hold, and are reported; what the rest of the state would contradict is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spindle.errors import CheckpointError
from spindle.runtime.updates.optimizers import without_parameters
from spindle.runtime.updates.schedules import Schedule, SplitSchedule

Made = dict[str, Any]
"""Classes and plain settings, as they were before the first step."""

SCHEDULED = ("lr", "initial_lr", "momentum", "betas", "max_lr", "min_lr", "base_momentum", "max_momentum")
_REMEDY = "make it as it was, or put the weights alone into the modules (spindle.load_checkpoint) and train afresh"
_OTHER = "<object>"
_PLAIN = (bool, int, float, str, Tensor, type(None))


def made_optimizer(optimizer: torch.optim.Optimizer) -> Made:
    """Of an optimizer that comes from its factory, before there is a schedule for it."""
    groups = [_plain(without_parameters(group)) for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "groups": groups}


def made_schedule(schedule: Schedule | None) -> Made | None:
    """Of a schedule that comes from its factory."""
    if schedule is None:
        return None
    state = schedule.state_dict() if hasattr(schedule, "state_dict") else {}
    parts = schedule.parts if isinstance(schedule, SplitSchedule) else {"": schedule}
    return {"class": type(parts[""]).__name__, "components": sorted(parts), "state": _plain(state)}


def changed_settings(before: Made, now: Made, *, scheduled: bool) -> dict[tuple[int, str], tuple[Any, Any]]:
    """Settings of parameter groups that the user has changed, before and now, by group and key. Groups that were added
    are no matter here.

    Raises CheckpointError for an optimizer of another class, and, where a schedule steps them (`scheduled`), for other
    rates.
    """
    if before["class"] != now["class"]:
        raise CheckpointError(
            f"the checkpoint's optimizer is {before['class']} and this one {now['class']}, which cannot go on from its "
            f"states; {_REMEDY}"
        )
    found = {}
    for number, (old, new) in enumerate(zip(before["groups"], now["groups"], strict=False)):
        for key in old.keys() & new.keys():
            if _differ(old[key], new[key]):
                if scheduled and key in SCHEDULED:
                    raise CheckpointError(
                        f"{key} of the optimizer's group {number} was {_as_text(old[key])} when the checkpoint's run "
                        f"began, is {_as_text(new[key])} now, and a schedule goes on from it; {_REMEDY}"
                    )
                found[number, key] = (old[key], new[key])
    return found


def check_schedule(before: Made | None, now: Made | None) -> None:
    """Raises CheckpointError where the schedule is another one than that of the checkpoint."""
    if before is None or now is None:
        if before is not now:
            had = f"had {before['class']}, and this one has none" if before else "had none"
            raise CheckpointError(f"the checkpoint's run {had} as its schedule; {_REMEDY}")
        return
    if before["class"] != now["class"]:
        raise CheckpointError(f"the checkpoint's schedule is {before['class']} and this one {now['class']}; {_REMEDY}")
    if before["components"] != now["components"]:
        raise CheckpointError(
            f"the checkpoint's schedule was made for other components with settings of their own; {_REMEDY}"
        )
    for path, old, new in _differences(before["state"], now["state"], ""):
        raise CheckpointError(
            f"{path} of the schedule ({now['class']}) was {_as_text(old)} when the checkpoint's run began and is "
            f"{_as_text(new)} now; {_REMEDY}"
        )


def sentences_of(changed: Mapping[tuple[int, str], tuple[Any, Any]], labels: tuple[str, ...]) -> list[str]:
    """A sentence for each setting that was changed. `labels`: of the groups."""
    return [
        f"{key} of the optimizer{f' ({labels[number]})' if labels[number] else ''} was {_as_text(old)} when the "
        f"checkpoint's run began and is {_as_text(new)} from here on"
        for (number, key), (old, new) in sorted(changed.items(), key=lambda item: item[0])
    ]


def _plain(value: Any) -> Any:
    """What of a state is plain values and tensors, with lists for tuples; a mark in place of what is not."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return _OTHER


def _differ(old: Any, new: Any) -> bool:
    return next(_differences(old, new, ""), None) is not None


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Places at which two plain values differ; keys that only one of them has are left out."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() & new.keys()):
            yield from _differences(old[key], new[key], f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{path}[{number}]")
    elif isinstance(old, Tensor) or isinstance(new, Tensor):
        if not (
            isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape and torch.equal(old, new)
        ):
            yield path, old, new
    elif old != new and _OTHER not in (old, new):
        yield path, old, new


def _as_text(value: Any) -> str:
    text = f"{value.item():g}" if isinstance(value, Tensor) and value.numel() == 1 else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
