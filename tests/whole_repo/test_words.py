"""Words: one spelling, and no phrase in what users read that they would stumble over."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.whole_repo.test_files import ROOT, lines_with, tracked

BRITISH = (
    "optimis", "minimis", "maximis", "initialis", "normalis", "serialis", "synchronis", "recognis", "organis",
    "summaris", "generalis", "specialis", "utilis", "parallelise", "neighbour", "colour", "behaviour", "favour",
    "labelled", "labelling", "modelled", "modelling", "travelled", "analyse", "catalogue", "centre", "grey",
)  # fmt: skip
BANNED = ("usual way", "so-manieth", "goes by samples", "that which")
"""Phrases of the authors' own. A number, a noun or the field's word says the same (docs/concepts.md has a glossary)."""

GONE = ("told", "pricing", "so many", "whoever", "goes? by", "those (?:that|which)", "kin")
"""Words and phrases with clearer ones in their place. They stand neither in names, nor in comments and docstrings of
the code, nor in docs.
"""


def test_one_spelling() -> None:
    """American, in code, docs and results."""
    here = str(Path(__file__).relative_to(ROOT))
    words = "|".join(BRITISH)
    assert [line for line in lines_with(rf"(?i)(?:{words})") if not line.startswith(here)] == []


def code() -> list[Path]:
    rooms = ("spindle", "planner", "runtime")
    return [p for p in tracked() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in rooms]


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {
        id(child.value)
        for node in ast.walk(tree)
        for child in (node.body if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else ())
        if isinstance(child, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.lineno, node.value


def pages() -> list[Path]:
    """What users read beside messages: docs, help texts among them, without the diary."""
    found = [p for p in tracked() if p.suffix == ".md" and p.name != "log.md" and p.is_relative_to(ROOT / "docs")]
    return [ROOT / "README.md", *found]


@pytest.mark.parametrize("phrase", BANNED)
def test_no_banned_phrase_in_what_users_read(phrase: str) -> None:
    pattern = re.compile(rf"\b{phrase}", re.IGNORECASE)
    found = [f"{p.name}:{n}" for p in code() for n, text in messages(p) if pattern.search(text)]
    found += [p.name for p in pages() if pattern.search(p.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("word", GONE)
def test_no_word_that_is_gone(word: str) -> None:
    """Neither alone nor as a part of a name, as in `word_s`."""
    pattern = re.compile(rf"(?<![^\W_]){word}(?![^\W_])", re.IGNORECASE)
    assert [
        str(p.relative_to(ROOT)) for p in (*code(), *pages()) if pattern.search(p.read_text(encoding="utf-8"))
    ] == []
