"""Draws: where a random number stands in training in; the number out, the same whatever the plan.

- A number is a function of (seed, step, batch of the step, task, call site, sample). Not of the rank, nor of how the
  batch is cut, nor of what was drawn before: so any part of a batch gets its part of what the whole batch would get,
  and what is computed again gets the same again.
- A generator is seeded for each chunk of entries, as many as make up `CHUNK` numbers: seeding one for each costs more
  than drawing when they are small, and one for the whole batch would draw all of it on every rank.
- `Site` tells which dimension of a draw the samples lie along; it is found when the task is captured.
- In a tensor-parallel run a rank that computes a part of the features draws what the whole would, and takes its part.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spindle.errors import WorkloadError
from spindle.values.units import SAMPLES, Units

_CPU = torch.device("cpu")
CHUNK = {"cpu": 4096}
GPU_CHUNK = 1 << 20  # a kernel launch takes the time of about a million numbers

GLOBAL_GENERATORS = threading.Lock()
"""Held by code that puts the process's own generators in another state for a while, or watches whether they move."""

Sites = Mapping[str, "tuple[Site, ...]"]
"""Of one task: what each of its scopes draws, in order. A scope is a call of a block, or "" for the glue."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where one call draws: rows of `unit` lie along dimension `dim`, `per_sample` entries to each row. dim -1: the
    draw is not made of samples, and every part of the batch gets all of it. `inner`: its other sizes where all features
    are computed. per_sample 0: the number differs from batch to batch, and follows from the size at hand.
    """

    dim: int
    per_sample: int = 0
    inner: tuple[int, ...] = ()
    unit: str = SAMPLES


@dataclass(frozen=True, slots=True)
class Stream:
    """A position in training: which step, batch and task a piece of code runs for, and its samples low..high-1.

    `units` tell the rows of the batch's samples; None: one row each. `device`: where the code runs. `portable`: draw on
    the CPU, whose numbers are the same in front of every device. `fake`: shapes alone are wanted. `part` of `parts` of
    the features of `samples` samples are computed.
    """

    seed: int = 0
    step: int = 0
    batch: int = 0
    task: str = ""
    low: int = 0
    device: torch.device = _CPU
    portable: bool = False
    fake: bool = False
    part: int = 0
    parts: int = 1
    samples: int = 0
    units: Units | None = None
    high: int = 0

    def rows(self, site: Site) -> tuple[int, int]:
        """Rows of a site's unit before the samples at hand, and among them."""
        if self.units is None:
            return self.low, self.samples
        return self.units.rows(site.unit, 0, self.low), self.units.rows(site.unit, self.low, self.high)

    def first_entry(self, site: Site, size: int) -> int:
        """Entries before the samples at hand, whose own are `size`, along the dimension of a draw."""
        if self.units is None:
            return self.low * site.per_sample
        before, rows = self.rows(site)
        if rows == 0:
            return 0
        if before * size % rows:
            raise WorkloadError(
                f"a draw has {size} numbers along the dimension of {rows} rows of {site.unit!r}; draw as many for each"
            )
        return before * size // rows

    def key(self, scope: str, index: int) -> int:
        """Seed of draw number `index` in `scope`."""
        text = f"{self.seed}/{self.step}/{self.batch}/{self.task}/{scope}/{index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


_STREAM: ContextVar[Stream] = ContextVar("spindle_stream", default=Stream())  # noqa: B039 - frozen


_DRAWING: ContextVar[bool] = ContextVar("spindle_drawing", default=False)


def is_drawing() -> bool:
    """Whether a draw of ours is under way, which uses torch's random functions itself."""
    return _DRAWING.get()


@contextmanager
def drawing_unseen() -> Iterator[None]:
    """While open torch's random functions may be called: what they give does not count."""
    token = _DRAWING.set(True)
    try:
        yield
    finally:
        _DRAWING.reset(token)


def current() -> Stream:
    """The stream that code draws from just now."""
    return _STREAM.get()


@contextmanager
def drawing_from(stream: Stream) -> Iterator[None]:
    """While open, code that draws stands at `stream`."""
    token = _STREAM.set(stream)
    try:
        yield
    finally:
        _STREAM.reset(token)


@contextmanager
def shapes_only() -> Iterator[None]:
    """While open, nothing is drawn: for code that runs on fake tensors."""
    with drawing_from(replace(current(), fake=True)):
        yield


