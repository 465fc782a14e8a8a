"""Lowering: a Plan and the captured task graph in, a Program out. Pure Python, no torch.

- One global order of slice runs: turns first, then dependencies, then the plan's start times. The backward of each turn
  follows its reverse.
- A transfer stands right after the run that makes what it carries, at the same place of the global order on both sides;
  each rank's program is the global order restricted to it. So no two ranks can wait for each other in a circle.
- Here the tables are made: slice runs, transfers, buckets. `passes` writes the instruction lists from them.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from spindle.errors import PlanError
from spindle.runtime.programs.flats import make_flats
from spindle.runtime.programs.messages import transfer_messages
from spindle.runtime.programs.passes import run_passes
from spindle.runtime.programs.program import Bucket, Program, SliceRun, Transfer
from spindle.runtime.programs.states import (
    make_handovers,
    make_states,
    make_tallies,
    make_writes,
    orders,
    refuse_circle,
)
from spindle.values.graph import Operator, Parameter, TaskGraph, TensorSpec, in_one_process, unit_of
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import BUCKET_BYTES, Plan, Slice


def lower(
    plan: Plan,
    metagraph: MetaGraph,
    graph: TaskGraph,
    *,
    losses: Mapping[str, str],
    weights: Mapping[str, float],
    max_grad_norm: float | None = None,
    recompute: Collection[str] = (),
    shard_optimizer: bool = False,
    shard_parameters: Collection[str] = (),
    varying: Collection[str] = (),
    rounds: int = 1,
    turns: Mapping[str, int] | None = None,
) -> Program:
    """Lower `plan` for the operators of `metagraph`, which is the contraction of `graph`.

    `losses`: the tensor that holds each task's loss; `weights`: what multiplies it; `recompute`: components that keep
    their inputs only; `shard_optimizer`: each bucket is updated by one of its ranks; `shard_parameters`: components of
    whose layers each rank keeps a part; `varying`: tasks whose batches are shared by what their samples hold; `rounds`:
    how often a step runs it; `turns`: of its tasks, else the plan's.

    Raises PlanError when the plan does not cover every layer of the MetaGraph exactly once, splits an operator that
    mixes samples, cannot keep the order in which one process changes a buffer, runs tasks in other turns than that, or
    shards parameters that are not used on one set of devices.
    """
    if turns is None:
        _check_order_of_turns(plan, graph)
        turns = plan.turn_by_task
    _check_turns(turns, graph)
    runs = [
        replace(run, varies=True, weigh_by=unit_of(graph.tensors[name] for name in run.outputs))
        if run.task in varying and len(run.ranks) > run.tensor_parallel
        else run
        for run in _sharing(
            _slice_runs(plan, metagraph, graph, losses, recompute, orders(graph, rounds), turns, apart=shard_parameters)
        )
    ]
    flats, runs = make_flats(runs, graph, shard_parameters)
    sharded = {name for flat in flats for name in flat.parameters}
    states = make_states(runs)
    edges = _edges(runs)
    forward = [_transfer(graph, *edge) for edge in edges]
    backward = [_backward_transfer(graph, *edge) for edge in edges if edge[1].backward]
    program = Program(
        num_ranks=plan.num_devices,
        tensors=tuple(graph.tensors[name] for name in sorted({t for run in runs for t in (*run.inputs, *run.outputs)})),
        slices=tuple(runs),
        transfers=tuple(t for t in (*forward, *backward) if t.members()),
        buckets=tuple(make_buckets(runs, graph, shard_optimizer, plan.bucket_bytes, leave_out=sharded)),
        losses=tuple(losses.items()),
        weights=tuple(weights.items()),
        instructions=((),) * plan.num_devices,
        max_grad_norm=max_grad_norm,
        tallies=tuple(make_tallies(runs)),
        states=tuple(states),
        handovers=tuple(make_handovers(states, runs)),
        writes=tuple(make_writes(graph, runs)),
        flats=tuple(flats),
    )
    return run_passes(program)


# -- slice runs -------------------------------------------------------------------------------------------------------


def _slice_runs(
    plan: Plan,
    metagraph: MetaGraph,
    graph: TaskGraph,
    losses: Mapping[str, str],
    recompute: Collection[str],
    waits: Mapping[str, set[str]],
    turns: Mapping[str, int],
    *,
    apart: Collection[str],
) -> list[SliceRun]:
    slices = _dependency_order(plan, metagraph, graph, waits, turns)
    for slice_ in slices:
        if max(slice_.devices) >= plan.num_devices:
            raise PlanError(
                f"slice of {slice_.metaop!r} runs on device {max(slice_.devices)}, but the plan has {plan.num_devices} "
                "devices, counted from 0; plan again"
            )
    parts = [(s, names) for s in slices for names in _parts(_operators(s, metagraph), graph, recompute, apart)]
    operators = [names for _, names in parts]
    _check_cover(operators, graph)
    home = {name: index for index, names in enumerate(operators) for name in names}
    outward = set(losses.values())
    for op in graph:
        outward.update(name for name in op.inputs if home[graph.producers[name]] != home[op.name])
    runs = (
        slice_run(index, slice_, plan.wave_of(slice_), [graph.by_name[name] for name in names], outward, recompute)
        for index, (slice_, names) in enumerate(parts)
    )
    return [replace(run, turn=turns[run.task]) if turns else run for run in runs]


def _check_order_of_turns(plan: Plan, graph: TaskGraph) -> None:
    """The plan's turns are what one process runs one after another."""
    named = tuple(task for tasks in plan.turns for task in tasks)
    due = in_one_process(op.task for op in graph)
    if plan.turns and named != due:
        raise PlanError(
            f"the plan's turns run tasks {', '.join(named)}, but one process runs {', '.join(due)} in this order; plan "
            "this workload again"
        )


