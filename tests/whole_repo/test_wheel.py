"""Wheel and sdist: what `pip install` gives is whole, and works away from the repository."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.printed.samples import metagraph_file

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from an sdist, which is built from what git tracks, links included, in a folder of its own: nothing stale,
    nothing left behind. What the wheel holds was in the sdist.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "target"
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name.startswith(("spindle/", "planner/", "runtime/")) or name in ("pyproject.toml", "README.md"):
            path, copy = ROOT / name, source / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                copy.symlink_to(path.readlink())
            elif path.is_file():
                copy.write_bytes(path.read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source), cwd=folder)
    (found,) = target.glob("spindle-*.whl")
    return found


def test_it_holds_the_three_packages(wheel: Path) -> None:
    """Every module of the repository, as plain files, and nothing at the top but `spindle`."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "ls-files", "-z", "*.py", cwd=ROOT).split("\0")
    for name in tracked:
        if name.startswith(("planner/", "runtime/")):
            assert f"spindle/{name}" in names
        elif name.startswith("spindle/"):
            assert name in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"spindle"}


def test_it_holds_its_data(wheel: Path) -> None:
    """Device types, held-out steps, the scripts and styles of the timeline, and the mark that it is typed."""
    names = set(zipfile.ZipFile(wheel).namelist())
    scripts = [p.name for p in (ROOT / "spindle" / "timeline" / "page").iterdir() if p.suffix in (".js", ".css")]
    assert len(scripts) > 3
    files = ("files/devices.yaml", "cost/held_out.yaml", "py.typed", *(f"timeline/page/{name}" for name in scripts))
    assert {f"spindle/{name}" for name in files} <= names


def test_it_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Unpacked anywhere it plans, checks and draws; every module of it is its own."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    metagraph_file(tmp_path / "graph.json")
    here = {"PYTHONPATH": str(tmp_path / "site")}
    spindle = (sys.executable, "-m", "spindle")
    run(*spindle, "plan", "graph.json", "--cluster", "1x2:a100-80g", "-o", "plan.json", cwd=tmp_path, **here)
    assert "keeps all rules" in run(*spindle, "check", "plan.json", cwd=tmp_path, **here)
    run(*spindle, "show", "plan.json", "--html", "page.html", cwd=tmp_path, **here)
    assert "</html>" in (tmp_path / "page.html").read_text()
    code = "import json, spindle.planner.solve, spindle.runtime as r; print(json.dumps([spindle.__file__, r.__file__]))"
    files = json.loads(run(sys.executable, "-c", code, cwd=tmp_path, **here))
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in files)


def test_it_installs_the_command(wheel: Path) -> None:
    """`spindle` on the command line is `spindle.cli:main`."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
    assert archive.read(name).decode().split() == ["[console_scripts]", "spindle", "=", "spindle.cli:main"]
