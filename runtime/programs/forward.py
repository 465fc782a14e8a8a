"""Forward: a training program and other tasks, captured forward only, in; a plan of these on the ranks that hold what
they compute with, and its program, out. Pure Python, no torch.

- A layer runs where a run of the training program holds it, or several do together, on as many of its ranks as the
  batch has samples for. So nothing moves, and nobody holds more than it trains with. What holds nothing runs beside
  what it sends to.
- Sharded parameters are the same rows as in training: their layers run one after the other, each gathered for its run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from spindle.errors import PlanError
from spindle.runtime.programs.passes import run_passes
from spindle.runtime.programs.program import Flat, Program, SliceRun
from spindle.values.graph import Operator, TaskGraph
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan, Slice, make_waves


@dataclass(frozen=True, slots=True)
class Place:
    """Ranks that an operator runs on, each `tensor_parallel` of them with one copy of it."""

    ranks: tuple[int, ...]
    tensor_parallel: int = 1


def plan_beside(
    program: Program,
    held: Mapping[str, frozenset[str]],
    metagraph: MetaGraph,
    graph: TaskGraph,
    needs: Mapping[str, frozenset[str]],
) -> Plan:
    """A plan of the forward-only tasks of `graph` (whose contraction `metagraph` is) on the ranks of `program`.

    `held`: parameters and changing buffers by operator of the program, `needs`: the same of the operators of `graph`.
    Raises PlanError for an operator of which no rank holds all that it needs.
    """
    places = _Places(program, held, graph, needs).found()
    sharded = {name for flat in program.flats for name in flat.parameters}
    free_at: dict[int, int] = {}
    ended_at: dict[str, int] = {}
    slices: list[Slice] = []
    for name in metagraph.topological_order:
        operators = metagraph[name].operators
        ready = max((ended_at[before] for before in metagraph.predecessors.get(name, ())), default=0)
        for first, count in _chunks(
            [places[op.name] for op in operators], [needs[op.name] for op in operators], sharded
        ):
            place = places[operators[first].name]
            start = max(ready, *(free_at.get(rank, 0) for rank in place.ranks))
            ready = start + count
            free_at.update(dict.fromkeys(place.ranks, ready))
            slices.append(
                Slice(
                    metaop=name,
                    first_layer=first,
                    num_layers=count,
                    devices=place.ranks,
                    start_s=float(start),
                    end_s=float(ready),
                    tensor_parallel=place.tensor_parallel,
                )
            )
        ended_at[name] = ready
    return Plan(
        num_devices=program.num_ranks,
        devices_per_node=program.num_ranks,
        method="beside training",
        waves=make_waves(slices),
        makespan_s=max(slice_.end_s for slice_ in slices),
    )


def with_rows(program: Program, training: Program, needs: Mapping[str, frozenset[str]]) -> Program:
    """The program with the flats of `training` that its runs use, so that rows of sharded parameters are one."""
    if not training.flats:
        return program
    used: dict[str, Flat] = {}
    runs = []
    for run in program.slices:
        names = frozenset().union(*(needs[name] for name in run.operators))
        flats = [flat for flat in training.flats if not names.isdisjoint(flat.parameters)]
        _check_whole(run, flats)
        used.update((flat.name, replace(flat, trained=False)) for flat in flats)
        runs.append(replace(run, flats=tuple(flat.name for flat in flats)))
    return run_passes(
        replace(program, slices=tuple(runs), flats=tuple(used.values()), instructions=((),) * program.num_ranks)
    )


def _check_whole(run: SliceRun, flats: Sequence[Flat]) -> None:
    for flat in flats:
        if sorted(run.ranks) != sorted(flat.ranks):
            raise PlanError(
                f"evaluation task {run.task!r}: {run.metaop!r} runs on devices {list(run.ranks)}, and its parameters "
                f"are sharded over {list(flat.ranks)}; give it a batch_size of at least {len(flat.ranks)}, and no "
                "layer that mixes samples"
            )


def _chunks(places: Sequence[Place], needs: Sequence[frozenset[str]], sharded: set[str]) -> Iterator[tuple[int, int]]:
    """First layer and number of layers of the slices of a MetaOp: those on one place, a layer of sharded parameters by
    itself.
    """
    first = 0
    for index in range(1, len(places) + 1):
        alone = index < len(places) and not (needs[index] | needs[index - 1]).isdisjoint(sharded)
        if index == len(places) or places[index] != places[first] or alone:
            yield first, index - first
            first = index


class _Places:
    def __init__(
        self,
        program: Program,
        held: Mapping[str, frozenset[str]],
        graph: TaskGraph,
        needs: Mapping[str, frozenset[str]],
    ) -> None:
        self.graph = graph
        self.holding = [(run, frozenset().union(*(held[name] for name in run.operators))) for run in program.slices]
        everything = frozenset().union(*(names for _, names in self.holding))
        self.needs = {name: names & everything for name, names in needs.items()}
        self.sharded = {name: flat for flat in program.flats for name in flat.parameters}
        self.readers: dict[str, list[str]] = {}
        for source, target in graph.flows:
            self.readers.setdefault(source, []).append(target)

    def found(self) -> dict[str, Place]:
        """The place of each operator."""
        places = {op.name: self._holding(op) for op in self.graph if self.needs[op.name]}
        while len(places) < len(self.graph):
            near = {op.name: self._near(op, places) for op in self.graph if op.name not in places}
            new = {name: place for name, place in near.items() if place is not None}
            places |= new or dict.fromkeys(near, Place((0,)))  # tasks that use nothing that is trained
        return places

    def _holding(self, operator: Operator) -> Place:
        """The most ranks of one run that holds all that the operator needs."""
        needed = self.needs[operator.name]
        runs = [run for run, names in self.holding if needed <= names]
        if not runs:
            return self._cut(operator, Place(self._holding_together(operator, needed)))
        run = max(runs, key=lambda run: len(run.ranks) // run.tensor_parallel)
        return self._cut(operator, Place(run.ranks, run.tensor_parallel))

    def _holding_together(self, operator: Operator, needed: frozenset[str]) -> tuple[int, ...]:
        """The ranks of which each holds all that is needed, of several runs: what training cuts where it mixes samples
        may be one operator in eval mode.
        """
        whole: dict[int, set[str]] = {}
        for run, names in self.holding:
            for rank in run.ranks if run.tensor_parallel == 1 else ():
                whole.setdefault(rank, set()).update(names & needed)
        ranks = tuple(sorted(rank for rank, names in whole.items() if names == needed))
        if ranks:
            return ranks
        homes = {name: [run for run, names in self.holding if name in names] for name in sorted(needed)}
        first, *others = homes
        held = {rank for run in homes[first] for rank in run.ranks}
        other = next((n for n in others if held.isdisjoint(r for run in homes[n] for r in run.ranks)), others[-1])
        component = first.partition(".")[0]
        alike = component == other.partition(".")[0]
        pinned = f", or plan with pins={{{component!r}: (0,)}}, which keep it on one device" if alike else ""
        raise PlanError(
            f"evaluation task {operator.task!r}: {operator.name!r} computes with {first!r} and {other!r} at "
            f"once, which this plan keeps apart, on devices {list(homes[first][0].ranks)} and "
            f"{list(homes[other][0].ranks)}; compute with each in calls of its own, as the training tasks do{pinned}"
        )

    def _near(self, operator: Operator, places: Mapping[str, Place]) -> Place | None:
        """Beside what it sends to, else beside what it reads."""
        sources = [self.graph.producers[name] for name in operator.inputs]
        for other in (*self.readers.get(operator.name, ()), *reversed(sources)):
            if other in places:
                place = places[other]
                return self._cut(operator, Place(place.ranks[:: place.tensor_parallel]))
        return None

    def _cut(self, operator: Operator, place: Place) -> Place:
        """No more copies than samples; one where it mixes them."""
        copies = min(len(place.ranks) // place.tensor_parallel, operator.batch_size if operator.splittable else 1)
        return Place(place.ranks[: copies * place.tensor_parallel], place.tensor_parallel)
