"""pi0: a vision-language stack and an action expert, coupled layer by layer through attention; flow matching.

| component | model | layers | width | reads |
|---|---|---|---|---|
| vision | SigLIP and a linear layer | 4 | 48 -> 64 | a picture from each camera |
| prefix | layers of Gemma | 4 | 64 | pictures and instruction, among themselves |
| expert | layers of Gemma | 4 | 32 | noisy actions and the state; keys and values of the same layer of the prefix |
| ends | linear layers | | 32 | actions and state in, velocities out |

One task, `action`. All learns. Layers are those of `transformers`, unmodified: what they would keep in a cache for
generation is how keys and values get from one stack to the other. True size: benchmarks/workloads/pi0.yaml.

Data: two cameras see a red and a blue blob and the hand between them; the instruction names a blob, the action is the
path there in eight steps.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer

import spindle

PIXELS, CAMERAS, STEPS, WIDTH, EXPERT, HEAD = 16, 2, 8, 64, 32, 16
Pair = tuple[Tensor, Tensor]


class Handover:
    """Stands where a layer expects a cache: keeps the layer's own keys and values, puts another stack's before them."""

    def __init__(self, before: Pair | None) -> None:
        self.before, self.own = before, None

    def update(self, keys: Tensor, values: Tensor, *_: object) -> Pair:
        """What the layer attends to."""
        self.own = (keys, values)
        if self.before is None:
            return self.own
        return torch.cat([self.before[0], keys], 2), torch.cat([self.before[1], values], 2)


class Coupled(nn.Module):
    """A layer that hands on its keys and values, and reads those of another stack if it is given any."""

    def __init__(self, layer: GemmaDecoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, angles: Pair, before: Pair | None = None) -> tuple[Tensor, Pair]:
        """[b, n, width] and rotary angles of its places -> the same shape, and (keys, values) of [b, 1, n, HEAD]."""
        handover = Handover(before)
        x = self.layer(x, position_embeddings=angles, past_key_values=handover, is_causal=False)
        return x, handover.own


class Stack(nn.Module):
    """Layers of Gemma and what stands around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        gemma = GemmaModel(
            GemmaConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=HEAD,
                vocab_size=3,  # its table is not used
            )
        )
        self.rotary, self.norm = gemma.rotary_emb, gemma.norm
        self.layers = nn.ModuleList(Coupled(layer) for layer in gemma.layers)

    def angles(self, x: Tensor, first: int) -> Pair:
        """Rotary angles of the places `first`, `first + 1`, ..."""
        return self.rotary(x, torch.arange(first, first + x.shape[1])[None])


class Ends(nn.Module):
    """Noisy actions, their time and the state into the expert; velocities out."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.action, self.out = nn.Linear(2, EXPERT), nn.Linear(2, EXPERT), nn.Linear(EXPERT, 2)
        self.time = nn.Sequential(nn.Linear(2 * EXPERT, EXPERT), nn.SiLU(), nn.Linear(EXPERT, EXPERT))

    def forward(self, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """[b, 2], [b, STEPS, 2], [b] -> [b, 1 + STEPS, EXPERT]."""
        waves = time[:, None] * torch.exp(torch.arange(EXPERT // 2) / 3)
        when = torch.cat([waves.sin(), waves.cos()], -1)[:, None].expand(-1, STEPS, -1)
        return torch.cat([self.state(state)[:, None], self.time(torch.cat([self.action(noisy), when], -1))], 1)


class Reach:
    """Batches of pictures, instructions, states and paths; every pass gives the same ones."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(1)
        for _ in range(200):
            red, blue, state = torch.rand(3, self.rows, 2, generator=random)
            front = torch.stack([blob(red), blob(state), blob(blue)], 1)
            asked = torch.randint(2, (self.rows,), generator=random)
            way = torch.where((asked == 0)[:, None], red, blue) - state
            path = way[:, None] * torch.linspace(1 / STEPS, 1, STEPS)[:, None]
            pixels = torch.stack([front, front.flip(-1)], 1)  # the second camera sees it in a mirror
            yield {"pixels": pixels, "words": torch.stack([asked, asked + 2], 1), "state": state, "path": 2 * path}


def blob(center: Tensor) -> Tensor:
    """Centers [n, 2] in 0..1 -> bright spots [n, PIXELS, PIXELS]."""
    axis = (torch.arange(PIXELS) + 0.5) / PIXELS
    y, x = ((axis - center[:, i, None]) ** 2 for i in (0, 1))
    return torch.exp(-60 * (y[:, :, None] + x[:, None, :]))


class Eyes(nn.Module):
    """A SigLIP tower, and its patches in the width of the prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=48,
                intermediate_size=192,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=PIXELS,
                patch_size=4,
                vision_use_head=False,
            )
        )
        self.project = nn.Linear(48, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, cameras, 3, PIXELS, PIXELS] -> [b, patches of all cameras, WIDTH]."""
        seen = self.project(self.tower(pixel_values=pixels.flatten(0, 1)).last_hidden_state)
        return seen.unflatten(0, (-1, CAMERAS)).flatten(1, 2)


torch.manual_seed(0)
workload = spindle.Workload("pi0-experts")
vision = workload.component("vision", Eyes())
words = workload.component("words", nn.Embedding(4, WIDTH))
prefix = workload.component("prefix", Stack(WIDTH))
expert = workload.component("expert", Stack(EXPERT))
ends = workload.component("ends", Ends())


@workload.task("action", batch_size=32, data=Reach(32))
def action(batch: dict[str, Tensor]) -> Tensor:
    """The velocity from noise to the path, at a time between them."""
    noise = torch.randn_like(batch["path"])
    time = torch.rand_like(batch["path"][:, 0, 0])
    noisy = torch.lerp(noise, batch["path"], time[:, None, None])
    x = torch.cat([vision(batch["pixels"]), words(batch["words"])], 1)
    y = ends(batch["state"], noisy, time)
    x_angles, y_angles = prefix.angles(x, 0), expert.angles(y, x.shape[1])
    for lower, upper in zip(prefix.layers, expert.layers, strict=True):
        x, handed = lower(x, x_angles)
        y, _ = upper(y, y_angles, handed)
    velocity = ends.out(expert.norm(y[:, 1:]))
    return F.mse_loss(velocity, batch["path"] - noise)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What `spindle train` uses."""
    return torch.optim.AdamW(parameters, lr=1e-3)
