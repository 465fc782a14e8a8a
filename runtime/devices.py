"""Devices: what a rank asks of the device that it computes on. In what order that device does things, and who waits.

- On a CPU (`Streams`) everything is done when a call returns, so that nobody waits.
- On a GPU (`GpuStreams`) a call only gives work to a stream; each wait that stands here or in a caller is explained in
  docs/runtime.md, and taken away by a test (tests/parity/test_late_messages.py).
- `Driver` is what a GPU offers, a call each: `CudaDriver` here, and `tests/late_transport.py`, as late as a GPU may be.

No other module of the runtime names `torch.cuda`.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Taken = Callable[[], Tensor]
"""Gives a tensor that is on its way, once its reader may read it."""

CONNECTIONS = ("CUDA_DEVICE_MAX_CONNECTIONS", "32")
"""Hardware queues of a GPU, set before its first use: with the usual 8 a message that waits holds up other streams."""


class Streams:
    """A CPU: what was asked for is done when the call returns."""

    ahead = 0
    """Steps that the process may have given to the device beyond the one whose numbers it reports."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def enter_thread(self) -> None:
        """Let this thread use the rank's device: threads begin on the first one of the machine."""

    def copy_in(self, tensor: Tensor) -> Taken:
        """Begin to bring a tensor from main memory to the device; what gives it to its reader, who computes."""
        return lambda: tensor.to(self.device)

    def numbers(self, rows: Sequence[Tensor]) -> Callable[[], list[float]]:
        """Begin to bring numbers to the process; what waits for them and gives all of all rows, one after the other."""
        found = [float(number) for row in rows for number in row.detach().reshape(-1).tolist()]
        return lambda: found

    def mark(self) -> Any:
        """The moment at which the device has done all that it was given so far by this thread."""
        return time.perf_counter()

    def has_passed(self, moment: Any) -> bool:
        """Whether the device has come there."""
        del moment
        return True

    def between_s(self, begun: Any, ended: Any) -> float:
        """Seconds from one moment to a later one, both passed."""
        return float(ended - begun)

    def settle(self) -> None:
        """Wait until the device has done all that it was given."""

    def set_origin(self) -> None:
        """Compare the device's clock with that of the process; waits for the device."""

    def moment_s(self, moment: Any) -> float:
        """A passed moment, or one of the process, in seconds of the process's clock (`time.perf_counter`)."""
        return float(moment)

    def held_bytes(self) -> int:
        """What this rank holds: in tensors on its GPU, else as a process; 0 where that is not known."""
        try:
            with open("/proc/self/statm", "rb") as file:
                return int(file.read().split()[1]) * resource.getpagesize()
        except (OSError, ValueError, IndexError):
            return 0

    def peak_bytes(self) -> int:
        """The most that it has held."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


class Driver(Protocol):
    """What a GPU offers. Streams and marks are its own kinds of values."""

    def enter(self) -> None:
        """Make the GPU that of this thread."""

    def computing(self) -> Any:
        """The stream to which this thread gives its work."""

    def new_stream(self) -> Any:
        """A stream beside it."""

    def staged(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in main memory that the GPU can read and write by itself (pinned)."""

    def copy(self, source: Tensor, stream: Any, *, to_host: bool = False) -> Tensor:
        """Give a stream the copying of a tensor, into new memory that belongs to that stream."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Keep memory from being used again until the stream has done what it was given up to the tensor's end."""

    def mark(self, stream: Any) -> Any:
        """A moment of a stream: it has done all that it was given so far."""

    def wait(self, stream: Any, mark: Any) -> None:
        """Have a stream wait for a moment of another one."""

    def settle(self, mark: Any) -> None:
        """Have the process wait for a moment."""

    def passed(self, mark: Any) -> bool:
        """Whether a moment has come."""

    def between_s(self, begun: Any, ended: Any) -> float:
        """Seconds between two moments that have come."""

    def held_bytes(self, *, most: bool) -> int:
        """Bytes of tensors now, or the most there were."""


