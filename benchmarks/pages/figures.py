"""Copies tables of benchmarks/results into the pages that show them: `python -m benchmarks.pages.figures`.

A page marks where a section of a report goes:

    <!-- figures: paper.md, Gains -->
    <!-- end of figures -->

`tests/whole_repo/test_figures.py` says when a page is stale.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- figures: (?P<file>[\w.]+), (?P<section>[^>]+?) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def pages() -> tuple[Path, ...]:
    """All pages that may show figures."""
    return (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def made_anew(text: str) -> str:
    """A page with every marked section as the report has it now. Raises KeyError where a report has no such section."""

    def section_of(found: re.Match[str]) -> str:
        return f"{found[1]}{section(found['file'], found['section'])}\n{found[4]}"

    return MARK.sub(section_of, text)


def section(file: str, title: str) -> str:
    """What stands under a second-level heading of a report."""
    report = (RESULTS / file).read_text(encoding="utf-8")
    parts = dict(part.split("\n", 1) for part in re.split(r"^## ", report, flags=re.MULTILINE)[1:])
    return parts[title].strip()


def main() -> None:
    """Write every page that is stale, and say which."""
    for page in pages():
        old = page.read_text(encoding="utf-8")
        if (new := made_anew(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