def _check_turns(turns: Mapping[str, int], graph: TaskGraph) -> None:
    """No data passes from one turn to another."""
    for op in graph if turns else ():
        for name in op.inputs:
            source = graph.by_name[graph.producers[name]].task
            if turns[source] != turns[op.task]:
                raise PlanError(
                    f"task {op.task!r} reads {name!r} of task {source!r}, but the plan runs them in turns "
                    f"{turns[op.task]} and {turns[source]}; put them in one turn, or plan again"
                )


def _sharing(runs: Iterable[SliceRun]) -> Iterator[SliceRun]:
    """The runs, equal tuples of ranks or bounds one value: in what is sent each stands once then."""
    known: dict[object, Any] = {}
    for run in runs:
        ranks, bounds = (known.setdefault(value, value) for value in (run.ranks, run.bounds))
        yield replace(run, ranks=ranks, bounds=bounds)


def _parts(
    names: tuple[str, ...], graph: TaskGraph, recompute: Collection[str], apart: Collection[str]
) -> list[tuple[str, ...]]:
    """The operators of a slice as runs: one, or one for each layer where backward computes activations again, or where
    parameters are gathered (`apart`), so that those of one layer exist at a time.
    """
    last = graph.by_name[names[-1]]
    again = last.component in recompute and any(tensor.needs_grad for tensor in last.outputs)
    return [(name,) for name in names] if again or last.component in apart else [names]


