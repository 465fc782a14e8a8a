"""Held out: the errors that the printed bands come from, as spindle/held_out.yaml.

    python -m benchmarks.held_out            compares the file with the cost model as it is; 1 when they differ
    python -m benchmarks.held_out --write    makes it again

- predicted: every row of the cost report that no constant was fitted on, and StarVLA's.
- calibrated: rows left out of a calibration in turn: StarVLA's tables, and the paper's sequential times by workload.
- profiled: steps of benchmarks/results/prediction.md, measured on one machine.
- pairs: of those plans, each beside the sequential one: what a gain is made of.
- factors: what calibrations of whole tables find, as the ranges in which factors move.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the report's modules import each other by bare name

from cost_model import all_sections
from cost_tables import read_table

from spindle.api import make_calibration, plan_source
from spindle.calibration import Calibration, MeasuredStep
from spindle.cluster import Cluster
from spindle.clusterfile import parse_cluster
from spindle.cost.bands import HELD_OUT, BandSource, band_of, held_out
from spindle.planner.report.compare import resized
from spindle.source import Source, spec_source
from spindle.spec.batch import per_device, scaled_by
from spindle.spec.file import read_workload
from spindle.spec.values import WorkloadSpec

HERE = Path(__file__).parent
TOLERANCE = 0.01  # of a ratio, within which the file is not stale
STARVLA = "StarVLA on A100"
Loader = Callable[[MeasuredStep, Cluster], Source]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured step over its prediction."""

    source: str
    table: str
    row: str
    ratio: float

    def __str__(self) -> str:
        source = f"source: {self.source}, " if self.source else ""
        return f"  - {{{source}table: {self.table}, row: '{self.row}', ratio: {self.ratio:.4f}}}"


def spec_of(name: str) -> WorkloadSpec:
    """A spec of benchmarks/workloads."""
    return read_workload(HERE / "workloads" / f"{name}.yaml")


# Steps to calibrate on ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Measured steps of one program on one cluster, and what ran in each."""

    name: str
    cluster: Cluster
    steps: tuple[MeasuredStep, ...]
    load: Loader

    def fitted(self, steps: Sequence[MeasuredStep]) -> Calibration:
        """The calibration on some of its steps."""
        return make_calibration(self.load, self.cluster, steps)

    def predicted_s(self, step: MeasuredStep, calibration: Calibration | None = None) -> float:
        """What `spindle plan --method sequential` says of a step."""
        where = resized(self.cluster, step.gpus)
        return plan_source(self.load(step, where), where, calibration=calibration, method="sequential")[0].expected_s


def starvla_tables() -> list[Table]:
    """Its two tables, which disagree with each other."""
    rows, spec = read_table("starvla_a100"), spec_of("starvla_gr00t")

    def load(step: MeasuredStep, where: Cluster) -> Source:
        return spec_source(per_device(spec, step.per_gpu_batch, step.gpus))

    return [
        Table(
            f"{STARVLA}, {name}",
            parse_cluster("4x8:a100-80g"),
            tuple(
                MeasuredStep(
                    gpus=int(row["gpus"]),
                    per_gpu_batch=int(row["per_gpu_batch"]),
                    seconds=float(row["seconds_per_step"]),
                )
                for row in rows
                if row["table"] == name
            ),
            load,
        )
        for name in ("batch", "nodes")
    ]


STARVLA_HEADER = MeasuredStep(gpus=8, per_gpu_batch=8, seconds=1.131)
"""Of the table of batches, in the header of the file."""


def calibrated_rows() -> Iterator[Row]:
    """Each row of each table, predicted by a calibration on the others of its table."""
    batches, nodes = starvla_tables()
    for table in (batches, nodes):
        for step in table.steps:
            others = [other for other in table.steps if other is not step]
            told_s = table.predicted_s(step, table.fitted(others))
            yield Row("calibrated", table.name, str(step), step.seconds / told_s)
    told_s = batches.predicted_s(STARVLA_HEADER, batches.fitted(batches.steps))
    yield Row("calibrated", batches.name, str(STARVLA_HEADER), STARVLA_HEADER.seconds / told_s)


def starvla_rows() -> Iterator[Row]:
    """StarVLA's steps without any calibration."""
    for table in starvla_tables():
        for step in table.steps:
            yield Row("predicted", table.name, str(step), step.seconds / table.predicted_s(step))


def report_rows() -> Iterator[Row]:
    """Rows of the cost report."""
    for section in all_sections():
        for held in section.held:
            yield Row("predicted", held.table, held.row, held.ratio)


# Results of this machine --------------------------------------------------------------------------------------------

PLAN_ROW = re.compile(r"^\| (?P<plan>[^|]+?) \| (?P<predicted>[\d.]+) \| (?P<measured>[\d.]+) \| [+-]", re.MULTILINE)


def profiled_rows() -> tuple[list[Row], list[Row]]:
    """Steps of the last report of `benchmarks.prediction`, and each plan's step over the sequential one's."""
    text = (HERE / "results" / "prediction.md").read_text(encoding="utf-8")
    steps = {m["plan"]: (float(m["predicted"]), float(m["measured"])) for m in PLAN_ROW.finditer(text)}
    ratios = {plan: measured / predicted for plan, (predicted, measured) in steps.items()}
    rows = [Row("profiled", "digits", plan, ratio) for plan, ratio in ratios.items()]
    pairs = [
        Row("", "digits", f"{plan} over sequential", ratio / ratios["sequential"])
        for plan, ratio in ratios.items()
        if plan != "sequential" and not plan.startswith("sequential,")
    ]
    return rows, pairs


# The file -----------------------------------------------------------------------------------------------------------


def factor_lines() -> Iterator[str]:
    """What a calibration on all rows of each table finds."""
    for table in starvla_tables():
        found = table.fitted(table.steps)
        yield (
            f"  - {{table: '{table.name}', compute: {found.compute:.4f}, host: {found.host:.4f}, "
            f"network: {found.network:.4f}}}"
        )


def text_of() -> str:
    """The file as it should be."""
    rows, pairs = profiled_rows()
    lines = [
        "# Measured seconds over predicted ones, of steps that nothing was fitted on: what the printed bands come from.",
        "# Made by `python -m benchmarks.held_out --write`, which says what each part is; do not edit.",
        "format: spindle.held_out",
        "version: 1",
        "rows:",
        *map(str, (*report_rows(), *starvla_rows(), *calibrated_rows(), *rows)),
        "pairs:",
        *map(str, pairs),
        "factors:",
        *factor_lines(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(text_of())
