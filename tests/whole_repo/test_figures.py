"""Pages show the tables that the reports hold now."""

import pytest
from pages.figures import ROOT, made_anew, pages, section


def test_no_page_is_stale() -> None:
    stale = [str(page.relative_to(ROOT)) for page in pages() if made_anew(text := page.read_text()) != text]
    assert stale == [], "run python -m benchmarks.pages.figures"


def test_a_stale_table_is_seen() -> None:
    """A number that was changed by hand comes back; what stands around the marks stays."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert "<!-- figures: paper.md, Gains -->" in page
    table = section("paper.md", "Gains")
    assert made_anew(page.replace(table, table.replace("1", "9"))) == page


def test_a_section_that_no_report_has() -> None:
    with pytest.raises(KeyError, match="Losses"):
        made_anew("<!-- figures: paper.md, Losses -->\n<!-- end of figures -->")
