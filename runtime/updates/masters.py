"""Masters: float32 copies of bfloat16 parameters, which the optimizer steps in their place.

An update of a thousandth of a parameter is lost when it is added in bfloat16, whose numbers lie a 256th apart. The
optimizer adds it to a copy of four bytes, and the parameter is that copy rounded.

- Gradients of each backward are of the parameter's type, as autograd makes them. They are summed in float32: over
  tasks, micro-batches and, unless `reduce_dtype` says otherwise, ranks.
- A rank keeps masters of the parameters that it updates: the owner's alone with sharded optimizer states, of its
  range where parameters are sharded, of its piece under tensor parallelism.
- What something else than the optimizer writes to a parameter (a task's clamp, weights of a checkpoint) goes for its
  master too: elements that no longer are their master rounded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spindle.errors import CheckpointError
from spindle.values.graph import Parameter
from spindle.workload import ReduceType, Workload

KEY = "master_weight"
"""The name under which checkpoints hold a master, among the states of its parameter."""
WIDE = torch.float32
_NARROW = (torch.bfloat16,)
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Numbers:
    """In which types a run sums, reduces and steps: whether narrow parameters have `masters`, and the type of `reduce`,
    None for that in which gradients are summed.
    """

    masters: bool = False
    reduce: ReduceType | None = None

    @classmethod
    def of(cls, workload: Workload) -> "Numbers":
        """As a workload asks for."""
        return cls(workload.master_weights == "fp32", workload.reduce_dtype)

    def has_master(self, parameter: Tensor) -> bool:
        """Whether a parameter has a master."""
        return self.masters and parameter.dtype in _NARROW

    def summed(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which gradients of parameters of a type are summed."""
        return WIDE if self.masters and dtype in _NARROW else dtype

    def reduced(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which ranks reduce gradients that are summed in a type."""
        return dtype if self.reduce is None else _TYPES[self.reduce]

    def narrow(self, workload: Workload) -> list[str]:
        """Trained parameters of a workload that have masters."""
        return [name for name, p in workload.named_parameters() if p.requires_grad and self.has_master(p)]

    def stepped(self, parameters: Iterable[Parameter]) -> tuple[Parameter, ...]:
        """Parameters as the optimizer gets them."""
        names = {str(dtype).removeprefix("torch.") for dtype in _NARROW} if self.masters else set()
        return tuple(
            replace(p, dtype=str(WIDE).removeprefix("torch.")) if p.trainable and p.dtype in names else p
            for p in parameters
        )


def master_of(parameter: Tensor) -> nn.Parameter:
    """A master of a parameter, equal to it."""
    return nn.Parameter(parameter.detach().to(WIDE, copy=True))


def add_gradient(parameter: Tensor, total: Tensor | None) -> Tensor:
    """Take the gradient that a backward has left at a parameter, and add it to the sum of earlier ones; the sum."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient.to(WIDE) if total is None else total.add_(gradient)


def write_back(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give parameters the values of their masters, rounded; pairs of both."""
    held = [(parameter.detach(), master.detach()) for parameter, master in pairs]
    if held:
        torch._foreach_copy_([parameter for parameter, _ in held], [master for _, master in held])


@torch.no_grad()
def follow(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give masters the values of those elements of their parameters that something else has written."""
    for parameter, master in pairs:
        master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.to(master.dtype)))


# -- in checkpoints ----------------------------------------------------------------------------------------------------


def master_tensors(masters: Mapping[str, Tensor], names: Iterable[str], *, copies: bool = True) -> dict[str, Tensor]:
    """Masters of some parameters as `optimizer:NAME:master_weight`."""
    own = {name: masters[name].detach() for name in names if name in masters}
    return {f"optimizer:{n}:{KEY}": master.cpu().clone() if copies else master for n, master in own.items()}


def split_masters(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States of an optimizer in a checkpoint without the masters among them, and the masters by parameter."""
    masters = {full.split(":")[1]: value for full, value in tensors.items() if full.endswith(f":{KEY}")}
    return {full: value for full, value in tensors.items() if not full.endswith(f":{KEY}")}, masters


def states_for(
    states: Mapping[str, Tensor], saved: Mapping[str, Tensor], stepped: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """States of a checkpoint as they are to be loaded; `saved`: its masters by parameter, `stepped`: the types of the
    parameters that are stepped here, or of their masters. States of a run without masters become as wide as these.

    Raises CheckpointError where there are masters in the checkpoint, and none here.
    """
    for name, dtype in stepped.items():
        if name in saved and dtype in _NARROW:
            raise CheckpointError(
                f"the checkpoint holds a float32 master of {name!r}, and this run has master_weights='none', which "
                "would lose its digits; use master_weights='fp32', or put the weights alone into the modules "
                "(spindle.load_checkpoint) and train afresh"
            )
    return {full: _widened(value, full.split(":")[1], saved, stepped) for full, value in states.items()}


def _widened(value: Tensor, name: str, saved: Mapping[str, Tensor], stepped: Mapping[str, torch.dtype]) -> Tensor:
    grows = stepped.get(name) == WIDE and name not in saved and value.dtype in _NARROW
    return value.to(WIDE) if grows else value


def named_pairs(
    names: Iterable[str], parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters and masters of those names that have one."""
    return ((parameters[name], masters[name]) for name in names if name in masters)


# -- in one process ----------------------------------------------------------------------------------------------------


class PlainMasters:
    """Masters of one process that trains as any loop would: `stepped` has what the optimizer steps, by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], numbers: Numbers) -> None:
        self.parameters = parameters
        self.masters = {
            name: master_of(p) for name, p in parameters.items() if p.requires_grad and numbers.has_master(p)
        }
        self.stepped: dict[str, nn.Parameter] = {**parameters, **self.masters}

    def held(self, name: str) -> Tensor:
        """The master of a parameter, or itself."""
        return self.stepped[name]

    def collect(self) -> None:
        """After a backward: add its gradients to those of the masters."""
        for name, master in self.masters.items():
            if self.parameters[name].grad is not None:
                master.grad = add_gradient(self.parameters[name], master.grad)

    def clear(self) -> None:
        """Before a step: forget all gradients."""
        for parameter in (*self.parameters.values(), *self.stepped.values()):
            parameter.grad = None

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of what the optimizer steps, by name."""
        return {name: p.grad for name, p in self.stepped.items() if p.grad is not None}

    def before_step(self) -> None:
        """Let masters follow what a task has written."""
        follow(self._pairs())

    def after_step(self) -> None:
        """Round the masters into the parameters."""
        write_back(self._pairs())

    def _pairs(self) -> Sequence[tuple[Tensor, Tensor]]:
        return list(named_pairs(self.masters, self.parameters, self.masters))
