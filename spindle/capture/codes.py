"""Codes: what the runtime executes. Operators are torch modules that run the calls recorded for them.

- An operator's module holds its parameters; what it computes comes anew with each recording, as an OperatorPart.
- A TaskCode tells how the recording of any batch of a task, or of a part of one, falls into its operators.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spindle.capture.facts import Slot
from spindle.capture.grouping import Frontier, Key
from spindle.errors import WorkloadError
from spindle.inputs.compilation import Compilation
from spindle.record.recording import LeafWrite, Node, Recording, execute
from spindle.record.skeleton import Skeleton
from spindle.record.substitutes.caches import caches_off, caching_configs
from spindle.record.substitutes.checkpoints import Planned, going, resumed
from spindle.record.substitutes.draws import Site
from spindle.record.substitutes.randomness import Drawing
from spindle.values.graph import TaskGraph, base_task
from spindle.values.units import Place
from spindle.workload import Precision

Crossing = tuple[object, int, int]
"""A value that one operator sends to others: key of glue or name of a block call, which of its calls that send
something (code that runs twice has one key), and which of its results."""


class OperatorModule(nn.Module):
    """The parameters of one operator, which its block holds or its glue reads, under names of their own."""

    def __init__(self, block: nn.Module | None, state: Mapping[str, Tensor]) -> None:
        """`state`: parameters and changing buffers that the operator reads itself, by the workload's names."""
        super().__init__()
        self.block = block
        self.own: dict[str, str] = {}
        for index, (name, value) in enumerate(state.items()):
            self.own[name] = f"value_{index}"
            if isinstance(value, nn.Parameter):
                self.register_parameter(self.own[name], value)
            else:
                self.register_buffer(self.own[name], value)
        self.configs = caching_configs(block) if block is not None else []

    def leaf(self, name: str) -> Tensor:
        """The parameter or buffer of the workload's name. Raises WorkloadError where the operator has none."""
        if name not in self.own:
            raise WorkloadError(
                f"the batch has code compute with {name!r} that did not do so in the first batches; begin with a batch "
                "that takes this way, or let the module that chooses be one layer: name it in layers="
            )
        value: Tensor = getattr(self, self.own[name])
        return value

    def _put(self, name: str, value: Tensor) -> None:
        """Put a tensor in place of a buffer; autograd may have kept the one before."""
        before = self.leaf(name)
        self._buffers[self.own[name]] = value.detach().to(before.dtype).clone()

    def forward(self, part: "OperatorPart", *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run what was recorded on the tensors that other operators sent; what it sends to others."""
        values = dict(zip(part.inputs, inputs, strict=True))
        execute(
            part.nodes,
            values,
            aux=part.aux,
            leaf=self.leaf,
            leaves=part.recording.leaves,
            blocks={part.block: self._block(part)} if part.block else {},
            device=part.values.where.device,
            put=self._put,
        )
        return tuple(values[out] for out in part.outputs)

    def _block(self, part: "OperatorPart") -> Callable[..., Any]:
        assert self.block is not None
        hooked = self.block._forward_hooks or self.block._forward_pre_hooks  # these were recorded as glue
        run: Callable[..., Any] = self.block.forward if hooked else self.block

        def around() -> contextlib.AbstractContextManager[object]:
            return caches_off(self.configs)

        def opened(*args: Any, **kwargs: Any) -> Any:
            draws = Drawing(part.block, part.sites) if part.sites else contextlib.nullcontext()
            with draws, around(), resumed(around), going(Planned()):
                return run(*args, **kwargs)

        return opened


@dataclass(frozen=True, slots=True)
class OnDevice:
    """Where a batch is read. On a GPU a copy may be begun before (`spindle.runtime.devices.Streams`)."""

    device: torch.device

    def copy_in(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to bring a tensor there; what gives it to its reader."""
        return lambda: tensor.to(self.device)


class CopiesIn(Protocol):
    """Somewhere that a batch is brought to: OnDevice, or the streams of a device."""

    @property
    def device(self) -> torch.device:
        """The device."""

    def copy_in(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See OnDevice."""


@dataclass(slots=True)
class BatchValues:
    """Tensors that were computed from a batch, brought to a device when they are first read there, or before."""

    tensors: Sequence[Tensor]
    where: CopiesIn
    moved: dict[int, Tensor] = field(default_factory=dict)
    begun: dict[int, Callable[[], Tensor]] = field(default_factory=dict)

    def begin(self, number: int) -> None:
        """Begin to bring tensor `number` to the device."""
        if number not in self.moved and number not in self.begun:
            self.begun[number] = self.where.copy_in(self.tensors[number])

    def on_device(self, number: int) -> Tensor:
        """Tensor `number` on the device."""
        if number not in self.moved:
            self.begin(number)
            self.moved[number] = self.begun.pop(number)()
        return self.moved[number]


@dataclass(slots=True)
class OperatorPart:
    """The calls of one operator in one recording: values that come in and go out, and what was computed from the batch.

    `inputs` and `outputs` are value numbers, in the order of `OperatorCode.inputs` and `outputs`. `block`: the name of
    its block call; `sites`: where that draws.
    """

    recording: Recording
    nodes: Sequence[Node]
    inputs: Sequence[int]
    outputs: Sequence[int]
    values: "BatchValues"
    block: str = ""
    sites: tuple[Site, ...] = ()

    def aux(self, number: int) -> Tensor:
        """A tensor computed from the batch, on the device."""
        return self.values.on_device(number)

    def aux_read(self) -> list[int]:
        """Tensors computed from the batch that it reads."""
        return list(dict.fromkeys(number for node in self.nodes for number in node.aux()))


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCode:
    """Code of one operator: `module(part, *inputs)` gives a tuple with a tensor for each of `outputs`.

    `parameters` maps names inside the module to the workload's names; `buffers` likewise. `mixes`: it mixes samples,
    and runs on what was recorded of whole batches. `compilation`: how devices compile its layer, if they do.
    """

    name: str
    module: OperatorModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...]
    buffers: tuple[tuple[str, str], ...] = ()
    mixes: bool = False
    compilation: Compilation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCode:
    """How recordings of a task fall into operators.

    `glue` and `blocks` name the operator of each key and block call, `crossing` the values that each operator sends, in
    order, `tensors` their names; `loss` is the name of the loss. `sites`: along what the samples lie in draws, by
    scope. `stateful`: buffers that change. `held`: fields and units of which the first batch had some. `waits`: the
    last block calls before each; `places`: how the results of keys and block calls are cut. `trained`: parameters that
    the task trains, `graded`: keys and block calls that it differentiates through; `learning`: tensors that a gradient
    comes back for; `writes`: what it writes to parameters. `lines`: where keys and block calls stand in the code, as
    far as that is known. `apart`: where calls took something else for parts of a batch than for the whole at capture;
    `by_sample`: how many calls a sample made there, where they were made for samples.
    """

    task: str
    glue: Mapping[Key, str]
    blocks: Mapping[str, str]
    crossing: Mapping[str, tuple[Crossing, ...]]
    tensors: Mapping[Crossing, str]
    reads: Mapping[str, tuple[str, ...]]
    loss: str
    held: frozenset[str]
    waits: Mapping[str, Frontier]
    places: Mapping[object, tuple[Place | None, ...]]
    trained: frozenset[str]
    graded: frozenset[Key | str]
    learning: frozenset[str] = frozenset()
    sites: Mapping[str, tuple[Site, ...]]
    stateful: frozenset[str] = frozenset()
    copies_batch: bool = False
    writes: tuple[LeafWrite, ...] = ()
    lines: Mapping[Key | str, str] = field(default_factory=dict)
    apart: frozenset[Slot] = frozenset()
    by_sample: Mapping[Slot, float] = field(default_factory=dict)

    def sent(self, operator: str) -> list[str]:
        """Tensors that an operator sends to others."""
        return [self.tensors[what] for what in self.crossing.get(operator, ())]

    def place(self, what: Crossing) -> Place | None:
        """How a value is cut by sample; None when it only exists whole."""
        places = self.places.get(what[0], ())
        return places[what[2]] if what[2] < len(places) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A workload as captured: its task graph, the code of each operator in it, and what records each task.

    `losses` names the tensor that holds each task's loss; `parameters` are the user's, by the workload's names.
    `skeleton` holds the modules as recordings need them, `tasks` tell how recordings fall into operators.
    """

    graph: TaskGraph
    codes: Mapping[str, OperatorCode]
    tasks: Mapping[str, TaskCode]
    losses: Mapping[str, str]
    weights: Mapping[str, float]
    parameters: Mapping[str, nn.Parameter]
    skeleton: Skeleton
    precision: Precision = "fp32"

    @property
    def draws(self) -> dict[str, Mapping[str, tuple[Site, ...]]]:
        """What each task draws, by scope; its micro-batches draw alike."""
        return {base_task(name): code.sites for name, code in self.tasks.items()}


def computing_in(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which operators compute: autocast, or none even where it is on outside."""
    if precision != "bf16" and not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # half a millisecond of a small model's step less
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
