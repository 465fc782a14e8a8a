"""Tables of benchmarks/data (each names its source in its header) as rows of text, and errors of predictions."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
Row = dict[str, str]


def read_table(name: str) -> list[Row]:
    """Rows of benchmarks/data/<name>.csv by column, comment lines left out."""
    lines = (DATA / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of predictions: mean and largest magnitude, and how many."""

    mean: float
    largest: float
    count: int

    def __str__(self) -> str:
        return f"mean {self.mean:6.1%}  largest {self.largest:6.1%}  ({self.count} rows)"


def errors(pairs: Iterable[tuple[float, float]]) -> Errors:
    """Errors of (predicted, measured) pairs."""
    found = [abs(predicted / measured - 1) for predicted, measured in pairs]
    return Errors(sum(found) / len(found), max(found), len(found))


@dataclass(frozen=True, slots=True)
class Figure:
    """One judged number: what it is, its value and limit (None: only stated), and what it was fitted on."""

    name: str
    value: float
    limit: float | None
    fitted_on: str = ""

    @property
    def ok(self) -> bool:
        """Whether it keeps its limit; limits on counts of hits are from below, written as negative numbers."""
        if self.limit is None:
            return True
        return self.value <= self.limit if self.limit >= 0 else self.value >= -self.limit

    def line(self) -> str:
        """One line of the report."""
        limit = "stated" if self.limit is None else f"{'<=' if self.limit >= 0 else '>='} {abs(self.limit):.0%}"
        verdict = "" if self.limit is None else ("ok" if self.ok else "MISSED")
        return f"{self.name:<62} {self.value:>7.1%}  {limit:>8} {verdict:<7} {self.fitted_on}"


@dataclass(frozen=True, slots=True)
class Held:
    """A row that nothing was fitted on: measured over predicted seconds of its step."""

    table: str
    row: str
    ratio: float


def held_rates(table: str, names: Iterable[str], pairs: Iterable[tuple[float, float]]) -> tuple[Held, ...]:
    """Of (predicted, measured) rates: what is done in a second."""
    return tuple(Held(table, n, predicted / measured) for n, (predicted, measured) in zip(names, pairs, strict=True))


def held_seconds(table: str, names: Iterable[str], pairs: Iterable[tuple[float, float]]) -> tuple[Held, ...]:
    """Of (predicted, measured) seconds."""
    return tuple(Held(table, n, measured / predicted) for n, (predicted, measured) in zip(names, pairs, strict=True))


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows with even and with odd number, counted from 0: fitted on, and held out."""
    return list(rows[::2]), list(rows[1::2])
