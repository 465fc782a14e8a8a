"""Finite: losses and gradients of a step that are no numbers, found before the optimizer makes parameters of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from spindle.errors import InputError
from spindle.runtime.comms.transport import Transport, sum_over_all
from spindle.values.graph import base_task

NotFinite = Literal["stop", "skip", "ignore"]
"""What a run does in a step with a loss or a gradient that is not finite: end before the optimizer steps, let the
optimizer rest in this step on all devices, or go on.
"""


def checked(what: str) -> None:
    """Raise InputError for what is no NotFinite."""
    if what not in get_args(NotFinite):
        raise InputError(f"not_finite is {what!r}; give one of {', '.join(get_args(NotFinite))}")


def broken_losses(rounds: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of the losses of some rounds, by task or micro-batch, one that is not finite of each task that has such."""
    found = ((base_task(task), loss) for losses in rounds for task, loss in losses.items())
    return {task: loss for task, loss in found if not math.isfinite(loss)}


def agreed(reason: str, losses: Mapping[str, Tensor], tasks: Sequence[str], transport: Transport) -> list[str] | None:
    """What all ranks say alike, each by what it has found: None where all is finite everywhere, else those of the
    `tasks` whose losses are not finite on other ranks alone. All ranks call it together.
    """
    flags = [bool(reason), *(task in losses for task in tasks)]
    found = torch.tensor(flags, dtype=torch.float32, device=transport.device)
    sum_over_all(found, transport)
    anywhere, *by_task = found.tolist()
    if not anywhere:
        return None
    return [task for task, count in zip(tasks, by_task, strict=True) if count and task not in losses]


def stopped(step: int, reason: str, elsewhere: Sequence[str]) -> str:
    """What to say where a step ends the run, counted from 1: what is not finite here, and the tasks `elsewhere`."""
    weights = f"weights are as step {step - 1} left them" if step > 1 else "weights are as they were"
    what = [f"the loss of task {task!r} is not finite" for task in elsewhere] + ([reason] if reason else [])
    return (
        f"step {step} ({weights}): {', '.join(what) or 'a gradient on another device is not finite'}; the optimizer "
        "did not step with that. Lower the learning rate, clip gradients (max_grad_norm=), look at the batch, or give "
        "not_finite='skip'"
    )


def not_finite(losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> str:
    """Which of a rank's losses, by task, and gradients, by parameter, are not finite; "" where all are.

    Waits for the device once. A norm that cannot overflow is taken of each gradient, which reads it once.
    """
    tasks = [task for task, loss in losses.items() if not math.isfinite(loss)]
    broken = list(_broken(gradients))
    by_component: dict[str, list[str]] = {}
    for name in broken:
        by_component.setdefault(name.partition(".")[0], []).append(name)
    sentences = [f"the loss of task {task!r} is {float(losses[task])}" for task in tasks]
    for component, names in by_component.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        sentences.append(f"the gradient of component {component!r} is not finite ({names[0]}{more})")
    return ", ".join(sentences)


def _broken(gradients: Mapping[str, Tensor]) -> Iterable[str]:
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, gradient in gradients.items():
        if gradient.numel():
            groups.setdefault((gradient.device, gradient.dtype), []).append(name)
    for names in groups.values():
        largest = torch.stack(torch._foreach_norm([gradients[name] for name in names], math.inf))
        if not bool(torch.isfinite(largest).all()):
            yield from (name for name, each in zip(names, torch.isfinite(largest).tolist(), strict=True) if not each)
