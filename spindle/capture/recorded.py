"""Recorded: what calls of blocks give, from a real run of the task on a few samples.

For blocks that fake tensors cannot run through, because sizes or branches in them depend on the data: run twice, with
different numbers of samples, their results show which dimensions grow with the batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spindle.capture.blocks import INSIDE_BLOCK, Block, BlockCall, Forward, Results, Scopes, replaced
from spindle.capture.caches import caches_off, caching_configs
from spindle.capture.draws import Site
from spindle.capture.randomness import Drawing
from spindle.capture.rows import PROBE_SAMPLES
from spindle.capture.slots import with_slots
from spindle.errors import WorkloadError
from spindle.workload import Batch, Task, Workload

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Seen:
    """One call in one run: its results, tensors apart, what it drew, and the shapes drawn."""

    structure: Any
    tensors: list[Tensor]
    draws: list[Shape]
    written_out: bool


class _ShapesOfDraws(Drawing):
    """Draws as usual and keeps the shapes."""

    def __init__(self, scope: str) -> None:
        super().__init__(scope, None)
        self.shapes: list[Shape] = []

    def draw(self, fill: str, numbers: Sequence[float], shape: Sequence[int], **options: Any) -> Tensor:
        """Note the shape."""
        self.shapes.append(tuple(shape))
        return super().draw(fill, numbers, shape, **options)


class Recording:
    """Runs of a task on a few samples, made when they are first asked for."""

    def __init__(
        self, workload: Workload, task: Task, batch: Batch, blocks: Sequence[Block], paths: frozenset[str]
    ) -> None:
        """`paths`: those of `blocks` whose results are wanted."""
        self.paths = paths
        self.workload, self.task, self.batch, self.blocks = workload, task, batch, blocks
        most = min(PROBE_SAMPLES, task.batch_size)
        self.counts = tuple(dict.fromkeys((most, max(1, most - 2))))
        self.runs: list[dict[str, _Seen]] | None = None

    def error(self) -> Exception | None:
        """What the task function raises on real samples, if it does."""
        try:
            self._run()
        except Exception as error:
            return error
        return None

    def results(self, call: BlockCall, rows: int) -> Results:
        """What a call gives, with empty tensors; `rows` is the batch size as the trace knows it.

        Raises WorkloadError when a size does not grow with the batch alone.
        """
        self._run()
        assert self.runs is not None
        if any(call.scope not in run for run in self.runs):
            raise WorkloadError(f"task {self.task.name!r} calls {call.scope!r} only for some numbers of samples")
        seen = [run[call.scope] for run in self.runs]
        if any(len(one.tensors) != len(seen[0].tensors) or len(one.draws) != len(seen[0].draws) for one in seen):
            raise WorkloadError(
                f"task {self.task.name!r}: {call.scope!r} gives another number of tensors for another number of samples"
            )
        tensors = []
        for versions in zip(*(one.tensors for one in seen), strict=True):
            site = self._site([tuple(tensor.shape) for tensor in versions], call.scope)
            shape: list[int] = list(versions[0].shape)
            if site.dim >= 0:
                shape[site.dim] = site.per_sample * rows
            tensors.append(torch.empty(shape, dtype=versions[0].dtype))
        sites = tuple(self._site(versions, call.scope) for versions in zip(*(one.draws for one in seen), strict=True))
        return Results(seen[0].structure, tensors, sites, seen[0].written_out)

    def _site(self, shapes: Sequence[Shape], scope: str) -> Site:
        """The dimension that grows with the number of samples."""
        grown = [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
        inner = tuple(size for dim, size in enumerate(shapes[0]) if dim not in grown)
        if not grown:
            return Site(-1, 0, inner)
        ratios = {shape[grown[0]] / count for shape, count in zip(shapes, self.counts, strict=True)}
        if len(grown) > 1 or len(ratios) > 1 or not (ratio := ratios.pop()).is_integer():
            raise WorkloadError(
                f"task {self.task.name!r}: {scope!r} gives a tensor of {' and '.join(map(str, shapes))} for "
                f"{' and '.join(map(str, self.counts))} samples; its size must be a multiple of their number"
            )
        return Site(grown[0], int(ratio), inner)

    def _run(self) -> None:
        if self.runs is None:
            runs = []
            for count in self.counts:
                seen: dict[str, _Seen] = {}
                with self._buffers_kept(), torch.no_grad(), replaced(self.blocks, _noting(seen)), Drawing("", None):
                    self.task.function({name: value[:count].clone() for name, value in self.batch.items()})
                runs.append(seen)
            self.runs = runs

    @contextlib.contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        buffers = [buffer for _, buffer in self.workload.named_buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _noting(seen: dict[str, _Seen]) -> Callable[[Block, Forward], Forward]:
    scopes = Scopes()

    def make(block: Block, own: Forward) -> Forward:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if INSIDE_BLOCK.get():
                return own(*args, **kwargs)
            scope = scopes.next(block.path)
            token = INSIDE_BLOCK.set(True)
            try:
                with _ShapesOfDraws(scope) as drawing, caches_off(caching_configs(block.module)):
                    results = own(*args, **kwargs)
            finally:
                INSIDE_BLOCK.reset(token)
            seen[scope] = _Seen(*with_slots(results), drawing.shapes, drawing.writes_out_attention)
            return results

        return noted

    return make
