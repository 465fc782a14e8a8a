"""The cost model against what others measured: `python benchmarks/cost_model.py [--write]`.

Prints every judged figure of the cost model with its error and what it was fitted on; `--write` also writes
benchmarks/results/cost_model.md. `--here` adds steps and memory of this machine (`prediction.py`, some minutes).
`--fit` fits the device types' constants again (needs scipy) and prints them.
"""

import argparse
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a fresh clone as well

from cost_report import sections, unfitted
from cost_report.sections import Section
from cost_report.tables import Figure

HERE = Path(__file__).parent


def all_sections() -> list[Section]:
    """The report, in the order in which it is judged."""
    return [
        sections.collectives(),
        sections.llama_layers(),
        sections.mosaicml(),
        sections.layouts(),
        unfitted.openclip(),
        unfitted.vit(),
        unfitted.t5(),
        unfitted.llava(),
        unfitted.megatron(),
        unfitted.paper_workloads(HERE),
    ]


def this_machine() -> Section:
    """Steps and peak memory of `make demo`'s workload, predicted from a profile that is taken now."""
    from prediction import LIMIT, measure

    rows, profiled = measure(num_ranks=2)
    found = []
    for row in rows:
        found += [
            Figure(f"{row.method}: step, {row.median_ms:.1f} ms", abs(row.step_error), LIMIT, "nothing"),
            Figure(f"{row.method}: peak, {row.measured_mib:.1f} MiB", abs(row.memory_error), LIMIT, "nothing"),
        ]
    return Section("This machine", (profiled,), tuple(found))


def report(found: list[Section]) -> str:
    """The report as text."""
    lines = []
    for section in found:
        lines += [section.title, *(f"    {line}" for line in section.lines)]
        lines += [f"  {figure.line()}".rstrip() for figure in section.figures]
        lines.append("")
    missed = [figure.name for section in found for figure in section.figures if not figure.ok]
    judged = sum(figure.limit is not None for section in found for figure in section.figures)
    lines.append(
        f"{judged - len(missed)} of {judged} limits kept" + (f"; missed: {'; '.join(missed)}" if missed else "")
    )
    return "\n".join(lines) + "\n"


def table(found: list[Section]) -> str:
    """All figures as a Markdown table, of a check's mean and largest error one row."""
    rows: dict[str, list[Figure]] = {}
    for section in found:
        for figure in section.figures:
            rows.setdefault(figure.name.partition(": mean error")[0].partition(": largest error")[0], []).append(figure)
    lines = ["| check | value, or mean error | largest error | fitted on it |", "|---|--:|--:|---|"]
    for name, figures in rows.items():
        values = [f"{figure.value:.1%}" for figure in figures]
        lines.append(f"| {name} | {values[0]} | {values[1] if len(values) > 1 else ''} | {figures[0].fitted_on} |")
    return "\n".join(lines)


def main() -> int:
    """Print the report; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cost_model.md")
    parser.add_argument("--fit", action="store_true", help="fit the constants again and print them")
    parser.add_argument("--here", action="store_true", help="measure this machine too")
    arguments = parser.parse_args()
    if arguments.fit:
        from cost_report.fit import fit_report

        print(fit_report())
        return 0
    found = all_sections() + ([this_machine()] if arguments.here else [])
    text = report(found)
    print(text, end="")
    if arguments.write:
        head = (
            "Command: `python benchmarks/cost_model.py --write`. "
            f"Python {platform.python_version()}; no timing of this machine enters."
        )
        target = HERE / "results" / "cost_model.md"
        target.write_text(
            f"# Cost model against published measurements\n\n{head}\n\n## Errors\n\n{table(found)}\n\n"
            f"## Rows\n\n```\n{text}```\n",
            encoding="utf-8",
        )
    return int(any(not figure.ok for section in found for figure in section.figures))


if __name__ == "__main__":
    sys.exit(main())
