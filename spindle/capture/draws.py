"""Draws: where a random number stands in training in; the number out, the same whatever the plan.

- A number is a function of (seed, step, batch of the step, task, call site, sample). Not of the rank, nor of how the
  batch is cut, nor of what was drawn before: so any part of a batch gets its part of what the whole batch would get,
  and what is computed again gets the same again.
- A generator is seeded for each chunk of samples, as many as make up `CHUNK` numbers: seeding one for each sample costs
  more than drawing when samples are small, and one for the whole batch would draw all of it on every rank.
- `Site` tells which dimension of a draw the samples lie along; it is found while the task is traced.
- In a tensor-parallel run a rank that computes a part of the features draws what the whole would, and takes its part.
"""

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spindle.errors import WorkloadError

_CPU = torch.device("cpu")
CHUNK = {"cpu": 4096}
GPU_CHUNK = 1 << 20  # a kernel launch takes the time of about a million numbers

GLOBAL_GENERATORS = threading.Lock()
"""Held by whoever puts the process's own generators in another state for a while, or watches whether they move."""

Sites = Mapping[str, "tuple[Site, ...]"]
"""Of one task: what each of its scopes draws, in order. A scope is a call of a block, or "" for the glue."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where one call draws: `per_sample` entries of dimension `dim` belong to each sample. -1: the draw is not made of
    samples, and every part of the batch gets all of it. `inner`: its other sizes where all features are computed.
    """

    dim: int
    per_sample: int
    inner: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stream:
    """A position in training: which step, batch and task a piece of code runs for, and its first sample.

    `device`: where the code runs. `portable`: draw on the CPU, whose numbers are the same in front of every device.
    `fake`: shapes alone are wanted. `part` of `parts` of the features of `samples` samples are computed.
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

    def key(self, scope: str, index: int) -> int:
        """Seed of draw number `index` in `scope`."""
        text = f"{self.seed}/{self.step}/{self.batch}/{self.task}/{scope}/{index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


_STREAM: ContextVar[Stream] = ContextVar("spindle_stream", default=Stream())  # noqa: B039 - frozen


_DRAWING: ContextVar[bool] = ContextVar("spindle_drawing", default=False)


def is_drawing() -> bool:
    """Whether a draw of ours is under way, which uses torch's random functions itself."""
    return _DRAWING.get()


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
        if site.dim < 0:
            shape = (stream.parts > 1 and site.inner) or what.shape
            whole = what.filled(generator.manual_seed(key), shape)
            return _own_part(whole, what.shape, stream).to(what.device)
        inner = list(what.shape)
        rows = inner.pop(site.dim)
        samples = stream.samples if stream.parts > 1 else rows // site.per_sample
        of_sample = (site.per_sample, *((stream.parts > 1 and site.inner) or inner))
        parts = list(_chunks(what, generator, key, (samples, *of_sample), stream.low))
        values = torch.cat(parts) if parts else what.filled(generator, (0, *of_sample))
        values = _own_part(values, (samples, rows // max(1, samples), *inner), stream)
        return values.flatten(0, 1).movedim(0, site.dim).to(what.device)


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
    """Numbers of samples `first` up, samples in the first dimension, a chunk at a time."""
    samples, *of_sample = shape
    size = max(1, CHUNK.get(generator.device.type, GPU_CHUNK) // max(1, math.prod(of_sample)))
    for chunk in range(first // size, -(-(first + samples) // size)):
        generator.manual_seed((key + chunk * 0x9E3779B97F4A7C15) % (1 << 63))
        values = what.filled(generator, (size, *of_sample))
        start = chunk * size
        yield values[max(0, first - start) : min(size, first + samples - start)]


@torch.library.custom_op("spindle::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_operator(
    like: Tensor | None,
    fill: str,
    numbers: list[float],
    shape: list[int],
    dtype: torch.dtype | None,
    scope: str,
    index: int,
    dim: int,
    per_sample: int,
) -> Tensor:
    """A draw in a traced graph. It takes the device, and without `dtype` the type, of `like`."""
    found = (like.dtype if like is not None else torch.get_default_dtype()) if dtype is None else dtype
    device = like.device if like is not None else current().device
    what = Draw(fill, tuple(numbers), tuple(shape), found, device)
    return draw(what, scope, index, Site(dim, per_sample))


@draw_operator.register_fake
def _(
    like: Tensor | None,
    fill: str,
    numbers: list[float],
    shape: list[int],
    dtype: torch.dtype | None,
    scope: str,
    index: int,
    dim: int,
    per_sample: int,
) -> Tensor:
    if like is None:
        return torch.empty(shape, dtype=dtype)
    return like.new_empty(shape, dtype=dtype)
