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
    assert (len(package.files), package.size_bytes) == (4, package.path.stat().st_size)


@pytest.mark.parametrize("under_git", [False, True])
def test_keys_and_passwords_stay_and_are_named(folder: Path, tmp_path: Path, under_git: bool) -> None:
    """Also where git would take them; a tokenizer, a file of keywords and one that the job names are no secrets."""
    kept = ["tokenizer.json", "keys.py", "environment.yaml"]
    secrets = [".env", ".env.local", "id_rsa", "id_ed25519.pub", "tls.pem", ".aws/config", "my-credentials.json"]
    for name in (*kept, *secrets, "named.key"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    if under_git:
        subprocess.run(["git", "init", "-q", str(folder)], check=True, timeout=30)
    package = pack(folder, tmp_path / "a.zip", needed=["named.key"])
    assert set(names(package.path)) == {
        *("data/big.bin", "model.py", "parts/tower.py", "plan.json", "named.key"), *kept
    }  # fmt: skip
    assert {*package.secrets} >= set(secrets) - {".env"}  # which stays as an environment does
    assert "not sent, since they may hold secrets: .aws/config, .env.local" in package.summary(folder)


@pytest.mark.parametrize("under_git", [False, True])
def test_links_that_lead_out_are_not_followed(folder: Path, tmp_path: Path, under_git: bool) -> None:
    """Those that stay inside are, as files."""
    (tmp_path / "secret").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "out_there").symlink_to(tmp_path / "elsewhere")
    (folder / "inside.py").symlink_to("model.py")
    (folder / "around").symlink_to(".")
    if under_git:
        subprocess.run(["git", "init", "-q", str(folder)], check=True, timeout=30)
    package = pack(folder, tmp_path / "a.zip")
    packed = names(package.path)
    assert "inside.py" in packed
    assert not [name for name in packed if "out" in name.split("/")[-1] or "elsewhere" in name or name.endswith("file")]
    assert "out" in package.links
    assert f"not sent, since they lead out of it: {package.links[0]}" in package.summary(folder)


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
    assert pack(folder, tmp_path / "a.zip", exclude=["data"], limit_bytes=2 * 2**20).files[:2] == (
        "model.py",
        "parts/tower.py",
    )


def test_a_file_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    """A name with no file behind it, for instance."""
    with pytest.raises(FormatError, match=r"nothing\.py: cannot be read \(No such file"):
        pack(folder, tmp_path / "a.zip", needed=["nothing.py"])
