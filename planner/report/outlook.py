"""Outlook: a plan and what its costs are made of in; how sure its step and its gain are out (`spindle.values.outlook`).

- The band of the step is that of its sources of costs (`spindle.cost.sources`).
- The band of the gain: the plan and the quickest alternative are costed again with the seconds of computation, of the
  host and of the network at either end of what these factors have been found to be, one at a time. Both steps then
  change, mostly together. What plans that were measured side by side have shown besides is added.
- The moves of the gain: the same with the host's or the network's seconds halved and doubled, and on batches half and
  twice as large. Nothing is searched: the slices stay.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from spindle.cost.bands import Band, band, factor_bands, pair_band
from spindle.cost.sources import CostSource, cost_sources, costed_like, step_band
from spindle.errors import InfeasibleError
from spindle.planner.baselines.alternatives import Choice, step_again_s
from spindle.planner.recost import Costs, Recosted
from spindle.planner.report.instead import LEAST_GAIN
from spindle.values.calibration import FACTORS, Calibration
from spindle.values.outlook import Gain, Moves, Outlook, Proof
from spindle.values.plan import Alternative, Plan

HALF, DOUBLE = Fraction(1, 2), Fraction(2)

OnBatches = Callable[[Fraction], Costs | None]
"""The same costs on batches times a factor; None where there are no such batches."""


StepOf = Callable[[Costs, Calibration | None], float | None]
"""Seconds of a step of the baseline under costs with factors; None where it does not run so."""


@dataclass(frozen=True)
class _Pair:
    """The plan and the alternative that it is compared with; `shift`: of the gain over several batches from that of the
    mean one, which is what is costed again.
    """

    plan: Plan
    other: Alternative
    shift: float = 0.0

    def gain(self, costs: Costs, factors: Calibration | None = None, *, must_fit: bool = False) -> float | None:
        """The share of the alternative's step that the plan saves; None where one of them does not run so."""
        try:
            own = costs.under(factors)
        except InfeasibleError:  # sharded parameters ask for batches that all devices share
            return None
        if must_fit and not own.fits(self.plan):
            return None
        own_s, other_s = own.step_s(self.plan), self._other_s(costs, own, factors, must_fit=must_fit)
        if own_s is None or other_s is None:
            return None
        return self.shift + 1 - (own_s + self.plan.fixed_s) / (other_s + self.plan.fixed_s)

    def _other_s(self, costs: Costs, own: Recosted, factors: Calibration | None, *, must_fit: bool) -> float | None:
        """Seconds of the alternative, costed under its own memory choice."""
        given = costs.cost_options
        memory = replace(given, recompute=self.other.recompute, shard_optimizer=self.other.shard_optimizer)
        memory = replace(memory, shard_parameters=())  # FSDP2 is costed from whole ones
        found = own if memory == given else replace(costs, cost_options=memory).under(factors)
        choice = Choice(found.costed.metagraph, found.costed.steps, self.other.recompute)
        return step_again_s(self.other, choice, found.cluster, must_fit=must_fit)


def outlook_of(
    plan: Plan,
    costs: Costs,
    on_batches: OnBatches,
    *,
    calibration: Calibration | None = None,
    can_profile: bool = False,
) -> Outlook:
    """How sure a plan is that was made just now; `costs` are of the cluster that it was made for. `can_profile`: its
    operators can be measured.
    """
    sources = sources_of(plan, costs, is_calibrated=calibration is not None)
    found = step_band(plan.slices, sources)
    return Outlook(
        source=_source(sources),
        low_s=plan.fixed_s + found.low * (plan.expected_s - plan.fixed_s),
        high_s=plan.fixed_s + found.high * (plan.expected_s - plan.fixed_s),
        gain=_gain(plan, costs, on_batches, sources, calibration, can_profile=can_profile),
    )


def sources_of(plan: Plan, costs: Costs, *, is_calibrated: bool = False) -> tuple[CostSource, ...]:
    """Where the times of each MetaOp come from."""
    return cost_sources(costed_like(costs.metagraph, plan), costs.profile, is_calibrated=is_calibrated)


