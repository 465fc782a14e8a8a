"""The examples of docs/examples, each run at its own small size: plans, parity on two ranks, and losses that fall.

What the commands of the gallery's pages do stands in tests/whole_repo/test_docs.py, parity by `spindle verify` with it.
"""

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

import spindle
from spindle.planner.check import check_plan
from spindle.verbs.source import load_workload

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = ROOT / "docs" / "gallery"
SPEC = re.compile(r"(?:benchmarks/workloads|docs/examples/\w+)/[\w-]+\.yaml")
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/model.py") if SPEC.search(path.read_text("utf-8")))
SHOWN = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "index")
EXCERPT = re.compile(r"<!-- not run: part of \S+ -->\n```python\n(.*?)```", re.DOTALL)
SEARCH_S = 1.0

Optimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


@pytest.mark.parametrize("name", NAMES)
def test_plans_keep_every_rule_and_every_task_learns(name: str) -> None:
    """Plans for two and for four devices; in eight steps on two each task's loss falls: the later half of its steps is
    below the earlier half. AdamW at 1e-3, as on the command line, where the example names no optimizer.
    """
    workload, module = load_workload(str(EXAMPLES / name / "model.py"))
    optimizer: Optimizer = getattr(module, "optimizer", functools.partial(torch.optim.AdamW, lr=1e-3))
    plans = [spindle.make_plan(workload, f"1x{number}:cpu", time_limit_s=SEARCH_S) for number in (2, 4)]
    for plan in plans:
        check_plan(plan)
    result = spindle.train(workload, plans[0], optimizer=optimizer, steps=8, launcher="threads")
    for task in workload.tasks:
        losses = [step[task] for step in result.losses if task in step]
        half = len(losses) // 2
        assert sum(losses[-half:]) < sum(losses[:half]), f"{task}: {losses}"


@pytest.mark.parametrize("name", SHOWN)
def test_a_page_verifies_its_example(name: str) -> None:
    """Parity of two ranks with one process is a command of each page, which tests/whole_repo/test_docs.py runs."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert f"spindle plan docs/examples/{name}/model.py:workload --cluster 1x2:cpu" in page
    assert f"spindle verify docs/examples/{name}/model.py:workload --plan plan.json --launcher threads\n" in page


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
