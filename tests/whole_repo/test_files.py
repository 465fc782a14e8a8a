"""Files: nothing of one machine, no debt without an issue, sizes that a reader can hold, a README that is true."""

import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".md", ".txt", ".yaml", ".yml", ".json", ".csv", ".js", ".css", ".toml", ""}


def tracked() -> list[Path]:
    """Text files that git keeps, links left out."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [p for p in paths if p.suffix in TEXT and p.is_file() and not p.is_symlink()]


def lines_with(pattern: str) -> list[str]:
    found = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if found.search(line)
    ]


def test_no_path_of_a_machine() -> None:
    """Home folders and temporary ones of whoever wrote it."""
    folders = "|".join(("home", "root", "Users", "work", "tmp", "mnt"))
    assert lines_with(rf"""(?:^|["'\s(=])/(?:{folders})/\w""") == []


def test_no_debt_without_an_issue() -> None:
    """`TODO(#12): ...` is kept, a bare one is not."""
    words = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X"))
    assert lines_with(rf"\b(?:{words})\b(?!\(#\d+\))") == []


def test_sources_are_ascii() -> None:
    """Signs of mathematics may stand in docs and docstrings; names, messages and data are ASCII."""
    code = [p for p in tracked() if p.suffix in {".yaml", ".toml", ".js", ".css"} and "docs" not in p.parts]
    assert [str(p.relative_to(ROOT)) for p in code if not p.read_text(encoding="utf-8").isascii()] == []


def test_no_module_is_too_long() -> None:
    """600 lines are the hard limit of a module."""
    modules = [p for p in tracked() if p.suffix == ".py"]
    long = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in modules}
    assert {name: count for name, count in long.items() if count > 600} == {}


def test_no_folder_holds_too_many_modules() -> None:
    """Fifteen, so that a reader sees at once what stands in it."""
    folders = Counter(str(p.parent.relative_to(ROOT)) for p in tracked() if p.suffix == ".py")
    assert {folder: count for folder, count in folders.items() if count > 15} == {}


def test_every_module_says_what_it_is() -> None:
    """Its docstring comes first, in all that is not a test."""
    modules = [p for p in tracked() if p.suffix == ".py" and "tests" not in p.relative_to(ROOT).parts]
    silent = [p for p in modules if not re.match(r'(#!.*\n)?r?"""\S', p.read_text(encoding="utf-8"))]
    assert [str(path.relative_to(ROOT)) for path in silent] == []


# -- the README -------------------------------------------------------------------------------------------------------


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def tree_entries() -> list[str]:
    """Paths of the tree in the README; a line's indent says which folder it is in."""
    block = re.search(r"## The tree\s+```text\n(.*?)```", readme(), re.DOTALL)
    assert block is not None
    found: list[str] = []
    folders: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*((?:[\w.*/-]+(?:\.\w+|/)(?: |$))+)", line)
        if names is None:
            continue  # the rest of a description
        for name in names[1].split():
            del folders[depth:]
            found.append("/".join([*folders, name.rstrip("/")]))
            if name.endswith("/"):
                folders.append(name.rstrip("/"))
    return found


def test_the_tree_of_the_readme_exists() -> None:
    """Every file and folder that it lists, patterns too; the three rooms and the tests among them."""
    entries = tree_entries()
    assert {"spindle", "planner", "runtime", "tests", "docs"} <= set(entries)
    assert len(entries) > 30
    assert [entry for entry in entries if not list(ROOT.glob(entry))] == []


def test_paths_in_the_text_of_the_readme_exist() -> None:
    """Files to read first, and whatever else stands in backquotes and has a slash and a suffix."""
    paths = re.findall(r"`([\w./-]+/[\w.-]*)`", readme())
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_nothing_in_the_readme_is_left_to_fill_in() -> None:
    """No placeholder stands where a real picture was to be."""
    assert re.findall(r"@[A-Z]+@", readme()) == []


def test_commands_of_the_readme_exist() -> None:
    """Each `spindle VERB` is a command with those options, each `make TARGET` a target."""
    from spindle.cli import cli

    for verb, rest in re.findall(r"^spindle (\w+)(.*)$", readme(), re.MULTILINE):
        own, _, of_train = rest.partition("#")[0].partition(" -- ")  # what follows -- is for another command
        for name, typed in ((verb, own), ("train", of_train)):
            command = cli.commands[name]
            known = {word for option in command.params for word in (*option.opts, *option.secondary_opts)}
            assert set(re.findall(r"(?<=\s)(--?[a-z][\w-]*)", typed)) <= known
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", readme()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tests_readme_names_every_folder() -> None:
    """A new folder of tests says there what it is for, and the helpers named there exist."""
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", tables))
    helpers = [name for name in sorted(named) if name.endswith(".py")]
    assert helpers
    assert [name for name in helpers if not (ROOT / "tests" / name).exists()] == []
    folders = {path.relative_to(ROOT).parts[1] for path in tracked() if path.relative_to(ROOT).parts[0] == "tests"}
    assert {name for name in folders if (ROOT / "tests" / name).is_dir()} <= {name.rstrip("/") for name in named}


def test_the_design_names_every_decision_and_only_folders_that_exist() -> None:
    """Decisions by the titles they have, and the floors of the import contract, from the top down."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    records = (ROOT / "docs" / "decisions").glob("*.md")
    titles = {path.name: path.read_text(encoding="utf-8").splitlines()[0].partition(". ")[2] for path in records}
    named = re.findall(r"^- \[(.*)\]\(decisions/(.*)\)$", text, re.MULTILINE)
    assert titles == {name: title for title, name in named}
    floors = re.search(r"## Who may import whom.*?```text\n(.*?)```", text, re.DOTALL)
    assert floors is not None
    lines = [line for line in floors[1].splitlines() if not line.startswith(" ")]
    shown = [room for line in lines for room in re.findall(r"\w+", line.partition("   ")[0])]
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    kept = [room for layer in contract for room in layer.split(" | ")]
    assert [room for room in kept if room in shown] == shown
    assert all((ROOT / "spindle" / room).exists() or (ROOT / "spindle" / f"{room}.py").exists() for room in shown)
