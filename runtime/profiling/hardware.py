"""Hardware: what a rank computes on, and with which versions, as profiles name it."""

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from spindle.runtime.devices import gpu_bytes, gpu_count, gpu_name


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device, one of `ranks` on its machine that are busy at once, with `threads` threads each (none on GPUs).

    `room_bytes`: what layers that are measured together may take of the memory of each.
    """

    device: str
    ranks: int
    threads: int | None
    torch: str
    python: str
    room_bytes: float


def hardware_here(ranks_here: int, num_threads: int) -> Hardware:
    """The device of one of `ranks_here` ranks on this machine, with `num_threads` threads on a CPU."""
    on_gpu = gpu_count() > 0
    return Hardware(
        device=device_name(),
        ranks=ranks_here,
        threads=None if on_gpu else num_threads,
        torch=torch.__version__,
        python=platform.python_version(),
        room_bytes=gpu_bytes() / 2 if on_gpu else _main_bytes() / 2 / ranks_here,
    )


def device_name() -> str:
    """What this machine computes on."""
    if gpu_count():
        return gpu_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"cpu {model}"


def _main_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
