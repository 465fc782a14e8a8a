"""Change: a former plan or pins in, what a new search begins from or must keep out.

- Task sets change while training runs. What stays keeps its slices, their order and their devices; what is new gets one
  slice on the count that the bound's prices ask for; what left is gone. A search begins there besides its usual starts.
- A pin fixes a MetaOp, or all MetaOps of a component, to devices: all its slices run on exactly these.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

from spindle.errors import PlanError
from spindle.planner.bounds.bound import Bound
from spindle.planner.costing.curves import Curve
from spindle.planner.problem import Problem
from spindle.planner.search.decode import Draft, FlatDecoder, Part
from spindle.planner.search.device_pool import make_device_pool
from spindle.planner.search.finish import finish, runs_of_draft
from spindle.planner.search.model import Model, make_model
from spindle.planner.search.placed import PlacedDecoder
from spindle.values.plan import Plan, Slice
from spindle.words.nearest import did_you_mean

Pins = Mapping[str, Sequence[int]]
"""Devices by name of a MetaOp or component."""


def carry_over(problem: Problem, bound: Bound, former: Plan) -> tuple[Slice, ...] | None:
    """The former plan's slices as a schedule of `problem`; None when memory does not let it be one."""
    model, pool = make_model(problem, bound.bound_s), make_device_pool(problem)
    slices_by_name: dict[str, list[Slice]] = {}
    for s in former.slices:
        slices_by_name.setdefault(s.metaop, []).append(s)
    weight = dict.fromkeys(range(len(problem)), 0.0)
    for path_weight, names in bound.certificate.paths:
        for name in names:
            weight[problem.index[name]] += path_weight
    draft: Draft = [[] for _ in range(len(problem))]
    ends = [0.0] * len(problem)
    for m in problem.order:
        earliest = max((ends[p] for p in problem.predecessors[m]), default=0.0)
        price = max(bound.certificate.area_price, 1e-12)
        draft[m] = _kept(model, m, slices_by_name.get(problem.metaops[m].name, []), problem.num_devices)
        if not draft[m]:
            draft[m] = [_new_part(model, m, price, weight[m], earliest)]
        c, layers, rank, _, _ = draft[m][-1]
        ends[m] = rank + layers * model.times[m][c]
    decoder = PlacedDecoder(model, pool) if pool.matters else FlatDecoder(model)
    decoded = decoder.decode(draft, float("inf"))
    return finish(problem, model, runs_of_draft(model, draft, decoded)) if decoded else None


def _kept(model: Model, m: int, slices: Sequence[Slice], num_devices: int) -> list[Part]:
    """The former slices of MetaOp m on the nearest counts that are still valid; none when its layers are others."""
    if sum(s.num_layers for s in slices) != model.layers[m]:
        return []
    parts: list[Part] = []
    for s in slices:
        counts = model.counts[m]
        near = max(0, bisect_right(counts, len(s.devices), hi=model.useful[m]) - 1)
        c = counts.index(len(s.devices)) if len(s.devices) in counts else near
        hint = sum(1 << d for d in s.devices if d < num_devices)
        parts.append((c, s.num_layers, s.start_s, 0.0, hint))
    return parts


def _new_part(model: Model, m: int, area_price: float, weight: float, rank: float) -> Part:
    """All layers of m on the count with the least worth by the bound's prices."""
    counts, times = model.counts[m], model.times[m]
    best = min(range(len(counts)), key=lambda c: times[c] * (area_price * counts[c] + weight))
    return (best, model.layers[m], rank, 0.0, 0)


def pinned(problem: Problem, pins: Pins) -> Problem:
    """The problem with MetaOps fixed to devices; raises PlanError for a pin that cannot be kept."""
    fixed: dict[int, tuple[int, ...]] = {}
    for name, wanted in pins.items():
        ops = [m for m, metaop in enumerate(problem.metaops) if name in (metaop.name, metaop.component)]
        if not ops:
            known = {each for metaop in problem.metaops for each in (metaop.component, metaop.name)}
            raise PlanError(
                f"pin {name!r} names no component of this workload{did_you_mean(name, sorted(known))}; "
                f"the components are {', '.join(sorted({metaop.component for metaop in problem.metaops}))}"
            )
        devices = tuple(sorted(wanted))
        if not devices or len(set(devices)) != len(devices) or not 0 <= devices[0] <= devices[-1] < problem.num_devices:
            raise PlanError(
                f"pin {name!r} wants devices {list(wanted)}; name each once, from 0 to {problem.num_devices - 1}"
            )
        for m in ops:
            counts = sorted(problem.curves[m].time_by_count)
            if len(devices) not in counts:
                raise PlanError(
                    f"pin {name!r} gives MetaOp {problem.metaops[m].name!r} {len(devices)} devices; "
                    f"it runs on {', '.join(map(str, counts))}"
                )
            fixed[m] = devices
    curves = tuple(
        Curve((len(fixed[m]),), (curve.time_by_count[len(fixed[m])],)) if m in fixed else curve
        for m, curve in enumerate(problem.curves)
    )
    return replace(problem, curves=curves, pins=fixed)