def slice_run(
    index: int, slice_: Slice, wave: int, ops: Sequence[Operator], outward: set[str], recompute: Collection[str]
) -> SliceRun:
    """Some operators of a slice as run number `index`; `outward`: tensors that others read. Raises PlanError."""
    made = {tensor.name for op in ops for tensor in op.outputs}
    if len(slice_.devices) > 1 and not all(op.splittable for op in ops):
        raise PlanError(
            f"slice of {slice_.metaop!r} runs on {len(slice_.devices)} devices, but it mixes samples and runs on one; "
            "plan again with this MetaGraph"
        )
    parts = slice_.tensor_parallel
    if any(op.tensor_parallel % parts for op in ops):
        raise PlanError(
            f"slice of {slice_.metaop!r} is tensor parallel over {parts} devices, but its layers can be cut for "
            f"{min(op.tensor_parallel for op in ops)}; plan again with this MetaGraph"
        )
    copies = len(slice_.devices) // parts
    if copies > ops[0].batch_size:
        raise PlanError(
            f"slice of {slice_.metaop!r} shares {ops[0].batch_size} samples among {copies} devices; each "
            "needs at least one, plan again with this MetaGraph"
        )
    backward = any(tensor.needs_grad for op in ops for tensor in op.outputs)
    return SliceRun(
        name=f"s{index}",
        metaop=slice_.metaop,
        task=ops[0].task,
        component=ops[0].component,
        wave=wave,
        operators=tuple(op.name for op in ops),
        ranks=slice_.devices,
        bounds=tuple(bounds for bounds in split_samples(ops[0].batch_size, copies) for _ in range(parts)),
        inputs=tuple(dict.fromkeys(name for op in ops for name in op.inputs if name not in made)),
        outputs=tuple(name for op in ops for name in (t.name for t in op.outputs) if name in outward),
        trained=tuple(dict.fromkeys(name for op in ops for p in op.parameters if p.trainable for name in p.names())),
        loads=True,
        backward=backward,
        recompute=backward and ops[0].component in recompute,
        tensor_parallel=parts,
        statistics=tuple(dict.fromkeys(layer for op in ops for layer in op.statistics)),
        states=tuple(dict.fromkeys(state for op in ops for state in op.states)),
    )


