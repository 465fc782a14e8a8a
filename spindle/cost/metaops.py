"""Cost: a contracted MetaGraph and a cluster in, the same MetaGraph with T_m(n) and memory per device out.

- A count n is valid for data parallelism when it divides the batch; a MetaOp that mixes samples runs on one device.
- Layouts are (dp, tp) with dp * tp = n, tp inside a node; T_m(n) is the least of them, and the MetaOp's
  `tensor_parallel` tells which. A captured component says how far it may be spread, for a spec the CostOptions does.
- Where a Profile has measured a MetaOp's operator kind, measured layouts are taken as they are, of a count the quickest
  of them. Between two measured counts T = a + b/n through both (paper, section 3.2); outside them the nearest
  measured time is scaled by the ratio that the analytic model predicts. Kinds that were not measured are predicted
  (`spindle.cost.roofline`). A kind of a family that was measured on other sizes is predicted from its size
  (`spindle.cost.measured.family`).
- Layer times hold no gradient reduction: a parameter that several tasks use is reduced once a step, after backward, so
  the planner charges it by plan (`spindle.planner.costing.traffic`). `layer_param_bytes` is therefore what is reduced:
  the trainable bytes of a layer; `layer_state_bytes` is what tasks that share it hold once. The optimizer's step comes
  once a device too: `layer_update_s`, measured or what moving its states takes, whole even where states are sharded.
- Of a component whose parameters are sharded every MetaOp runs on all devices (`spindle.cost.shards`).
- Loading comes once a rank and task: `load_s` of the MetaOps that read a field of the batch, as measured, else none.
- Where samples differ in length, all wait for the longest local batch: times grow by `imbalance`, memory by `tail`.
  Where a batch is known, its samples' rows tell how much.
- Points are left as they come: they may rise where a larger count is slower; the planner cleans them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

from spindle.cost.layout import tensor_parallel_s
from spindle.cost.measured.family import curves_of, shared_curve
from spindle.cost.measured.heldout import between
from spindle.cost.memory import chain_bytes, recomputed_bytes, shared_bytes, waiting_bytes
from spindle.cost.optimizers import step_s
from spindle.cost.roofline import OperatorTime, Work, chain_rows, operator_work, time_operator
from spindle.cost.shards import on_all_devices, shards, with_shards
from spindle.errors import InfeasibleError
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions, imbalance, tail
from spindle.values.execution import as_styled
from spindle.values.graph import Operator, Parameter, base_task
from spindle.values.metagraph import MetaGraph, MetaOp, points
from spindle.values.profile import Profile, ProfileEntry


def with_costs(
    metagraph: MetaGraph,
    cluster: Cluster,
    profile: Profile | None = None,
    cost_options: CostOptions | None = None,
) -> MetaGraph:
    """Fill the times, bytes and forward_fraction of every MetaOp.

    MetaOps without operators (read from a file) keep what they have. `cost_options`: optimizer, memory choices, layouts
    and spread of lengths; a spec makes its own (`WorkloadSpec.cost_options`).
    """
    cost_options = cost_options or CostOptions()
    profile = profile or Profile("")
    metaops = tuple(
        _costed(metaop, cluster, profile, cost_options) if metaop.operators else metaop for metaop in metagraph
    )
    sharded = metagraph.shard_optimizer or cost_options.shard_optimizer
    return replace(metagraph, metaops=metaops, shard_optimizer=sharded)


def valid_layouts(operators: Sequence[Operator], cluster: Cluster, cost_options: CostOptions) -> dict[int, list[int]]:
    """Degrees of tensor parallelism by device count: dp = n / tp divides the batch, tp divides a node's devices.

    An operator that mixes samples runs on one device, whatever the least degree.
    """
    batch = operators[0].batch_size
    splittable = all(operator.splittable for operator in operators)
    layouts: dict[int, list[int]] = {}
    spread = min(operator.tensor_parallel for operator in operators)
    allowed = cost_options.degrees_within(cluster.devices_per_node)
    for tp in range(1, max(cost_options.tensor_parallel, spread) + 1) if splittable else (1,):
        said = tp in allowed
        if cluster.devices_per_node % tp or (splittable and not said and (tp == 1 or spread % tp)):
            continue
        for dp in range(1, min(batch, cluster.num_devices // tp) + 1 if splittable else 2):
            if batch % dp == 0:
                layouts.setdefault(dp * tp, []).append(tp)
    return dict(sorted(layouts.items()))


def _costed(metaop: MetaOp, cluster: Cluster, profile: Profile, cost_options: CostOptions) -> MetaOp:
    if not shards(metaop, cluster, cost_options):
        return _costs_of(metaop, cluster, profile, cost_options.of(metaop.component))
    alone = replace(cost_options, shard_optimizer=False, tensor_parallel=1, min_tensor_parallel=1, degrees=())
    return with_shards(_costs_of(metaop, cluster, profile, alone.of(metaop.component), on_all=True), cluster)


def _costs_of(
    metaop: MetaOp,
    cluster: Cluster,
    profile: Profile,
    cost_options: CostOptions,
    *,
    on_all: bool = False,
) -> MetaOp:
    """`on_all`: on all devices, each of which holds all layers."""
    operators = metaop.operators
    by_layout: Mapping[tuple[int, int], ProfileEntry] = profile.by_layout.get(operators[0].kind, {})
    if operators[0].units is not None or not by_layout:
        by_layout = {**by_layout, **_sized(operators, profile.by_family.get(operators[0].family, ()))}
    layouts = valid_layouts(operators, cluster, cost_options)
    layouts = on_all_devices(layouts, cluster) if on_all else layouts
    if not layouts and not cost_options.degrees_within(cluster.devices_per_node):
        raise InfeasibleError(
            f"MetaOp {metaop.name!r}: none of its tensor_parallel degrees, from {cost_options.min_tensor_parallel} up, "
            f"divides the {cluster.devices_per_node} devices of a node, within which it stays; allow lower ones"
        )
    if not layouts:
        raise InfeasibleError(
            f"MetaOp {metaop.name!r} has no valid device count on {cluster.num_devices} devices; use a larger batch"
        )
    predicted, degrees = _predict(operators, cluster, layouts, cost_options)
    if cost_options.recompute:  # predictions have it already
        by_layout = {layout: _recomputed(entry) for layout, entry in by_layout.items() if entry.backward_s}
    measured = {n: entry for (n, tp), entry in by_layout.items() if tp == 1}
    degrees |= dict.fromkeys(measured.keys() & degrees.keys(), 1)
    times = {n: _measured_or(predicted, n, measured) for n in layouts}
    for (n, tp), entry in by_layout.items():  # a cut layer that was measured, where it is quicker or nothing else was
        time = OperatorTime(entry.forward_s, entry.backward_s)
        if tp == 1 or tp not in layouts.get(n, ()):
            continue
        if (n, degrees[n]) not in by_layout or time.total_s < times[n].total_s:
            times[n], degrees[n] = time, tp
    first = next(iter(times.values()))
    spread, batch = cost_options.spread_of(metaop.task, metaop.component), operators[0].batch_size
    replicas = {n: n // tp for n, tp in degrees.items()}
    waits = {n: _waits(operators[0], spread, dp) for n, dp in replicas.items()}
    longest = {n: tail(spread, batch / dp) * (waits[n] if operators[0].units else 1) for n, dp in replicas.items()}
    shared = shared_bytes(operators, cost_options, data_parallel=max(replicas.values()))
    waiting = (
        n * waiting_bytes(operators, cost_options, data_parallel=replicas[n], tensor_parallel=tp, longest=longest[n])
        for n, tp in degrees.items()
    )
    again = recomputed_bytes(operators, cost_options)
    trainable = sum(_reduced_bytes(p, cost_options) for op in operators for p in op.parameters if p.trainable)
    # pieces and shards together are as many as the devices, by which the planner divides a sharded update
    update = _update_s(operators, cluster, measured, cost_options) / (
        1 if cost_options.shard_optimizer else max(degrees.values())
    )
    reads = any(operator.batch_fields for operator in operators)
    task = base_task(metaop.task)  # micro-batches are tasks of their own, and each loads a batch
    return replace(
        metaop,
        layer_time_s=points({n: waits[n] * time.total_s for n, time in times.items()}),
        memory_bytes=points(
            {
                n: chain_bytes(
                    operators, cost_options, data_parallel=replicas[n], tensor_parallel=tp, longest=longest[n]
                )
                for n, tp in degrees.items()
            }
        ),
        layer_param_bytes=trainable / len(operators),
        layer_state_bytes=shared / len(operators) / max(degrees.values()),
        layer_update_s=update,
        load_s=profile.load_s.get((task, batch), 0.0) if reads else 0.0,
        kept_bytes=max(0.0, min(waiting) - again),
        recomputed_bytes=again,
        output_bytes=float(operators[0].output_bytes),
        forward_fraction=first.forward_s / first.total_s,
        tensor_parallel=tuple((n, tp) for n, tp in degrees.items() if tp > 1),
    )


def _sized(operators: Sequence[Operator], measured: Sequence[ProfileEntry]) -> dict[tuple[int, int], ProfileEntry]:
    """What would be measured of the layers, by what was on batches of other sizes.

    The slowest part is the one that counts; entries are for the mean part, of which `_waits` makes the slowest.
    """
    size = sum(operator.size for operator in operators) / len(operators)
    found = {}
    curves = curves_of(measured)
    if curves and operators[0].units is None:
        shares = shared_curve(measured)
        return {(count, 1): replace(shares.at(size / count), num_devices=count) for count in curves}
    for count, curve in curves.items():
        waits = _waits(operators[0], 0.0, count)
        entry = curve.at(size * waits)
        found[count, 1] = replace(
            entry,
            forward_s=entry.forward_s / waits,
            backward_s=entry.backward_s / waits,
            bare_forward_s=entry.bare_forward_s / waits,
        )
    return found


def _waits(operator: Operator, spread: float, parts: int) -> float:
    """The slowest of the parts of the batch over the mean one."""
    if operator.units is not None:
        return operator.units.slowest(operator.unit, parts)
    return imbalance(spread, operator.batch_size / parts, parts)


def _recomputed(entry: ProfileEntry) -> ProfileEntry:
    """Forward keeps nothing, and comes once more before backward; then it keeps one layer's, which is as quick."""
    forward_s = entry.bare_forward_s or entry.forward_s
    return replace(entry, forward_s=forward_s, backward_s=entry.backward_s + forward_s)


