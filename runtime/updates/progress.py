"""Progress: optimizers and schedules as tensors and plain values by the user's names, and back.

All ranks have the same parameter groups, each with what it holds of them (optimizers.py), so position names a group,
and a schedule's state is that of any rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spindle.errors import CheckpointError
from spindle.runtime.parallel.names import piece_of
from spindle.runtime.updates.optimizers import without_parameters
from spindle.values.graph import parse_piece

Progress = dict[str, Any]
"""Plain values and tensors that tell where a run stands besides its tensors."""

PREFIX = "optimizer"
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
_KEPT = ("state", "param_groups")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    strict: bool = True,
    copies: bool = True,
) -> dict[str, Tensor]:
    """States of the named parameters as `optimizer:NAME:KEY`; numbers become tensors of no dimension. Without `copies`
    they are the optimizer's own, which the next step changes.

    Raises CheckpointError for an optimizer that keeps anything else, unless not `strict`: then that is left out.
    """
    found = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{PREFIX}:{name}:{key}"] = value.detach().cpu().clone() if copies else value.detach()
            elif type(value) in _NUMBERS:
                found[f"{PREFIX}:{name}:{key}"] = torch.tensor(value, dtype=_NUMBERS[type(value)])
            elif value is not None and strict:
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of {name!r}; only tensors "
                    "and numbers can be saved: train without checkpoints, or use another optimizer"
                )
    return found


def optimizer_progress(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], numbers: Mapping[str, str]
) -> Progress:
    """Settings of each group, the parameters in it by `names` (by id), and which states are numbers, beside `numbers`.

    `held` are settings of groups of which this rank has parameters: an optimizer may count in them. Raises
    CheckpointError for an optimizer that keeps more than states of parameters and groups.
    """
    try:
        kept = optimizer.state_dict()
    except Exception as error:  # of an optimizer around others, say, whose __init__ does not call Optimizer's
        raise CheckpointError(
            f"{type(optimizer).__name__}.state_dict() raises {type(error).__name__} ({error}), so its states cannot be "
            "saved: let its __init__ call super().__init__(params, defaults), train without checkpoints, or use "
            "another optimizer"
        ) from error
    more = [key for key in kept if key not in _KEPT] + [key for key in optimizer.state if not isinstance(key, Tensor)]
    more += [key for key, value in vars(optimizer).items() if isinstance(value, torch.optim.Optimizer)]
    if more:
        raise CheckpointError(
            f"{type(optimizer).__name__} keeps {more[0]!r} beside its states and groups, which cannot be saved by "
            "parameter: train without checkpoints, or use another optimizer"
        )
    settings = {str(number): without_parameters(group) for number, group in enumerate(optimizer.param_groups)}
    states = (state for parameter, state in optimizer.state.items() if id(parameter) in names)
    return {
        "groups": settings,
        "held": {n: settings[n] for n, group in zip(settings, optimizer.param_groups, strict=True) if group["params"]},
        "members": {
            parse_piece(names[id(parameter)]).whole: number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        },
        "numbers": dict(numbers)
        | {k: type(v).__name__ for state in states for k, v in state.items() if type(v) in _NUMBERS},
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    progress: Progress,
    tensors: Mapping[str, Tensor],
    changed: Mapping[tuple[int, str], Any] | None = None,
) -> None:
    """Give an optimizer, fresh from its factory, the states and settings that a checkpoint holds; of `changed` ones, by
    group and key, the value that is given.

    Raises CheckpointError when its groups are others.
    """
    name_by_id = {id(parameter): name for name, parameter in parameters.items()}
    _check_groups(optimizer, name_by_id, progress)
    numbers = {kind.__name__: kind for kind in _NUMBERS}
    states: dict[str, dict[str, Any]] = {}
    by_whole: dict[str, list[str]] = {}
    for name in parameters:
        by_whole.setdefault(parse_piece(name).whole, []).append(name)
    for full, value in tensors.items():
        _, name, key = full.split(":")
        kind = numbers.get(progress["numbers"].get(key, ""))
        for own in by_whole.get(name, ()):
            states.setdefault(own, {})[key] = kind(value.item()) if kind else piece_of(value, own).clone()
    fresh = optimizer.state_dict()
    order = [name_by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]
    fresh["state"] = {index: states[name] for index, name in enumerate(order) if name in states}
    for number, group in enumerate(fresh["param_groups"]):
        group.update((progress["groups"] | progress["held"])[str(number)])
    for (number, key), value in (changed or {}).items():
        fresh["param_groups"][number][key] = value
    try:
        optimizer.load_state_dict(fresh)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's optimizer does not fit this one ({error}); use the optimizer it was made with"
        ) from None
    for name, state in states.items():
        _keep_types(optimizer.state[parameters[name]], state)


def _keep_types(held: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Undo that torch casts states to the type of their parameter when it loads them, which loses digits."""
    for key, value in saved.items():
        now = held.get(key)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and value.dtype != now.dtype:
            cast = value.to(now)
            if cast.shape == now.shape and torch.equal(cast, now):
                held[key] = value.to(now.device)


def _check_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str], progress: Progress) -> None:
    groups, saved = optimizer.param_groups, progress["groups"]
    if len(groups) != len(saved):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups, and this one {len(groups)}; make the same "
            "groups (of all parameters, frozen ones too, which no optimizer steps)"
        )
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            name = parse_piece(names[id(parameter)]).whole
            before = progress["members"].get(name, number)
            if before != number:
                raise CheckpointError(
                    f"parameter {name!r} is in group {number} of the optimizer, and was in group {before} when the "
                    "checkpoint was written; make the same groups in the same order"
                )


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Progress of a whole run from that of its ranks: all groups and feeds, whichever rank holds them."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            known = whole.get(key)
            if isinstance(value, Mapping) and isinstance(known, Mapping):
                whole[key] = merged([value, known])
            elif known is None:
                whole[key] = value
    return whole
