"""Wrap many model families as they are, plan each, and compare planned runs with one process; tables come out.

    python benchmarks/models.py [NAME ...] [--write]

No family has code of its own in spindle. Every model is tiny and has random weights; it runs in float64, on two and on
three ranks (threads), each under the widest plan (all layers on all ranks) and two random ones, dropout on, one step
for each of its batches. `--write` renews benchmarks/results/models.md, and the table in docs/models.md.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import platform
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from families import action, hearing, own, senses, text, vision_language
from families.base import Family

import spindle
from spindle.capture import Captured, capture
from spindle.capture.blocks import blocks_of
from spindle.errors import SpindleError, SpindleWarning
from spindle.values.plan import Plan
from spindle.workload import Workload
from tests.random_plans import random_plan, widest_plan

CHANGING = (*vision_language.FAMILIES, *action.FAMILIES, *hearing.FAMILIES)
FAMILIES = (*CHANGING, *senses.FAMILIES, *text.FAMILIES, *own.FAMILIES)
RANKS = (2, 3)
SINGLE = 1e-5  # models that compute their norms or loss in float32, whatever they are given
RESULTS = Path(__file__).parent / "results" / "models.md"
DOCS = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- made by benchmarks/models.py --write -->", "<!-- until here -->"


@dataclass
class Row:
    """What was found for one family."""

    family: Family
    operators: int = 0
    layers: dict[str, str] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    capture_s: float = 0.0
    outcome: str = ""
    plans: int = 0
    error: float = 0.0
    remarks: tuple[str, ...] = ()

    @property
    def found(self) -> str:
        """Layers by list: how many run, and how many there are."""
        return ", ".join(f"{name} {count}" for name, count in self.layers.items()) or "none"

    @property
    def sharded(self) -> str:
        """Which operators can be sharded over the batch; the loss itself never can."""
        if not self.operators:
            return ""
        if self.operators == 1:
            return "no, one operator"
        return "yes" if not self.whole else "all but " + ", ".join(self.whole)

    @property
    def is_right(self) -> bool:
        """Whether it agrees with one process, or is refused as it must be."""
        return self.outcome.startswith("exact") or (self.outcome == "refused" and bool(self.family.refused))

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        exact = self.outcome.startswith("exact")
        return (
            self.family.name,
            self.family.origin,
            str(self.operators or ""),
            self.found,
            self.sharded,
            f"{self.capture_s:.1f}",
            self.outcome,
            str(self.plans or ""),
            f"{self.error:.0e}" if exact else "",
        )

    @property
    def short_cells(self) -> tuple[str, ...]:
        """The row for docs/models.md."""
        outcome = f"{self.outcome}, {self.plans} plans" if self.plans else self.outcome
        return self.family.name, self.family.origin, self.found, self.sharded, outcome


HEADER = (
    "family",
    "kind",
    "operators",
    "layers",
    "sharded over the batch",
    "capture s",
    "outcome",
    "plans",
    "largest error",
)
SHORT_HEADER = ("family", "kind", "layers found", "sharded over the batch", "agrees with one process")


def tried(family: Family) -> Row:
    """Wrap one family and compare."""
    row = Row(family)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SpindleWarning)
        try:
            _try(family, row)
        except SpindleError as error:
            row.outcome, row.remarks = "refused", (*row.remarks, str(error))
            if family.refused and family.refused not in str(error):
                row.outcome = "refused in other words"
        except Exception as error:
            row.outcome = f"CRASH: {type(error).__name__}"
            row.remarks = (*row.remarks, traceback.format_exc()[-3000:])
            del error
    told = dict.fromkeys(str(w.message) for w in caught if isinstance(w.message, SpindleWarning))
    row.remarks += tuple(told)
    return row


def _try(family: Family, row: Row) -> None:
    workload = family.workload()
    start_s = time.perf_counter()
    captured = capture(workload)
    row.capture_s = time.perf_counter() - start_s
    metagraph = spindle.make_metagraph(workload)
    row.operators = len(captured.graph.operators)
    row.layers = _layers(workload, captured) if row.operators > 1 else {}
    row.whole = tuple(
        op.name.removeprefix("task.")
        for op in captured.graph
        if not op.splittable and op.outputs and not (set(captured.losses.values()) & {t.name for t in op.outputs})
    )
    for ranks in RANKS:
        for plan in (
            widest_plan(metagraph, ranks),
            random_plan(metagraph, ranks, 1),
            random_plan(metagraph, ranks, 2),
        ):
            _compare(workload, plan, row)


def _compare(workload: Workload, plan: Plan, row: Row) -> None:
    """Run one plan beside one process, a step for each batch, and note what comes out."""
    steps = len(workload.tasks["task"].data)  # type: ignore[arg-type]
    report = spindle.verify(workload, plan, steps=steps, launcher="threads")
    row.plans += 1
    row.error = max(row.error, report.max_rel_error)
    if report.ok:
        row.outcome = row.outcome or "exact"
        return
    report = spindle.verify(workload, plan, steps=steps, launcher="threads", rtol=SINGLE, atol=SINGLE)
    if report.ok and row.outcome != "WRONG":
        row.outcome = "exact (float32 inside)"
    elif not report.ok:
        row.outcome, row.remarks = "WRONG", (*row.remarks, str(report))


def _layers(workload: Workload, captured: Captured) -> dict[str, str]:
    """Layers that are operators of their own, by the list that they stand in: how many; of how many, where not all."""
    called = {scope.partition("@")[0] for code in captured.tasks.values() for scope in code.blocks}
    paths = dict.fromkeys(block.path for block in blocks_of(workload))
    all_of = Counter(path.rpartition(".")[0] for path in paths)
    own = Counter(path.rpartition(".")[0] for path in paths if path in called)
    names = {path: _short(path, len(workload.components)) for path in all_of if own[path]}
    return {name: f"{own[path]}" + f" of {all_of[path]}" * (own[path] < all_of[path]) for path, name in names.items()}


def _short(path: str, components: int) -> str:
    """A list of layers without the names that all of them begin with."""
    component, *parts = path.split(".")
    while parts and parts[0] in ("model", "base_model"):
        parts.pop(0)
    return ".".join([component, *parts] if components > 1 else parts or [component])


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Cells as a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Try the families named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families to try; all without")
    parser.add_argument("--write", action="store_true", help=f"renew {RESULTS.name} and the table in docs/{DOCS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    rows = []
    for family in FAMILIES:
        if not options.names or family.name in options.names:
            rows.append(tried(family))
            print(" | ".join(rows[-1].cells), flush=True)
            for remark in rows[-1].remarks:
                print(f"    {remark}", flush=True)
    if options.write:
        RESULTS.write_text(_page(rows))
        before, _, rest = DOCS.read_text().partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{_summary(rows)}\n{END}{rest.partition(END)[2]}")


def _counted(rows: list[Row]) -> str:
    exact, refused = (
        sum(row.outcome.startswith(word) and row.is_right for row in rows) for word in ("exact", "refused")
    )
    wrong = len(rows) - exact - refused
    return f"{len(rows)} families; agree with one process: {exact}; refused in a sentence: {refused}; neither: {wrong}"


def _summary(rows: list[Row]) -> str:
    """The tables in docs/models.md."""
    changing = [row for row in rows if row.family in CHANGING]
    others = [row for row in rows if row.family not in CHANGING]
    return "\n".join(
        [
            "",
            f"{_counted(rows)}.",
            "",
            "Called whole, with three batches of different shapes:",
            "",
            table(SHORT_HEADER, (row.short_cells for row in changing)),
            "",
            "With batches of one shape:",
            "",
            table(SHORT_HEADER, (row.short_cells for row in others)),
            "",
        ]
    )


def _page(rows: list[Row]) -> str:
    remarks = [f"- **{row.family.name}**: {remark}" for row in rows for remark in row.remarks]
    return "\n".join(
        [
            "# Model families, wrapped as they are",
            "",
            f"`python benchmarks/models.py --write`: {_counted(rows)}. Torch {torch.__version__}, transformers "
            f"{transformers.__version__}, Python {platform.python_version()}, one CPU core, float64.",
            "",
            table(HEADER, (row.cells for row in rows)),
            "",
            "What spindle said:",
            "",
            *remarks,
            "",
        ]
    )


if __name__ == "__main__":
    main()
