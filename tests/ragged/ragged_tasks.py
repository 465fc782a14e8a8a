"""Random workloads in float64 whose batches change their shapes: task code put together from pieces by chance.

A Case is plain data, so that one that fails can be printed and made smaller; `workload_of` builds it.
"""

import random
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.errors import SpindleError, WorkloadError
from spindle.runtime.parity import ParityReport
from spindle.workload import Batch, Workload
from tests.ragged.ragged_images import MERGES
from tests.ragged.ragged_losses import HEADS, LOSSES, PACKED_LOSSES, TEXT_LOSSES, VECTOR_LOSSES
from tests.ragged.ragged_pieces import (
    FEATURES,
    IMAGE,
    PACKED_PIECES,
    PIECES,
    TEXT_PIECES,
    VECTOR_PIECES,
    WORDS,
    Given,
)
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import VOCABULARY, WIDTH, Residual

Rows = Callable[[Batch], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerCase:
    """A stack of `depth` layers of one kind, over token ids or vectors of numbers."""

    reads: str
    layer: str
    depth: int
    is_frozen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCase:
    """A task: what it reads, by which towers, the pieces of its code, its loss; and lengths of samples of each batch.

    `is_listed`: its data is a list, of which capture sees several batches. `images`: of each sample of each batch.
    """

    kind: str
    tower: int
    pieces: tuple[str, ...]
    loss: str
    lengths: tuple[tuple[int, ...], ...]
    is_listed: bool = True
    images: tuple[tuple[int, ...], ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload of random tasks, and the plan that runs it."""

    towers: tuple[TowerCase, ...]
    tasks: tuple[TaskCase, ...]
    num_ranks: int
    plan_seed: int
    is_widest: bool = False
    recompute: bool = False
    shard_optimizer: bool = False


# -- modules ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """A layer that looks at all positions that `mask` [B, 1 or T, T] lets it see."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-2, -3)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.unsqueeze(-3))
        y: Tensor = x + self.dropout(self.out(mixed.transpose(-2, -3).flatten(-2)))
        return y


class Varied(nn.Module):
    """A layer of packed texts that loops over them; `starts` are where each begins, and the end."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        ends = starts.tolist()
        return torch.cat([self.inner(x[:, a:b]) for a, b in pairwise(ends)], 1)


class Dropped(Residual):
    """A residual layer with dropout."""

    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        return F.dropout(super().forward(x_BW), 0.2, self.training)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Residual(WIDTH),
    "dropped": lambda: Dropped(WIDTH),
    "attention": Attention,
    "dropped attention": lambda: Attention(0.2),
    "varied": Varied,
}


class Stack(nn.Module):
    """A stem, layers, and a norm."""

    def __init__(self, case: TowerCase) -> None:
        super().__init__()
        self.stem = nn.Embedding(VOCABULARY, WIDTH) if case.reads == "ids" else nn.Linear(FEATURES, WIDTH)
        self.places = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(LAYERS[case.layer]() for _ in range(case.depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.sees = case.layer in ("attention", "dropped attention", "varied")

    def forward(self, x: Tensor, mask: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        h = x if x.is_floating_point() and x.shape[-1] == WIDTH else self.stem(x)
        if places is not None:
            h = h + self.places(places)
        for layer in self.layers:
            h = layer(h, mask) if self.sees else layer(h)
        y: Tensor = self.norm(h)
        return y


class Extras(nn.Module):
    """What pieces of task code use: a gate, a vector, batch norm, heads."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(WIDTH))
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.answer = nn.Linear(WIDTH, 3)


# -- batches ----------------------------------------------------------------------------------------------------------


def batch_of(task: TaskCase, index: int) -> Batch:
    """Batch `index` of a task: all fields that pieces of its kind read."""
    generator = torch.Generator().manual_seed(task.seed * 10 + index)
    lengths = torch.tensor(task.lengths[index])
    count, longest = len(lengths), int(lengths.max())
    batch: Batch = {
        "y": torch.randint(3, (count,), generator=generator),
        "target": torch.randn(count, WIDTH, generator=generator, dtype=torch.float64),
        "weight": torch.rand(count, generator=generator, dtype=torch.float64) + 0.5,
        "score": torch.rand(count, generator=generator, dtype=torch.float64),
        "group": torch.randint(2, (count,), generator=generator),
        "names": ["n" * (1 + (i * 7 + index) % 4) for i in range(count)],
        "factor": 1.0 + index / 4,
        "settings": {"scale": 1.5 - index / 3},
    }
    if task.kind == "vectors":
        batch["x"] = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
        batch["mask"] = torch.rand(count, generator=generator) < 0.6
        batch["mask"][0] &= index > 0
        return batch
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    labels = torch.randint(VOCABULARY, mask.shape, generator=generator)
    left_out = torch.rand(mask.shape, generator=generator) < 0.3
    left_out[lengths.argmax()] = False
    second = lengths.argsort()[:-1][-1:]  # of a loader's first batch, the only one that is seen, not all labels count
    left_out[second, lengths[second] - 1] |= index == 0
    labels = labels.masked_fill(left_out, -100)
    counts_starts = task.kind != "packed" or task.seed % 2 or longest == 1  # chance would hide what they mix
    labels[:, 0] = labels[:, 0].clamp(min=1) if counts_starts else -100
    if task.kind == "packed":
        batch["x"], batch["labels"] = ids[mask][None], labels[mask][None]
        batch["mask"] = torch.rand(batch["x"].shape, generator=generator) < 0.7
        batch["mask"][0, 0] &= index > 0
        batch["places"] = torch.arange(longest).expand(mask.shape)[mask][None]
        return batch
    batch |= {"mask": mask, "lengths": lengths, "labels": labels.masked_fill(~mask, -100)}
    batch["x"] = ids * mask
    if task.kind == "frames":
        frames = torch.randn(*mask.shape, FEATURES, generator=generator, dtype=torch.float64)
        batch["x"] = frames * mask[..., None]
    if task.kind in ("images", "patches"):
        images = torch.tensor(task.images[index])
        batch["x"] = torch.where(torch.arange(longest) < images[:, None], IMAGE, batch["x"])
        shape = (int(images.sum()), 2 + index % 2, FEATURES)
        if task.kind == "patches":
            batch["grid"] = torch.randint(1, 4, (int(images.sum()),), generator=generator)
            shape = (int(batch["grid"].sum()), FEATURES)  # type: ignore[assignment]
        if images.any() or has_empty_fields(task):
            batch["pixels"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            batch.pop("grid", None)
    return batch


def has_empty_fields(task: TaskCase) -> bool:
    """Whether batches without an image have fields of images, of no rows: then the towers take these."""
    return task.kind == "images" and task.seed % 2 == 0


def rows_of(task: TaskCase) -> Rows | None:
    """What a task's `rows=` is: packed fields of its kind, and in some tasks a unit for texts without their padding."""
    if task.kind == "packed":
        return _packed_rows
    if task.kind == "images":
        return lambda batch: {"pixels": (batch["x"] == IMAGE).sum(1)}
    if task.kind == "patches":
        return _patch_rows
    if task.kind in ("text", "frames") and task.seed % 2:
        return lambda batch: {WORDS: batch["lengths"]}
    return None


def _packed_rows(batch: Batch) -> Mapping[str, Any]:
    starts = (batch["places"][0] == 0).nonzero()[:, 0].tolist()
    lengths = [b - a for a, b in zip(starts, [*starts[1:], batch["x"].shape[1]], strict=True)]
    return dict.fromkeys(("x", "labels", "mask", "places"), (1, lengths))


def _patch_rows(batch: Batch) -> Mapping[str, Any]:
    images = (batch["x"] == IMAGE).sum(1)
    grid = batch.get("grid", torch.zeros(0, dtype=torch.long))
    return {"grid": images, "pixels": spindle.per_sample(grid, images)}


# -- tasks ------------------------------------------------------------------------------------------------------------


def _hidden(task: TaskCase, batch: Batch, towers: list[Stack]) -> Any:
    """What a task's towers give for its batch, before its pieces."""
    tower = towers[task.tower]
    if task.kind == "vectors":
        return tower(batch["x"])
    if task.kind == "packed":
        texts = (batch["places"] == 0).cumsum(1)
        mask = texts[:, :, None] == texts[:, None, :]
        if isinstance(tower.layers[0], Varied):
            mask = F.pad((batch["places"][0] == 0).nonzero()[:, 0], (0, 1), value=texts.shape[1])
        return tower(batch["x"], mask, batch["places"])
    if task.kind in ("images", "patches"):
        return tower(MERGES[task.kind][task.seed % 3](batch, tower.stem, towers[-1]), batch["mask"][:, None])
    return tower(batch["x"], batch["mask"][:, None], torch.arange(batch["x"].shape[1]))


def _function(task: TaskCase, towers: list[Stack], extras: Extras) -> Callable[[Batch], Tensor]:
    def function(batch: Batch) -> Tensor:
        given = Given(batch, extras, lambda: _hidden(task, batch, towers), task.kind)
        h = given.again()
        for name in task.pieces:
            h = PIECES[name](h, given)
        return LOSSES[task.loss](h, given)

    return function


def workload_of(case: Case) -> Workload:
    """The workload of a case, its weights always the same."""
    torch.manual_seed(0)
    recompute = ("tower0", "extras") if case.recompute else ()
    workload = Workload("ragged", recompute=recompute, shard_optimizer=case.shard_optimizer)
    towers = [Stack(tower).double().requires_grad_(not tower.is_frozen) for tower in case.towers]
    for index, tower in enumerate(towers):
        workload.component(f"tower{index}", tower)
    extras = workload.component("extras", Extras().double())
    for index, task in enumerate(case.tasks):
        data = [batch_of(task, number) for number in range(len(task.lengths))]
        workload.task(
            f"task{index}",
            batch_size=len(task.lengths[0]),
            data=data if task.is_listed else lambda data=data: data,  # type: ignore[misc]
            rows=rows_of(task),
            weight=1.0 + index,
        )(_function(task, towers, extras))
    return workload


# -- chance -----------------------------------------------------------------------------------------------------------


def random_case(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    number = rng.choice([2, 2, 3])
    towers: list[TowerCase] = []
    tasks = tuple(_random_task(rng, number, towers) for _ in range(rng.choice([1, 1, 1, 2, 2, 3])))
    untrained = {task.tower for task in tasks if task.loss not in HEADS}
    frozen = rng.randrange(len(towers)) if rng.random() < 0.3 else -1
    towers = [
        replace(tower, is_frozen=index == frozen and frozen not in untrained) for index, tower in enumerate(towers)
    ]
    if any(task.kind in ("images", "patches") for task in tasks):
        towers.append(TowerCase(reads="floats", layer=rng.choice(["residual", "dropped"]), depth=rng.randint(2, 3)))
    return Case(
        towers=tuple(towers),
        tasks=tasks,
        num_ranks=rng.randint(1, 4),
        plan_seed=rng.randrange(10**6),
        is_widest=rng.random() < 0.35,
        recompute=rng.random() < 0.15,
        shard_optimizer=rng.random() < 0.15,
    )


def _random_task(rng: random.Random, number: int, towers: list[TowerCase]) -> TaskCase:
    kind = rng.choice(["text", "text", "frames", "vectors", "packed", "images", "patches"])
    pieces = {"vectors": VECTOR_PIECES, "packed": PACKED_PIECES}.get(kind, TEXT_PIECES)
    losses = {"vectors": VECTOR_LOSSES, "packed": PACKED_LOSSES}.get(kind, TEXT_LOSSES)
    sizes = [rng.randint(2, 6), *(rng.choice([1, 2, 3, 4, 5, 7]) for _ in range(number - 1))]
    if rng.random() < 0.4:
        sizes = [sizes[0]] * number
    chosen = rng.sample(pieces, rng.randint(0, 4))
    if chosen and rng.random() < 0.15:
        chosen.append(rng.choice(chosen))
    if {"normed", "normed_tokens"} & set(chosen):
        sizes = [max(2, size) for size in sizes]  # batch norm takes no single row
    lengths = [tuple(rng.randint(1, rng.choice([3, 7])) for _ in range(size)) for size in sizes]
    lengths[0] = (4, 3, *lengths[0][2:])  # the only batch that is seen of a loader: no row for each sample by chance
    counts = [tuple(rng.randint(0, min(2, n)) for n in each) for each in lengths]
    counts = [(1, *each[1:]) if not any(each) else each for each in counts]
    if rng.random() < 0.4:  # a batch without any image
        lacking = rng.randrange(1, number)
        counts[lacking] = (0,) * len(counts[lacking])
    return TaskCase(
        kind=kind,
        tower=_random_tower(rng, kind, towers),
        pieces=tuple(chosen),
        loss=rng.choice(losses),
        lengths=tuple(lengths),
        is_listed=rng.random() < 0.6,
        images=tuple(counts) if kind in ("images", "patches") else (),
        seed=rng.randrange(1000),
    )


def _random_tower(rng: random.Random, kind: str, towers: list[TowerCase]) -> int:
    """A tower that a kind of task can use: one that another task uses already, or a new one."""
    reads = "floats" if kind in ("frames", "vectors") else "ids"
    layers = ["residual", "dropped"] if kind == "vectors" else list(LAYERS)[:4]
    if kind == "packed":
        layers = ["residual", "attention", "varied"]
    fitting = [i for i, tower in enumerate(towers) if tower.reads == reads and tower.layer in layers]
    if fitting and rng.random() < 0.5:
        return rng.choice(fitting)
    towers.append(TowerCase(reads=reads, layer=rng.choice(layers), depth=rng.randint(2, 4)))
    return len(towers) - 1


def smaller(case: Case) -> list[Case]:
    """Cases with less in them, to find the least that still fails."""
    found = [
        replace(case, tasks=case.tasks[:i] + case.tasks[i + 1 :]) for i in range(len(case.tasks)) if case.tasks[1:]
    ]
    found += [replace(case, num_ranks=n) for n in range(1, case.num_ranks)]
    found += [replace(case, recompute=False)] if case.recompute else []
    found += [replace(case, shard_optimizer=False)] if case.shard_optimizer else []
    for index, task in enumerate(case.tasks):
        others = [replace(task, pieces=task.pieces[:i] + task.pieces[i + 1 :]) for i in range(len(task.pieces))]
        if len(task.lengths) > 1:
            cut = len(task.lengths) - 1
            others.append(replace(task, lengths=task.lengths[:cut], images=task.images[:cut]))
        found += [replace(case, tasks=(*case.tasks[:index], each, *case.tasks[index + 1 :])) for each in others]
    for index, tower in enumerate(case.towers):
        towers = [replace(tower, depth=2)] if tower.depth > 2 else []
        towers += [replace(tower, layer="residual")] if tower.layer != "residual" else []
        towers += [replace(tower, is_frozen=False)] if tower.is_frozen else []
        found += [replace(case, towers=(*case.towers[:index], each, *case.towers[index + 1 :])) for each in towers]
    return found


# -- verdicts ---------------------------------------------------------------------------------------------------------


def plan_of(case: Case, workload: Workload) -> spindle.Plan:
    """The plan of a case."""
    metagraph = spindle.make_metagraph(workload)
    if case.is_widest:
        return widest_plan(metagraph, case.num_ranks)
    return random_plan(metagraph, case.num_ranks, case.plan_seed)


def verified(case: Case) -> ParityReport:
    """What verification of a case says; each batch is a step."""
    workload = workload_of(case)
    steps = max(len(task.lengths) for task in case.tasks)
    plan = plan_of(case, workload)
    return spindle.verify(workload, plan, steps=steps, launcher="threads", optimizer=_optimizer, timeout_s=20.0)


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.005)  # larger steps blow up sums over whole batches


def verdict_of(case: Case) -> tuple[str, str]:
    """Returns "ok", "refused" (a sentence says what is not supported), "differs", "error" or "crash"; and the text."""
    try:
        report = verified(case)
    except WorkloadError as error:
        return "refused", str(error)
    except SpindleError as error:
        return "error", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "crash", "".join(traceback.format_exception(error)[-4:])
    return ("ok", "") if report.ok else ("differs", str(report))
