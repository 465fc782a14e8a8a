"""The gallery's report: a part that is made anew leaves the others; the summary is of the parts that are there."""

from pathlib import Path

import pytest
from pages import gallery

HEAD = "| devices | " + " | ".join([*gallery.HEADS, *gallery.HEADS]) + " |\n|---" + "|--:" * 8 + "|\n"


def part(gain: str) -> str:
    """The table of an example with three rows."""
    row = f"| 8 A100 | 10.0 | 1.0% | {gain} | 0.0% | 1.0 | 2.0% | 3.0% (DDP) | 0.0% |"
    return HEAD + "\n".join([row, "| 16 A100 | does not fit |  |  |  | 1.0 | 2.0% | 3.0% (DDP) | 0.0% |", row])


def test_the_report_holds_its_own_summary() -> None:
    made, sections = gallery.read_report()
    assert {name + gallery.PLANNED for name, _ in gallery.examples()} <= set(sections)
    assert list(made) == list(sections)
    assert sections[gallery.SUMMARY] == gallery.summary(sections)


def test_a_part_made_anew_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "REPORT", tmp_path / "gallery.md")
    gallery.write_section(gallery.MEASURED, "a table", "by hand, on two cores")
    gallery.write_section("pi0_experts, planned", part("5.0% (FSDP2)"), "before")
    gallery.write_section("at_vla, planned", part("-1.0% (DDP)"), "one")
    gallery.write_section("pi0_experts, planned", part("7.0% (FSDP2)"), "after")
    made, sections = gallery.read_report()
    summary = sections.pop(gallery.SUMMARY)
    assert sections == {
        "pi0_experts, planned": part("7.0% (FSDP2)"),
        "at_vla, planned": part("-1.0% (DDP)"),
        gallery.MEASURED: "a table",
    }
    assert made["pi0_experts, planned"] == "after"
    assert made[gallery.MEASURED] == "by hand, on two cores"
    assert summary.splitlines()[2:] == [
        "| at_vla | -1.0% (DDP) | does not fit | -1.0% (DDP) | 3.0% (DDP) |",
        "| pi0_experts | 7.0% (FSDP2) | does not fit | 7.0% (FSDP2) | 3.0% (DDP) |",
    ]
