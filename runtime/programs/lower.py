"""Lowering: a Plan and the captured task graph in, a Program out. Pure Python, no torch.

- One global order of slice runs: dependencies first, then the plan's start times. Backward follows its reverse.
- A transfer stands right after the run that makes what it carries, at the same place of the global order on both sides;
  each rank's program is the global order restricted to it. So no two ranks can wait for each other in a circle.
- Here the tables are made: slice runs, transfers, buckets. `passes` writes the instruction lists from them.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from spindle.errors import PlanError
from spindle.graph import Operator, TaskGraph, TensorSpec, unit_of
from spindle.metagraph import MetaGraph
from spindle.plan import Plan, Slice
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

BUCKET_BYTES = 25 * 2**20  # as torch's DistributedDataParallel: smaller ones pay latency, larger ones overlap less


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
    varying: Collection[str] = (),
    rounds: int = 1,
) -> Program:
    """Lower `plan` for the operators of `metagraph`, which is the contraction of `graph`.

    `losses`: the tensor that holds each task's loss; `weights`: what multiplies it; `recompute`: components that keep
    their inputs only; `shard_optimizer`: each bucket is updated by one of its ranks; `varying`: tasks whose batches are
    shared by what their samples hold; `rounds`: how often a step runs it.

    Raises PlanError when the plan does not cover every layer of the MetaGraph exactly once, splits an operator that
    mixes samples, or cannot keep the order in which one process changes a buffer.
    """
    runs = [
        replace(run, varies=True, weigh_by=unit_of(graph.tensors[name] for name in run.outputs))
        if run.task in varying and len(run.ranks) > run.tensor_parallel
        else run
        for run in _slice_runs(plan, metagraph, graph, losses, recompute, orders(graph, rounds))
    ]
    states = make_states(runs)
    edges = _edges(runs)
    forward = [_transfer(graph, *edge) for edge in edges]
    backward = [_backward_transfer(graph, *edge) for edge in edges if edge[1].backward]
    program = Program(
        num_ranks=plan.num_devices,
        tensors=tuple(graph.tensors[name] for name in sorted({t for run in runs for t in (*run.inputs, *run.outputs)})),
        slices=tuple(runs),
        transfers=tuple(t for t in (*forward, *backward) if t.members()),
        buckets=tuple(make_buckets(runs, graph, shard_optimizer)),
        losses=tuple(losses.items()),
        weights=tuple(weights.items()),
        instructions=((),) * plan.num_devices,
        max_grad_norm=max_grad_norm,
        tallies=tuple(make_tallies(runs)),
        states=tuple(states),
        handovers=tuple(make_handovers(states, runs)),
        writes=tuple(make_writes(graph, runs)),
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
) -> list[SliceRun]:
    slices = _dependency_order(plan, metagraph, graph, waits)
    for slice_ in slices:
        if max(slice_.devices) >= plan.num_devices:
            raise PlanError(
                f"slice of {slice_.metaop!r} runs on device {max(slice_.devices)}, but the plan has {plan.num_devices} "
                "devices, counted from 0; plan again"
            )
    parts = [(s, names) for s in slices for names in _parts(_operators(s, metagraph), graph, recompute)]
    operators = [names for _, names in parts]
    _check_cover(operators, graph)
    home = {name: index for index, names in enumerate(operators) for name in names}
    outward = set(losses.values())
    for op in graph:
        outward.update(name for name in op.inputs if home[graph.producers[name]] != home[op.name])
    return [
        slice_run(index, slice_, plan.wave_of(slice_), [graph.by_name[name] for name in names], outward, recompute)
        for index, (slice_, names) in enumerate(parts)
    ]


def _parts(names: tuple[str, ...], graph: TaskGraph, recompute: Collection[str]) -> list[tuple[str, ...]]:
    """The operators of a slice as runs: one, or one for each layer where backward computes activations again, so that
    those of one layer exist at a time.
    """
    last = graph.by_name[names[-1]]
    again = last.component in recompute and any(tensor.needs_grad for tensor in last.outputs)
    return [(name,) for name in names] if again else [names]


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
    plan: Plan, metagraph: MetaGraph, graph: TaskGraph, orders: Mapping[str, set[str]]
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
    heap = [(_start_key(s), s) for s, count in waits.items() if count == 0]
    heapq.heapify(heap)
    order: list[Slice] = []
    while heap:
        _, slice_ = heapq.heappop(heap)
        order.append(slice_)
        for follower in followers[slice_]:
            waits[follower] -= 1
            if waits[follower] == 0:
                heapq.heappush(heap, (_start_key(follower), follower))
    if len(order) < len(waits):
        left = [name for slice_ in waits if slice_ not in order for name in _operators(slice_, metagraph)]
        raise refuse_circle(left, orders, graph)
    return order


def _start_key(slice_: Slice) -> tuple[float, tuple[int, ...], str, int]:
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


def make_buckets(runs: Sequence[SliceRun], graph: TaskGraph, shard_optimizer: bool) -> list[Bucket]:
    """Trained parameters by the exact set of ranks that hold them (the paper's device group pool, section 2.6).

    Those whose gradients are ready first come first, in buckets of about BUCKET_BYTES, so that reductions overlap with
    what is left of backward. With `shard_optimizer` they go to the ranks that own the fewest bytes so far.
    """
    order = {run.name: index for index, run in enumerate(runs)}
    found = _trained_parameters(runs, graph)
    groups: dict[tuple[tuple[int, ...], str], list[_Trained]] = {}
    for trained in found:
        groups.setdefault((trained.ranks, trained.dtype), []).append(trained)
    buckets: list[Bucket] = []
    owned: Counter[int] = Counter()
    for (ranks, dtype), members in sorted(groups.items()):
        members.sort(key=lambda t: (-min(order[run] for run in t.runs), t.name))
        most = BUCKET_BYTES
        if shard_optimizer:
            most = min(most, -(-sum(trained.num_bytes for trained in members) // len(ranks)))
        for part in _chunks(members, most):
            names = tuple(trained.name for trained in part)
            owner = min(ranks, key=lambda rank: (owned[rank], rank)) if shard_optimizer and len(ranks) > 1 else None
            buckets.append(Bucket(name=f"b{len(buckets)}", dtype=dtype, ranks=ranks, parameters=names, owner=owner))
            owned[buckets[-1].answering] += sum(trained.num_bytes for trained in part)
    return buckets


@dataclass
class _Trained:
    """A parameter that gets a gradient: where it is held, and which runs add to it."""

    name: str
    dtype: str
    num_bytes: int
    holders: set[int] = field(default_factory=set)
    runs: list[str] = field(default_factory=list)
    trainable: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted(self.holders))


def _trained_parameters(runs: Sequence[SliceRun], graph: TaskGraph) -> list[_Trained]:
    found: dict[str, _Trained] = {}
    for run in runs:
        for parameter in (p for name in run.operators for p in graph.by_name[name].parameters):
            for rank in run.ranks:
                copy = run.copy_of(rank)
                for name in parameter.names(copy.index(rank), len(copy)):
                    size = parameter.num_bytes // parameter.pieces
                    known = found.setdefault(name, _Trained(name, parameter.dtype, size))
                    known.holders.add(rank)
                    if parameter.trainable:
                        known.trainable = True
                        known.runs.append(run.name)
    return [trained for trained in found.values() if trained.trainable]


def _chunks(members: Sequence[_Trained], most_bytes: int) -> Iterator[list[_Trained]]:
    chunk: list[_Trained] = []
    for trained in members:
        if chunk and sum(t.num_bytes for t in chunk) + trained.num_bytes > most_bytes:
            yield chunk
            chunk = []
        chunk.append(trained)
    if chunk:
        yield chunk
