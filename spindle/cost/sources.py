"""Sources: a priced MetaGraph and its profile in; where each cost comes from and how wrong it may be, out.

- `measured`: every count the MetaOp may use was timed. `interpolated`: some counts lie between timed ones, or layers of
  other sizes were timed. `scaled`:
  some lie outside them and follow the prediction's shape. `predicted`: its operator kind was never timed. `given`: the
  MetaGraph came from a file that states its times.
- The error of interpolation is that of the profile's own points, each left out in turn; where there are too few, and
  for the other sources, it is what docs/cost-model.md found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spindle.cost.family import curves_of
from spindle.cost.heldout import HeldOut, left_out, left_out_sizes
from spindle.metagraph import MetaGraph, MetaOp
from spindle.plan import Slice
from spindle.profile import Profile, ProfileEntry

SourceKind = Literal["measured", "interpolated", "scaled", "predicted", "given"]

MEASURED_ERROR = 0.05  # medians of repeated runs against the same operator inside a step
INTERPOLATED_ERROR = 0.10  # published curves, every second point left out: means of 2 to 6 %, largest 16 %
SCALED_ERROR = 0.15
PREDICTED_ERROR = 0.20  # tables nothing was fitted on: means of 9 to 20 %


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSource:
    """Where the layer times of a MetaOp come from; `error` is relative, `timed` the counts that were measured."""

    metaop: str
    source: SourceKind
    error: float
    timed: tuple[int, ...] = ()

    def __str__(self) -> str:
        counts = f" at {', '.join(map(str, self.timed))}" if self.timed else ""
        return f"{self.metaop}: {self.source}{counts}, +-{self.error:.0%}"


def cost_sources(metagraph: MetaGraph, profile: Profile | None = None) -> tuple[CostSource, ...]:
    """The source of every MetaOp's times; `metagraph` still carries its operators."""
    return tuple(_source(metaop, profile or Profile("")) for metaop in metagraph)


def _source(metaop: MetaOp, profile: Profile) -> CostSource:
    if not metaop.operators:
        return CostSource(metaop=metaop.name, source="given", error=0.0)
    entries = profile.by_kind.get(metaop.operators[0].kind, {})
    alike = profile.by_family.get(metaop.operators[0].family, ())
    if curves_of(alike) and (metaop.operators[0].units or not entries):
        error = max(_mean_error(left_out_sizes("", alike)), MEASURED_ERROR)
        return CostSource(metaop=metaop.name, source="interpolated", error=error)
    timed = tuple(n for n in metaop.times if n in entries)
    if not timed:
        return CostSource(metaop=metaop.name, source="predicted", error=PREDICTED_ERROR)
    rest = [n for n in metaop.times if n not in entries]
    if not rest:
        return CostSource(metaop=metaop.name, source="measured", error=MEASURED_ERROR, timed=timed)
    if all(timed[0] < n < timed[-1] for n in rest):
        error = max(leave_one_out_error(entries), MEASURED_ERROR)
        return CostSource(metaop=metaop.name, source="interpolated", error=error, timed=timed)
    return CostSource(metaop=metaop.name, source="scaled", error=SCALED_ERROR, timed=timed)


def leave_one_out_error(entries: Mapping[int, ProfileEntry]) -> float:
    """Mean relative error at each inner measured count when T = a + b/n through its neighbours predicts it."""
    return _mean_error(left_out("", entries))


def _mean_error(rows: Sequence[HeldOut]) -> float:
    errors = [abs(row.error) for row in rows]
    return sum(errors) / len(errors) if errors else INTERPOLATED_ERROR


def makespan_error(slices: Sequence[Slice], sources: Sequence[CostSource]) -> float:
    """Relative error bar of a plan's makespan: its MetaOps' errors, weighted by the device time they take.

    Errors of one model lean to one side together, so they are added and not averaged out.
    """
    error_by_metaop = {source.metaop: source.error for source in sources}
    weights = [(s.span_s * len(s.devices), error_by_metaop.get(s.metaop, PREDICTED_ERROR)) for s in slices]
    total = sum(weight for weight, _ in weights)
    return sum(weight * error for weight, error in weights) / total if total else 0.0
