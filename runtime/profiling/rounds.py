"""Rounds: which layers of a workload are measured together, and what ranks found out of them as entries of a profile.

A round is a small step: layers of every kind, one after the other, on one count of devices. Alone, a layer would find
its code, its weights and its memory as it left them, which makes it up to a third faster than it is in a step.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spindle.runtime.launch.worker_group import WorkerGroup
from spindle.runtime.profiling.measure import MIN_REPEATS, degrees, spread, steady
from spindle.values.graph import Operator
from spindle.values.metagraph import MetaGraph
from spindle.values.profile import Profile, ProfileEntry

CHAIN = 4  # layers of a kind that run one after the other
MANY = 6  # a kind with more valid counts is measured at powers of two and its largest
OTHER_FLOPS = 3e8  # of layers that run between messages: some milliseconds on a core
KEEPING = 0.6  # share of the time for steps that keep activations; the others recompute them
MOST_REST_BYTES = 256 * 2**20  # no core has more in its caches


def counts_to_measure(batch_size: int, num_devices: int) -> list[int]:
    """Counts that divide a batch; where they are many, one, powers of two and the largest.

    >>> counts_to_measure(12, 4), counts_to_measure(60, 60)
    ([1, 2, 3, 4], [1, 2, 4, 60])
    """
    valid = [n for n in range(1, min(num_devices, batch_size) + 1) if batch_size % n == 0]
    return valid if len(valid) <= MANY else [n for n in valid if n & (n - 1) == 0 or n == valid[-1]]


Repeats = list[list[tuple[list[tuple[float, float]], float]]]
"""What Bench.rehearse says, by rank and repeat."""


@dataclass(frozen=True, slots=True)
class Round:
    """Kinds that are measured together, in the order of a step, and which of them are new. `layouts`: kind of layer ->
    (number of devices, tensor parallel degree).

    `rest_bytes`: what a rank touches in a step beside them.
    """

    layouts: Mapping[str, tuple[int, int]]
    new: tuple[str, ...]
    kinds: Mapping[str, "Kind"]
    rest_bytes: int = 0

    def measured(self, workers: WorkerGroup, seconds: float, progress: Callable[[float], None]) -> list[ProfileEntry]:
        """An entry of each new kind, from repeats for about `seconds`; `progress` gets the share that is done."""
        workers.call("prepare", self.layouts, self.rest_bytes)
        kept = _repeated(workers, KEEPING * seconds, lambda share: progress(KEEPING * share), recompute=False)
        bare = _repeated(
            workers, (1 - KEEPING) * seconds, lambda share: progress(KEEPING + (1 - KEEPING) * share), recompute=True
        )
        shares = [statistics.fmean(of_ranks) for of_ranks in zip(*workers.call("shares"), strict=True)]
        step_s = statistics.fmean(steady([step_s for _, step_s in rank]) for rank in kept)
        found = []
        for index, (kind, (count, parts)) in enumerate(self.layouts.items()):
            if kind in self.new:
                (forward_s, backward_s), (bare_s, _) = _means(kept, index), _means(bare, index)
                both_s = [[sum(times[index]) for times, _ in rank] for rank in kept]
                entry = ProfileEntry(
                    kind=kind,
                    num_devices=count,
                    forward_s=forward_s,
                    backward_s=backward_s,
                    bare_forward_s=bare_s if backward_s else 0.0,
                    update_s=shares[index] * step_s,
                    spread=statistics.fmean(map(spread, both_s)),
                    tensor_parallel=parts,
                    family=self.kinds[kind].operators[0].family,
                    size=self.kinds[kind].size_on((count, parts)),
                )
                found.append(entry)
        return found


def _means(repeats: Repeats, index: int) -> tuple[float, float]:
    """Steady seconds of forward and backward of a kind, over all ranks: in a step they wait for each other less often
    than after each layer.
    """
    by_rank = [list(zip(*(times[index] for times, _ in rank), strict=True)) for rank in repeats]
    forward_s, backward_s = (statistics.fmean(steady(rank[part]) for rank in by_rank) for part in (0, 1))
    return forward_s, backward_s


def _repeated(workers: WorkerGroup, seconds: float, progress: Callable[[float], None], *, recompute: bool) -> Repeats:
    """Small steps for `seconds`, after one that warms up."""
    workers.call("rehearse", recompute=recompute)
    started = time.perf_counter()
    found: list[list[Any]] = []
    while len(found) < MIN_REPEATS or time.perf_counter() - started < seconds:
        found.append(workers.call("rehearse", recompute=recompute))
        progress(min(1.0, (time.perf_counter() - started) / seconds) if seconds else 1.0)
    return [list(rank) for rank in zip(*found, strict=True)]


@dataclass(frozen=True, slots=True)
class Kind:
    """Operators of one kind that follow each other."""

    operators: tuple[Operator, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the operators."""
        return tuple(operator.name for operator in self.operators)

    @property
    def limit(self) -> int:
        """The most devices."""
        first = self.operators[0]
        return first.batch_size if first.splittable else 1

    @property
    def parts(self) -> int:
        """What can hold a copy of each between them: a divisor of this is a degree of tensor parallelism."""
        splittable = all(operator.splittable for operator in self.operators)
        return min(operator.tensor_parallel for operator in self.operators) if splittable else 1

    def size_on(self, layout: tuple[int, int]) -> float:
        """The work of a layer on a batch all of whose parts are like the first of a layout, which is measured."""
        first, copies = self.operators[0], layout[0] // layout[1]
        if first.units is None:
            return first.size
        rows = first.units.rows(first.unit, 0, first.batch_size)
        share = first.units.rows(first.unit, *first.units.first_share(first.unit, copies))
        return first.size * share * copies / rows if rows else first.size

    def num_bytes(self, layout: tuple[int, int]) -> float:
        """What they touch on one device of a layout, at most."""
        return _bytes_of(self.operators, layout)


