"""Sources: a MetaGraph with costs and its profile in; where each cost comes from and how wrong it may be, out.

- `measured`: every count the MetaOp may use was timed. `interpolated`: some counts lie between timed ones, or layers of
  other sizes were timed. `scaled`:
  some lie outside them and follow the prediction's shape. `predicted`: its operator kind was never timed. `given`: the
  MetaGraph came from a file that states its times.
- Each source has a band, which holds nine of ten held-out steps (`spindle.cost.bands`): of a profile where times were
  measured, of the calibrated or the bare cost model where they are predicted. Interpolated times add what the profile's
  own points show, each left out in turn; scaled ones lie halfway to predicted ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from spindle.cost.bands import EXACT, Band, band, between
from spindle.cost.measured.family import curves_of
from spindle.cost.measured.heldout import HeldOut, left_out, left_out_sizes
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Plan, Slice
from spindle.values.profile import Profile, ProfileEntry

SourceKind = Literal["measured", "interpolated", "scaled", "predicted", "calibrated", "given"]

INTERPOLATED_ERROR = 0.10  # published curves, every second point left out: means of 2 to 6 %, largest 16 %
NINE_OF_TEN = 2.06  # errors of a bell curve: nine of ten are within this many times their mean


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSource:
    """Where the layer times of a MetaOp come from, and the band of measured over predicted; `timed` the counts that
    were measured.
    """

    metaop: str
    source: SourceKind
    band: Band
    timed: tuple[int, ...] = ()

    def __str__(self) -> str:
        counts = f" at {', '.join(map(str, self.timed))}" if self.timed else ""
        return f"{self.metaop}: {self.source}{counts}, measured / predicted {self.band.low:.2f} to {self.band.high:.2f}"


def cost_sources(
    metagraph: MetaGraph, profile: Profile | None = None, *, is_calibrated: bool = False
) -> tuple[CostSource, ...]:
    """The source of every MetaOp's times; `metagraph` still carries its operators."""
    return tuple(_source(metaop, profile or Profile(""), is_calibrated) for metaop in metagraph)


def costed_like(metagraph: MetaGraph, plan: Plan) -> MetaGraph:
    """A MetaGraph, which has the operators, with the times that the plan's own was given for it."""
    if plan.metagraph is None:
        return metagraph
    times = {metaop.name: metaop.layer_time_s for metaop in plan.metagraph}
    return replace(metagraph, metaops=tuple(replace(m, layer_time_s=times[m.name]) for m in metagraph))


def _source(metaop: MetaOp, profile: Profile, is_calibrated: bool) -> CostSource:
    if not metaop.operators:
        return CostSource(metaop=metaop.name, source="given", band=EXACT)
    entries = profile.by_kind.get(metaop.operators[0].kind, {})
    alike = profile.by_family.get(metaop.operators[0].family, ())
    if curves_of(alike) and (metaop.operators[0].units or not entries):
        error = _mean_error(left_out_sizes("", alike))
        return CostSource(metaop=metaop.name, source="interpolated", band=_interpolated(error))
    timed = tuple(n for n in metaop.times if n in entries)
    model: Literal["calibrated", "predicted"] = "calibrated" if is_calibrated else "predicted"
    if not timed:
        return CostSource(metaop=metaop.name, source=model, band=band(model))
    rest = [n for n in metaop.times if n not in entries]
    if not rest:
        return CostSource(metaop=metaop.name, source="measured", band=band("profiled"), timed=timed)
    if all(timed[0] < n < timed[-1] for n in rest):
        wide = _interpolated(leave_one_out_error(entries))
        return CostSource(metaop=metaop.name, source="interpolated", band=wide, timed=timed)
    return CostSource(metaop=metaop.name, source="scaled", band=between(band("profiled"), band(model)), timed=timed)


def _interpolated(mean_error: float) -> Band:
    return band("profiled").wider(NINE_OF_TEN * mean_error)


def leave_one_out_error(entries: Mapping[int, ProfileEntry]) -> float:
    """Mean relative error at each inner measured count when T = a + b/n through its neighbors predicts it."""
    return _mean_error(left_out("", entries))


def _mean_error(rows: Sequence[HeldOut]) -> float:
    errors = [abs(row.error) for row in rows]
    return sum(errors) / len(errors) if errors else INTERPOLATED_ERROR


def step_band(slices: Sequence[Slice], sources: Sequence[CostSource]) -> Band:
    """The band of a plan's step: those of its MetaOps, weighted by the device time that they take.

    Errors of one model lean to one side together, so bands are added and not averaged out.
    """
    band_by_metaop = {source.metaop: source.band for source in sources}
    weights = [(s.span_s * len(s.devices), band_by_metaop[s.metaop]) for s in slices if s.metaop in band_by_metaop]
    total = sum(weight for weight, _ in weights)
    if not total:
        return EXACT
    return Band(sum(w * each.low for w, each in weights) / total, sum(w * each.high for w, each in weights) / total)
