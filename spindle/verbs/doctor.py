"""Doctor: this machine in, a list of findings out: what would keep a run from working here, and what to do about it.

- A finding is ok, a warning (it runs, but not as well, or not on several machines), or a failure (it will not run).
- Versions are held against what Spindle itself asks for when it is installed; nothing is listed twice.
- The trial of gloo is real: two ranks add a tensor over the network, as every run does, within seconds.
"""

import concurrent.futures
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
GIB = 2**30
TRIAL_S = 10.0
PYTHON = (3, 11)
ELSEWHERE = "192.0.2.1"  # an address that no machine has (RFC 5737); nothing is sent there


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one look found; `remedy` is empty when all is well."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name=name, status="ok", found=found)


def warn(name: str, found: str, remedy: str) -> Finding:
    """It runs, but not as well, or not everywhere."""
    return Finding(name=name, status="warn", found=found, remedy=remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    """It will not run."""
    return Finding(name=name, status="fail", found=found, remedy=remedy)


def examine() -> Iterator[Finding]:
    """All looks, one after another. One that itself breaks is a failure that names the error."""
    yield from _safely("python", lambda: [python_version(sys.version_info[:3])])
    yield from _safely("packages", lambda: list(packages(metadata.requires("spindle") or [])))
    for name, look in LOOKS:
        yield from _safely(name, look)


def _safely(name: str, look: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    try:
        return look()
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return [fail(name, f"{type(error).__name__}: {text}", "this look itself failed; mend what it names")]


# -- versions ---------------------------------------------------------------------------------------------------------


def python_version(version: tuple[int, ...]) -> Finding:
    """The interpreter."""
    shown = ".".join(map(str, version))
    if version[:2] < PYTHON:
        return fail("python", shown, f"use Python {'.'.join(map(str, PYTHON))} or later")
    return ok("python", f"{shown} at {sys.executable}")


def packages(required: Sequence[str], installed: Callable[[str], str] = metadata.version) -> Iterator[Finding]:
    """The packages of `required` (as in package metadata) that a run needs, and the extra one that brings models."""
    wanted = {"hf": "models of the Hugging Face hub"}
    for text in required:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?(?:>=([\d.]+))?(?:.*extra == ['\"](\w+)['\"])?", text)
        if match is None:
            continue
        name, least, extra = match[1], match[2] or "0", match[3]
        if extra is not None and extra not in wanted:
            continue
        try:
            version = installed(name)
        except metadata.PackageNotFoundError:
            if extra is None:
                yield fail(name, "not installed", f"pip install '{name}>={least}'")
            else:
                yield warn(name, "not installed", f"pip install 'spindle[{extra}]' for {wanted[extra]}")
            continue
        if _parts(version) < _parts(least):
            yield fail(name, f"{version}, needs {least} or later", f"pip install --upgrade '{name}>={least}'")
        else:
            yield ok(name, version)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


# -- devices ----------------------------------------------------------------------------------------------------------


def devices() -> list[Finding]:
    """GPUs that torch can use, the driver's word against it, and the libraries that carry tensors."""
    import torch
    import torch.distributed as dist

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [gpus(count, torch.version.cuda, Path("/proc/driver/nvidia").exists())]
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        shown = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        busy = free < total / 2
        found.append(
            warn(f"gpu {index}", shown, "end what else runs on it (nvidia-smi tells)")
            if busy
            else ok(f"gpu {index}", shown)
        )
    if count:
        there = dist.is_nccl_available()
        nccl: Any = torch.cuda.nccl
        version = ".".join(map(str, nccl.version())) if there else ""
        found.append(
            ok("nccl", version) if there else fail("nccl", "not in this torch", "install a CUDA build of torch")
        )
    there = dist.is_gloo_available()
    found.append(ok("gloo", "there") if there else fail("gloo", "not in this torch", "install torch from pytorch.org"))
    return found


def gpus(count: int, cuda: str | None, driver: bool) -> Finding:
    """Whether torch sees the GPUs that there are."""
    if count:
        return ok("gpus", f"{count}, CUDA {cuda}")
    if driver and cuda is None:
        return warn("gpus", "a driver, but torch is built without CUDA", "install the CUDA build (pytorch.org)")
    if driver:
        remedy = "look at CUDA_VISIBLE_DEVICES and at whether the driver is new enough (nvidia-smi)"
        return warn("gpus", f"a driver, but torch (CUDA {cuda}) sees no device", remedy)
    from spindle.runtime.comms.host import usable_cores

    return ok("gpus", f"none; runs use {len(usable_cores())} cores")


# -- room -------------------------------------------------------------------------------------------------------------


def memory(meminfo: str) -> Finding:
    """Free main memory, of /proc/meminfo."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    if match is None:
        return ok("memory", "unknown on this system")
    free = int(match[1]) * 1024
    shown = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        return warn("memory", shown, "a rank of a small model takes half a GiB; end other programs")
    return ok("memory", shown)


def shared_memory(free: float | None) -> Finding:
    """/dev/shm, which loaders with workers, NCCL and Ray use."""
    if free is None:
        return ok("shared memory", "no /dev/shm on this system")
    shown = f"/dev/shm has {free / GIB:.2f} GiB free"
    if free < GIB:
        remedy = "containers: --shm-size=8g (Docker), an emptyDir of medium Memory at /dev/shm (Kubernetes)"
        return warn("shared memory", shown, remedy)
    return ok("shared memory", shown)


def temporary(directory: str) -> Finding:
    """Whether the temporary directory can be written, and has room."""
    remedy = "set TMPDIR to a directory that you may write"
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"spindle")
    except OSError as error:
        return fail("temporary files", f"{directory} cannot be written ({error.strerror or error})", remedy)
    free = shutil.disk_usage(directory).free
    shown = f"{directory} has {free / GIB:.1f} GiB free"
    return warn("temporary files", shown, f"make room, or {remedy}") if free < GIB else ok("temporary files", shown)


def open_files(limit: int) -> Finding:
    """Connections and files that one process may have open."""
    if 0 <= limit < 4096:
        return warn("open files", f"at most {limit}", "ulimit -n 65536; many ranks and Ray need more")
    return ok("open files", f"at most {limit}" if limit >= 0 else "no limit")


# -- network ----------------------------------------------------------------------------------------------------------


def loopback() -> Finding:
    """Whether two sockets of this machine reach each other."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), 2.0).close()
    except OSError as error:
        return fail("loopback", str(error), "bring the interface up: ip link set lo up")
    return ok("loopback", "127.0.0.1 answers")


def interface(chosen: str | None, outward: str | None, known: Sequence[str]) -> Finding:
    """What gloo takes between machines: GLOO_SOCKET_IFNAME, else what leads to rank 0; `outward` leads to others."""
    name = "interface"
    if chosen:
        if chosen in known:
            return ok(name, f"{chosen}, by GLOO_SOCKET_IFNAME")
        return fail(name, f"GLOO_SOCKET_IFNAME is {chosen!r}, which is none", f"choose of {', '.join(sorted(known))}")
    if outward is None:
        remedy = "for runs over several machines set GLOO_SOCKET_IFNAME to the one that they share"
        return warn(name, "none is known to lead to other machines", remedy)
    return ok(name, f"{outward} leads to other machines; GLOO_SOCKET_IFNAME chooses another one")


def _interface() -> Finding:
    from spindle.runtime.comms.host import interface_to

    known = [name for _, name in socket.if_nameindex()]
    return interface(os.environ.get("GLOO_SOCKET_IFNAME"), interface_to(ELSEWHERE), known)


def gloo_trial(timeout_s: float = TRIAL_S) -> Finding:
    """Two ranks, as threads, add a tensor over gloo and the interface that it takes."""
    import torch
    import torch.distributed

    dist: Any = torch.distributed  # the classes below have no stubs
    store, timeout = dist.HashStore(), timedelta(seconds=timeout_s)

    def rank(number: int) -> float:
        group = dist.ProcessGroupGloo(store, number, 2, timeout)
        value = torch.tensor([float(number + 1)])
        group.allreduce([value]).wait()
        return float(value)

    remedy = "set GLOO_SOCKET_IFNAME (lo on one machine); see that no firewall stands between ports of this machine"
    pool = concurrent.futures.ThreadPoolExecutor(2)
    try:
        results = [future.result(timeout_s + 1) for future in [pool.submit(rank, number) for number in range(2)]]
    except Exception as error:
        return fail("all-reduce", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", remedy)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return (
        ok("all-reduce", "two ranks agree") if results == [3.0, 3.0] else fail("all-reduce", f"gave {results}", remedy)
    )


def _meminfo() -> str:
    path = Path("/proc/meminfo")
    return path.read_text() if path.exists() else ""


def _shm() -> float | None:
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else None


LOOKS: tuple[tuple[str, Callable[[], Sequence[Finding]]], ...] = (
    ("devices", devices),
    ("memory", lambda: [memory(_meminfo())]),
    ("shared memory", lambda: [shared_memory(_shm())]),
    ("temporary files", lambda: [temporary(tempfile.gettempdir())]),
    ("open files", lambda: [open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])]),
    ("loopback", lambda: [loopback()]),
    ("interface", lambda: [_interface()]),
    ("all-reduce", lambda: [gloo_trial()]),
)


def render(finding: Finding) -> list[str]:
    """One line, and a second one with the remedy."""
    line = f"{finding.status:5} {finding.name:16} {finding.found}"
    return [line, f"{'':22} {finding.remedy}"] if finding.remedy else [line]


def verdict(findings: Sequence[Finding]) -> dict[str, Any]:
    """All findings as plain values; `ok` when none is a failure."""
    rows = [{"name": f.name, "status": f.status, "found": f.found, "remedy": f.remedy} for f in findings]
    return {"ok": all(f.status != "fail" for f in findings), "findings": rows}
