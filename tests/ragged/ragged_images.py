"""Ways in which features of images come into texts: the last tower sees the images, the stem of another the words."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spindle.workload import Batch
from tests.ragged.ragged_pieces import IMAGE


def _scattered_images(words: Tensor, where: Tensor, images: Tensor) -> Tensor:
    return words.masked_scatter(where[..., None].expand_as(words), images)


def _written_images(words: Tensor, where: Tensor, images: Tensor) -> Tensor:
    words = words.clone()
    words[where] = images
    return words


def _looked_up_images(words: Tensor, where: Tensor, images: Tensor) -> Tensor:
    number = (where.flatten().cumsum(0) - 1).clamp(min=0).view(where.shape)
    rows = torch.cat([images, images.new_zeros(1, images.shape[-1])])
    return torch.where(where[..., None], rows[number], words)


_WAYS = (_scattered_images, _written_images, _looked_up_images)


def _images(way: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def merge(batch: Batch, stem: Any, tower: Any) -> Tensor:
        words = stem(batch["x"])
        return way(words, batch["x"] == IMAGE, tower(batch["pixels"]).mean(1)) if "pixels" in batch else words

    return merge


def _patches(way: Callable[..., Tensor], *, loops: bool) -> Callable[..., Tensor]:
    def merge(batch: Batch, stem: Any, tower: Any) -> Tensor:
        if "pixels" not in batch:
            words: Tensor = stem(batch["x"])
            return words
        seen, grid = tower(batch["pixels"]), batch["grid"]
        if loops:
            images = torch.stack([patches.mean(0) for patches in seen.split(grid.tolist())])
        else:
            owner = torch.repeat_interleave(torch.arange(len(grid)), grid)
            images = seen.new_zeros(len(grid), seen.shape[-1]).index_add(0, owner, seen) / grid[:, None]
        return way(stem(batch["x"]), batch["x"] == IMAGE, images)

    return merge


MERGES: dict[str, list[Callable[..., Tensor]]] = {
    "images": [_images(way) for way in _WAYS],
    "patches": [_patches(way, loops=index == 1) for index, way in enumerate(_WAYS)],
}
