"""Uploads: checkpoints come to a URL and back, whole or not at all; what fails is told, and ends no training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

from spindle.errors import CheckpointError, InputError
from spindle.runtime.checkpoints import uploads
from spindle.runtime.checkpoints.checkpoint import Checkpoints, begin, finish, path_of, put_progress
from spindle.runtime.checkpoints.uploads import Remote, Uploads, fetch, uploading
from tests.printed.conftest import Spindle, spindle_command
from tests.spindle.test_metrics import trained, words
from tests.spoiled_samples import MODEL

__all__ = ["spindle_command"]  # a fixture
SIGNED_IN = "broken://me:" + "word@bucket"  # apart, for the scan for secrets


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks and pauses of milliseconds; an empty memory://."""
    monkeypatch.setattr(uploads, "LOOK_S", 0.01)
    monkeypatch.setattr(uploads, "PAUSE_S", 0.01)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield
    MemoryFileSystem.store.clear()


def written(directory: Path, step: int, value: float = 1.0) -> Path:
    """A checkpoint as runs write them."""
    unfinished = begin(path_of(directory, step))
    save_file({"net.weight": torch.full((2, 2), value)}, unfinished / "shard-00001.safetensors")
    put_progress(unfinished, {})
    finish(unfinished, Checkpoints(directory, 1, run="a"), step=step, seed=0)
    return path_of(directory, step)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    """All bytes are alike; the newest comes back, and nothing where the folder is as new; one that was written again
    is uploaded again.
    """
    url = f"file://{tmp_path}/bucket/runs" if kind == "file" else "memory://bucket/runs"
    told: list[str] = []
    with uploading(url, tmp_path / "a", told.append, deadline_s=60.0):
        paths = [written(tmp_path / "a", step) for step in (1, 2)]
    assert told == []
    found = fetch(url, tmp_path / "b", told.append)
    assert found == tmp_path / "b" / "step-00000002"
    assert contents(found) == contents(paths[1])
    assert fetch(url, tmp_path / "b", told.append) is None
    again = written(tmp_path / "a", 2, value=5.0)
    with uploading(url, tmp_path / "a", told.append, deadline_s=60.0):
        pass
    found = fetch(url, tmp_path / "c", told.append)
    assert found is not None
    assert contents(found) == contents(again)
    assert told == []


class Broken(MemoryFileSystem):  # type: ignore[misc]
    """Fails `left` times, as a network does."""

    protocol = "broken"
    left = 0

    def put_file(self, *arguments: Any, **options: Any) -> None:
        """The file, or an error."""
        if type(self).left:
            type(self).left -= 1
            raise ConnectionError("no route to host")
        super().put_file(*arguments, **options)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    monkeypatch.setattr(Broken, "left", 0)
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Broken(), url.partition("://")[2]))
    return Broken


def test_a_failed_upload_is_tried_again(tmp_path: Path, broken: type[Broken]) -> None:
    """It is told once; what says that the checkpoint is whole comes last."""
    broken.left = 3
    told: list[str] = []
    path = written(tmp_path / "a", 1)
    with uploading(SIGNED_IN, tmp_path / "a", told.append, deadline_s=60.0):
        pass
    (line,) = told
    assert "step-00000001 was not uploaded to broken://bucket (ConnectionError: no route to host); it is tried" in line
    assert broken.left == 0
    assert Remote(SIGNED_IN).holds(path)


def test_what_is_not_there_at_the_end_is_told(tmp_path: Path, broken: type[Broken]) -> None:
    broken.left = 10**9
    told: list[str] = []
    written(tmp_path / "a", 1)
    with uploading("broken://bucket", tmp_path / "a", told.append, deadline_s=0.2):
        pass
    assert "step-00000001 is not at broken://bucket after 0.2 s; copy from" in told[-1]


def test_a_checkpoint_that_goes_meanwhile_is_left_out(tmp_path: Path, broken: type[Broken]) -> None:
    """`--keep` removes old ones; that is no failure."""
    told: list[str] = []
    path = written(tmp_path / "a", 1)
    found = Uploads("broken://bucket", tmp_path / "a", told.append)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert found._uploaded(path)
    assert told == []


