"""What of a working directory is sent with a job."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from spindle.errors import FormatError
from spindle.runtime.launch.package import pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with what jobs need, and what they do not."""
    found = tmp_path / "project"
    for name in (
        "model.py",
        "parts/tower.py",
        "parts/__pycache__/tower.pyc",
        ".venv/bin/python",
        "checkpoints/a/step-00000002/rank0.safetensors",
        "runs/step-00000002/rank0.safetensors",
        "plan.json",
        "data/big.bin",
    ):
        path = found / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return found


def names(package: Path) -> list[str]:
    return sorted(zipfile.ZipFile(package).namelist())


def test_environments_caches_and_checkpoints_stay(folder: Path, tmp_path: Path) -> None:
    """All else is sent."""
    package = pack(folder, tmp_path / "a.zip")
    assert names(package.path) == ["data/big.bin", "model.py", "parts/tower.py", "plan.json"]
    assert (package.num_files, package.size_bytes) == (4, package.path.stat().st_size)


@pytest.mark.parametrize("pattern", ["data", "data/", "data/big.bin", "*.bin", "data/*"])
def test_what_is_excluded_stays(folder: Path, tmp_path: Path, pattern: str) -> None:
    """A name, a path or a pattern of either."""
    package = pack(folder, tmp_path / "a.zip", exclude=[pattern])
    assert names(package.path) == ["model.py", "parts/tower.py", "plan.json"]


def test_what_git_ignores_stays_unless_the_job_names_it(folder: Path, tmp_path: Path) -> None:
    """Plans are often ignored, and a job without its plan fails far away."""
    (folder / ".gitignore").write_text("data\n*.json\n")
    subprocess.run(["git", "init", "-q", str(folder)], check=True, timeout=30)
    assert names(pack(folder, tmp_path / "a.zip").path) == [".gitignore", "model.py", "parts/tower.py"]
    package = pack(folder, tmp_path / "b.zip", needed=["plan.json", "./model.py"])
    assert names(package.path) == [".gitignore", "model.py", "parts/tower.py", "plan.json"]


def test_files_that_git_knows_but_are_gone_are_no_fault(folder: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(folder)], check=True, timeout=30)
    subprocess.run(["git", "-C", str(folder), "add", "model.py", "plan.json"], check=True, timeout=30)
    (folder / "plan.json").unlink()
    assert "plan.json" not in names(pack(folder, tmp_path / "a.zip").path)


def test_equal_folders_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    """Ray names a package by its bytes, and sends it once; times do not count, permissions do."""
    first = pack(folder, tmp_path / "a.zip").path.read_bytes()
    os.utime(folder / "model.py", (0, 0))
    assert pack(folder, tmp_path / "b.zip").path.read_bytes() == first
    (folder / "model.py").chmod(0o755)
    assert pack(folder, tmp_path / "c.zip").path.read_bytes() != first


def test_too_much_is_refused_with_what_is_largest(folder: Path, tmp_path: Path) -> None:
    """Reading ends at the limit, whatever else there is."""
    (folder / "data" / "big.bin").write_bytes(os.urandom(3 * 2**20))
    with pytest.raises(FormatError, match=r"more than 2 MiB.*largest: data 3 MiB(.|\n)*--exclude data"):
        pack(folder, tmp_path / "a.zip", limit_bytes=2 * 2**20)
    assert (tmp_path / "a.zip").stat().st_size < 4 * 2**20
    assert pack(folder, tmp_path / "a.zip", exclude=["data"], limit_bytes=2 * 2**20).num_files == 3


def test_a_file_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    """A name with no file behind it, for instance."""
    with pytest.raises(FormatError, match=r"nothing\.py: cannot be read \(No such file"):
        pack(folder, tmp_path / "a.zip", needed=["nothing.py"])
