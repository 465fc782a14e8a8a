"""Bands: a source of costs in, how far measured steps lay from what was predicted from it out.

- `held_out.yaml` holds measured over predicted seconds of steps that no constant was fitted on, by source; benchmarks
  make it (`python -m benchmarks.held_out --write`). A band is not symmetric: steps more often take longer.
- Half of the tenth that a band leaves out lies below it, half above. Each table counts alike, and then each row: the
  wider of both bands is taken, so that neither a long table nor a strange one decides alone.
- Of few rows a band holds all: with n rows a further one lies beyond the least or the largest of them 2 times in n + 1.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from spindle.calibration import FACTORS
from spindle.clusterfile import read_yaml
from spindle.errors import FormatError
from spindle.filemodels import StrictModel
from spindle.formats import explain_validation

BandSource = Literal["predicted", "calibrated", "profiled"]
HELD_OUT = Path(__file__).parents[1] / "held_out.yaml"
COVERS = 0.9


@dataclass(frozen=True, slots=True)
class Band:
    """Measured over predicted: nine of ten lie from `low` to `high`."""

    low: float
    high: float

    def holds(self, ratio: float) -> bool:
        """Whether a ratio lies in it; its ends do."""
        return self.low * (1 - 1e-9) <= ratio <= self.high * (1 + 1e-9)

    def wider(self, share: float) -> "Band":
        """Both ends moved out by a further relative error."""
        return Band(self.low / (1 + share), self.high * (1 + share))

    def around(self, other: "Band") -> "Band":
        """The least band that holds both."""
        return Band(min(self.low, other.low), max(self.high, other.high))


EXACT = Band(1.0, 1.0)


class _RowModel(StrictModel):
    source: BandSource
    table: str
    row: str
    ratio: float


class _GainModel(StrictModel):
    table: str
    row: str
    ratio: float


class _FactorsModel(StrictModel):
    table: str
    compute: float
    host: float
    network: float


class HeldOutModel(StrictModel):
    """The file: rows of steps, of pairs of steps (what one takes of the other), and factors of calibrations."""

    format: Literal["spindle.held_out"]
    version: Literal[1]
    rows: list[_RowModel]
    pairs: list[_GainModel]
    factors: list[_FactorsModel]


@cache
def held_out(path: Path = HELD_OUT) -> HeldOutModel:
    """What the file holds. Raises FormatError when it does not read."""
    try:
        return HeldOutModel.model_validate(read_yaml(path))
    except ValidationError as error:
        raise FormatError(f"{path}: {explain_validation(error)}; make it again (benchmarks.held_out)") from None


def band_of(ratios: Sequence[tuple[str, float]]) -> Band:
    """The band of (table, measured over predicted).

    >>> band_of([("a", 0.9), ("a", 1.0), ("b", 1.3)])
    Band(low=0.9, high=1.3)
    """
    per_table = Counter(table for table, _ in ratios)
    by_row = _quantiles([(ratio, 1.0) for _, ratio in ratios])
    return by_row.around(_quantiles([(ratio, len(ratios) / per_table[table]) for table, ratio in ratios]))


def _quantiles(weighted: Sequence[tuple[float, float]]) -> Band:
    """Values so far out that at most a twentieth of the weight lies beyond, counted as if there were one row more."""
    total = sum(weight for _, weight in weighted)
    allowed = (1 - COVERS) / 2 * total * (1 + 1 / len(weighted)) - total / len(weighted)
    return Band(_end(sorted(weighted), allowed), _end(sorted(weighted, reverse=True), allowed))


def _end(weighted: Sequence[tuple[float, float]], allowed: float) -> float:
    """The first value that may not be left out with all before it."""
    beyond = 0.0
    for ratio, weight in weighted:
        beyond += weight
        if beyond > allowed + 1e-9:
            return ratio
    return weighted[-1][0]


@cache
def band(source: BandSource) -> Band:
    """The band of a source."""
    return band_of([(row.table, row.ratio) for row in held_out().rows if row.source == source])


@cache
def pair_band() -> Band:
    """Of what one plan takes of another on one profile: measured over predicted."""
    return band_of([(row.table, row.ratio) for row in held_out().pairs])


@cache
def factor_bands() -> Mapping[str, Band]:
    """The range of each factor that calibrations of published steps have found; 1 lies in each."""
    rows = held_out().factors
    found = {name: band_of([(row.table, getattr(row, name)) for row in rows]) for name in FACTORS}
    return {name: each.around(EXACT) for name, each in found.items()}


def between(one: Band, other: Band) -> Band:
    """The band whose ends lie halfway, on a scale of ratios."""
    return Band(sqrt(one.low * other.low), sqrt(one.high * other.high))
