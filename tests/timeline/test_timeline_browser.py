"""The page in a real browser: it draws, and answers the pointer. Skipped where there is no Chromium."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spindle.timeline import render_page
from tests.timeline.timeline_samples import made_up_run, planned

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=30000",
    "--dump-dom",
)
DRIVER = Path(__file__).parent / "driver.js"


@pytest.mark.parametrize("num_devices", [2, 16])
def test_the_page_draws_and_answers(num_devices: int, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs chromium")
    plan, predicted = planned(num_devices)
    text = render_page(plan, predicted=predicted, measured=made_up_run(plan, predicted), title="two tasks")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it would forbid the driver
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", f"<script>{DRIVER.read_text()}</script></body>"), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root is not None, done.stderr[-2000:]
    opened = html.unescape(root[0])
    assert "data-failed" not in opened, opened
    assert 'data-ready="1"' in opened
    assert 'data-painted="true"' in opened
    tip, range_shown, pinned = opened.partition('data-said="')[2].partition('"')[0].split("|")
    assert "MetaOp" in tip
    assert "duration" in tip
    assert " to " in range_shown
    assert not range_shown.startswith("0 s to")
    assert pinned == "true"


def test_the_policy_lets_the_page_run_as_it_is(tmp_path: Path) -> None:
    """Unchanged, with its Content-Security-Policy: the hashes match what the browser computes."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs chromium")
    path = tmp_path / "page.html"
    path.write_text(render_page(planned(2)[0]), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert 'class="js"' in done.stdout, done.stderr[-2000:]
    assert 'data-ready="1"' in done.stdout
