"""The examples of docs/examples, each run at its own small size: plans, parity on two ranks, and losses that fall."""

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

import spindle
from spindle.planner.check import check_plan
from spindle.source import load_workload

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = ROOT / "docs" / "gallery"
SPEC = re.compile(r"(?:benchmarks/workloads|docs/examples/\w+)/[\w-]+\.yaml")
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/model.py") if SPEC.search(path.read_text("utf-8")))
SHOWN = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "index")
EXCERPT = re.compile(r"<!-- not run: part of \S+ -->\n```python\n(.*?)```", re.DOTALL)
SEARCH_S = 1.0

Optimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


@functools.cache
def built(name: str) -> tuple[spindle.Workload, Optimizer]:
    """An example and its optimizer: AdamW at 1e-3, as on the command line, where it names none."""
    workload, module = load_workload(str(EXAMPLES / name / "model.py"))
    return workload, getattr(module, "optimizer", functools.partial(torch.optim.AdamW, lr=1e-3))


def plan_of(name: str, num_devices: int) -> spindle.Plan:
    return spindle.make_plan(built(name)[0], f"1x{num_devices}:cpu", time_limit_s=SEARCH_S)


@pytest.mark.parametrize("name", NAMES)
def test_plans_keep_every_rule(name: str) -> None:
    """On two and on four devices."""
    for num_devices in (2, 4):
        check_plan(plan_of(name, num_devices))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_agree_with_one_process(name: str) -> None:
    """Losses, gradients and updates of two steps."""
    report = spindle.verify(built(name)[0], plan_of(name, 2), launcher="threads")
    assert report.ok, str(report)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_learns(name: str) -> None:
    """In eight steps each task's loss falls: the later half of its steps is below the earlier half."""
    workload, optimizer = built(name)
    result = spindle.train(workload, plan_of(name, 2), optimizer=optimizer, steps=8, launcher="threads")
    for task in workload.tasks:
        losses = [step[task] for step in result.losses if task in step]
        half = len(losses) // 2
        assert sum(losses[-half:]) < sum(losses[:half]), f"{task}: {losses}"


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_page_shows_stands_in_the_example(name: str) -> None:
    """Blocks marked as part of the example are copied from it, paragraph by paragraph."""
    shown = EXCERPT.findall((PAGES / f"{name}.md").read_text(encoding="utf-8"))
    text = (EXAMPLES / name / "model.py").read_text(encoding="utf-8")
    assert shown
    assert [part for block in shown for part in re.split(r"\n{2,}", block.rstrip()) if part not in text] == []


def test_every_example_is_in_the_table() -> None:
    """Each has a page, a row in the gallery's index, and a spec of its true size that exists."""
    assert NAMES == SHOWN
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    assert [name for name in SHOWN if f"({name}.md)" not in index] == []
    for name in SHOWN:
        found = SPEC.search((EXAMPLES / name / "model.py").read_text(encoding="utf-8"))
        assert found, f"{name}: name the spec of its true size"
        assert (ROOT / found[0]).is_file()
