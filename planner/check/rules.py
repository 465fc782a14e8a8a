"""Rules of the schedule: waves, devices, layers, counts, data and memory."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import isclose

from spindle.planner.check.case import RELATIVE, Case, CostedCase, Finding, by_metaop, layer_bytes, named, received_s
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Slice

SHARES = 1e-6  # by which shares of steps may miss 1 together

# ------------------------------------------------------------------------------------ rules of the plan by itself


def _waves_in_order(case: Case) -> Iterator[Finding]:
    before_s = 0.0
    for index, wave in enumerate(case.plan.waves):
        if wave.index != index:
            yield Finding(f"wave {wave.index} stands at place {index}; number waves from 0 up", (wave.index,))
        if not wave.slices:
            yield Finding(f"wave {wave.index} has no slices; remove it", (wave.index,))
            continue
        if wave.start_s < before_s - case.slack_s:
            yield Finding(
                f"wave {wave.index} starts at {wave.start_s} s, before the wave in front of it", (wave.index,)
            )
        before_s = wave.start_s
        ends_s = max(s.end_s for s in wave.slices)
        if abs(wave.end_s - ends_s) > case.slack_s:
            yield Finding(f"wave {wave.index} ends at {wave.end_s} s but its last slice at {ends_s} s", (wave.index,))
        for s in wave.slices:
            if abs(s.start_s - wave.start_s) > case.slack_s + 1e-12:
                yield Finding(
                    f"{named(s)} starts at {s.start_s} s in wave {wave.index}, which starts at {wave.start_s} s; "
                    "the slices of a wave start together",
                    (wave.index,),
                )


def _devices_exist(case: Case) -> Iterator[Finding]:
    for wave, s in case.slices:
        if max(s.devices) >= case.plan.num_devices:
            yield Finding(
                f"{named(s)} runs on device {max(s.devices)} but the plan has {case.plan.num_devices} devices", (wave,)
            )


def _one_slice_at_a_time(case: Case) -> Iterator[Finding]:
    last: dict[int, tuple[int, Slice]] = {}
    noted: set[tuple[Slice, Slice]] = set()
    for wave, s in case.slices:
        for device in s.devices:
            before = last.get(device)
            if before and s.start_s < before[1].end_s - case.slack_s and (before[1], s) not in noted:
                noted.add((before[1], s))
                yield Finding(
                    f"device {device} runs {named(s)} from {s.start_s} s while {named(before[1])} holds it until "
                    f"{before[1].end_s} s; a device runs one slice at a time",
                    (before[0], wave),
                )
            if not before or s.end_s >= before[1].end_s:
                last[device] = (wave, s)


def _makespan(case: Case) -> Iterator[Finding]:
    plan = case.plan
    ends_s = max((s.end_s for _, s in case.slices), default=0.0)
    if abs(plan.makespan_s - ends_s) > case.slack_s:
        yield Finding(f"makespan_s is {plan.makespan_s} but the last slice ends at {ends_s} s")
    if plan.makespan_s < plan.lower_bound_s - case.slack_s:
        yield Finding(
            f"makespan_s is {plan.makespan_s}, below lower_bound_s {plan.lower_bound_s}, which no schedule can beat"
        )


# --------------------------------------------------------------------------------- rules that need the MetaGraph


def unknown_metaops(slices: Sequence[tuple[int, Slice]], metagraph: MetaGraph) -> Iterator[Finding]:
    """Slices of MetaOps that are not there: nothing else can then be said of costs."""
    for wave, s in slices:
        if s.metaop not in metagraph.by_name:
            yield Finding(f"{named(s)}: the MetaGraph has no MetaOp {s.metaop!r}", (wave,))


def _every_layer_once(case: CostedCase) -> Iterator[Finding]:
    slices_of = by_metaop(case)
    for metaop in case.metagraph:
        following, until_s = 0, 0.0
        for wave, s in slices_of[metaop.name]:
            if s.first_layer != following:
                yield Finding(
                    f"{named(s)} comes when layer {following} of {metaop.name!r} is due; "
                    "every layer runs once and in order",
                    (wave,),
                )
            if s.start_s < until_s - case.slack_s:
                yield Finding(f"{named(s)} starts at {s.start_s} s, before the layers in front of it end", (wave,))
            following, until_s = s.first_layer + s.num_layers, s.end_s
        if following != metaop.layers:
            yield Finding(f"{metaop.name!r} has {metaop.layers} layers but the plan runs {following} of them")


def _counts_and_spans(case: CostedCase) -> Iterator[Finding]:
    transfers_s = received_s(case)
    for (wave, s), extra_s in zip(case.slices, transfers_s, strict=True):
        metaop = case.metagraph[s.metaop]
        time_s = metaop.times.get(len(s.devices))
        if time_s is None:
            valid = ", ".join(str(n) for n in metaop.times)
            yield Finding(f"{named(s)} runs on {len(s.devices)} devices; valid counts are {valid}", (wave,))
            continue
        least_s = s.num_layers * time_s + extra_s
        if s.end_s - s.start_s < least_s - case.slack_s:
            why = f"{s.num_layers} layers of {time_s} s" + (f" and {extra_s} s of transfers" if extra_s else "")
            yield Finding(f"{named(s)} lasts {s.end_s - s.start_s} s but takes {least_s} s: {why}", (wave,))


def _dependencies(case: CostedCase) -> Iterator[Finding]:
    ends: dict[str, tuple[float, int]] = {}
    for wave, s in case.slices:
        ends[s.metaop] = max(ends.get(s.metaop, (0.0, wave)), (s.end_s, wave))
    for wave, s in case.slices:
        for name in case.metagraph.predecessors[s.metaop]:
            end_s, its_wave = ends.get(name, (0.0, wave))
            if s.start_s < end_s - case.slack_s:
                yield Finding(
                    f"{named(s)} starts at {s.start_s} s but needs {name!r}, which ends at {end_s} s", (its_wave, wave)
                )


def _memory(case: CostedCase) -> Iterator[Finding]:
    plan, cluster = case.plan, case.cluster
    peaks = _peaks(case)
    reported = plan.memory.peak_bytes_per_device
    if reported and len(reported) != len(peaks):
        yield Finding(f"memory tells of {len(reported)} devices but the plan has {len(peaks)}")
    for device, (peak, stated) in enumerate(zip(peaks, reported, strict=False)):
        if not isclose(peak, stated, rel_tol=1e-6, abs_tol=1.0):
            yield Finding(f"device {device} needs {peak:.0f} bytes but the plan says {stated:.0f}")
            break
    if cluster is None:
        return
    full = [device for device, peak in enumerate(peaks) if peak > cluster.device.memory_bytes * (1 + RELATIVE)]
    if full:
        worst = max(full, key=lambda device: peaks[device])
        waves = tuple(sorted({wave for wave, s in case.slices if worst in s.devices}))
        yield Finding(
            f"device {worst} needs {peaks[worst] / 2**30:.2f} GiB but {cluster.device.name!r} has "
            f"{cluster.device.memory_bytes / 2**30:.2f} GiB ({len(full)} devices overflow)",
            waves[:1],
        )
    if plan.memory.fits == bool(full):
        yield Finding(f"memory.fits is {str(plan.memory.fits).lower()} but {len(full)} devices overflow")


def _cluster_shape(case: CostedCase) -> Iterator[Finding]:
    plan, cluster = case.plan, case.cluster
    if cluster and (plan.num_devices, plan.devices_per_node) != (cluster.num_devices, cluster.devices_per_node):
        yield Finding(
            f"the plan is for {plan.num_devices} devices, {plan.devices_per_node} a node, but the cluster has "
            f"{cluster.num_devices}, {cluster.devices_per_node} a node"
        )


def _peaks(case: CostedCase) -> list[float]:
    """Bytes of each device: all its layers; weight and gradient of a shared layer once; what backward computes again,
    which each MetaOp's bytes hold once, for one layer at a time; activations of its fullest turn only; two layers of
    those whose parameters are sharded."""
    twice: dict[str, float] = {}
    for metaop in case.metagraph:
        if metaop.parameters:
            smallest = min((b / metaop.layers for _, b in metaop.memory_bytes), default=0.0)
            saved = min(smallest, metaop.layer_state_bytes or 2 * metaop.layer_param_bytes)
            twice[metaop.parameters] = min(saved, twice.get(metaop.parameters, saved))
    turns = case.plan.turn_by_task
    peaks = [0.0] * case.plan.num_devices
    again = [[0.0] * (len(case.plan.turns) or 1) for _ in peaks]
    waiting = [[0.0] * (len(case.plan.turns) or 1) for _ in peaks]
    copies: dict[tuple[int, str, int], int] = defaultdict(int)
    gathered = [0.0] * len(peaks)
    for _, s in case.slices:
        metaop = case.metagraph[s.metaop]
        turn = turns.get(metaop.task, 0)
        computed_again = metaop.recomputed_bytes / len(s.devices)
        for device in (d for d in s.devices if d < len(peaks)):
            peaks[device] += (layer_bytes(metaop, len(s.devices)) - computed_again / metaop.layers) * s.num_layers
            again[device][turn] = max(again[device][turn], computed_again)
            gathered[device] = max(gathered[device], metaop.gathered_bytes)
            waiting[device][turn] += _activation_bytes(metaop, len(s.devices)) * s.num_layers
            if twice.get(metaop.parameters):
                for layer in range(s.first_layer, s.first_layer + s.num_layers):
                    copies[device, metaop.parameters, layer] += 1
    for (device, key, _), count in copies.items():
        peaks[device] -= (count - 1) * twice[key]
    return [
        whole + two - sum(kept) + max(own + once for own, once in zip(kept, computed, strict=True))
        for whole, two, kept, computed in zip(peaks, gathered, waiting, again, strict=True)
    ]


def _activation_bytes(metaop: MetaOp, count: int) -> float:
    """What a layer keeps on each of `count` devices until its turn ends: as the MetaOp says, and at most what is left
    of its bytes without one layer computed again; where it says nothing, what its parameters and states leave.
    """
    left = layer_bytes(metaop, count) - metaop.recomputed_bytes / (count * metaop.layers)
    if metaop.kept_bytes:
        return max(0.0, min(left, metaop.kept_bytes / (count * metaop.layers)))
    return max(0.0, left - (metaop.layer_state_bytes or 2 * metaop.layer_param_bytes))


def _turns(case: CostedCase) -> Iterator[Finding]:
    """Turns name each task once and in order, hand each other nothing, and do not overlap."""
    turns = case.plan.turn_by_task
    if not turns:
        return
    names = [task for tasks in case.plan.turns for task in tasks]
    bases = list(dict.fromkeys(metaop.task.partition("#")[0] for metaop in case.metagraph))
    tasks = list(dict.fromkeys(metaop.task for metaop in case.metagraph))
    numbers = {task: task.partition("#")[2] for task in tasks}
    batches = {task: int(number) if number.isdecimal() else 0 for task, number in numbers.items()}
    due = sorted(tasks, key=lambda task: (bases.index(task.partition("#")[0]), batches[task]))
    if names != due:
        yield Finding(f"turns run tasks {', '.join(names)}, but one process runs {', '.join(due)} in this order")
        return
    for flow in case.metagraph.flows:
        source, target = (turns[case.metagraph[end].task] for end in (flow.source, flow.target))
        if source != target:
            yield Finding(
                f"{flow.source!r} of turn {source} hands data to {flow.target!r} of turn {target}; tasks that do so "
                "are in one turn"
            )
    last: list[tuple[float, int, Slice] | None] = [None] * len(case.plan.turns)
    for wave, s in case.slices:
        turn = turns[case.metagraph[s.metaop].task]
        known = last[turn]
        if known is None or s.end_s > known[0]:
            last[turn] = (s.end_s, wave, s)
    for wave, s in case.slices:
        turn = turns[case.metagraph[s.metaop].task]
        for before in last[:turn]:
            if before is not None and s.start_s < before[0] - case.slack_s:
                yield Finding(
                    f"{named(s)} of turn {turn} starts at {s.start_s} s, before {named(before[2])} of an "
                    f"earlier turn ends at {before[0]} s",
                    (before[1], wave),
                )


def _shards_together(case: CostedCase) -> Iterator[Finding]:
    """Slices of a component whose parameters are sharded run on the same devices, one copy of the layers on each."""
    of_plan = set(case.plan.shard_parameters)
    known = {metaop.component for metaop in case.metagraph}
    for name in sorted(of_plan - known):
        yield Finding(f"shard_parameters names component {name!r}, of which the plan runs nothing")
    first: dict[str, tuple[int, Slice]] = {}
    for wave, s in case.slices:
        metaop = case.metagraph[s.metaop]
        if metaop.component in of_plan and metaop.layer_param_bytes:
            yield Finding(
                f"{named(s)}: the plan shards the parameters of {metaop.component!r}, but this MetaOp's "
                "layer_param_bytes are reduced after backward; find its costs with sharded parameters",
                (wave,),
            )
        if not metaop.is_sharded:
            continue
        if metaop.component not in of_plan:
            yield Finding(
                f"{named(s)} is costed with sharded parameters, but shard_parameters does not name component "
                f"{metaop.component!r}",
                (wave,),
            )
        before_wave, before = first.setdefault(metaop.component, (wave, s))
        if set(before.devices) != set(s.devices) or s.tensor_parallel > 1:
            yield Finding(
                f"{named(s)} and {named(before)} run on different devices, or tensor parallel; slices of a component "
                "whose parameters are sharded all run on the same devices",
                (before_wave, wave),
            )


def _task_sets(case: Case) -> Iterator[Finding]:
    """Sets of tasks that steps have: shares of all steps, and tasks that the plan runs."""
    sets = case.plan.task_sets
    together = sum(each.share for each in sets)
    if sets and abs(together - 1) > SHARES:
        yield Finding(f"task_sets have {100 * together:g} % of the steps together; give shares that add up to 100 %")
    graph = case.plan.metagraph
    known = {metaop.task.partition("#")[0] for metaop in graph} if graph else {n for each in sets for n in each.tasks}
    for each in sets:
        if not 0 <= each.share <= 1 or each.step_s < 0 or each.sequential_s < 0:
            yield Finding(
                f"task_sets: {', '.join(each.tasks)} has a share of {each.share} and takes {each.step_s} s, "
                f"{each.sequential_s} s in sequence; give shares from 0 to 1 and seconds of zero or more"
            )
        for name in each.tasks:
            if name not in known:
                yield Finding(f"task_sets name {name!r}, of which the plan runs nothing")


PLAN_RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    _waves_in_order,
    _devices_exist,
    _one_slice_at_a_time,
    _makespan,
    _task_sets,
)
METAGRAPH_RULES: tuple[Callable[[CostedCase], Iterator[Finding]], ...] = (
    _cluster_shape,
    _every_layer_once,
    _counts_and_spans,
    _dependencies,
    _shards_together,
    _turns,
    _memory,
)