class GpuStreams(Streams):
    """A GPU: the process gives work to its streams, and is up to a step ahead of it."""

    ahead = 1

    def __init__(self, device: torch.device, driver: Driver | None = None) -> None:
        super().__init__(device)
        self._driver = driver or CudaDriver(device)
        self.enter_thread()
        self._copying = self._driver.new_stream()
        self._origin: tuple[Any, float] | None = None

    def enter_thread(self) -> None:
        """See Streams."""
        self._driver.enter()

    def copy_in(self, tensor: Tensor) -> Taken:
        """The copy runs beside what is computed; may be begun by any thread that has entered. What is not an ordinary
        tensor in main memory is brought when it is read.
        """
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return super().copy_in(tensor)
        driver = self._driver
        moved = driver.copy(driver.staged(tensor), self._copying)
        arrived = driver.mark(self._copying)

        def take() -> Tensor:
            reader = driver.computing()
            driver.wait(reader, arrived)
            driver.keep(moved, reader)
            return moved

        return take

    def numbers(self, rows: Sequence[Tensor]) -> Callable[[], list[float]]:
        """One copy for all; it stands in the order of what is computed, so that later writes do not matter."""
        driver, left = self._driver, None
        if rows:
            row = torch.cat([each.detach().reshape(-1).to(torch.float64) for each in rows])
            left = driver.copy(row, driver.computing(), to_host=True)
        there = driver.mark(driver.computing())

        def take() -> list[float]:
            driver.settle(there)  # without a number too: then the process is no step ahead
            found: list[float] = [] if left is None else left.tolist()
            return found

        return take

    def mark(self) -> Any:
        """See Streams."""
        return self._driver.mark(self._driver.computing())

    def has_passed(self, moment: Any) -> bool:
        """See Streams."""
        return self._driver.passed(moment)

    def between_s(self, begun: Any, ended: Any) -> float:
        """See Streams."""
        return self._driver.between_s(begun, ended)

    def settle(self) -> None:
        """See Streams."""
        self._driver.settle(self.mark())

    def set_origin(self) -> None:
        """See Streams."""
        mark = self.mark()
        self._driver.settle(mark)
        self._origin = mark, time.perf_counter()

    def moment_s(self, moment: Any) -> float:
        """See Streams."""
        if isinstance(moment, float):
            return moment
        assert self._origin is not None, "no origin was set"
        return self._origin[1] + self._driver.between_s(self._origin[0], moment)

    def held_bytes(self) -> int:
        """See Streams."""
        return self._driver.held_bytes(most=False)

    def peak_bytes(self) -> int:
        """See Streams."""
        return self._driver.held_bytes(most=True)


class CudaDriver:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def enter(self) -> None:
        """See Driver."""
        os.environ.setdefault(*CONNECTIONS)
        torch.cuda.set_device(self._device)

    def computing(self) -> torch.cuda.Stream:
        """See Driver."""
        return torch.cuda.current_stream(self._device)

    def new_stream(self) -> torch.cuda.Stream:
        """See Driver."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def staged(self, tensor: Tensor) -> Tensor:
        """The allocator of pinned memory keeps it until copies that were begun from it are through."""
        return torch.empty_like(tensor.detach(), pin_memory=True).copy_(tensor)

    def copy(self, source: Tensor, stream: torch.cuda.Stream, *, to_host: bool = False) -> Tensor:
        """See Driver."""
        with torch.cuda.stream(stream):
            if not to_host:
                return source.to(self._device, non_blocking=True)
            target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            return target.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        """See Driver."""
        tensor.record_stream(stream)

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """See Driver."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, mark: torch.cuda.Event) -> None:
        """See Driver."""
        stream.wait_event(mark)

    def settle(self, mark: torch.cuda.Event) -> None:
        """See Driver."""
        mark.synchronize()

    def passed(self, mark: torch.cuda.Event) -> bool:
        """See Driver."""
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def between_s(self, begun: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        """See Driver."""
        return float(begun.elapsed_time(ended)) / 1e3

    def held_bytes(self, *, most: bool) -> int:
        """See Driver."""
        asked = torch.cuda.max_memory_allocated if most else torch.cuda.memory_allocated
        return asked(self._device)


def streams_of(device: torch.device) -> Streams:
    """The streams of a device, which is that of this thread from now on."""
    return GpuStreams(device) if device.type == "cuda" else Streams(device)


# -- the GPUs of a machine --------------------------------------------------------------------------------------------


def gpu_count() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()


def gpu_id(number: int) -> str:
    """What tells a GPU from all others, of any machine."""
    os.environ.setdefault(*CONNECTIONS)
    return str(torch.cuda.get_device_properties(number).uuid)


def gpu_name() -> str:
    """The kind of GPU that this thread uses."""
    return torch.cuda.get_device_name()


def gpu_bytes() -> int:
    """Memory of the GPU that this thread uses."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def move_modules(modules: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Move modules to a device. A buffer that several of them hold stays one tensor there, which `Module.to` would copy
    for each.
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor that was moved, so that no other gets its id
    for module in modules:
        for part in module.modules():
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = moved.setdefault(id(value), (value, value.to(device)))[1]
        module.to(device)
