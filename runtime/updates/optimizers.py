"""Optimizers: the user's own parameter groups, the same on every rank, and what of them can step as in one process.

- The factory gets all parameters of the workload in one order, so its groups, and what a schedule keeps for each, are
  those of one process. A rank gives it stand-ins for parameters that it does not update: of their shape and type, and
  without memory. They leave the groups again; a group may be empty on a rank.
- Settings of a component (`component(optimizer=...)`) split each group of the factory: parameters of components with
  settings become groups of their own, in the order in which they occur, the rest stays one.
"""

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spindle.errors import RunError, SpindleWarning, WorkloadError
from spindle.inputs.usercode import PAIRS, arguments, takes_names
from spindle.runtime.parallel.names import piece_of
from spindle.values.graph import Parameter, parse_piece

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
Settings = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Optimization:
    """An optimizer and the labels of its groups: "" or the component that has settings, with the number (or the `name`)
    of the user's group where there are several. `origins`: the number of the user's group that each was split from, and
    the component, "" for the rest; `of_user` gives the user's own groups.
    """

    optimizer: torch.optim.Optimizer
    labels: tuple[str, ...]
    origins: tuple[tuple[int, str], ...]
    user_groups: tuple[dict[str, Any], ...] = field(repr=False)
    settings: Settings = field(default_factory=dict, repr=False)

    def of_user(self, component: str) -> torch.optim.Optimizer:
        """What stands for the optimizer with the user's own groups, all with the settings of a component."""
        made: torch.optim.Optimizer = object.__new__(type(self.optimizer))
        made.__dict__.update((key, value) for key, value in vars(self.optimizer).items() if key != "step")
        own = self.settings.get(component, {})
        made.param_groups = [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()} | dict(own)
            for group in self.user_groups
        ]
        return made

    def learning_rates(self) -> dict[str, float]:
        """The rate of each group by its label; optimizers that find their own (lr=None) have none."""
        rates = (
            (label, group.get("lr")) for label, group in zip(self.labels, self.optimizer.param_groups, strict=True)
        )
        return {label: float(rate) for label, rate in rates if rate is not None}


