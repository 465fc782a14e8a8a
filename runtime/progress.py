"""Progress: optimizers and schedules as tensors and plain values by the user's names, and back.

Ranks hold different parameters, so parameter groups go by the component that has settings of its own, or "" for the
rest, never by their position.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spindle.errors import CheckpointError
from spindle.graph import parse_piece
from spindle.runtime.parallel.names import piece_of

Progress = dict[str, Any]
"""Plain values and tensors that tell where a run stands besides its tensors."""

Groups = dict[str, dict[str, Any]]
"""Settings of parameter groups by component."""

_BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs")  # lists in a schedule's state with an entry a group
PREFIX = "optimizer"


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """States of the named parameters as `optimizer:NAME:KEY`; numbers become tensors of no dimension."""
    found = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"{PREFIX}:{name}:{key}"] = torch.as_tensor(value).detach().cpu().clone()
    return found


def group_settings(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Groups:
    """Settings of each parameter group; `names` gives a group's name by the id of its first parameter."""
    return {
        names[id(group["params"][0])]: {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    group_names: Sequence[str],
    groups: Groups,
    tensors: Mapping[str, Tensor],
) -> None:
    """Give an optimizer, fresh from its factory, the states and settings that a checkpoint holds."""
    states: dict[str, dict[str, Tensor]] = {}
    by_whole: dict[str, list[str]] = {}
    for name in parameters:
        by_whole.setdefault(parse_piece(name).whole, []).append(name)
    for full, value in tensors.items():
        _, name, key = full.split(":")
        for own in by_whole.get(name, ()):
            states.setdefault(own, {})[key] = piece_of(value, own).clone()
    fresh = optimizer.state_dict()
    name_by_id = {id(parameter): name for name, parameter in parameters.items()}
    order = [name_by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]
    fresh["state"] = {index: states[name] for index, name in enumerate(order) if name in states}
    for name, group in zip(group_names, fresh["param_groups"], strict=True):
        group.update(groups.get(name, {}))
    try:
        optimizer.load_state_dict(fresh)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's optimizer does not fit this one ({error}); use the optimizer it was made with"
        ) from None


def schedule_state(schedule: Any, group_names: Sequence[str]) -> Any:
    """A schedule's state; what it keeps a group is told by the group's name."""
    return None if schedule is None else _by_group(schedule.state_dict(), group_names)


def _by_group(state: Any, names: Sequence[str]) -> Any:
    if isinstance(state, dict):
        return {
            key: {"by_group": dict(zip(names, value, strict=True))}
            if key in _BY_GROUP and isinstance(value, list) and len(value) == len(names)
            else _by_group(value, names)
            for key, value in state.items()
        }
    return [_by_group(value, names) for value in state] if isinstance(state, list) else state


def load_schedule(schedule: Any, group_names: Sequence[str], state: Any) -> None:
    """Give a schedule the state that a checkpoint holds."""
    if state is not None:
        schedule.load_state_dict(_in_order(state, group_names, schedule.state_dict()))


def _in_order(state: Any, names: Sequence[str], present: Any) -> Any:
    if isinstance(state, dict) and set(state) == {"by_group"}:
        found = state["by_group"]
        return [found.get(name, own) for name, own in zip(names, present, strict=True)]
    if isinstance(state, dict):
        inner = present if isinstance(present, dict) else {}
        return {key: _in_order(value, names, inner.get(key)) for key, value in state.items()}
    if isinstance(state, list) and isinstance(present, list) and len(present) == len(state):
        return [_in_order(value, names, own) for value, own in zip(state, present, strict=True)]
    return state


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Progress of a whole run from that of its ranks: all groups and feeds, of whoever holds them."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            known = whole.get(key)
            if isinstance(value, Mapping) and isinstance(known, Mapping):
                whole[key] = merged([value, known])
            elif known is None:
                whole[key] = value
    return whole
