"""Uploads: the checkpoints of a folder, copied to object storage in a thread beside the training, and fetched back.

- A checkpoint gets its name when it is whole, so the folder says what is ready; the training knows of no upload.
- `spindle.json` goes last: what lies at the URL without it is no checkpoint yet. The newest checkpoint goes first.
- What fails is said by one warning a checkpoint, and tried again; it never ends a training.
- What was fetched is checked against its checksums before it gets its name.
"""

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spindle.errors import CheckpointError, InputError
from spindle.runtime.checkpoints.checkpoint import About, about_of, begin, checkpoints_in, read, step_of
from spindle.runtime.checkpoints.tensor_files import ABOUT
from spindle.runtime.comms.background import start_thread

LOOK_S = 1.0
PAUSE_S = 10.0  # after an upload that failed

Warn = Callable[[str], None]


class Remote:
    """A folder of checkpoints at a URL of fsspec: file://, s3://, gs://, memory:// and so on."""

    def __init__(self, url: str) -> None:
        """Raises InputError for a URL whose kind is not known, or whose package is not installed."""
        from fsspec.core import url_to_fs

        self.url = re.sub(r"//[^/@]*@", "//", url)  # without a password
        try:
            found: tuple[Any, str] = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{self.url} is no place for uploads ({error}); give s3://BUCKET/FOLDER") from None
        self._files, self._root = found[0], found[1].rstrip("/")

    def steps(self) -> list[str]:
        """Names of the checkpoints there, whole or not, the newest first."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return []
        names = [str(each).rstrip("/").rpartition("/")[2] for each in self._files.ls(self._root, detail=False)]
        return sorted((name for name in names if re.fullmatch(r"step-\d{8,15}", name)), reverse=True)

    def holds(self, path: Path) -> bool:
        """Whether the whole checkpoint at `path` is there."""
        there = f"{self._root}/{path.name}/{ABOUT}"
        return bool(self._files.exists(there)) and self._files.cat_file(there) == (path / ABOUT).read_bytes()

    def put(self, path: Path) -> None:
        """Copy a checkpoint there, what says of itself that it is whole last."""
        names = sorted(about_of(path).files)
        there = f"{self._root}/{path.name}"
        self._files.makedirs(there, exist_ok=True)
        if self._files.exists(f"{there}/{ABOUT}"):  # of another run: from now on it is none
            self._files.rm_file(f"{there}/{ABOUT}")
        for name in (*names, ABOUT):
            self._files.put_file(str(path / name), f"{there}/{name}")

    def get(self, name: str, directory: Path) -> Path:
        """Fetch a checkpoint into a directory. Raises CheckpointError when it is not whole, not as it was written, or
        there already.
        """
        path = directory / name
        if path.exists():
            raise CheckpointError(f"{path} is there already; give another folder, or move it away")
        copied(self._files, f"{self._root}/{name}", path, f"{self.url}/{name}")
        return path


def copied(files: Any, there: str, path: Path, shown: str) -> None:
    """Copy a checkpoint at `there` of an fsspec file system to `path`, where it appears once it was checked. `shown`:
    what errors call it.
    """
    unfinished = begin(path)
    try:
        files.get_file(f"{there}/{ABOUT}", str(unfinished / ABOUT))
        for file, (num_bytes, _) in about_of(unfinished).files.items():
            if files.size(f"{there}/{file}") != num_bytes:
                raise CheckpointError(f"{shown}/{file} is not as it was written; take an older one")
            files.get_file(f"{there}/{file}", str(unfinished / file))
        read(unfinished)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def step_there(files: Any, there: str) -> int:
    """After how many steps the checkpoint at `there` of an fsspec file system was written. Raises OSError or
    ValueError where there is none.
    """
    return About.model_validate_json(files.cat_file(f"{there}/{ABOUT}")).step


def fetch(url: str, directory: Path, warn: Warn) -> Path | None:
    """The newest whole checkpoint at a URL, copied into a directory that has none of as many steps; None where there is
    nothing newer. Damaged ones are named in a warning and left out. Raises CheckpointError where the URL cannot
    be read.
    """
    remote = Remote(url)
    newest = max((step_of(path) for path in checkpoints_in(directory)), default=-1)
    try:
        names = [name for name in remote.steps() if step_of(Path(name)) > newest]
    except Exception as error:  # each library has errors of its own
        raise CheckpointError(
            f"{remote.url} cannot be read ({_as_text(error)}); check the URL and its rights"
        ) from None
    for name in names:
        try:
            return remote.get(name, directory)
        except Exception as error:
            warn(f"{remote.url}/{name} cannot be fetched ({_as_text(error)}); an older one is tried")
    return None


class Uploads:
    """Copies checkpoints to a URL, from `begin` on until `end`."""

    def __init__(self, url: str, directory: Path, warn: Warn) -> None:
        """Raises InputError as Remote does."""
        self._remote, self._directory, self._warn = Remote(url), directory, warn
        self._stopped = threading.Event()
        self._done: dict[str, int] = {}  # when the checkpoint that was uploaded under this name was written
        self._failed: set[str] = set()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start the thread, which ends with Python at the latest."""
        self._thread = start_thread(self._run, "uploads", end=self._stopped.set)

    def end(self, deadline_s: float) -> list[str]:
        """Wait at most `deadline_s` for what is not there yet; the names of checkpoints that are still missing."""
        until_s = time.monotonic() + deadline_s
        thread = self._thread
        while thread and thread.is_alive() and self._missing() and time.monotonic() < until_s:
            thread.join(min(LOOK_S, deadline_s) / 10)
        self._stopped.set()
        return [path.name for path in self._missing()]

    def _run(self) -> None:
        while not self._stopped.is_set():
            failed = False
            for path in reversed(self._missing()):
                failed = not self._uploaded(path)
                if failed or self._stopped.is_set():
                    break
            self._stopped.wait(PAUSE_S if failed else LOOK_S)

    def _missing(self) -> list[Path]:
        return [path for path in checkpoints_in(self._directory) if self._done.get(path.name) != _written_ns(path)]

    def _uploaded(self, path: Path) -> bool:
        """Whether a checkpoint is there now, or is no longer here; what went wrong is said by one warning."""
        written_ns = _written_ns(path)
        try:
            if not self._remote.holds(path):
                self._remote.put(path)
        except Exception as error:  # each library has errors of its own, and none of them may end a training
            if not path.exists():  # newer ones took its place meanwhile
                return True
            if path.name not in self._failed:
                self._failed.add(path.name)
                self._warn(f"{path.name} was not uploaded to {self._remote.url} ({_as_text(error)}); it is tried again")
            return False
        self._done[path.name] = written_ns
        return True


@contextlib.contextmanager
def uploading(url: str, directory: Path, warn: Warn, *, deadline_s: float) -> Iterator[None]:
    """Upload what is written into a directory meanwhile, and at the end, good or bad, what is left; what is not there
    after `deadline_s` seconds is named in a warning.
    """
    uploads = Uploads(url, directory, warn)
    uploads.begin()
    try:
        yield
    finally:
        missing = uploads.end(deadline_s)
        if missing:
            warn(
                f"{', '.join(missing[-3:])} {'is' if len(missing) == 1 else 'are'} not at {uploads._remote.url} after "
                f"{deadline_s:g} s; copy from {directory} what you need"
            )


def _written_ns(path: Path) -> int:
    try:
        return (path / ABOUT).stat().st_mtime_ns
    except OSError:
        return 0


def _as_text(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
