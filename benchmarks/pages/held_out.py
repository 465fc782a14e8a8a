"""Held out: the errors that the printed bands come from, as spindle/cost/held_out.yaml.

    python -m benchmarks.pages.held_out            compares the file with the cost model as it is; 1 when they differ
    python -m benchmarks.pages.held_out --quick    the same without the paper's calibrations and most layouts
    python -m benchmarks.pages.held_out --write    makes it again

- predicted: every row of the cost report that no constant was fitted on, and StarVLA's.
- calibrated: rows that a calibration on two or more others of their table does not know: StarVLA's, and the paper's
  sequential times: other task sets than the fitted one, and 16 GPUs by the rows of 8.
- profiled: steps of benchmarks/results/prediction.md, measured on one machine, and of `make demo` as it tells of it.
- pairs: of those plans, each beside the sequential one: what a gain is made of.
- factors: what calibrations of whole tables find, where their rows determine it: how far factors move.
"""

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the report's modules import each other by bare name

from cost_report import sections, unfitted
from cost_report.layouts import predict, read_runs
from cost_report.tables import read_table

from spindle.cost.bands import HELD_OUT, Band, HeldOut, band_of, held_out, held_out_of
from spindle.errors import SpindleWarning
from spindle.files.clusterfile import parse_cluster, parse_yaml
from spindle.planner.report.sizes import resized
from spindle.spec.batch import per_device
from spindle.spec.file import read_workload
from spindle.spec.values import WorkloadSpec
from spindle.values.calibration import FACTORS, Calibration, MeasuredStep
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.plan import Plan
from spindle.verbs.calibrating import make_calibration
from spindle.verbs.planning import plan_source
from spindle.verbs.source import Source, spec_source

HERE = Path(__file__).parents[1]
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
        return f"  - {{{source}table: '{self.table}', row: '{self.row}', ratio: {self.ratio:.4f}}}"


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

    def fitted(self, steps: Sequence[MeasuredStep]) -> Calibration | None:
        """The calibration on some of its steps; None where calibrating warns that they are not of one program."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", SpindleWarning)
            found = make_calibration(self.load, self.cluster, steps)
        return None if warned else found

    def predicted_s(self, step: MeasuredStep, calibration: Calibration | None = None) -> float:
        """What `spindle plan --method sequential` says of a step."""
        return self._solved(step, calibration)[0].expected_s

    def of_one_program(self) -> list[MeasuredStep]:
        """Its steps that fit memory in the way in which most of them do."""
        ways = {step: self._solved(step)[1] for step in self.steps}
        most = Counter(ways.values()).most_common(1)[0][0]
        return [step for step, way in ways.items() if way == most]

    def _solved(self, step: MeasuredStep, calibration: Calibration | None = None) -> tuple[Plan, CostOptions]:
        where = resized(self.cluster, step.gpus)
        return plan_source(self.load(step, where), where, calibration=calibration, method="sequential")


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


def paper_tables() -> list[Table]:
    """Task sets of Multitask-CLIP and OFASys, one after another, on 8 and 16 GPUs; one table a workload."""
    found = []
    for name in ("multitask_clip", "ofasys"):
        spec, steps, specs = spec_of(name), [], {}
        for row in read_table("spindle_paper_sequential"):
            if row["workload"] == name:
                some = spec.only(task.name for task in spec.tasks[: int(row["tasks"])])
                gpus, samples = int(row["gpus"]), sum(task.batch_size for task in some.tasks)
                step = MeasuredStep(gpus=gpus, per_gpu_batch=samples // gpus, seconds=1e-3 * float(row["milliseconds"]))
                steps.append(step)
                specs[step] = some
        cluster = parse_cluster(str(HERE / "clusters" / "spindle-paper.yaml"))
        found.append(Table(f"Spindle paper, {name}", cluster, tuple(steps), partial(_load, specs)))
    return found


def _load(specs: Mapping[MeasuredStep, WorkloadSpec], step: MeasuredStep, where: Cluster) -> Source:
    return spec_source(specs[step])


def calibrated_rows(*, is_quick: bool = False) -> Iterator[Row]:
    """Steps that a calibration on two or more others of their table does not know."""
    batches, _ = starvla_tables()
    yield from left_out(batches, batches.steps, [STARVLA_HEADER])
    for table in () if is_quick else paper_tables():
        by_tasks: dict[int, list[MeasuredStep]] = {}
        for step in table.steps:
            by_tasks.setdefault(step.gpus * step.per_gpu_batch, []).append(step)
        for some in by_tasks.values():
            yield from left_out(table, some, [step for step in table.steps if step not in some])
        first = [step for step in table.steps if step.gpus == 8]
        yield from left_out(table, first, [step for step in table.steps if step.gpus != 8])


def left_out(table: Table, known: Sequence[MeasuredStep], others: Sequence[MeasuredStep]) -> Iterator[Row]:
    """Steps of a table by a calibration on others of it, where these are of one program."""
    found = table.fitted(known)
    if found is None:
        return
    for step in others:
        name = f"{step} (known: {'; '.join(map(str, known))})"
        yield Row("calibrated", table.name, name, step.seconds / table.predicted_s(step, found))


def starvla_rows() -> Iterator[Row]:
    """StarVLA's steps without any calibration."""
    for table in starvla_tables():
        for step in table.steps:
            yield Row("predicted", table.name, str(step), step.seconds / table.predicted_s(step))


def report_rows(*, is_quick: bool = False) -> Iterator[Row]:
    """Rows of the cost report."""
    found = [sections.mosaicml(), unfitted.openclip(), unfitted.vit(), unfitted.t5(), unfitted.megatron()]
    found += [unfitted.paper_workloads(HERE), *([] if is_quick else [sections.layouts()])]
    for section in found:
        for held in section.held:
            yield Row("predicted", held.table, held.row, held.ratio)


