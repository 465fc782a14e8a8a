"""The example that starts as a script of the Trainer: before.py and after.py are the same training."""

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spindle

pytest.importorskip("datasets", reason="the example reads its data with Hugging Face's datasets (extra dev)")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "from_trainer"
PAGE = ROOT / "docs" / "from_trainer.md"
EXCERPT = re.compile(r"<!-- not run: part of \S+/(\w+\.py) -->\n```python\n(.*?)```", re.DOTALL)
NAMES = ("pieces", "before", "after")


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Imports a file of the example, in a folder of its own, with one thread for these small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in NAMES:
        sys.modules.pop(name, None)


def test_both_scripts_train_alike(imported: Callable[[str], Any], tmp_path: Path) -> None:
    """In float64: the summed loss of each step, all weights, and adapters that load and merge as ever."""
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    pieces, before, after = map(imported, NAMES)
    model, processor = pieces.load()
    theirs = before.train(model.double(), processor, "trained-before")
    after.model.double()
    plan = spindle.make_plan(after.workload, "1x2:cpu", time_limit_s=1.0)
    result = spindle.train(
        after.workload,
        plan,
        optimizer=after.optimizer,
        scheduler=after.scheduler,
        steps=len(theirs),
        launcher="threads",
    )
    ours = [losses["caption"] + 0.5 * losses["match"] for losses in result.losses]
    assert len(ours) == 8
    assert ours == pytest.approx(theirs, rel=1e-6)  # the Trainer adds losses up in float32
    for (name, own), (_, other) in zip(after.model.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12, msg=name)

    batch = next(iter(after.loader()))
    trained = after.caption(batch).detach()
    folder = spindle.export(after.workload, "trained-after")["model"]

    def fresh() -> Any:
        return LlavaForConditionalGeneration.from_pretrained(pieces.START).double()

    loaded = PeftModel.from_pretrained(fresh(), folder)
    loaded.merge_and_unload().save_pretrained("merged")
    merged = LlavaForConditionalGeneration.from_pretrained("merged")
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    with torch.no_grad():
        torch.testing.assert_close(merged(**given).loss, trained)
        assert abs(fresh()(**given).loss - trained) > 1e-3  # what was trained shows


def test_what_the_page_shows_stands_in_the_example() -> None:
    """Blocks marked as part of the example are copied from it, paragraph by paragraph."""
    shown = EXCERPT.findall(PAGE.read_text(encoding="utf-8"))
    assert {name for name, _ in shown} == {"before.py", "after.py"}
    for name, block in shown:
        text = (EXAMPLE / name).read_text(encoding="utf-8")
        assert [part for part in re.split(r"\n{2,}", block.rstrip()) if part not in text] == [], name


def test_the_page_names_arguments_that_exist() -> None:
    """Of TrainingArguments, of the Trainer, and all methods of its callbacks; a new one of these is to be placed."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    text = PAGE.read_text(encoding="utf-8")
    arguments, callbacks = text.split("## Which argument goes where")[1].split("## Callbacks")
    rows = re.findall(r"^\| (`.*?) \|", arguments, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    known = {field.name for field in dataclasses.fields(TrainingArguments)} | {*inspect.signature(Trainer).parameters}
    assert named <= known
    moments = " ".join(re.findall(r"^\| (`on_.*?) \|", callbacks, re.MULTILINE))
    assert {name for name in vars(TrainerCallback) if name.startswith("on_")} == {*re.findall(r"on_\w+", moments)}
