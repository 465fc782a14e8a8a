"""The pages: the site builds strictly, and every Python and shell block of them runs, in order, in a folder of its own.

Marks in a page, which readers do not see:

    <!-- file: model.py -->        the next block is a file, which is written, not run
    <!-- not run: needs a GPU -->  the next block is left out; only for what one machine without a GPU cannot do
    <!-- setup: COMMANDS -->       run first, for pages that start from files that others make
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from spindle.cli import cli
from spindle.verbs import source

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name != "log.md")
SHELL = ("sh", "bash", "console")
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>file|not run|setup): *(?P<value>(?:(?!-->).)*?) *-->\n*)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
SETUP = re.compile(r"<!-- setup: *(.*?) *-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code of a page, with the mark before it."""

    language: str
    text: str
    line: int
    file: str = ""
    left_out: str = ""


def blocks_of(text: str) -> Iterator[Block]:
    """Code blocks in order; a setup comes as a shell block."""
    found = [(m.start(), Block("sh", m[1] + "\n", _line(text, m.start()))) for m in SETUP.finditer(text)]
    for match in BLOCK.finditer(text):
        mark, value = match["mark"], match["value"] or ""
        given = {"file": value if mark == "file" else "", "left_out": value if mark == "not run" else ""}
        found.append(
            (match.start("text"), Block(match["language"], match["text"], _line(text, match.start("text")), **given))
        )
    return (block for _, block in sorted(found, key=lambda pair: pair[0]))


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def runs(block: Block) -> bool:
    return bool(block.file) or (not block.left_out and block.language in (*SHELL, "python"))


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).with_suffix("").as_posix()


WITH_CODE = [p for p in PAGES if any(map(runs, blocks_of(p.read_text()))) and p.name != "wrapping.md"]
"""tests/capture/test_docs.py runs the page on wrapping."""


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who copies the blocks of a page, in their order, meets no error."""
    for name in ("docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in [name for name in sys.modules if name in ("model", "spindle_source_model")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(source, "_import", read_once(source._import))
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        where = f"{page.name}, line {block.line}"
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif not runs(block):
            continue
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
        else:
            shell(block.text, where)


def read_once(load: Callable[[Path], ModuleType]) -> Callable[[Path], ModuleType]:
    """Commands of a page that name the same file share its workload: tracing it for each takes most of their time."""
    known: dict[tuple[Path, bytes], ModuleType] = {}

    def shared(path: Path) -> ModuleType:
        key = path, path.read_bytes() if path.is_file() else b""
        if key not in known:
            known[key] = load(path)
        return known[key]

    return shared


def shell(text: str, where: str) -> None:
    """Run commands; those of Spindle in this process, since a fresh one spends its time on importing torch."""
    failed: object = ""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["spindle"] and not {"|", ">", "&&"} & set(words):
            done = CliRunner().invoke(cli, words[1:], prog_name="spindle")
            failed = done.exit_code and f"{done.output[-2000:]}\n{done.exception!r}"
        elif words:
            run = subprocess.run(["bash", "-euc", line], capture_output=True, text=True, timeout=100, check=False)
            failed = run.returncode and run.stdout[-2000:] + run.stderr[-2000:]
        assert not failed, f"{where}: {line}\n{failed}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_left_out_says_why(page: Path) -> None:
    """A block that is not run needs something that this test cannot have."""
    reasons = [block.left_out for block in blocks_of(page.read_text(encoding="utf-8")) if block.left_out]
    words = ("cluster", "GPU", "network", "browser", "part of")
    assert [reason for reason in reasons if not any(word in reason for word in words)] == []


def test_blocks_are_found() -> None:
    """Marks belong to the block that follows; a setup runs before all of them."""
    text = (
        "<!-- setup: touch a -->\n\n```python\na = 1\n```\n<!-- not run: GPU -->\n```sh\nb\n```\n"
        "<!-- file: c.py -->\n```python\nc\n```\n"
    )
    found = list(blocks_of(text))
    assert [(b.language, b.text.strip(), b.file, b.left_out) for b in found] == [
        ("sh", "touch a", "", ""),
        ("python", "a = 1", "", ""),
        ("sh", "b", "", "GPU"),
        ("python", "c", "c.py", ""),
    ]


def test_the_model_of_the_quickstart_is_the_example() -> None:
    """What the page tells to save stands in docs/examples as it is there."""
    block = next(b for b in blocks_of((DOCS / "quickstart.md").read_text(encoding="utf-8")) if b.file == "model.py")
    assert block.text == (DOCS / "examples" / "quick" / "model.py").read_text(encoding="utf-8")


def test_the_kept_picture_is_fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the README shows is what its command draws now; UPDATE_GOLDEN=1 draws it anew."""
    monkeypatch.chdir(ROOT)
    kept = DOCS / "graph.svg"
    drawn = kept if os.environ.get("UPDATE_GOLDEN") else tmp_path / "graph.svg"
    shell(f"spindle graph benchmarks/workloads/vla_cotrain.yaml --cluster 2x8:a100-80g -o {drawn}", "graph.svg")
    assert drawn.read_text() == kept.read_text(), (
        "the picture of the README is stale: run this test with UPDATE_GOLDEN=1"
    )


@pytest.mark.parametrize("name", ["api.md", "cli.md"])
def test_reference_pages_are_those_of_the_code(name: str) -> None:
    """`python docs/reference.py` writes them anew; they are read in the repository as they are."""
    reference = source._import(DOCS / "reference.py")
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page == reference.rendered(page, reference.PAGES[name]), "run python docs/reference.py"


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a link to a page or heading that is not there is an error. Every command and public name is on it."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / page.relative_to(DOCS)).with_suffix(".html").is_file()
    import spindle

    commands, names = (tmp_path / "cli.html").read_text(), (tmp_path / "api.html").read_text()
    assert [name for name in cli.commands if f"Usage: spindle {name}" not in commands] == []
    assert [name for name in spindle.__all__ if not name.startswith("_") and f"spindle.{name}" not in names] == []
    shown = {name for page in tmp_path.glob("*.html") for name in re.findall(r'src="([^"]+\.svg)"', page.read_text())}
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("pictures/*.svg")}
    assert made == {name for name in shown if name.startswith("pictures/")}
    assert "<!-- " not in "".join(re.findall(r"<!-- (?:setup|not run|file)", commands + names))
