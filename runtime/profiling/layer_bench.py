"""Layer bench: a few layers of one rank, run as a step runs them, again and again, without the rest of the step."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spindle.capture.codes import Captured
from spindle.capture.operators.parts import TaskPart
from spindle.inputs.batch import SampledBatch
from spindle.record.on_meta.made_up import SCALE, give_numbers
from spindle.record.substitutes.draws import Stream
from spindle.runtime.comms.transport import ThreadTransport, Transport
from spindle.runtime.devices import streams_of
from spindle.runtime.loading.recordings import LoadedBatch, Recipe, Recordings
from spindle.runtime.parallel.layers import Switch, cut_codes
from spindle.runtime.parallel.names import held_by_rank
from spindle.runtime.programs.messages import StepLayout
from spindle.runtime.programs.program import Instruction, Op, Program, activations, gradients
from spindle.runtime.programs.subprogram import AFTER, BEFORE, excerpt
from spindle.runtime.steps.compiled import compile_layers
from spindle.runtime.steps.executor import Activations, Executor
from spindle.runtime.steps.store import ParameterStore
from spindle.runtime.updates.masters import Numbers
from spindle.values.graph import TensorSpec
from spindle.values.units import Bounds

SMALL = 1e-3  # size of the gradients that come back, so that no optimizer takes the parameters far


class LayerBench:
    """Layers `names`, which follow each other, on the first of `count` devices that share their batch.

    They have parameters of their own. What they read of other layers are random numbers, and so are the gradients that
    come back; `batch` is one of their task. `copy_on`: where they are cut, how this rank reaches ranks with a copy
    of them between them, and which these are. `goes_back`: any has a backward. `trained`: what is stepped.
    """

    def __init__(
        self,
        captured: Captured,
        recipe: Recipe,
        names: Sequence[str],
        batch: SampledBatch,
        count: int,
        device: torch.device,
        copy_on: tuple[Transport, tuple[int, ...]] | None = None,
        numbers: Numbers | None = None,
    ) -> None:
        self.captured, self.size, self.device = captured, len(names), device
        self.transport, ranks = copy_on or (_alone(device), ())
        self.rank, self.switch = self.transport.rank, Switch()
        program = excerpt(captured.graph, [names], count, losses=captured.losses, copy=ranks)
        codes = copy.deepcopy({name: captured.codes[name] for name in names})
        self.codes = cut_codes(codes, held_by_rank(program, captured)[self.rank], self.switch)
        held = nn.ModuleList(code.module for code in self.codes.values())
        give_numbers(held, lambda value: torch.randn(value.shape, device=device).to(value.dtype) * SCALE)
        held.to(device)
        compile_layers(self.codes)
        self.store = ParameterStore(program, self.rank, self.codes.values(), numbers=numbers)
        self.trained = {n: self.store.stepped(n) for n, p in self.store.parameters.items() if p.requires_grad}
        each = [[name] for name in names]
        again = excerpt(captured.graph, each, count, losses=captured.losses, recompute=True, copy=ranks)
        self.executors = {False: self._executor(program), True: self._executor(again)}
        before, run, after = program.slices
        self.goes_back = run.backward
        self.task = run.task
        bounds = batch.units.first_share(captured.graph.by_name[names[0]].unit, count // max(1, len(ranks)))
        specs = program.tensor_by_name
        recordings, stream = Recordings(recipe, self.transport.streams), Stream(task=run.task, units=batch.units)
        parts: dict[Bounds, TaskPart] = {}
        self.loaded = {
            recompute: LoadedBatch(recordings, run.task, batch, _layout(executor.program, batch, bounds), stream, parts)
            for recompute, executor in self.executors.items()
        }
        shapes = self.loaded[False].part(bounds).shapes
        self.given = {name: _random(specs[name], shapes[name], device) for name in before.outputs}
        wanted = [spec for spec in map(specs.__getitem__, after.inputs) if spec.needs_grad]
        self.wanted = {spec.name: _random(spec, shapes[spec.name], device).mul_(SMALL) for spec in wanted}

    def _executor(self, program: Program) -> Executor:
        precision, switch, partial = self.captured.precision, self.switch, self.captured.graph.partial
        executor = Executor(program, self.transport, self.codes, self.store, None, precision, switch, partial)
        executor.stream, executor.first_batch = Stream(device=self.device), 0
        return executor

    def begin(self, *, recompute: bool) -> None:
        """Put everything where the rest of a step would have left it.

        With `recompute` each layer will be a run of its own, which keeps its inputs only and runs forward again in
        backward; else all are one run.
        """
        self.executor = self.executors[recompute]
        self.executor.begin()
        self.executor.loaded = {self.task: self.loaded[recompute]}
        self.executor.buffers = {activations(BEFORE): Activations({}, self.given), gradients(AFTER): dict(self.wanted)}
        self.runs = self.executor.program.slices[1:-1]

    def forward(self) -> None:
        """Run all layers forward."""
        for run in self.runs:
            self.executor.carry_out(Instruction(Op.FORWARD, run.name), [], 0)

    def backward(self) -> None:
        """Run backward the layers that have one, and drop what is not needed any more."""
        later = AFTER
        for run in reversed(self.runs):
            if run.backward:
                self.executor.carry_out(Instruction(Op.BACKWARD, run.name), [], 0)
                for buffer in {activations(run.name), gradients(later)} & self.executor.buffers.keys():
                    self.executor.carry_out(Instruction(Op.FREE, buffer), [], 0)
                later = run.name


def _alone(device: torch.device) -> Transport:
    [transport] = ThreadTransport.connect(1)
    transport.device, transport.streams = device, streams_of(device)
    return transport


def _layout(program: Program, batch: SampledBatch, bounds: Bounds) -> StepLayout:
    """The samples of an excerpt: on each rank the first share of the batch, cut as runs cut it."""
    return StepLayout(batch.units, {run.name: (bounds,) * len(run.ranks) for run in program.slices}, {})


def _random(spec: TensorSpec, shape: tuple[int, ...], device: torch.device) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)
