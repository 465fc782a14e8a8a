"""Package: the working directory of a job as one zip file, small enough for Ray to hand to every node.

What git ignores stays behind where the directory is under git; caches, environments and checkpoints always do, and so
do keys and passwords, and links that lead out of the directory. Files that the job names are in it in any case. Equal
directories give equal bytes, so that Ray sends each version once.
"""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from spindle.errors import FormatError

LIMIT_BYTES = 100 * 2**20
"""Ray takes no package above this."""

LEFT_OUT = (
    *(".git", ".hg", ".venv", "venv", ".env", "__pycache__", "node_modules", ".ipynb_checkpoints"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", "checkpoints", "step-[0-9]*"),
)
"""Names of files and folders that no job needs, in the shell's patterns; checkpoints are `step-NUMBER` folders."""


SECRETS = (
    *(".env*", ".netrc", ".npmrc", ".pypirc", ".htpasswd", ".pgpass", ".git-credentials", ".secrets*"),
    *(".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".kube", ".ssh"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.kdbx"),
    *("*credentials*.json", "credentials", "service-account*.json", "*kubeconfig*", "*.keystore"),
)
"""Names under which keys and passwords are kept; who means to send one names it in the job, or by another name."""


@dataclass(frozen=True)
class Package:
    """A zip file, what went into it, and what was left out: files with secrets, links that lead elsewhere."""

    path: Path
    files: tuple[str, ...]
    size_bytes: int
    secrets: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    def summary(self, folder: Path) -> str:
        """What is sent, and what is not, in a line or two."""
        text = f"{len(self.files)} files of {folder.resolve()}, {self.size_bytes / 2**20:.1f} MiB packed"
        for names, what in ((self.secrets, "may hold secrets"), (self.links, "lead out of it")):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                text += f"\nnot sent, since they {what}: {', '.join(names[:5])}{more}"
        return text


def pack(
    folder: Path,
    target: Path,
    *,
    needed: Iterable[str] = (),
    exclude: Sequence[str] = (),
    limit_bytes: int = LIMIT_BYTES,
) -> Package:
    """Write the files of `folder` to the zip file `target`. `exclude`: more names or paths in it to leave out.

    Raises FormatError, with what is largest, when the zip file would not stay under `limit_bytes`.
    """
    found = sorted(set(_files(folder, (*LEFT_OUT, *exclude))))
    inside = folder.resolve()
    links = tuple(name for name in found if not (folder / name).resolve().is_relative_to(inside))
    secrets = tuple(name for name in found if not _kept(name, SECRETS) and name not in links)
    names = sorted({*found} - {*links, *secrets} | {os.path.normpath(name) for name in needed})
    try:
        with zipfile.ZipFile(target, "w") as archive:
            for name in names:
                _add(archive, folder / name, name, limit_bytes)
    except OSError as error:
        raise FormatError(
            f"{error.filename}: cannot be read ({error.strerror}); leave it out with --exclude"
        ) from error
    size_bytes = target.stat().st_size
    if size_bytes >= limit_bytes:
        raise FormatError(_too_large(folder, names, limit_bytes))
    return Package(target, tuple(names), size_bytes, secrets, links)


def _add(archive: zipfile.ZipFile, path: Path, name: str, limit_bytes: int) -> None:
    """One file, with its permissions but without its time. Nothing is read once the limit is reached."""
    entry = zipfile.ZipInfo(Path(name).as_posix())
    entry.external_attr = path.stat().st_mode << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as sink:
        while archive.fp is not None and archive.fp.tell() < limit_bytes and (part := source.read(2**20)):
            sink.write(part)


def _files(folder: Path, left_out: Sequence[str]) -> Iterator[str]:
    """Files to send, relative to the folder."""
    tracked = _known_to_git(folder)
    for name in _walk(folder, left_out) if tracked is None else tracked:
        if _kept(name, left_out):
            path = folder / name
            if path.is_file():
                yield name
            elif not path.resolve().is_relative_to(folder.resolve()):
                yield name  # a link that `pack` leaves out
            elif path.is_dir():  # git names a repository inside this one, or a link to a folder, but not what is in it
                yield from (os.path.join(name, inner) for inner in _walk(path, left_out))


def _walk(folder: Path, left_out: Sequence[str]) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        relative = os.path.relpath(place, folder)
        folders[:] = [name for name in folders if _kept(os.path.normpath(os.path.join(relative, name)), left_out)]
        names = (os.path.normpath(os.path.join(relative, name)) for name in files)
        yield from (name for name in names if _kept(name, left_out) and (folder / name).is_file())


def _kept(name: str, left_out: Sequence[str]) -> bool:
    """Whether neither the path nor one of the names on it is to be left out."""
    path = Path(name)
    parts = (*path.parts, *(parent.as_posix() for parent in path.parents), path.as_posix())
    return not any(fnmatch(part, pattern.rstrip("/")) for part in parts for pattern in left_out)


def _known_to_git(folder: Path) -> list[str] | None:
    """Files that git tracks or would track; None where there is no git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return sorted({name for name in done.stdout.split("\0") if name}) if done.returncode == 0 else None


def _too_large(folder: Path, names: Iterable[str], limit_bytes: int) -> str:
    sizes: dict[str, int] = {}
    for name in names:
        first = Path(name).parts[0]
        sizes[first] = sizes.get(first, 0) + (folder / name).stat().st_size
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    shown = ", ".join(f"{name} {sizes[name] / 2**20:.0f} MiB" for name in largest)
    return (
        f"working directory {folder} packs to more than {limit_bytes / 2**20:.0f} MiB, the most that Ray sends to a "
        f"job (largest: {shown})\nleave something out (--exclude {largest[0]}); data go on storage that all nodes share"
    )
