"""Bands: a source of costs in, how far measured steps lay from what was predicted from it out.

- `held_out.yaml` holds measured over predicted seconds of steps that no constant was fitted on, by source; benchmarks
  make it (`python -m benchmarks.pages.held_out --write`). A band is not symmetric: steps more often take longer.
- Half of the tenth that a band leaves out lies below it, half above. Each row counts alike; and then, since rows of one
  table err together, a table counts as the root of its number of rows. The band holds both bands.
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

from spindle.errors import FormatError
from spindle.files.clusterfile import read_yaml
from spindle.files.filemodels import StrictModel
from spindle.files.formats import explain_validation
from spindle.values.calibration import FACTORS

BandSource = Literal["predicted", "calibrated", "profiled"]
HELD_OUT = Path(__file__).with_name("held_out.yaml")
COVERS = 0.9
FEW = 3  # calibrations that tell how far a factor moves
UNKNOWN = 2.0  # times a factor, or part of it, that nobody has determined


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
    compute: float | None = None
    host: float | None = None
    network: float | None = None


class HeldOut(StrictModel):
    """The file: rows of steps, of pairs of steps (what one takes of the other), and factors of calibrations."""

    format: Literal["spindle.held_out"]
    version: Literal[1]
    rows: list[_RowModel]
    pairs: list[_GainModel]
    factors: list[_FactorsModel]


@cache
def held_out() -> HeldOut:
    """What the file that comes with Spindle holds."""
    return held_out_of(read_yaml(HELD_OUT), str(HELD_OUT))


def held_out_of(data: object, source: str) -> HeldOut:
    """What such a file holds, checked; `source` names it in errors."""
    try:
        return HeldOut.model_validate(data)
    except ValidationError as error:
        raise FormatError(
            f"{source}: {explain_validation(error, HeldOut)}; make it again (benchmarks.held_out)"
        ) from None


def band_of(ratios: Sequence[tuple[str, float]]) -> Band:
    """The band of (table, measured over predicted).

    >>> band_of([("a", 0.9), ("a", 1.0), ("b", 1.3)])
    Band(low=0.9, high=1.3)
    """
    per_table = Counter(table for table, _ in ratios)
    by_row = _quantiles([(ratio, 1.0) for _, ratio in ratios])
    return by_row.around(_quantiles([(ratio, 1 / sqrt(per_table[table])) for table, ratio in ratios]))


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
    return band_of([(row.table, row.ratio) for row in held_out().pairs]).around(EXACT)


@cache
def factor_bands() -> Mapping[str, Band]:
    """How far calibrations of published steps have moved each factor, taken either way; where fewer than three have
    determined it, it may be half or double.
    """
    found: dict[str, Band] = {}
    for name in FACTORS:
        values = [value for row in held_out().factors if (value := getattr(row, name)) is not None]
        most = max(max(value, 1 / value) for value in values) if len(values) >= FEW else UNKNOWN
        found[name] = Band(1 / most, most)
    return found


def between(one: Band, other: Band) -> Band:
    """The band whose ends lie halfway, on a scale of ratios."""
    return Band(sqrt(one.low * other.low), sqrt(one.high * other.high))
