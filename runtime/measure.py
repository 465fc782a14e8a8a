"""Measure: one rank of a profile. Operators, messages and loaders in, seconds of them on this rank's device out.

Each is run as a step runs it, or its time would be another:

- A few layers of a MetaOp run one after the other and keep their activations; backward follows. One layer alone finds
  its weights and its memory where it left them, which makes it up to a third faster than it is in a step.
- On a CPU the caches are filled with something else first: with as much as a step's activations before a forward that
  keeps its own, since their memory is then the longest unused, with less before all else. All ranks measure at once,
  with a run's threads.
- Gradients are added to buffers that are there already. The optimiser steps many tensors at once.
- A message comes after other work and, where one rank sends, before more of it.
- A batch is read by a run's feed, from when the one before it is taken until the feed rests; on a CPU what a task
  computes of its fields alone (masks, positions, targets) belongs to it, since a rank computes it once a step too.

What counts of repeated runs, after one that warms up, is their `steady` mean: a step adds up hundreds of these, delays
too, where their medians would leave all delays out. CUDA events on a GPU, a monotonic clock on a CPU.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spindle.capture.codes import Captured, OperatorCode, computing_in
from spindle.capture.draws import Stream, drawing_from
from spindle.graph import Operator, TensorSpec
from spindle.runtime.data import Feed, keeps_state
from spindle.runtime.programs.lower import split_samples
from spindle.runtime.transport import Transport
from spindle.runtime.worker import OptimizerFactory
from spindle.workload import Batch, Task

MIN_REPEATS, MAX_REPEATS = 3, 30
STEPPED = 64  # tensors in one step of the optimiser, so that what a call costs whatever it does weighs little
STEP_BYTES, SOME_BYTES = 96 * 2**20, 24 * 2**20  # that a CPU's caches are filled with; see docs/log.md
MAX_MESSAGES = 256 * 2**20  # bytes of all messages of one size

Mark = float | torch.cuda.Event
"""A moment on a clock of this process, or on a GPU's."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Steady seconds of one layer and of one optimiser step over it, and the quartiles' distance over the median.

    `runs` are forward, backward and bare forward of each run, for ranks that must wait for each other. Of a message
    they are when this rank began and ended, and the seconds mean nothing.
    """

    forward_s: float
    backward_s: float = 0.0
    bare_forward_s: float = 0.0
    update_s: float = 0.0
    spread: float = 0.0
    runs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """What one rank needs to measure: a captured workload, its tasks without their functions, a batch of each,
    operators of each kind in a chain.
    """

    captured: Captured
    tasks: Mapping[str, Task]
    batches: Mapping[str, Batch]
    chains: Mapping[str, tuple[str, ...]]
    optimizer: OptimizerFactory | None = None
    num_threads: int | None = None
    seconds: float = 0.3


@dataclass(slots=True)
class _Chain:
    """Operators of one kind that hand their outputs on, copied, with the tensors and values that they read."""

    codes: list[OperatorCode]
    operators: list[Operator]
    inputs: dict[str, Tensor]
    aux: dict[str, Tensor]
    samples: int
    live: list[str] = field(default_factory=list)


class Bench:
    """One rank, ready to measure. `transport` None: alone, on the first device of this machine."""

    def __init__(self, job: BenchJob, transport: Transport | None = None) -> None:
        """Takes the rank's share of the cores."""
        if job.num_threads is not None:
            torch.set_num_threads(job.num_threads)
        self.job, self.transport = job, transport
        self.num_ranks = transport.num_ranks if transport else 1
        self.device = transport.device if transport else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clutter = torch.zeros(STEP_BYTES if self.device.type == "cpu" else 0, dtype=torch.uint8)
        self.update_s: dict[str, float] = {}
        if transport is not None:
            transport.make_groups([tuple(range(count)) for count in range(2, transport.num_ranks + 1)])

    # -- operators ------------------------------------------------------------------------------------------------

    def operator(self, kind: str, count: int) -> Timing:
        """Time a layer of `kind` on the samples that it would have on one of `count` devices."""
        chain = self._chain(kind, count)
        runs: list[tuple[float, ...]] = []
        started = time.perf_counter()
        for repeat in range(MAX_REPEATS + 1):
            run = (*self._once(chain), self._bare(chain))
            if repeat:  # the first warms up
                runs.append(tuple(seconds / len(chain.codes) for seconds in run))
            if len(runs) >= MIN_REPEATS and time.perf_counter() - started > self.job.seconds:
                break
        if kind not in self.update_s:
            self.update_s[kind] = self._update(chain)
        forward_s, backward_s, bare_s = map(steady, zip(*runs, strict=True))
        return Timing(
            forward_s=forward_s,
            backward_s=backward_s if chain.live else 0.0,
            bare_forward_s=bare_s if chain.live else 0.0,
            update_s=self.update_s[kind],
            spread=spread([f + b for f, b, _ in runs]),
            runs=tuple(runs),
        )

    def _chain(self, kind: str, count: int) -> _Chain:
        captured, names = self.job.captured, self.job.chains[kind]
        operators = [captured.graph.by_name[name] for name in names]
        codes = [copy.deepcopy(captured.codes[name]) for name in names]
        for code in codes:
            code.module.to(self.device)
            for parameter in code.module.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        size = operators[0].batch_size
        low, high = split_samples(size, count)[0]
        given = [given for code in codes for given in code.inputs]
        made = {name for code in codes for name in code.outputs}
        batch = self.job.batches[operators[0].task]
        aux = {g.name: captured.aux[g.name].value(batch, low, high, size) for g in given if g.kind == "aux"}
        read = {g.name for g in given if g.kind == "tensor"}
        return _Chain(
            codes=codes,
            operators=operators,
            inputs={name: _random(captured.graph.tensors[name], high - low, self.device) for name in read - made},
            aux={name: value.to(self.device) for name, value in aux.items()},
            samples=high - low,
            live=[t.name for op in operators for t in op.outputs if t.needs_grad and t.name not in read],
        )

    def _once(self, chain: _Chain) -> tuple[float, float]:
        """Seconds of forward and of backward of the whole chain."""
        self._fill_caches(STEP_BYTES)
        start = self._mark()
        values = self._forward(chain, keeps=bool(chain.live))
        middle = self._mark()
        ends = [values[name] for name in chain.live]
        self._fill_caches()
        again = self._mark()
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
        end = self._mark()
        self._settle()
        return _seconds(start, middle), _seconds(again, end)

    def _bare(self, chain: _Chain) -> float:
        """Seconds of forward that keeps nothing, as where activations are computed again: a quarter less on a CPU."""
        self._fill_caches()
        start = self._mark()
        self._forward(chain, keeps=False)
        end = self._mark()
        self._settle()
        return _seconds(start, end)

    def _forward(self, chain: _Chain, *, keeps: bool) -> dict[str, Tensor]:
        """All values of the chain, with their graph or without."""
        values = {
            name: value.detach().requires_grad_(self.job.captured.graph.tensors[name].needs_grad)
            for name, value in chain.inputs.items()
        }
        with (
            torch.set_grad_enabled(keeps),
            computing_in(self.job.captured.precision, self.device),
            drawing_from(Stream(device=self.device)),
        ):
            for code in chain.codes:
                arguments = list(_arguments(code, values, chain))
                values.update(zip(code.outputs, code.module(*arguments), strict=True))
        return values

    def _update(self, chain: _Chain) -> float:
        """Seconds of the optimiser's step over one layer's trained parameters, as part of a step over many."""
        trained = [p for code in chain.codes for p in code.module.parameters() if p.requires_grad]
        if self.job.optimizer is None or not trained:
            return 0.0
        copies = -(-STEPPED // len(trained))
        stepped = [nn.Parameter(p.detach().clone()) for _ in range(copies) for p in trained]
        for parameter in stepped:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = self.job.optimizer(stepped)
        took = []
        for _ in range(MIN_REPEATS + 3):
            self._fill_caches()
            start = self._mark()
            optimizer.step()
            torch._foreach_zero_([p.grad for p in stepped if p.grad is not None])
            end = self._mark()
            self._settle()
            took.append(_seconds(start, end))
        return steady(took[1:]) / copies / len(chain.codes)

    # -- messages -------------------------------------------------------------------------------------------------

    def all_reduce(self, members: int, num_bytes: int) -> Timing:
        """Sums over the first ranks, each after other work; the others have nothing to do."""
        transport = self.transport
        assert transport is not None
        if transport.rank >= members:
            return Timing(0.0)
        values, ranks = torch.zeros(num_bytes // 4, device=self.device), tuple(range(members))

        def exchange() -> tuple[float, float]:
            self._fill_caches()
            started = self._now()
            transport.all_reduce(values, ranks)()
            return started, self._now()

        return self._messages(num_bytes, exchange)

    def transfer(self, num_bytes: int) -> Timing:
        """Messages from the first rank, which computes before and after each, to the second, which waits for it."""
        transport = self.transport
        assert transport is not None
        if transport.rank > 1:
            return Timing(0.0)
        values, answer = torch.zeros(num_bytes // 4, device=self.device), torch.zeros(1, device=self.device)

        def send() -> tuple[float, float]:
            self._fill_caches()
            started = self._now()
            departed, answered = transport.start([(1, values)], [(1, answer)])
            self._fill_caches()
            departed()
            answered()
            return started, started

        def receive() -> tuple[float, float]:
            _, arrived = transport.start([], [(0, values)])
            arrived()
            ended = self._now()
            transport.start([(0, answer)], [])[0]()
            return 0.0, ended

        return self._messages(num_bytes, receive if transport.rank else send)

    def _messages(self, num_bytes: int, exchange: Callable[[], tuple[float, float]]) -> Timing:
        """Moments at which this rank began and ended each exchange, on the clock that all ranks of a machine share.

        All ranks count alike: one that stopped earlier would leave the others waiting.
        """
        repeats = max(MIN_REPEATS, min(MAX_REPEATS, MAX_MESSAGES // num_bytes))
        return Timing(1.0, runs=tuple(exchange() for _ in range(1 + repeats))[1:])

    # -- loaders --------------------------------------------------------------------------------------------------

    def load(self, name: str) -> Timing:
        """Batches of a task, and on a CPU what is computed of their fields alone, for a rank's share of the samples.

        Its data starts over where it ends, and a loader that has a state keeps it.
        """
        task = replace(self.job.tasks[name], on_end="restart")
        feed = Feed(replace(task, data=copy.deepcopy(task.data)) if keeps_state(task) else task, seed=0)
        took: list[float] = []
        started = time.perf_counter()
        try:
            while len(took) < MIN_REPEATS + 1 or time.perf_counter() - started < self.job.seconds:
                self._fill_caches()
                start = time.perf_counter()
                batch = feed.next()
                feed.settle()
                self._aux_values(task, batch)
                took.append(time.perf_counter() - start)
                if len(took) > MAX_REPEATS:
                    break
        finally:
            feed.close()
        return Timing(forward_s=steady(took[1:]), spread=spread(took[1:]))

    def _aux_values(self, task: Task, batch: Batch) -> None:
        if self.device.type != "cpu":
            return
        low, high = split_samples(task.batch_size, min(self.num_ranks, task.batch_size))[0]
        captured = self.job.captured
        with computing_in(captured.precision, self.device), drawing_from(Stream(device=self.device)):
            for code in captured.aux.values():
                if code.task == task.name:
                    code.value(batch, low, high, task.batch_size)

    # -- clocks ---------------------------------------------------------------------------------------------------

    def _mark(self) -> Mark:
        """A moment: on a GPU of the work that was given to it, which may not have begun."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _now(self) -> float:
        """A moment of the machine's clock, once the device has done what it was given."""
        self._settle()
        return time.perf_counter()

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _fill_caches(self, num_bytes: int = SOME_BYTES) -> None:
        """Between two visits of a layer a step runs all others."""
        if self.device.type == "cpu":
            self.clutter[:num_bytes].add_(1)

    def close(self) -> None:
        """Leave the group."""
        if self.transport is not None:
            self.transport.close()


def _seconds(start: Mark, end: Mark) -> float:
    """Seconds between two moments of one clock, both of which have come."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float), "a moment of a GPU and one of this process do not compare"
        assert isinstance(end, float), "a moment of this process and one of a GPU do not compare"
        return end - start
    return float(start.elapsed_time(end)) / 1e3


def _arguments(code: OperatorCode, values: Mapping[str, Tensor], chain: _Chain) -> Iterator[Tensor | int]:
    for given in code.inputs:
        if given.kind == "rows":
            yield chain.samples
        else:
            yield (chain.aux if given.kind == "aux" else values)[given.name]


def _random(spec: TensorSpec, samples: int, device: torch.device) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        return torch.zeros(spec.shape_of(samples), dtype=dtype, device=device)
    return torch.randn(spec.shape_of(samples), device=device).to(dtype)


def steady(values: Sequence[float]) -> float:
    """Mean of repeated runs, in which one that was held up counts as twice the median at most.

    >>> steady([1.0, 1.0, 1.3, 9.0])
    1.4
    """
    most = 2 * statistics.median(values)
    return statistics.fmean(min(value, most) for value in values)


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median.

    >>> spread([1.0, 2.0, 3.0])
    1.0
    """
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle if middle > 0 else 0.0
