"""A two-tower multi-task workload on packed batches whose sizes vary, for Spindle and for DistributedDataParallel.

Images of any number of patches and captions of any length are matched (a contrastive loss over all pairs of the batch);
longer texts train the text tower on their next words. `gather` joins what the ranks of a data-parallel run hold of a
batch, by samples; in one process, and under Spindle, nothing does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from race.models import Gather
from torch import Tensor, nn

import spindle
from spindle.workload import Batch, Workload

BATCHES, VOCABULARY, WIDTH, LAYERS, PATCH, JOINT = 32, 512, 384, 6, 48, 64


@dataclass(frozen=True)
class Sizes:
    """Samples of a batch, and what they have on average: patches of an image, tokens of a caption and of a text.

    `spread`: standard deviation of the logarithm of all of these.
    """

    samples: int
    patches: float
    caption: float
    text: float
    spread: float = 0.9

    def __str__(self) -> str:
        return (
            f"{self.samples} images of {self.patches:g} patches with captions of {self.caption:g} tokens, "
            f"{self.samples} texts of {self.text:g} tokens"
        )


SMALL, LARGE = Sizes(8, 16, 8, 16), Sizes(16, 48, 16, 48)
WIDE = Sizes(8, 48, 16, 192, spread=1.2)  # a long tail: one text in a hundred is eight times as long as the mean


class Layer(nn.Module):
    """Attention and a feed-forward over packed rows; `mask` [1, T, T] lets rows of one sample see each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        y: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return y


class Vision(nn.Module):
    """Packed patches [1, P, 48] of any number of images; one vector an image."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(PATCH, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, JOINT)

    def forward(self, patches: Tensor, counts: Tensor) -> Tensor:
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        mask = (owner[:, None] == owner[None, :])[None]
        h = self.inward(patches)
        for layer in self.layers:
            h = layer(h, mask)
        return F.normalize(self.head(means(h[0], owner, counts)), dim=-1)


def means(rows: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """The mean of the rows of each sample."""
    sums = rows.new_zeros(len(counts), rows.shape[-1]).index_add(0, owner, rows)
    return sums / counts[:, None]


def language_model(width: int = WIDTH) -> Any:
    """A small Qwen2, its weights at random."""
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.Qwen2ForCausalLM(config)


def log_normal(generator: torch.Generator, sizes: Sizes, mean: float) -> Tensor:
    """Lengths of the samples of a batch."""
    normal = torch.randn(sizes.samples, generator=generator)
    return (mean * torch.exp(sizes.spread * normal - sizes.spread**2 / 2)).long().clamp(3, int(8 * mean))


def packed_texts(lengths: Tensor, generator: torch.Generator) -> Batch:
    """Texts that follow each other in one row."""
    ids = torch.randint(1, VOCABULARY, (1, int(lengths.sum())), generator=generator)
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions}


def text_lengths(batch: Batch) -> Tensor:
    """Tokens of each text of a packed row."""
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
    return torch.diff(starts, append=torch.tensor([batch["position_ids"].shape[1]]))


def pairs(sizes: Sizes) -> list[Batch]:
    """Images, and a caption of each."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(BATCHES):
        counts = log_normal(generator, sizes, sizes.patches)
        batch = packed_texts(log_normal(generator, sizes, sizes.caption), generator)
        batch["patches"] = torch.randn(1, int(counts.sum()), PATCH, generator=generator)
        found.append({**batch, "counts": counts})
    return found


def texts(sizes: Sizes) -> list[Batch]:
    """Texts, each token with the next one of its text."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(BATCHES):
        batch = packed_texts(log_normal(generator, sizes, sizes.text), generator)
        labels = batch["input_ids"].roll(-1, 1)
        labels[0, torch.tensor(list(accumulate(text_lengths(batch).tolist()))) - 1] = -100
        found.append({**batch, "labels": labels})
    return found


def rows(batch: Batch) -> Mapping[str, Any]:
    """Patches of each image, tokens of each text."""
    counts = {name: (1, text_lengths(batch)) for name in batch if name not in ("patches", "counts")}
    return counts | ({"patches": (1, batch["counts"])} if "patches" in batch else {})


def two_towers(gather: Gather = lambda part: part, sizes: Sizes = SMALL) -> Workload:
    """Both tasks."""
    torch.manual_seed(0)
    workload = spindle.Workload("two-towers")
    vision = workload.component("vision", Vision())
    text = workload.component("text", language_model())
    inward = workload.component("projection", nn.Linear(WIDTH, JOINT))

    @workload.task("match", batch_size=sizes.samples, rows=rows, data=pairs(sizes))
    def match(batch: Batch) -> Tensor:
        lengths = text_lengths(batch)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        read = text.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
        words = gather(F.normalize(inward(means(read[0], owner, lengths)), dim=-1))
        images = gather(vision(batch["patches"], batch["counts"]))
        scores, target = 10.0 * images @ words.T, torch.arange(len(images))
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    @workload.task("read", batch_size=sizes.samples, rows=rows, data=texts(sizes))
    def read(batch: Batch) -> Tensor:
        logits = text(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        count = (batch["labels"] != -100).sum()[None].float()
        every = gather(count)  # a mean over the tokens of all ranks, as in one process
        return F.cross_entropy(logits[0], batch["labels"][0], reduction="sum") * len(every) / every.sum()

    return workload
