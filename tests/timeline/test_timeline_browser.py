"""The page in a real browser: it draws, and answers the pointer. Skipped where there is no Chromium."""

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from spindle.timeline import render_page
from spindle.values.trace import Span, SpanKind, Trace
from tests.timeline.timeline_samples import made_up_run, planned, slowed

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


def test_the_page_says_when_plan_and_run_have_an_axis_each(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs chromium")
    plan, predicted = planned(2)
    path = tmp_path / "page.html"
    run = replace(slowed(predicted, 10.0), source="measured")
    path.write_text(render_page(plan, predicted=predicted, measured=run), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert 'data-ready="1"' in done.stdout, done.stderr[-2000:]
    assert ">The run is drawn at 1/10 of the plan's scale: each has a time axis of its own.<" in done.stdout


COUNT_COLUMNS = """
const rows = document.getElementById("rows"), pen = rows.getContext("2d");
const { width, height } = rows, pixels = pen.getImageData(0, 0, width, height).data;
const hex = getComputedStyle(document.documentElement).getPropertyValue("--reduce").trim();
const wanted = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const same = (x, y) => wanted.every((value, at) => Math.abs(pixels[4 * (y * width + x) + at] - value) < 3);
let columns = 0;
for (let x = 0; x < width; x++) for (let y = 0; y < height; y++) if (same(x, y) && ++columns) break;
document.documentElement.dataset.share = columns / width;
"""


def test_reductions_lie_over_the_computation_that_they_run_beside(tmp_path: Path) -> None:
    """One that began before backward and ends after it is seen along the whole of it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs chromium")
    spans = (
        Span(rank=0, kind=SpanKind.REDUCE, name="REDUCE b0", start_s=0.0, end_s=1.0),
        Span(rank=0, kind=SpanKind.BACKWARD, name="BACKWARD s0", start_s=0.1, end_s=0.9),
    )
    text = render_page(planned(2)[0], measured=Trace(num_ranks=2, source="measured", spans=spans))
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", f"<script>{COUNT_COLUMNS}</script></body>"), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    share = re.search(r'data-share="([\d.]+)"', done.stdout)
    assert share is not None, done.stderr[-2000:]
    assert float(share[1]) > 0.4  # 0.12 where backward hides it; stripes, names and bars take the rest