@dataclass(frozen=True, slots=True)
class Draw:
    """What one call asks for: `fill` is the in-place method of Tensor that draws, with `numbers` as its arguments."""

    fill: str
    numbers: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def filled(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        """Numbers of any shape."""
        values = torch.empty(tuple(shape), dtype=self.dtype, device=generator.device)
        numbers = (int(n) for n in self.numbers) if self.fill == "random_" else self.numbers
        token = _DRAWING.set(True)
        try:
            result: Tensor = getattr(values, self.fill)(*numbers, generator=generator)
        finally:
            _DRAWING.reset(token)
        return result


def draw(what: Draw, scope: str, index: int, site: Site) -> Tensor:
    """The numbers of one call for the samples at hand."""
    stream = current()
    if stream.fake:
        return torch.empty(what.shape, dtype=what.dtype, device=what.device)
    device = _CPU if stream.portable else what.device
    with torch._C.DisableTorchFunction(), torch.no_grad():  # modes must not see these calls
        generator, key = torch.Generator(device), stream.key(scope, index)
        whole = stream.parts > 1 and site.inner
        if site.dim < 0:
            values = what.filled(generator.manual_seed(key), whole or what.shape)
            return _own_part(values, what.shape, stream).to(what.device)
        inner = list(what.shape)
        size = inner.pop(site.dim)
        if stream.parts == 1:
            parts = list(_chunks(what, generator, key, (size, *inner), stream.first_entry(site, size)))
            values = torch.cat(parts) if parts else what.filled(generator, (0, *inner))
            return values.movedim(0, site.dim).to(what.device)
        before, rows = stream.rows(site)
        of_row, others = site.per_sample, tuple(whole or inner)
        parts = list(_chunks(what, generator, key, (rows * of_row, *others), before * of_row))
        values = torch.cat(parts) if parts else what.filled(generator, (0, *others))
        values = values.reshape(rows, of_row, *others)
        values = _own_part(values, (rows, size // max(1, rows), *inner), stream)
        return values.flatten(0, 1).movedim(0, site.dim).to(what.device)


def draw_rows(function: Callable[..., Tensor], values: Tensor, args: Sequence[Any], key: int, first: int) -> Tensor:
    """A draw whose law each entry of the first dimension has by itself: `function(values[i], *args)`, entry by entry.

    Entry i draws from a generator of its own, so that it gets the same numbers in any part of the batch.
    """
    with torch._C.DisableTorchFunction(), torch.no_grad():
        generator, found = torch.Generator(), []
        for number, row in enumerate(values.detach().cpu()):
            generator.manual_seed((key + (first + number) * 0x9E3779B97F4A7C15) % (1 << 63))
            found.append(_drawing(function, row, args, generator))
        return torch.stack(found).to(values.device) if found else function(values, *args)


def _drawing(function: Callable[..., Tensor], row: Tensor, args: Sequence[Any], generator: torch.Generator) -> Tensor:
    token = _DRAWING.set(True)
    try:
        return function(row, *args, generator=generator)
    finally:
        _DRAWING.reset(token)


def _own_part(whole: Tensor, shape: Sequence[int], stream: Stream) -> Tensor:
    """The part of what the whole draws that belongs to this rank's part of the features."""
    cut = [dim for dim, (size, own) in enumerate(zip(whole.shape, shape, strict=True)) if size != own]
    if not cut:
        return whole
    if len(cut) > 1 or whole.shape[cut[0]] != shape[cut[0]] * stream.parts:
        raise WorkloadError(
            f"a layer that tensor parallelism cuts over {stream.parts} devices draws {tuple(shape)} random numbers "
            f"where one process draws {tuple(whole.shape)}; it must draw an equal part along one dimension, or all"
        )
    return whole.narrow(cut[0], stream.part * shape[cut[0]], shape[cut[0]])


def _chunks(what: Draw, generator: torch.Generator, key: int, shape: tuple[int, ...], first: int) -> Iterator[Tensor]:
    """Numbers of entries `first` up, entries in the first dimension, a chunk at a time."""
    entries, *of_entry = shape
    size = max(1, CHUNK.get(generator.device.type, GPU_CHUNK) // max(1, math.prod(of_entry)))
    for chunk in range(first // size, -(-(first + entries) // size)):
        generator.manual_seed((key + chunk * 0x9E3779B97F4A7C15) % (1 << 63))
        values = what.filled(generator, (size, *of_entry))
        start = chunk * size
        yield values[max(0, first - start) : min(size, first + entries - start)]