def _update_s(
    operators: Sequence[Operator], cluster: Cluster, measured: Mapping[int, ProfileEntry], cost_options: CostOptions
) -> float:
    """Seconds of the optimizer's step over a layer: measured, else what moving its states takes."""
    timed = next((entry.update_s for entry in measured.values() if entry.update_s), 0.0)
    if timed:
        return timed
    trained = [p for op in operators for p in op.parameters if p.trainable]
    return sum(step_s(parameter, cluster.device, cost_options) for parameter in trained) / len(operators)


def _reduced_bytes(parameter: Parameter, cost_options: CostOptions) -> int:
    """Bytes of a parameter's gradient as it is reduced."""
    wide = cost_options.execution.gradients == "float32"
    return max(parameter.num_bytes, 4 * prod(parameter.shape)) if wide else parameter.num_bytes


def _work(operator: Operator, rows: float, cost_options: CostOptions) -> Work:
    return operator_work(operator, rows, recompute=cost_options.recompute, execution=cost_options.execution)


def _predict(
    operators: Sequence[Operator], cluster: Cluster, layouts: Mapping[int, Sequence[int]], cost_options: CostOptions
) -> tuple[dict[int, OperatorTime], dict[int, int]]:
    """Mean time of a layer and the degree of tensor parallelism that gives it, by count.

    The mean, since the first and last layer may carry a stem or a projection: the whole chain then has its true time.
    """
    rows = chain_rows(operators)
    alike: dict[tuple[float, float, int], list[Operator]] = {}
    for operator in operators:  # layers that differ in nothing the model looks at are timed once
        key = (operator.forward_flops, operator.backward_flops, operator.output_bytes)
        alike.setdefault(key, []).append(operator)
    works = [(_work(group[0], rows, cost_options), group[0], len(group)) for group in alike.values()]
    device = as_styled(cluster.device, cost_options.execution, operators[0].kind)  # all of a MetaOp are of one kind
    times: dict[int, OperatorTime] = {}
    degrees: dict[int, int] = {}
    for n, options in layouts.items():
        for tp in options:
            forward = backward = 0.0
            for work, operator, count in works:
                time = time_operator(work, device, data_parallel=n // tp, tensor_parallel=tp)
                boundary = (operator.output_bytes or operator.input_bytes) / (n // tp)
                traffic = tensor_parallel_s(boundary, cluster, tp)
                forward += count * (time.forward_s + traffic)
                again = 2 if cost_options.recompute else 1
                backward += count * (time.backward_s + (again * traffic if time.backward_s else 0.0))
            mean = OperatorTime(forward / len(operators), backward / len(operators))
            if n not in times or mean.total_s < times[n].total_s:
                times[n], degrees[n] = mean, tp
    return times, degrees


def _measured_or(predicted: Mapping[int, OperatorTime], n: int, measured: Mapping[int, ProfileEntry]) -> OperatorTime:
    """Measured at n, else interpolated, else predicted and scaled to the nearest measured count, else predicted."""
    if n in measured:
        return OperatorTime(measured[n].forward_s, measured[n].backward_s)
    counts = sorted(count for count in measured if count in predicted)
    for low, high in pairwise(counts):
        if low < n < high:
            a, b = measured[low], measured[high]
            return OperatorTime(
                between(n, (low, a.forward_s), (high, b.forward_s)),
                between(n, (low, a.backward_s), (high, b.backward_s)),
            )
    if not counts:
        return predicted[n]
    nearest = min(counts, key=lambda count: abs(count - n))
    ratio = predicted[n].total_s / predicted[nearest].total_s
    return OperatorTime(measured[nearest].forward_s * ratio, measured[nearest].backward_s * ratio)