def make_optimizer(
    factory: OptimizerFactory, parameters: Mapping[str, nn.Parameter], settings: Settings
) -> Optimization:
    """What the user's factory makes of all parameters, its groups split by components with settings.

    Raises WorkloadError when it gives no optimizer, takes a parameter that it was not given, cannot be stepped without
    more, or lacks a setting that a component asks for; RunError when it raises.
    """
    try:
        optimizer = factory(list(parameters.items()) if takes_names(factory) else list(parameters.values()))
    except Exception as error:
        raise RunError.of(error, "optimizer=") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise WorkloadError(f"optimizer= gave a {type(optimizer).__name__}; return a torch.optim.Optimizer")
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise WorkloadError("SparseAdam needs sparse gradients, and planned runs add up dense ones; use Adam")
    if needed := [name for name, p in arguments(optimizer.step).items() if is_required(p)]:
        raise WorkloadError(
            f"{kind}.step needs {needed[0]!r}: it computes losses anew inside of a step, which a planned step cannot; "
            "use an optimizer whose step takes no argument"
        )
    if any(getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")):
        raise WorkloadError(
            f"optimizer= registered a hook on {kind}.step, which would see only what one device updates; leave it out"
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        if foreign := [p for p in group["params"] if id(p) not in names]:
            raise WorkloadError(
                f"optimizer= took a parameter of shape {tuple(foreign[0].shape)} that it was not given; use the "
                f"parameters of its argument only, since each device has its own (call it `{PAIRS}` to get names too)"
            )
    user_groups = tuple(
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in g.items()} for g in optimizer.param_groups
    )
    labels, origins = _split(optimizer, names, settings)
    return Optimization(optimizer, labels, origins, user_groups, settings)


def rank_optimizer(
    factory: OptimizerFactory,
    every: Sequence[Parameter],
    own: Iterable[tuple[str, nn.Parameter]],
    settings: Settings,
    device: torch.device,
) -> Optimization:
    """The optimizer of a rank that updates `own`: of `every` parameter itself, pieces where it is cut, or nothing."""
    held: dict[str, list[tuple[str, nn.Parameter]]] = {p.name: [] for p in every}
    for name, parameter in own:
        held[parse_piece(name).whole].append((name, parameter))
    alone = {name: found[0][1] for name, found in held.items() if len(found) == 1 and found[0][0] == name}
    parameters = {p.name: alone[p.name] if p.name in alone else stand_in(p, device) for p in every}
    built = make_optimizer(factory, parameters, settings)
    names = {id(parameter): name for name, parameter in parameters.items()}
    states: defaultdict[Any, Any] = defaultdict(dict)
    states.update({key: value for key, value in built.optimizer.state.items() if not isinstance(key, Tensor)})
    for group in built.optimizer.param_groups:
        taken = [(whole, *of) for whole in group["params"] for of in held[names[id(whole)]]]
        for whole, name, parameter in taken:
            for key, value in built.optimizer.state.get(whole, {}).items():  # of an optimizer that begins with some
                states[parameter][key] = value if whole is parameter else _piece(value, whole, name)
        group["params"] = [parameter for _, _, parameter in taken]
        if "param_names" in group:
            group["param_names"] = [name for _, name, _ in taken]
    built.optimizer.state.clear()  # it may be held in several places
    built.optimizer.state.update(states)
    return built


def stand_in(parameter: Parameter, device: torch.device) -> nn.Parameter:
    """A parameter of the same shape and type that takes no memory."""
    value = torch.zeros((), dtype=getattr(torch, parameter.dtype), device=device).expand(parameter.shape)
    return nn.Parameter(value, requires_grad=parameter.trainable)


def described(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[Parameter, ...]:
    """What a rank must know of each parameter to make a stand-in."""
    return tuple(
        Parameter(name=name, shape=tuple(p.shape), dtype=str(p.dtype).removeprefix("torch."), trainable=p.requires_grad)
        for name, p in parameters
    )


def _piece(value: Any, whole: Tensor, name: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (piece_of(value, name) if value.shape == whole.shape else value).clone()


def _split(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], settings: Settings
) -> tuple[tuple[str, ...], tuple[tuple[int, str], ...]]:
    """Split the groups by components with settings; the label and the origin of each."""
    groups, labels, origins, several = [], [], [], len(optimizer.param_groups) > 1
    rates: dict[int, Tensor] = {}  # tensors of groups: no other device's, and as many as one process has
    for number, group in enumerate(optimizer.param_groups):
        parts: dict[str, list[int]] = {}
        for index, parameter in enumerate(group["params"]):
            component = names[id(parameter)].partition(".")[0]
            parts.setdefault(component if component in settings else "", []).append(index)
        user = str(group.get("name", f"group {number}")) if several else ""
        if set(parts) <= {""}:  # the group itself: an optimizer that is made of others holds it in several places
            group.update({k: rates.setdefault(id(v), v.clone()) for k, v in group.items() if isinstance(v, Tensor)})
            groups.append(group)
            labels.append(user)
            origins.append((number, ""))
            continue
        for component, indices in parts.items():
            own = settings.get(component, {})
            if unknown := [key for key in own if key not in group]:
                raise WorkloadError(
                    f"component {component!r}: optimizer={dict(own)} sets {unknown[0]!r}, which "
                    f"{type(optimizer).__name__} does not have; it has {', '.join(k for k in group if k != 'params')}"
                )
            lists = {key: [group[key][index] for index in indices] for key in ("params", "param_names") if key in group}
            apart = {key: value.clone() for key, value in group.items() if isinstance(value, Tensor)}  # rates
            groups.append(group | apart | dict(own) | lists)
            labels.append(" ".join(filter(None, (user, component))))
            origins.append((number, component))
    optimizer.param_groups[:] = groups
    return tuple(labels), tuple(origins)


def without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group holds besides its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def is_required(parameter: inspect.Parameter) -> bool:
    """Whether a function cannot be called without it."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


# -- what an optimizer sees at once ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reach:
    """What the update of a number depends on beside its own gradients: others of its parameter, other parameters; how
    many dimensions its parameter has, so that a row of its numbers is updated otherwise.
    """

    of_parameter: bool
    of_others: bool
    of_shape: bool = False


class Elsewhere(WorkloadError):
    """An optimizer steps parameters that it keeps elsewhere than in its groups, as one that is made of others."""


def reach_of(optimizer: torch.optim.Optimizer) -> Reach:
    """Tried on small matrices: whole and in halves, together and one by one.

    Raises WorkloadError when it cannot be tried, or steps other parameters than those of its groups.
    """
    draw = torch.Generator().manual_seed(0)
    tried = [[torch.randn(4, 6, generator=draw, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    reach = [_reach_in(optimizer, group, tried) for group in optimizer.param_groups]
    return Reach(*(any(getattr(found, name) for found in reach) for name in ("of_parameter", "of_others", "of_shape")))


def _reach_in(optimizer: torch.optim.Optimizer, group: dict[str, Any], tried: list[list[Tensor]]) -> Reach:
    """`tried`: of two parameters the value and the gradients of two steps; the second one rests in the first step."""
    first, second = tried[0], [tried[1][0], None, tried[1][2]]
    try:
        together, alone = _after(optimizer, group, [first, second]), _after(optimizer, group, [first])
        alone += _after(optimizer, group, [second])
        halves = [
            torch.cat(_after(optimizer, group, [[t.chunk(2, dim)[k] for t in tried[0]] for k in (0, 1)]), dim)
            for dim in (0, 1)
        ]
    except Exception as error:
        raise WorkloadError(
            f"{type(optimizer).__name__} could not be tried on a small matrix ({type(error).__name__}: {error}), so "
            "whether it computes the update of an element from others is not known; if so, plan for one device, and "
            "leave tensor_parallel= and shard= out"
        ) from error
    try:
        rows = [_after(optimizer, group, [[t.flatten().chunk(2)[k] for t in tried[0]]])[0] for k in (0, 1)]
        in_rows = torch.allclose(torch.cat(rows), alone[0].flatten(), rtol=1e-9, atol=1e-12)
    except Exception:  # it takes matrices alone
        in_rows = False
    if torch.equal(alone[0], first[0]):
        raise Elsewhere(
            f"{type(optimizer).__name__} does not step the parameters that stand in its groups, but others that it "
            "keeps beside them, so whether it computes with whole matrices is not known; leave tensor_parallel= and "
            "shard= out, or use an optimizer that is not made of others"
        )
    return Reach(
        of_parameter=not all(torch.allclose(half, alone[0], rtol=1e-9, atol=1e-12) for half in halves),
        of_others=not all(torch.allclose(*pair, rtol=1e-9, atol=1e-12) for pair in zip(together, alone, strict=True)),
        of_shape=not in_rows,
    )


def _after(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], tried: Sequence[Sequence[Tensor | None]]
) -> list[Tensor]:
    """Values of fresh parameters after the steps; without a gradient one rests."""
    probe: Any = object.__new__(type(optimizer))
    probe.__dict__.update((key, value) for key, value in vars(optimizer).items() if key != "step")  # a schedule's
    parameters = [nn.Parameter(value.clone()) for value, *_ in tried if value is not None]
    probe.state = defaultdict(dict)
    fixed = {"fused": False, "capturable": False} | ({} if group.get("lr") is None else {"lr": 0.01})  # on any device
    probe.param_groups = [group | {key: value for key, value in fixed.items() if key in group} | {"params": parameters}]
    for step in range(1, len(tried[0])):
        for parameter, values in zip(parameters, tried, strict=True):
            gradient = values[step]
            parameter.grad = None if gradient is None else gradient.clone()
        probe.step()
    return [parameter.detach() for parameter in parameters]


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    *,
    cut: Iterable[str],
    sharded: Iterable[str],
    same_everywhere: bool,
    steps_apart: bool,
) -> None:
    """Refuse an optimizer that would not step as in one process. `cut`: components that tensor parallelism may cut;
    `sharded`: those whose parameters are sharded. `same_everywhere`: whether all ranks that update anything update all;
    `steps_apart`: there is more than one rank.
    """
    cut, sharded = sorted(cut), sorted(sharded)
    if not cut and not sharded and (same_everywhere or not steps_apart):
        return
    kind = type(optimizer).__name__
    try:
        reach = reach_of(optimizer)
    except Elsewhere:
        if cut or sharded:
            raise
        return  # trial steps tell
    except WorkloadError as error:
        if cut or sharded:
            raise
        warnings.warn(str(error), SpindleWarning, stacklevel=4)
        return
    if reach.of_parameter and cut:
        raise WorkloadError(
            f"{kind} computes with whole matrices, and component {cut[0]!r} is registered with tensor_parallel=, which "
            "keeps them in pieces; leave tensor_parallel out, or use an optimizer that updates each element by itself"
        )
    if (reach.of_parameter or reach.of_shape) and sharded:
        raise WorkloadError(
            f"{kind} computes with whole matrices, and the parameters of component {sharded[0]!r} are sharded, so that "
            "no device updates one; register it with shard='nothing' and plan again, or use an optimizer that updates "
            "each element by itself"
        )
    if reach.of_others and steps_apart and not same_everywhere:
        raise WorkloadError(
            f"{kind} computes the update of a parameter from others too, and in this plan devices update different "
            "ones; plan for one device, or use an optimizer that updates each parameter by itself (to clip gradients "
            "there is max_grad_norm= of the workload)"
        )