def some_layouts() -> Iterator[Row]:
    """Every eighth of the held-out layouts of the report, since all of them take twenty seconds."""
    runs = [run for run in read_runs() if run.step_s][1::2]
    named = list(numbered([Row("predicted", sections.ALEPH_ALPHA, run.group, 1.0) for run in runs]))
    for row, run in list(zip(named, runs, strict=True))[::8]:
        yield replace(row, ratio=(run.step_s or 0.0) / predict(run).step_s)


# Results of this machine --------------------------------------------------------------------------------------------

PLAN_ROW = re.compile(r"^\| (?P<plan>[^|]+?) \| (?P<predicted>[\d.]+) \| (?P<measured>[\d.]+) \| [+-]", re.MULTILINE)


DEMO = re.compile(r"(?P<measured>[\d.]+)(?: ms a step)?\s\((?:predicted )?(?P<predicted>[\d.]+): [+-]")


def demo_ratios(text: str) -> tuple[list[float], list[float]]:
    """Of each run of `make demo`: of waves, and of the sequential plan beside it."""
    told = text.partition("`make demo`")[2].partition("sequential")
    waves, sequential = (
        [float(m["measured"]) / float(m["predicted"]) for m in DEMO.finditer(part)] for part in (told[0], told[2])
    )
    return waves, sequential


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
    for run, (waves, sequential) in enumerate(zip(*demo_ratios(text), strict=True), 1):
        rows += [Row("profiled", "make demo", f"waves, run {run}", waves)]
        rows += [Row("profiled", "make demo", f"sequential, run {run}", sequential)]
        pairs.append(Row("", "make demo", f"run {run}", waves / sequential))
    return rows, pairs


# The file -----------------------------------------------------------------------------------------------------------


def factor_lines(*, is_quick: bool = False) -> Iterator[str]:
    """What a calibration on all rows of each table finds."""
    for table in (*starvla_tables(), *(() if is_quick else paper_tables())):
        found = table.fitted(table.of_one_program())
        assert found is not None, f"{table.name}: its rows of one program are not"
        open_ = {*found.undetermined, *(name for pair in found.inseparable for name in pair)}
        told = [f"{name}: {getattr(found, name):.4f}" for name in FACTORS if name not in open_]
        fields = ", ".join([f"table: '{table.name}'", *told])
        yield f"  - {{{fields}}}"


def numbered(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows of a table that are called alike, from the second on with a number."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        key = row.source, row.table, row.row
        seen[key] += 1
        yield replace(row, row=f"{row.row}, {seen[key]}") if seen[key] > 1 else row


def text_of(*, is_quick: bool = False) -> str:
    """The file as it should be, or all of it that takes seconds."""
    rows, pairs = profiled_rows()
    lines = [
        "# Measured over predicted seconds, of steps that nothing was fitted on: what the printed bands come from.",
        "# Made by `python -m benchmarks.pages.held_out --write`, which says what each part is; do not edit.",
        "format: spindle.held_out",
        "version: 1",
        "rows:",
        *map(str, numbered([*report_rows(is_quick=is_quick), *starvla_rows()])),
        *map(str, some_layouts() if is_quick else ()),
        *map(str, (*calibrated_rows(is_quick=is_quick), *rows)),
        "pairs:",
        *map(str, pairs),
        "factors:",
        *factor_lines(is_quick=is_quick),
    ]
    return "\n".join(lines) + "\n"


def differences(new: HeldOut, old: HeldOut, *, is_quick: bool = False) -> list[str]:
    """What a file as it should be has otherwise than the one that is there."""
    there, found = _numbers(old), []
    for name, value in _numbers(new).items():
        before = there.pop(name, None)
        if before is None or abs(value - before) > TOLERANCE * value:
            found.append(f"{name}: {value:.4f}, in the file {'none' if before is None else f'{before:.4f}'}")
    gone = [f"{name}: in the file, and no more measured" for name in there]
    return found if is_quick else found + gone


def _numbers(held: HeldOut) -> dict[str, float]:
    found = {f"{row.source} {row.table}, {row.row}": row.ratio for row in held.rows}
    found |= {f"{pair.table}, {pair.row}": pair.ratio for pair in held.pairs}
    for fit in held.factors:
        found |= {f"{fit.table}, {name}": value for name in FACTORS if (value := getattr(fit, name)) is not None}
    return found


def coverage(held: HeldOut) -> Iterator[tuple[str, Band, int, int]]:
    """(source, its band, rows that it holds, rows)."""
    for source in ("predicted", "calibrated", "profiled"):
        rows = [(row.table, row.ratio) for row in held.rows if row.source == source]
        found = band_of(rows)
        yield source, found, sum(found.holds(ratio) for _, ratio in rows), len(rows)


def main() -> int:
    """Compare, or write; 1 when the file is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {HELD_OUT.name}")
    parser.add_argument("--quick", action="store_true", help="compare what takes seconds")
    options = parser.parse_args()
    text = text_of(is_quick=options.quick and not options.write)
    if options.write:
        HELD_OUT.write_text(text, encoding="utf-8")
    new = held_out_of(parse_yaml(text), "what the cost model makes")
    found = differences(new, held_out(), is_quick=options.quick)
    print("\n".join(found) or f"{HELD_OUT.name} is what the cost model makes of it")
    for source, band, held, rows in coverage(held_out()):
        print(f"{source:<10} {band.low:.3f} to {band.high:.3f} holds {held} of {rows} rows")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