def test_what_is_damaged_there_is_not_taken(tmp_path: Path) -> None:
    """A bit of a file, a size, a half uploaded one: each is told, and the one before is fetched."""
    url, bucket, told = f"file://{tmp_path}/bucket", tmp_path / "bucket", list[str]()
    with uploading(url, tmp_path / "a", told.append, deadline_s=60.0):
        for step in (1, 2, 3, 4):
            written(tmp_path / "a", step)
    (bucket / "step-00000004" / "spindle.json").unlink()
    file = bucket / "step-00000003" / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    (bucket / "step-00000002" / "progress.pt").write_bytes(b"short")
    found = fetch(url, tmp_path / "b", told.append)
    assert found is not None
    assert found.name == "step-00000001"
    assert [line.partition(" cannot be fetched")[0][-1] for line in told] == ["4", "3", "2"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["step-00000001"]


def test_a_name_that_leads_elsewhere(tmp_path: Path) -> None:
    """A checkpoint of a stranger that lists ../harm is refused before anything of it is fetched."""
    url, bucket, told = f"file://{tmp_path}/bucket", tmp_path / "bucket", list[str]()
    with uploading(url, tmp_path / "a", told.append, deadline_s=60.0):
        written(tmp_path / "a", 1)
    about = json.loads((bucket / "step-00000001" / "spindle.json").read_text())
    about["files"]["../harm"] = [0, 0]
    (bucket / "step-00000001" / "spindle.json").write_text(json.dumps(about))
    assert fetch(url, tmp_path / "b", told.append) is None
    assert "which is no file of this folder" in told[0]


def test_urls_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that nobody knows, and a place that may not be read; passwords are not shown."""
    with pytest.raises(InputError, match=r"nosuch://bucket is no place for uploads .* give s3://BUCKET/FOLDER"):
        Remote(SIGNED_IN.replace("broken", "nosuch"))

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "exists", refuses)
    with pytest.raises(CheckpointError, match=r"memory://bucket cannot be read \(PermissionError: Access Denied\)"):
        fetch(SIGNED_IN.replace("broken", "memory"), tmp_path, print)


def test_uploads_of_a_run_in_python(tmp_path: Path) -> None:
    """The next run goes on in an empty folder; what cannot be uploaded is refused before a step."""
    options: dict[str, Any] = {"upload": "memory://bucket/runs", "resume": True}
    trained(words(), 1, checkpoints=tmp_path / "a", **options)
    assert trained(words(), 2, checkpoints=tmp_path / "b", **options).first_step == 1
    assert trained(words(), 3, checkpoints=tmp_path / "b", **options).first_step == 2
    with pytest.raises(InputError, match="upload is 'memory://x' and the run writes no checkpoints; give checkpoints="):
        trained(words(), 1, upload="memory://x")
    with pytest.raises(InputError, match="upload_wait_s is -1; give seconds, from 0 up"):
        trained(words(), 1, checkpoints=tmp_path / "c", upload="memory://x", upload_wait_s=-1)
    with pytest.raises(InputError, match="nosuch://bucket is no place for uploads"):
        trained(words(), 1, checkpoints=tmp_path / "c", upload="nosuch://bucket")


def test_a_run_on_another_machine_goes_on(tmp_path: Path, spindle_command: Spindle) -> None:
    """`--upload` beside the steps; the same with --resume in an empty folder goes on from what lies there."""
    Path("model.py").write_text(MODEL)
    run = ("train", "model.py", "--launcher", "threads", "--upload", f"file://{tmp_path}/bucket")
    assert spindle_command(*run, "--steps", "1", "--checkpoints", "here").code == 0
    assert contents(Path("here/step-00000001")) == contents(tmp_path / "bucket" / "step-00000001")
    done = spindle_command(*run, "--steps", "2", "--checkpoints", "there", "--resume")
    assert (done.code, "resumed after 1 steps" in done.out) == (0, True)
    assert (tmp_path / "bucket" / "step-00000002" / "spindle.json").is_file()
    done = spindle_command(*run, "--steps", "2")
    assert (done.code, "--upload needs --checkpoints DIR" in done.said) == (2, True)