def _source(sources: tuple[CostSource, ...]) -> str:
    words = {"measured": "profiled", "interpolated": "profiled", "scaled": "profiled"}
    return ", ".join(sorted({words.get(each.source, each.source) for each in sources}))


def _gain(
    plan: Plan,
    costs: Costs,
    on_batches: OnBatches,
    sources: tuple[CostSource, ...],
    calibration: Calibration | None,
    *,
    can_profile: bool,
) -> Gain | None:
    pair = _pair(plan)
    share = pair.gain(costs) if pair else None
    if pair is None or share is None:
        return None
    if costs.steps:  # a dozen batches take a dozen times as long
        costs = replace(costs, steps=())
        alone = pair.gain(costs)
        pair = pair if alone is None else replace(pair, shift=share - alone)
    shares = {"": share}
    kinds: set[str] = {each.source for each in sources}
    for name, ends in _ranges(costs, kinds, calibration).items():
        for end in (ends.low, ends.high):
            changed = pair.gain(costs, _factor(plan, name, end))
            assert changed is not None, "other factors leave the numbers of devices as they are"
            if name not in shares or changed < shares[name]:
                shares[name] = changed
            shares["high"] = max(shares.get("high", share), changed)
    high = shares.pop("high", share)
    low, weakest = min((value, name) for name, value in shares.items())
    if kinds & {"measured", "interpolated", "scaled"}:  # each was timed by itself, so they err apart
        low, high = min(low, 1 - (1 - low) * pair_band().high), max(high, 1 - (1 - high) * pair_band().low)
    moves = tuple(_moves(pair, costs, on_batches, share, kinds))
    proof: Proof = "" if low > LEAST_GAIN else _proof(kinds, weakest, can_profile)
    return Gain(baseline=pair.other.name, share=share, low=low, high=high, weakest=weakest, proof=proof, moves=moves)


def _proof(kinds: set[str], weakest: str, can_profile: bool) -> Proof:
    if not kinds & {"predicted", "calibrated", "scaled"}:
        return "runs"
    if can_profile:
        return "profile"
    return "devices" if weakest == "network" else "batches"


def _pair(plan: Plan) -> _Pair | None:
    """The plan beside the quickest alternative that fits."""
    fitting = [other for other in plan.alternatives if other.fits]
    if plan.compared == "makespan" or not fitting:
        return None
    return _Pair(plan, min(fitting, key=lambda other: other.step_s))


def _ranges(costs: Costs, kinds: set[str], calibration: Calibration | None) -> dict[str, Band]:
    """What each factor may be: as found for published steps; once fitted, what is left of that. Times that are given,
    or measured, do not depend on the device's constants.
    """
    found = dict(factor_bands())
    if not kinds & {"predicted", "calibrated", "scaled"}:
        del found["compute"], found["host"]
    if costs.profile is not None and costs.profile.links:
        found["network"] = band("profiled")
    if calibration is not None:
        open_ = {*calibration.undetermined, *(name for names in calibration.inseparable for name in names)}
        found |= {name: band("calibrated") for name in found if name not in open_}
    return found


def _factor(plan: Plan, name: str, value: float) -> Calibration:
    assert name in FACTORS, f"{name!r} is not a factor of costs"
    assert plan.cluster is not None, "a plan that was made just now carries its cluster"
    return replace(Calibration(device=plan.cluster.device.name), **{name: value})  # type: ignore[arg-type]


def _moves(pair: _Pair, costs: Costs, on_batches: OnBatches, share: float, kinds: set[str]) -> Iterator[Moves]:
    for name in ("host", "network"):
        if name == "host" and not kinds & {"predicted", "calibrated", "scaled"}:
            continue  # measured and given times have the host's in them
        half, double = (pair.gain(costs, _factor(pair.plan, name, value)) for value in (0.5, 2.0))
        yield Moves(name=name, half=half, as_is=share, double=double)
    ends = []
    for factor in (HALF, DOUBLE):
        other = on_batches(factor)
        ends.append(pair.gain(replace(other, steps=()), must_fit=True) if other else None)
    if any(end is not None for end in ends):
        yield Moves(name="batch", half=ends[0], as_is=share, double=ends[1])
