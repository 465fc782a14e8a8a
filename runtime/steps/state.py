"""State: the buffers that one rank holds, and what runs do to them while a step lasts.

- A buffer may stand in several modules; it is the same tensor in all of them. Code may change it in place or put a new
  tensor there: autograd may have kept the old one, so neither do we write into what a forward has read.
- Running statistics in a tally: each run starts from zeros and leaves what it adds; the step's end folds it in.
- A run that is computed again finds what it changes as it was before it first ran.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from spindle.capture.codes import OperatorCode
from spindle.errors import RunError
from spindle.runtime.programs.program import Program, SliceRun
from spindle.runtime.steps.tally import Added, Counted, TallyOrder

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Buffers:
    """Buffers of a rank by the workload's names."""

    def __init__(self, codes: Iterable[OperatorCode]) -> None:
        places: dict[str, dict[tuple[int, str], dict[str, Tensor | None]]] = {}
        for code in codes:
            for inner, name in code.buffers:
                path, _, key = inner.rpartition(".")
                held = code.module.get_submodule(path)._buffers
                places.setdefault(name, {})[id(held), key] = held
        self._places = {name: [(held, key[1]) for key, held in found.items()] for name, found in places.items()}

    def __getitem__(self, name: str) -> Tensor:
        held, key = self._places[name][0]
        value = held[key]
        assert value is not None
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def put(self, name: str, value: Tensor) -> None:
        """Let a buffer be another tensor, wherever it stands."""
        for held, key in self._places[name]:
            held[key] = value

    def settle(self, name: str, before: Tensor) -> None:
        """After code ran that may have put a new tensor in one of a buffer's places: have it in all."""
        for held, key in self._places[name]:
            value = held[key]
            if value is not before and value is not None:
                self.put(name, value.detach())
                return

    @contextlib.contextmanager
    def standing(self, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """While open other tensors stand for some buffers; what stands there in the end is put into what is given."""
        before = {name: self[name] for name in values}
        left: dict[str, Tensor] = {}
        for name, value in values.items():
            self.put(name, value)
        try:
            yield left
            for name, value in values.items():
                self.settle(name, value)
                left[name] = self[name]
        finally:
            for name, value in before.items():
                self.put(name, value)


class StepState:
    """What the runs of a program do to the buffers of a rank."""

    def __init__(
        self, program: Program, rank: int, codes: Mapping[str, OperatorCode], momenta: Mapping[str, float | None]
    ) -> None:
        """`momenta`: of the norm layers in tallies."""
        self.program, self.buffers, self.momenta = program, Buffers(codes.values()), momenta
        self.rank = rank
        tallied = {layer for tally in program.tallies for layer in tally.layers}
        own = [run for run in program.slices if rank in run.ranks]
        self._tallied = {run.name: [layer for layer in run.statistics if layer in tallied] for run in own}
        self._counted = {run.name: self._names(run.statistics) for run in own}
        self._constant = {run.name: self._constants(run, codes) for run in own}
        users = Counter(name for run in own for name in run.states)
        self._shared = {name for name, count in users.items() if count > 1}
        self._orders: dict[tuple[str, int], TallyOrder] = {}
        self.begin(1)

    def begin(self, rounds: int) -> None:
        """Begin a step of `rounds` rounds."""
        self.rounds, self.round = rounds, 0
        self.added: Added = {}
        self.before: dict[str, dict[str, Tensor]] = {}

    def _names(self, layers: Iterable[str]) -> list[str]:
        return [name for layer in layers for name in (f"{layer}.{part}" for part in STATISTICS) if name in self.buffers]

    def _constants(self, run: SliceRun, codes: Mapping[str, OperatorCode]) -> list[tuple[str, str]]:
        changing = {*self._names(run.statistics), *run.states}
        return [(op, name) for op in run.operators for _, name in codes[op].buffers if name not in changing]

    # -- runs -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def forward(self, run: SliceRun) -> Iterator[None]:
        """While open a run computes for the first time."""
        if run.recompute and run.states:
            self.before[run.name] = {name: self.buffers[name].clone() for name in run.states}
        for name in run.states:
            if name in self._shared:
                self.buffers.put(name, self.buffers[name].clone())  # another run's backward may need the one before
        touched = {name: self.buffers[name] for name in run.states}
        constant = [(op, name, self.buffers[name]) for op, name in self._constant[run.name]]
        versions = [value._version for _, _, value in constant]
        with self._adding(run, "forward"):
            yield
        for name, value in touched.items():
            self.buffers.settle(name, value)
        for (op, name, value), version in zip(constant, versions, strict=True):
            if self.buffers[name] is not value or value._version != version:
                raise RunError(
                    f"{op} changed buffer {name!r}, which it did not on the first batches, so that nobody takes care "
                    "of it; change it in every step"
                )

    @contextlib.contextmanager
    def again(self, run: SliceRun) -> Iterator[None]:
        """While open a run computes again what it computed before; buffers are then as they stood."""
        values = {name: torch.zeros_like(self.buffers[name]) for name in self._counted[run.name]}
        values |= self.before.pop(run.name, {})
        with self.buffers.standing(values):
            yield

    @contextlib.contextmanager
    def backward(self, run: SliceRun) -> Iterator[None]:
        """While open a run's backward computes; a checkpoint of the model's own runs its layers again."""
        touched = {name: self.buffers[name] for name in run.states}
        with self._adding(run, "backward"):
            yield
        for name, value in touched.items():
            self.buffers.settle(name, value)

    @contextlib.contextmanager
    def _adding(self, run: SliceRun, phase: str) -> Iterator[None]:
        """Keep apart what is added to statistics in a tally."""
        layers = self._tallied[run.name]
        if not layers:
            yield
            return
        zeros = {name: torch.zeros_like(self.buffers[name]) for name in self._names(layers)}
        with self.buffers.standing(zeros) as left:
            yield
        for layer in layers:
            mean, variance, count = (left[f"{layer}.{part}"] for part in STATISTICS)
            self.added[layer, run.name, self.round, phase] = Counted(count, mean, variance)

    # -- the end of a step ----------------------------------------------------------------------------------------

    def contribution(self, name: str) -> Tensor:
        """What this rank adds to the statistics of a tally, in a place of its own beside what the others add."""
        return self._order(name).packed(self.added, self.buffers)

    def fold(self, name: str, contributions: Tensor) -> None:
        """Fold in what all ranks add."""
        self._order(name).fold(contributions, self.buffers)

    def _order(self, name: str) -> TallyOrder:
        key = name, self.rounds
        if key not in self._orders:
            tally = self.program.tally_by_name[name]
            self._orders[key] = TallyOrder(self.program, tally, self.rank, self.rounds, self.momenta)
        return self._orders[key]


def momenta(modules: Mapping[str, nn.Module], layers: Iterable[str]) -> dict[str, float | None]:
    """Momenta of norm layers, by name. `modules`: the components."""
    found: dict[str, float | None] = {}
    for layer in layers:
        component, _, path = layer.partition(".")
        momentum = modules[component].get_submodule(path).momentum
        assert momentum is None or isinstance(momentum, float | int)
        found[layer] = momentum
    return found


def received(state: Sequence[str], buffers: Buffers) -> list[Tensor]:
    """Room for a state that arrives; not the buffers themselves, which autograd may have kept."""
    return [torch.empty_like(buffers[name], memory_format=torch.contiguous_format) for name in state]
