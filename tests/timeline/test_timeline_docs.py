"""The example in the docs runs."""

import re
from pathlib import Path

import pytest

from tests.timeline.timeline_html import Page

DOCS = Path(__file__).parent.parent.parent / "docs" / "timeline.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, found)
    assert "clip on 4 devices" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<svg ")
    assert found["events"]