def split_samples(batch_size: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Consecutive bounds of `parts` shares of a batch, as even as can be, the larger ones first."""
    share, rest = divmod(batch_size, parts)
    starts = [index * share + min(index, rest) for index in range(parts + 1)]
    return tuple(pairwise(starts))


def _operators(slice_: Slice, metagraph: MetaGraph) -> tuple[str, ...]:
    metaop = metagraph.by_name.get(slice_.metaop)
    if metaop is None:
        raise PlanError(f"the plan runs MetaOp {slice_.metaop!r}, which this workload does not have; plan it again")
    chosen = metaop.operators[slice_.first_layer : slice_.last_layer + 1]
    if len(chosen) != slice_.num_layers:
        raise PlanError(
            f"slice of {slice_.metaop!r} runs layers {slice_.first_layer}..{slice_.last_layer}, but the MetaOp has "
            f"{len(metaop.operators)} operators; plan this workload again"
        )
    return tuple(op.name for op in chosen)


def _check_cover(operators: Sequence[tuple[str, ...]], graph: TaskGraph) -> None:
    seen: set[str] = set()
    for name in (name for names in operators for name in names):
        if name in seen:
            raise PlanError(f"the plan runs operator {name!r} twice; each layer runs exactly once")
        seen.add(name)
    missing = [op.name for op in graph if op.name not in seen]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PlanError(f"the plan leaves out operator {missing[0]!r}{more}; plan this workload again")


def _dependency_order(
    plan: Plan, metagraph: MetaGraph, graph: TaskGraph, orders: Mapping[str, set[str]], turns: Mapping[str, int]
) -> list[Slice]:
    """Slices by start time, but never before one that they depend on. `orders`: operators that each comes after."""
    by_metaop: dict[str, list[Slice]] = {}
    for slice_ in sorted(plan, key=lambda s: (s.metaop, s.first_layer)):
        by_metaop.setdefault(slice_.metaop, []).append(slice_)
    needs: dict[Slice, set[Slice]] = {}
    for metaop, slices in by_metaop.items():
        before = {by_metaop[p][-1] for p in metagraph.predecessors.get(metaop, ()) if p in by_metaop}
        for index, slice_ in enumerate(slices):
            needs[slice_] = before if index == 0 else {slices[index - 1]}
    if orders:
        home = {name: slice_ for slice_ in plan for name in _operators(slice_, metagraph)}
        for after, names in orders.items():
            extra = {home[name] for name in names if name in home and after in home} - {home.get(after)}
            if extra:
                needs[home[after]] = needs[home[after]] | extra
    followers: dict[Slice, list[Slice]] = {slice_: [] for slice_ in plan}
    for slice_, found in needs.items():
        for other in found:
            followers[other].append(slice_)
    waits = {slice_: len(found) for slice_, found in needs.items()}

    def key(slice_: Slice) -> tuple[int, _StartKey]:
        return turns[metagraph[slice_.metaop].task] if turns else 0, _start_key(slice_)

    heap = [(key(s), s) for s, count in waits.items() if count == 0]
    heapq.heapify(heap)
    order: list[Slice] = []
    while heap:
        _, slice_ = heapq.heappop(heap)
        order.append(slice_)
        for follower in followers[slice_]:
            waits[follower] -= 1
            if waits[follower] == 0:
                heapq.heappush(heap, (key(follower), follower))
    if len(order) < len(waits):
        left = [name for slice_ in waits if slice_ not in order for name in _operators(slice_, metagraph)]
        raise refuse_circle(left, orders, graph)
    return order


_StartKey = tuple[float, tuple[int, ...], str, int]


def _start_key(slice_: Slice) -> _StartKey:
    return slice_.start_s, slice_.devices, slice_.metaop, slice_.first_layer


# -- data flow --------------------------------------------------------------------------------------------------------

Edge = tuple[SliceRun, SliceRun, tuple[str, ...]]
"""Source run, target run, tensors that pass."""


def _edges(runs: Sequence[SliceRun]) -> list[Edge]:
    maker = {tensor: run for run in runs for tensor in run.outputs}
    found: list[Edge] = []
    for target in runs:
        sources = dict.fromkeys(maker[tensor].name for tensor in target.inputs)
        for name in sources:
            tensors = tuple(tensor for tensor in target.inputs if maker[tensor].name == name)
            found.append((maker[tensors[0]], target, tensors))
    order = {run.name: index for index, run in enumerate(runs)}
    return sorted(found, key=lambda edge: (order[edge[0].name], order[edge[1].name]))


def _transfer(graph: TaskGraph, source: SliceRun, target: SliceRun, tensors: tuple[str, ...]) -> Transfer:
    specs = [graph.tensors[name] for name in tensors]
    return Transfer(
        name=f"{source.name}>{target.name}",
        source=source.name,
        target=target.name,
        backward=False,
        messages=transfer_messages(specs, source, target, source.bounds, target.bounds, backward=False),
        **_ends(specs, source, target, backward=False),
    )


def _backward_transfer(graph: TaskGraph, source: SliceRun, target: SliceRun, tensors: tuple[str, ...]) -> Transfer:
    """Gradients from the target run back to the source run; in the order of the forward messages."""
    specs = [graph.tensors[name] for name in tensors if graph.tensors[name].needs_grad]
    return Transfer(
        name=f"{source.name}<{target.name}",
        source=target.name,
        target=source.name,
        backward=True,
        messages=transfer_messages(specs, source, target, source.bounds, target.bounds, backward=True),
        **_ends(specs, source, target, backward=True),
    )


def _ends(
    specs: Sequence[TensorSpec], source: SliceRun, target: SliceRun, *, backward: bool
) -> dict[str, tuple[int, ...]]:
    """Ranks that may send and receive where bounds vary: none of runs whose bounds are always the same."""
    what = ("ranks", "tensor_parallel", "varies", "weigh_by")
    alike = all(getattr(source, name) == getattr(target, name) for name in what)
    cut = [spec for spec in specs if spec.rows and not alike]
    if not specs or not (source.varies or target.varies):
        return {}
    from_all = bool(cut)
    makers = source.ranks if from_all else source.ranks[:1]
    readers = tuple(rank for rank in target.ranks if from_all or rank != source.ranks[0])
    if not cut and all(spec.rows for spec in specs):
        return {}
    if len({*makers, *readers}) < 2:
        return {}
    senders, receivers = (readers, makers) if backward else (makers, readers)
    return {"senders": tuple(senders), "receivers": tuple(receivers)}


# -- parameters -------------------------------------------------------------------------------------------------------


def make_buckets(
    runs: Sequence[SliceRun],
    graph: TaskGraph,
    shard_optimizer: bool,
    bucket_bytes: int = BUCKET_BYTES,
    *,
    leave_out: Collection[str] = (),
) -> list[Bucket]:
    """Trained parameters by the exact set of ranks that hold them (the paper's device group pool, section 2.6).

    Those whose gradients are ready first come first, in buckets of about `bucket_bytes`, so that reductions overlap
    with what is left of backward: last runs first, and in a run what it uses last. With `shard_optimizer` they go
    to the ranks that own the fewest bytes so far. `leave_out`: parameters that are sharded.
    """
    order = {run.name: (run.turn, -index) for index, run in enumerate(runs)}  # of backward
    found = [trained for trained in _trained_parameters(runs, graph) if trained.name not in leave_out]
    groups: dict[tuple[tuple[int, ...], str], list[_Trained]] = {}
    for trained in found:
        groups.setdefault((trained.ranks, trained.dtype), []).append(trained)
    buckets: list[Bucket] = []
    owned: Counter[int] = Counter()
    for (ranks, dtype), members in sorted(groups.items()):
        members.sort(key=lambda t: (max(order[run] for run in t.runs), -t.place, t.name))
        most = bucket_bytes
        if shard_optimizer:
            most = min(most, -(-sum(trained.num_bytes for trained in members) // len(ranks)))
        for part in _chunks(members, most):
            names = tuple(trained.name for trained in part)
            owner = min(ranks, key=lambda rank: (owned[rank], rank)) if shard_optimizer and len(ranks) > 1 else None
            buckets.append(Bucket(name=f"b{len(buckets)}", dtype=dtype, ranks=ranks, parameters=names, owner=owner))
            owned[buckets[-1].answering] += sum(trained.num_bytes for trained in part)
    return buckets


@dataclass(frozen=True, slots=True)
class _Trained:
    """A parameter that gets a gradient, the ranks that hold it in order, and the runs that add to it. `place`: among
    the parameters of the first run that trains it, in the order of their use.
    """

    name: str
    dtype: str
    num_bytes: int
    ranks: tuple[int, ...]
    runs: tuple[str, ...]
    place: int


def _trained_parameters(runs: Sequence[SliceRun], graph: TaskGraph) -> list[_Trained]:
    """Most parameters are held by the same parts of the same runs as others, whose ranks are found once."""
    held: dict[str, list[tuple[int, int]]] = {}  # a run, and the part of its copies that holds the parameter
    found: dict[str, tuple[Parameter, list[str]]] = {}
    first: dict[str, int] = {}  # its place in the first run that trains it
    for index, run in enumerate(runs):
        used = (p for name in run.operators for p in graph.by_name[name].parameters)
        for place, parameter in enumerate(used):
            for part in range(run.tensor_parallel):
                for name in parameter.names(part, run.tensor_parallel):
                    if (index, part) not in (places := held.setdefault(name, []))[-1:]:
                        places.append((index, part))
                    _, users = found.setdefault(name, (parameter, []))
                    if parameter.trainable:
                        first.setdefault(name, place)
                        users += [run.name] if users[-1:] != [run.name] else ()
    known: dict[tuple[int, ...], tuple[int, ...]] = {run.ranks: run.ranks for run in runs}
    ranks: dict[tuple[tuple[int, int], ...], tuple[int, ...]] = {}
    for at in dict.fromkeys(map(tuple, held.values())):
        holders = {rank for index, part in at for rank in runs[index].ranks[part :: runs[index].tensor_parallel]}
        own = tuple(sorted(holders))
        ranks[at] = known.setdefault(own, own)
    return [
        _Trained(
            name=name,
            dtype=parameter.dtype,
            num_bytes=parameter.num_bytes // parameter.pieces,
            ranks=ranks[tuple(held[name])],
            runs=tuple(users),
            place=first[name],
        )
        for name, (parameter, users) in found.items()
        if users
    ]


def _chunks(members: Sequence[_Trained], most_bytes: int) -> Iterator[list[_Trained]]:
    chunk: list[_Trained] = []
    size = 0
    for trained in members:
        if chunk and size + trained.num_bytes > most_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append(trained)
        size += trained.num_bytes
    if chunk:
        yield chunk
