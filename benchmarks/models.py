"""Wrap many model families as they are, plan each, and compare two ranks with one process; a table comes out.

    python benchmarks/models.py [NAME ...] [--write]

No family has code of its own in spindle. Every model is tiny and has random weights; it runs in float64, on two ranks
(threads), under the widest plan (all layers on both ranks) and two random ones, dropout on. `--write` renews
benchmarks/results/models.md.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import platform
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import models_multimodal
import models_own
import models_senses
import models_text
import torch
import transformers
from models_base import Family

import spindle
from spindle.capture import Captured, capture
from spindle.capture.blocks import BlockModule
from spindle.errors import SpindleError, SpindleWarning
from tests.random_plans import random_plan, widest_plan

FAMILIES = (*models_senses.FAMILIES, *models_text.FAMILIES, *models_multimodal.FAMILIES, *models_own.FAMILIES)
SINGLE = 1e-5  # models that compute their norms or loss in float32, whatever they are given
RESULTS = Path(__file__).parent / "results" / "models.md"


@dataclass
class Row:
    """What was found for one family."""

    family: Family
    operators: int = 0
    layers: int = 0
    whole: tuple[str, ...] = ()
    capture_s: float = 0.0
    outcome: str = ""
    error: float = 0.0
    remarks: tuple[str, ...] = ()

    @property
    def cut(self) -> str:
        """Which operators go by samples; the loss itself never does."""
        if self.operators == 1:
            return "no, one operator"
        return "yes" if not self.whole else "all but " + ", ".join(self.whole)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (
            self.family.name,
            self.family.origin,
            str(self.operators),
            str(self.layers) if self.layers else "none",
            self.cut,
            f"{self.capture_s:.1f}",
            self.outcome,
            f"{self.error:.0e}" if self.outcome.startswith("ok") else "",
        )


HEADER = ("family", "kind", "operators", "layers", "batch is cut", "capture s", "parity", "largest error")


def tried(family: Family) -> Row:
    """Wrap one family and compare."""
    row = Row(family)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SpindleWarning)
        try:
            _try(family, row)
        except SpindleError as error:
            row.outcome, row.remarks = f"refused: {type(error).__name__}", (*row.remarks, str(error))
        except Exception as error:
            row.outcome = f"CRASH: {type(error).__name__}"
            row.remarks = (*row.remarks, traceback.format_exc()[-3000:])
            del error
    row.remarks += tuple(str(w.message) for w in caught if isinstance(w.message, SpindleWarning))
    return row


def _try(family: Family, row: Row) -> None:
    workload = family.workload()
    start_s = time.perf_counter()
    captured = capture(workload)
    row.capture_s = time.perf_counter() - start_s
    metagraph = spindle.make_metagraph(workload)
    row.operators = len(captured.graph.operators)
    row.layers = sum(_is_block(captured, op.name) for op in captured.graph) if row.operators > 1 else 0
    row.whole = tuple(
        op.name.removeprefix("task.")
        for op in captured.graph
        if not op.splittable and op.outputs and not (set(captured.losses.values()) & {t.name for t in op.outputs})
    )
    plans = [widest_plan(metagraph, 2), random_plan(metagraph, 2, 1), random_plan(metagraph, 2, 2)]
    row.outcome = "ok"
    for plan in plans:
        report = spindle.verify(workload, plan, launcher="threads")
        row.error = max(row.error, report.max_rel_error)
        if not report.ok and row.outcome != "WRONG":
            row.outcome = (
                "ok (float32 inside)"
                if spindle.verify(workload, plan, launcher="threads", rtol=SINGLE, atol=SINGLE).ok
                else "WRONG"
            )
            row.remarks += (str(report),) if row.outcome == "WRONG" else ()


def _is_block(captured: Captured, name: str) -> bool:
    return any(isinstance(module, BlockModule) for module in captured.codes[name].module.modules())


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADER, tuple("---" for _ in HEADER), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Try the families named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families to try; all without")
    parser.add_argument("--write", action="store_true", help=f"renew {RESULTS.name}")
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


def _page(rows: list[Row]) -> str:
    ok = sum(row.outcome.startswith("ok") for row in rows)
    remarks = [f"- **{row.family.name}**: {remark}" for row in rows for remark in row.remarks]
    return "\n".join(
        [
            "# Model families, wrapped as they are",
            "",
            f"`python benchmarks/models.py --write`: {len(rows)} families, {ok} exact. Torch {torch.__version__}, "
            f"transformers {transformers.__version__}, Python {platform.python_version()}, one CPU core, float64.",
            "",
            table(rows),
            "",
            "What spindle said:",
            "",
            *remarks,
            "",
        ]
    )


if __name__ == "__main__":
    main()
