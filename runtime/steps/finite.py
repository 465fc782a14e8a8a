"""Finite: losses and gradients of a step that are no numbers, found before the optimizer makes parameters of them."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from spindle.errors import InputError
from spindle.runtime.comms.transport import Transport, sum_over_all
from spindle.runtime.devices import Streams
from spindle.values.graph import base_task

NotFinite = Literal["stop", "skip", "ignore"]
"""What a run does in a step with a loss or a gradient that is not finite: end before the optimizer steps, let the
optimizer rest in this step on all devices, or go on.
"""


def checked(what: str) -> None:
    """Raise InputError for what is no NotFinite."""
    if what not in get_args(NotFinite):
        raise InputError(f"not_finite is {what!r}; give one of {', '.join(get_args(NotFinite))}")


def agreed(reason: str, broken: Collection[str], tasks: Sequence[str], transport: Transport) -> list[str] | None:
    """What all ranks say alike, each by what it has found, among it tasks whose losses are `broken`: None where all is
    finite everywhere, else those of the `tasks` whose losses are not finite on other ranks alone. All ranks call it
    together.
    """
    flags = [bool(reason), *(task in broken for task in tasks)]
    found = torch.tensor(flags, dtype=torch.float32)
    sum_over_all(found, transport)
    anywhere, *by_task = found.tolist()
    if not anywhere:
        return None
    return [task for task, count in zip(tasks, by_task, strict=True) if count and task not in broken]


def stopped(step: int, reason: str, elsewhere: Sequence[str]) -> str:
    """What to say where a step ends the run, counted from 1: what is not finite here, and the tasks `elsewhere`."""
    weights = f"weights are as step {step - 1} left them" if step > 1 else "weights are as they were"
    what = [f"the loss of task {task!r} is not finite" for task in elsewhere] + ([reason] if reason else [])
    return (
        f"step {step} ({weights}): {', '.join(what) or 'a gradient on another device is not finite'}; the optimizer "
        "did not step with that. Lower the learning rate, clip gradients (max_grad_norm=), look at the batch, or give "
        "not_finite='skip'"
    )


def not_finite(
    rounds: Iterable[Mapping[str, Tensor]], gradients: Mapping[str, Tensor], norm: Tensor | None, streams: Streams
) -> tuple[str, list[str]]:
    """Which of a rank's losses, by task or micro-batch in each of some rounds, and gradients, by parameter, are not
    finite: a sentence, "" where all are, and the tasks. `norm`: of all gradients, where it is known.

    Waits for the device once, or twice where the norm is not finite. A norm that cannot overflow is taken of each
    gradient, which reads it once.
    """
    losses = [(base_task(task), loss) for found in rounds for task, loss in found.items()]
    groups = _by_kind(gradients)
    first = [_largest(gradients, group) for group in groups] if norm is None else [norm]
    numbers = streams.numbers([*(loss for _, loss in losses), *first])()
    broken = {task: value for (task, _), value in zip(losses, numbers, strict=False) if not math.isfinite(value)}
    sizes = numbers[len(losses) :]
    if norm is not None:
        is_broken = not math.isfinite(sizes[0])
        sizes = streams.numbers([_largest(gradients, group) for group in groups])() if is_broken else []
    names = (name for group in groups for name in group)
    wrong = [name for name, size in zip(names, sizes, strict=False) if not math.isfinite(size)]
    return ", ".join([*_of_losses(broken), *_of_gradients(wrong)]), list(broken)


def _of_losses(broken: Mapping[str, float]) -> list[str]:
    return [f"the loss of task {task!r} is {value}" for task, value in broken.items()]


def _of_gradients(wrong: Iterable[str]) -> list[str]:
    by_component: dict[str, list[str]] = {}
    for name in wrong:
        by_component.setdefault(name.partition(".")[0], []).append(name)
    return [
        f"the gradient of component {component!r} is not finite ({names[0]}"
        f"{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for component, names in by_component.items()
    ]


def _by_kind(gradients: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of gradients whose norms one call takes."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, gradient in gradients.items():
        if gradient.numel():
            groups.setdefault((gradient.device, gradient.dtype), []).append(name)
    return list(groups.values())


def _largest(gradients: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The largest absolute value of each of these."""
    return torch.stack(torch._foreach_norm([gradients[name] for name in names], math.inf))
