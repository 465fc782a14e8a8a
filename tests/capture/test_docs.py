"""The page on wrapping says what is: its code blocks run, one after another."""

import re
from pathlib import Path

import pytest

from spindle.errors import SpindleWarning

PAGE = Path(__file__).parents[2] / "docs" / "wrapping.md"


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
def test_code_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number} of {PAGE.name}", "exec"), names)
    assert "match.image.layers 3 layers, by samples" in capsys.readouterr().out
    assert issubclass(SpindleWarning, UserWarning)