def _bytes_of(operators: Sequence[Operator], layout: tuple[int, int]) -> float:
    """Activations on one device, were they not cut; parameters with gradients and an optimizer's two states."""
    copies = layout[0] // layout[1]
    return sum(op.activation_bytes / copies + 4 * op.parameter_bytes for op in operators)


def kinds_of(metagraph: MetaGraph) -> dict[str, Kind]:
    """A few layers of each kind, in the order of a step; of its longest MetaOp."""
    found: dict[str, Kind] = {}
    for metaop in metagraph:
        operators = metaop.operators[:CHAIN]
        kind = operators[0].kind
        if kind not in found or len(operators) > len(found[kind].operators):
            found[kind] = Kind(operators)
    return found


def other_work(kinds: Mapping[str, Kind], num_ranks: int) -> dict[str, tuple[int, int]]:
    """The largest of the layers that are done in no time, on a number of ranks: to run between messages."""
    counts = {name: max(counts_to_measure(kind.limit, num_ranks)) for name, kind in kinds.items()}
    flops = {name: sum(op.forward_flops for op in kind.operators) / counts[name] for name, kind in kinds.items()}
    small = [name for name, count in flops.items() if count <= OTHER_FLOPS] or [min(flops, key=flops.__getitem__)]
    name = max(small, key=flops.__getitem__)
    return {name: (counts[name], 1)}


def rounds_of(
    metagraph: MetaGraph,
    kinds: Mapping[str, Kind],
    known: Profile,
    num_devices: int,
    ranks_per_node: int,
    room_bytes: float,
    measured: Collection[str] = (),
) -> Iterator[Round]:
    """For each layout what runs together with new kinds on it; a kind that cannot run on as many devices takes fewer.

    Devices that hold a copy between them are on one node, and all that measure do. `room_bytes`: what layers that run
    together may take. Kinds that are `measured` elsewhere are not new.
    """
    for parts in (1, *degrees(ranks_per_node)):
        degree = {name: parts if kind.parts % parts == 0 else 1 for name, kind in kinds.items()}
        counts = {
            name: [degree[name] * copies for copies in counts_to_measure(kind.limit, num_devices // degree[name])]
            for name, kind in kinds.items()
        }
        for count in sorted({count for name in kinds if degree[name] == parts for count in counts[name]}):
            at = {name: (max(c for c in counts[name] if c <= count), degree[name]) for name in kinds}
            yield from _divided(metagraph, kinds, known, (count, parts), at, room_bytes, measured)


def _divided(
    metagraph: MetaGraph,
    kinds: Mapping[str, Kind],
    known: Profile,
    layout: tuple[int, int],
    at: Mapping[str, tuple[int, int]],
    room_bytes: float,
    measured: Collection[str],
) -> Iterator[Round]:
    """What runs on one layout, in rounds that have room."""
    step_bytes = sum(_bytes_of(metaop.operators, at[metaop.operators[0].kind]) for metaop in metagraph)
    for names in _that_fit({name: kinds[name].num_bytes(at[name]) for name in kinds}, room_bytes):
        lacking = [n for n in names if at[n] == layout and layout not in known.by_layout.get(n, {})]
        new = [n for n in lacking if n not in measured]
        rest_bytes = step_bytes - sum(kinds[name].num_bytes(at[name]) for name in names)
        if new:
            rest_bytes = min(max(0, int(rest_bytes)), MOST_REST_BYTES)
            yield Round({n: at[n] for n in names}, tuple(new), kinds, rest_bytes)


def _that_fit(num_bytes: Mapping[str, float], room_bytes: float) -> Iterator[list[str]]:
    """Names in order, as many at a time as have room together, one at least."""
    part: list[str] = []
    for name in num_bytes:
        if part and sum(num_bytes[other] for other in (*part, name)) > room_bytes:
            yield part
            part = []
        part.append(name)
    yield part
