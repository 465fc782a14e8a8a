"""Measured steps as users write them: a CSV file in, checked rows out.

The columns are `gpus`, `per_gpu_batch` and `seconds_per_step`. Lines that begin with # are comments. Other columns are
left out and named, except `table`: tables are fitted apart, since what differs between them is not in the columns.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spindle.errors import FormatError, ProfileError
from spindle.files.filetypes import MOST_YAML_BYTES
from spindle.files.formats import read_text
from spindle.values.calibration import MeasuredStep

COLUMNS = ("gpus", "per_gpu_batch", "seconds_per_step")
MOST_ROWS = 200
MOST_COUNT = 10**7
LEAST_S, MOST_S = 1e-6, 1e6  # no step of training is shorter than a kernel or longer than some days


@dataclass(frozen=True)
class MeasuredTable:
    """Rows of one table, and columns of the file that were not read."""

    rows: tuple[MeasuredStep, ...]
    unread: tuple[str, ...] = ()


def read_steps(path: str | Path, table: str | None = None) -> MeasuredTable:
    """Measured steps of a CSV file; where it has a column `table`, those of one table.

    Raises FormatError naming the line when a column or a number is missing, or several tables are there and none is
    named.
    """
    lines = [(i, line) for i, line in enumerate(read_text(path, MOST_YAML_BYTES).splitlines(), 1) if line.strip()]
    lines = [(i, line) for i, line in lines if not line.lstrip().startswith("#")]
    numbers, texts = [i for i, _ in lines], [line for _, line in lines]
    reader = csv.DictReader(texts, skipinitialspace=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise FormatError(
            f"{path}: column {missing[0]!r} is missing (the first line has {', '.join(names) or 'nothing'}); name the "
            f"columns {','.join(COLUMNS)}"
        )
    reader.fieldnames = names
    found = list(zip(numbers[1:], reader, strict=False))
    chosen = _of_table(found, table, str(path)) if "table" in names else found
    if table is not None and "table" not in names:
        raise FormatError(f"{path}: has no column 'table' to find {table!r} in; leave --table out, or add the column")
    rows = tuple(_row(row, f"{path}, line {number}") for number, row in chosen)
    if not rows:
        raise FormatError(f"{path}: holds no measured step; add a line for each, below {','.join(COLUMNS)}")
    _check_twice(rows, str(path))
    if len(rows) > MOST_ROWS:
        raise FormatError(
            f"{path}: holds {len(rows)} steps, and each row is planned; give at most {MOST_ROWS}, one for each number "
            "of GPUs and batch, with the mean of its steps"
        )
    return MeasuredTable(rows, tuple(name for name in names if name not in (*COLUMNS, "table")))


Line = tuple[int, Mapping[str, str]]


def _of_table(lines: Sequence[Line], table: str | None, path: str) -> list[Line]:
    tables = list(dict.fromkeys((row["table"] or "").strip() for _, row in lines))
    if table is None and len(tables) > 1:
        raise FormatError(
            f"{path}: holds {len(tables)} tables ({', '.join(tables)}), which are fitted apart; name one with --table"
        )
    if table is not None and table not in tables:
        raise FormatError(f"{path}: holds no table {table!r}; it has {', '.join(tables)}")
    return [(number, row) for number, row in lines if table is None or (row["table"] or "").strip() == table]


def _row(row: Mapping[str, str], where: str) -> MeasuredStep:
    if None in row or any(row[name] is None for name in COLUMNS):
        raise FormatError(f"{where}: has another number of values than the first line has columns; mend the line")
    try:
        counts = [int(row[name]) for name in COLUMNS[:2]]
        seconds = float(row[COLUMNS[2]])
    except ValueError:
        found = ", ".join(f"{name} {row[name].strip()!r}" for name in COLUMNS)
        raise FormatError(
            f"{where}: {found}; give whole numbers of GPUs and samples, and seconds as a number"
        ) from None
    if not LEAST_S <= seconds <= MOST_S:  # NaN too
        raise FormatError(f"{where}: a step of {seconds!r} s; give the seconds of one step, {LEAST_S:g} to {MOST_S:g}")
    if max(counts) > MOST_COUNT:
        raise FormatError(f"{where}: {counts[0]} GPUs, {counts[1]} samples on each; give at most {MOST_COUNT}")
    try:
        return MeasuredStep(gpus=counts[0], per_gpu_batch=counts[1], seconds=seconds)
    except ProfileError as error:
        raise FormatError(f"{where}: {error}") from None


def _check_twice(rows: Sequence[MeasuredStep], path: str) -> None:
    seen: dict[tuple[int, int], float] = {}
    for row in rows:
        key = row.gpus, row.per_gpu_batch
        if key in seen and seen[key] != row.seconds:
            raise FormatError(
                f"{path}: {row} took {seen[key]:g} s and {row.seconds:g} s; what differs is in no column: give their "
                "mean, or put them into tables of their own (a column `table`)"
            )
        seen[key] = row.seconds
