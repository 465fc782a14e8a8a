"""Rows: which values of a piece of code belong to single samples, found by running it, not by trusting a flag.

- The piece runs on a few samples together and on parts of them. A value whose parts, put together, are the whole is
  made of rows; a value that is not mixes samples, or counts them.
- Two trials: on real samples, and on samples whose entries were shuffled, masked and jittered, because real ones can
  hide mixing (equal lengths, all-ones masks). Parameters are jittered too: zeros hide everything.
- Random functions are switched off meanwhile.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from spindle.workload import Batch

PROBE_SAMPLES = 5
FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AssertionError)
"""What code raises that cannot run on the number of samples it is given."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
_MASK = 1e30  # infinities, and the least numbers of a type, stand in attention masks and masked logits


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` entries of dimension `dim` belong to each sample."""

    count: int
    dim: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of a value: its rows, if its shape has any, and whether they do not depend on other samples."""

    rows: Rows | None
    independent: bool


def split_sizes(samples: int) -> tuple[int, ...]:
    """Uneven parts of the probe, so that a mean of means differs from the mean."""
    return (samples,) if samples < 2 else (samples // 2, samples - samples // 2)


def compare(
    whole: Sequence[Any], run: Callable[[int, int], Sequence[Any]], samples: int, *, known: int
) -> list[Finding]:
    """Findings for the first `known` values of `whole`, which `run(low, high)` computes from samples low..high-1.

    A value that could not be computed is None, and nothing is found for it.
    """
    parts, low = [], 0
    for size in split_sizes(samples):
        parts.append((size, run(low, low + size)))
        low += size
    return [
        _finding(value, [(size, values[index]) for size, values in parts], samples)
        for index, value in enumerate(whole[:known])
    ]


def agreed(findings: Sequence[Finding]) -> Finding:
    """What trials agree on."""
    rows = {finding.rows for finding in findings}
    return Finding(rows.pop() if len(rows) == 1 else None, all(finding.independent for finding in findings))


def _finding(whole: Any, parts: Sequence[tuple[int, Any]], samples: int) -> Finding:
    if not isinstance(whole, Tensor) or not all(isinstance(part, Tensor) for _, part in parts):
        return Finding(None, False)
    candidates = [
        Rows(size // samples, dim)
        for dim, size in enumerate(whole.shape)
        if size and size % samples == 0 and _scales(whole, parts, dim, size // samples)
    ]
    for rows in candidates:
        joined = torch.cat([part for _, part in parts], rows.dim)
        if _close(joined, whole):
            return Finding(rows, True)
    if not candidates and all(part.shape == whole.shape and _close(part, whole) for _, part in parts):
        return Finding(None, True)
    return Finding(candidates[0] if candidates else None, False)


def _scales(whole: Tensor, parts: Sequence[tuple[int, Any]], dim: int, count: int) -> bool:
    """Whether the parts have the whole's shape but for dimension `dim`, which is as long as their samples ask."""
    return all(part.shape == (*whole.shape[:dim], size * count, *whole.shape[dim + 1 :]) for size, part in parts)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree up to rounding: each entry as exactly as the largest one that is no mask."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _TOLERANCE.get(b.dtype, 2e-4)
    a, b = (value.detach().to(torch.promote_types(value.dtype, torch.float32)) for value in (a, b))  # or a parameter
    if not b.numel():
        return True
    scale, distance = float(b.abs().max()), float((a - b).abs().max())
    if math.isfinite(distance) and scale < _MASK:
        return distance <= tolerance * max(scale, 1e-30)
    a, b = (torch.nan_to_num(value.double(), nan=7.0) for value in (a, b))
    size = b.abs()
    scale = float(size[size < _MASK].max()) if bool((size < _MASK).any()) else 0.0
    return bool(((a - b).abs() <= tolerance * torch.where(size < _MASK, max(scale, 1e-30), size)).all())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The probe is so small that waking and parking threads would take longer than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def disturbed(batch: Batch, generator: torch.Generator, *, gently: bool = False) -> Batch:
    """The batch with its entries moved about: integers shuffled, masks cut short, floats jittered.

    `gently`: integers keep their place in the sample and change samples alone, so that what a model demands of them
    (grids, image tokens where images go) still holds.
    """
    return {name: _disturb(value, generator, gently=gently) for name, value in batch.items()}


def _disturb(value: Tensor, generator: torch.Generator, *, gently: bool) -> Tensor:
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.dtype)
        return value + noise * (float(value.double().std(correction=0)) or 1.0)
    if value.ndim > 1 and bool(((value == 0) | (value == 1)).all()) and bool((value == 1).any()):
        lengths = torch.randint(1, value.shape[-1] + 1, value.shape[:-1], generator=generator)
        return value * (torch.arange(value.shape[-1]) < lengths[..., None]).to(value.dtype)
    if gently:
        flat = value.flatten(1) if value.ndim > 1 else value[:, None]
        return flat.gather(0, torch.rand(flat.shape, generator=generator).argsort(0)).reshape(value.shape)
    order = torch.randperm(value.numel(), generator=generator)
    return value.flatten()[order].reshape(value.shape)


def jittered(module: fx.GraphModule, generator: torch.Generator) -> fx.GraphModule:
    """A copy of a module on the CPU, its parameters moved off zeros and ones; those on the meta device made up."""
    twin = copy.deepcopy(module)
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.detach().zero_()
    twin = twin.to("cpu")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02)
    return twin


class Tolerant(fx.Interpreter):
    """Runs a graph node by node; what cannot be computed is None, and so is all that depends on it.

    Code that has the batch size baked in fails on a probe of another size; the rest of its group is still looked at.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        """`module` returns a tuple."""
        super().__init__(module, garbage_collect_values=False)

    def run_node(self, n: fx.Node) -> Any:
        """One node, or None."""
        if n.op == "output":
            return tuple(self.env[source] for source in n.args[0])  # type: ignore[union-attr, index]
        if any(self.env[source] is None for source in n.all_input_nodes):
            return None
        try:
            return super().run_node(n)
        except FAILURES:
            return None
