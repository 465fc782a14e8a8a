"""Measure: one rank of a profile. Operators, messages and loaders in, seconds of them on this rank's device out.

Each is run as a step runs it, or its time would be another:

- A few layers of each kind are slice runs of a small step: all forward, all backward, optimizer. So they find code,
  weights and memory as they would in a step, and what a run costs beside its operators is in. What a whole step touches
  beside them goes through a CPU's caches before either direction. All ranks measure at once, with a run's threads.
- A message comes after some layers and, where one rank sends, before more of them.
- A batch is read by a run's feed, from when the one before it is taken until the feed rests; its recording (which
  computes masks, positions, targets) belongs to it, since a rank records each batch too.

What counts of repeated runs, after one that warms up, is their `steady` mean: a step adds up hundreds of these, delays
too, where their medians would leave all delays out. CUDA events on a GPU, a monotonic clock on a CPU.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spindle.capture.codes import Captured
from spindle.inputs.batch import SampledBatch
from spindle.record.substitutes.draws import Stream
from spindle.runtime.comms.transport import Transport, Wait
from spindle.runtime.loading.data import Feed, keeps_state
from spindle.runtime.loading.recordings import Recipe, Recordings
from spindle.runtime.profiling.hardware import Hardware, hardware_here
from spindle.runtime.profiling.layer_bench import LayerBench
from spindle.runtime.programs.messages import StepLayout
from spindle.runtime.steps.clock import Clock
from spindle.runtime.updates.masters import Numbers
from spindle.runtime.updates.optimizers import OptimizerFactory, rank_optimizer
from spindle.values.graph import Parameter, base_task
from spindle.values.profile import LinkLevel
from spindle.values.units import SAMPLES
from spindle.workload import Task

MIN_REPEATS, MAX_REPEATS = 3, 30

"""A moment on a clock of this process, or on a GPU's."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Steady seconds, and the quartiles' distance over the median."""

    seconds: float
    spread: float


Moments = tuple[tuple[float, float], ...]
"""When a rank began and ended each of some messages, on the clock of the first that takes part; none where it does not.
"""


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What one rank needs to measure: a captured workload, its tasks without their functions, a batch and operators in
    a chain for each kind, and how ranks stand on nodes.
    """

    captured: Captured
    recipe: Recipe
    tasks: Mapping[str, Task]
    batches: Mapping[str, SampledBatch]
    chains: Mapping[str, tuple[str, ...]]
    ranks_per_node: int
    parameters: tuple[Parameter, ...] = ()
    settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    optimizer: OptimizerFactory | None = None
    numbers: Numbers = field(default_factory=Numbers)
    seconds: float = 0.3


class Bench:
    """One rank, ready to measure."""

    def __init__(self, spec: BenchSpec, transport: Transport) -> None:
        """Takes the rank's share of the cores."""
        self.spec, self.transport, self.clock = spec, transport, Clock()
        self.num_ranks, self.device = transport.num_ranks, transport.device
        if self.device.type == "cpu":
            torch.set_num_threads(transport.num_threads)
        self.layers: dict[str, LayerBench] = {}
        self._streams = transport.streams
        self.recordings = Recordings(spec.recipe, self._streams)
        self.optimizer: torch.optim.Optimizer | None = None
        self.rest = torch.zeros(0, dtype=torch.uint8)  # stands for what a step touches beside what is measured
        self.everyone = tuple(range(self.num_ranks))
        groups = [ranks for level in link_groups(self.num_ranks, spec.ranks_per_node).values() for ranks in level]
        transport.make_groups(
            [*groups, *(copy for parts in degrees(spec.ranks_per_node) for copy in copies(self.num_ranks, parts))]
        )

    def hardware(self) -> Hardware:
        """What this rank computes on."""
        return hardware_here(self.transport.ranks_here, self.transport.num_threads)

    # -- operators ------------------------------------------------------------------------------------------------

    def prepare(self, layouts: Mapping[str, tuple[int, int]], rest_bytes: int) -> None:
        """Make a few layers of each of these kinds ready. `layouts`: kind of layer -> (number of devices, tensor
        parallel degree). A layer gets the samples of one data-parallel replica; all ranks are divided into replicas.

        `rest_bytes`: what a step touches beside them.
        """
        captured = self.spec.captured
        self.layers, self.optimizer = {}, None  # before others take their memory
        for kind, (count, parts) in layouts.items():
            names = self.spec.chains[kind]
            batch = self.spec.batches[kind]
            copy_on = (
                (self.transport, copies(self.num_ranks, parts)[self.transport.rank // parts]) if parts > 1 else None
            )
            own = (names, batch, count, self.device, copy_on, self.spec.numbers)
            self.layers[kind] = LayerBench(captured, self.spec.recipe, *own)
        self.optimizer = self._optimizer(self.layers.values())
        self.rest = torch.zeros(rest_bytes if self.device.type == "cpu" else 0, dtype=torch.uint8)

    def rehearse(self, *, recompute: bool) -> tuple[list[tuple[float, float]], float]:
        """A small step: all layers forward, all backward, optimizer; with `recompute` layers keep their inputs only.

        Seconds of forward and of backward of a layer of each kind, and of the optimizer's step over all of them.
        """
        layers = list(self.layers.values())
        for each in layers:
            each.begin(recompute=recompute)
        if self.num_ranks > 1:  # all at once, also where they got the order one after the other
            self.transport.all_reduce(torch.zeros(1, device=self.device), self.everyone)()
        self.rest.add_(1)
        forward = [self._marks(each.forward) for each in layers]
        self.rest.add_(1)
        backward = [self._marks(each.backward) for each in reversed(layers)]
        step = self._marks(self._step)
        self._streams.settle()
        between_s = self._streams.between_s
        times = [
            (between_s(*there) / each.size, between_s(*back) / each.size if each.goes_back else 0.0)
            for each, there, back in zip(layers, forward, reversed(backward), strict=True)
        ]
        return times, between_s(*step)

    def _optimizer(self, layers: Iterable[LayerBench]) -> torch.optim.Optimizer | None:
        """The user's optimizer over what these layers train."""
        spec, trained = self.spec, [item for each in layers for item in each.trained.items()]
        if spec.optimizer is None or not trained:
            return None
        return rank_optimizer(spec.optimizer, spec.parameters, trained, spec.settings, self.device).optimizer

    def _step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        for each in self.layers.values():
            each.store.round_masters(each.trained)
            each.store.zero_gradients()

    def shares(self) -> list[float]:
        """What a layer of each kind has of the optimizer's step over all of them. They are stepped alone to find out,
        which takes longer in all, since an optimizer's call has a cost of its own.
        """
        alone_s = [self._update_s(each) for each in self.layers.values()]
        total_s = sum(alone_s) or 1.0
        return [seconds / total_s / each.size for seconds, each in zip(alone_s, self.layers.values(), strict=True)]

    def _update_s(self, layers: LayerBench) -> float:
        optimizer = self._optimizer([layers])
        if optimizer is None:
            return 0.0
        took = []
        for _ in range(MIN_REPEATS + 1):
            for parameter in layers.trained.values():
                parameter.grad = torch.zeros_like(parameter)
            step = self._marks(optimizer.step)
            self._streams.settle()
            took.append(self._streams.between_s(*step))
        return steady(took[1:])

    def _marks(self, call: Callable[[], None]) -> tuple[Any, Any]:
        """Moments before and after a call."""
        start = self._streams.mark()
        call()
        return start, self._streams.mark()

    # -- messages -------------------------------------------------------------------------------------------------

    def all_reduce(self, ranks: tuple[int, ...], num_bytes: int, repeats: int) -> Moments:
        """Sums over some ranks, each after other work; the others have nothing to do."""
        return self._collective(ranks, num_bytes, repeats, lambda values: self.transport.all_reduce(values, ranks))

    def reduce(self, ranks: tuple[int, ...], num_bytes: int, repeats: int) -> Moments:
        """Sums that one of them has."""
        owner = ranks[0]
        return self._collective(ranks, num_bytes, repeats, lambda values: self.transport.reduce(values, ranks, owner))

    def broadcast(self, ranks: tuple[int, ...], num_bytes: int, repeats: int) -> Moments:
        """What one of them has, for all."""
        owner = ranks[0]
        return self._collective(
            ranks, num_bytes, repeats, lambda values: self.transport.broadcast(values, ranks, owner)
        )

    def _collective(
        self, ranks: tuple[int, ...], num_bytes: int, repeats: int, begin: Callable[[Tensor], Wait]
    ) -> Moments:
        transport = self.transport
        if transport.rank not in ranks:
            return ()
        values = torch.zeros(num_bytes // 4, device=self.device)

        def exchange() -> tuple[float, float]:
            self._work()
            started = self._now()
            begin(values)()
            return started, self._now()

        return self._messages(ranks, repeats, exchange)

    def transfer(self, ranks: tuple[int, int], num_bytes: int, repeats: int) -> Moments:
        """Messages from the first rank, which computes before and after each, to the second, which waits for it. Of the
        first when it began and was free to go on, of the second when it had the message.
        """
        transport, (sender, receiver) = self.transport, ranks
        if transport.rank not in ranks:
            return ()
        values, answer = torch.zeros(num_bytes // 4, device=self.device), torch.zeros(1, device=self.device)

        def send() -> tuple[float, float]:
            self._work()
            started = self._now()
            departed, answered = transport.start([(receiver, values)], [(receiver, answer)])
            posted = self.clock.now()
            self._work()
            departed()
            answered()
            return started, posted

        def receive() -> tuple[float, float]:
            _, arrived = transport.start([], [(sender, values)])
            arrived()
            ended = self._now()
            departed, _ = transport.start([(sender, answer)], [])
            departed()
            return ended, ended

        return self._messages(ranks, repeats, send if transport.rank == sender else receive)

    def _work(self) -> None:
        """Run some layers, as a step does between two messages: they leave nothing in the caches that posting needs."""
        for each in self.layers.values():
            each.begin(recompute=False)
            each.forward()
            each.backward()
            each.store.zero_gradients()

    def _messages(self, ranks: tuple[int, ...], repeats: int, exchange: Callable[[], tuple[float, float]]) -> Moments:
        """Moments at which this rank began and ended each exchange with the others.

        All get the same number: one that stopped earlier would leave the others waiting.
        """
        self.clock.agree(self.transport, ranks)
        return tuple(exchange() for _ in range(1 + repeats))[1:]

    # -- loaders --------------------------------------------------------------------------------------------------

    def load(self, name: str) -> Timing:
        """Batches of a task, and what it computes of them, recorded for a rank's share of the samples.

        Its data starts over where it ends, and a loader that has a state keeps it.
        """
        task = replace(self.spec.tasks[name], on_end="restart")
        feed = Feed(replace(task, data=copy.deepcopy(task.data)) if keeps_state(task) else task, seed=0)
        took: list[float] = []
        started = time.perf_counter()
        try:
            while len(took) < MIN_REPEATS + 1 or time.perf_counter() - started < self.spec.seconds:
                self._work()
                start = time.perf_counter()
                batch = feed.next()
                feed.settle()
                self._record(task, batch)
                took.append(time.perf_counter() - start)
                if len(took) > MAX_REPEATS:
                    break
        finally:
            feed.close()
        return Timing(steady(took[1:]), spread(took[1:]))

    def _record(self, task: Task, batch: SampledBatch) -> None:
        """Record a rank's share of the samples, as each step does when it has loaded a batch."""
        bounds = batch.units.first_share(SAMPLES, min(self.num_ranks, batch.units.num_samples))
        name = next(name for name in self.spec.captured.tasks if base_task(name) == task.name)
        layout = StepLayout(batch.units, {}, {})
        self.recordings.loaded(name, batch, layout, Stream(task=task.name)).part(bounds)

    # -- clocks ---------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        """A moment on the clock that ranks agree on, once the device has done what it was given."""
        self._streams.settle()
        return self.clock.now()

    def close(self) -> None:
        """Leave the group."""
        self.transport.close()


def link_groups(num_ranks: int, ranks_per_node: int) -> dict[LinkLevel, list[tuple[int, ...]]]:
    """Ranks that exchange messages over each level of links: the first 2, 4, .. and all of one node, and as many that
    stand in a node of their own each.

    >>> link_groups(12, 4)
    {'intra_node': [(0, 1), (0, 1, 2, 3)], 'inter_node': [(0, 4), (0, 4, 8)]}
    """
    sides: dict[LinkLevel, range] = {
        "intra_node": range(ranks_per_node),
        "inter_node": range(0, num_ranks, ranks_per_node),
    }
    return {level: [tuple(ranks[:count]) for count in _counts(len(ranks))] for level, ranks in sides.items()}


def _counts(most: int) -> list[int]:
    return sorted({*(2**i for i in range(1, most.bit_length())), most} - {1})


def degrees(num_ranks: int) -> list[int]:
    """Tensor parallel degrees that divide `num_ranks`.

    >>> degrees(6)
    [2, 3, 6]
    """
    return [parts for parts in range(2, num_ranks + 1) if num_ranks % parts == 0]


def copies(num_ranks: int, parts: int) -> list[tuple[int, ...]]:
    """The ranks in copies of `parts` that follow each other."""
    return [tuple(range(first, first + parts)) for first in range(0, num_ranks, parts)]


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
