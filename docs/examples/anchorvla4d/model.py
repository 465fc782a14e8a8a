"""AnchorVLA4D's kind: a vision-language model, and beside it a frozen encoder that compares now with an anchor picture.

| component | model | layers | width | learns |
|---|---|---|---|---|
| vision | SigLIP, both pictures | 3 | 48 -> 64 | yes |
| llm | Qwen2 | 3 | 64 | yes |
| spatial | ViT, both pictures | 4 | 48 -> 64 | its projections alone: gradients pass through frozen layers |
| head | diffusion transformer, adaptive norms | 3 | 32 | yes |

Two tasks: `anchored` reads the anchor and the picture of now, `plain` the picture of now alone, without the spatial
encoder. True size: benchmarks/workloads/anchorvla4d_like.yaml.

Data: a red and a blue blob; the instruction names one, the action is a path there. With an anchor, the blobs are hidden
by now: only the anchor shows them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model, SiglipVisionConfig, SiglipVisionModel, ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

import spindle

PIXELS, PATCH, STEPS, WIDTH, ACTION = 16, 4, 5, 64, 32


def sizes(width: int, layers: int = 3) -> dict[str, int]:
    """Settings that all transformers share."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 4}


class Eyes(nn.Module):
    """A SigLIP tower, and its patches in the width of the language model."""

    def __init__(self) -> None:
        super().__init__()
        config = SiglipVisionConfig(**sizes(48), image_size=PIXELS, patch_size=PATCH, vision_use_head=False)
        self.tower, self.project = SiglipVisionModel(config), nn.Linear(48, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, pictures, 3, PIXELS, PIXELS] -> [b, patches of all pictures, WIDTH]."""
        seen = self.project(self.tower(pixel_values=pixels.flatten(0, 1)).last_hidden_state)
        return seen.unflatten(0, pixels.shape[:2]).flatten(1, 2)


class WithinAndAcross(nn.Module):
    """A layer that looks at each picture by itself, and one that looks at both."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.within, self.across = ViTLayer(config), ViTLayer(config)

    def forward(self, x: Tensor) -> Tensor:
        """[b, pictures, patches, width], as it comes out."""
        x = self.within(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.across(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class Spatial(nn.Module):
    """Frozen layers between projections that learn."""

    def __init__(self, pairs: int = 2, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH**2, width)
        self.places = nn.Parameter(torch.randn(2, (PIXELS // PATCH) ** 2, width) / 4)
        config = ViTConfig(**sizes(width), attn_implementation="sdpa")
        self.layers = nn.ModuleList(WithinAndAcross(config) for _ in range(pairs)).requires_grad_(False)
        self.out = nn.Linear(pairs * width, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, 2, 3, PIXELS, PIXELS] -> [b, WIDTH]; what every pair of layers gives counts."""
        patches = pixels.unfold(3, PATCH, PATCH).unfold(4, PATCH, PATCH)  # [b, 2, 3, rows, columns, PATCH, PATCH]
        x = self.patches(patches.permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(2, 3)) + self.places
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return self.out(torch.cat(states, -1)).mean((1, 2))


class Block(nn.Module):
    """Attention and perceptron whose norms and gates follow a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(ACTION, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(ACTION, 4 * ACTION), nn.GELU(), nn.Linear(4 * ACTION, ACTION))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * ACTION))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[b, STEPS, ACTION] and [b, WIDTH] -> [b, STEPS, ACTION]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        y = F.layer_norm(x, (ACTION,)) * (1 + scale1) + shift1
        x = x + (1 + gate1) * self.attention(y, y, y, need_weights=False)[0]
        return x + (1 + gate2) * self.mlp(F.layer_norm(x, (ACTION,)) * (1 + scale2) + shift2)


class Head(nn.Module):
    """Noisy paths and a condition in, the noise out."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.embed = nn.Linear(1, WIDTH), nn.Linear(2, ACTION)
        self.places = nn.Parameter(torch.randn(STEPS, ACTION) / 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(ACTION, 2)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """[b, STEPS, 2], [b], [b, WIDTH] -> [b, STEPS, 2]."""
        condition = condition + self.time(time[:, None])
        x = self.embed(noisy) + self.places
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x)


class Reach:
    """Batches of pictures, instructions and paths; every pass gives the same ones."""

    def __init__(self, rows: int, *, anchored: bool) -> None:
        self.rows, self.anchored = rows, anchored

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(1 + self.anchored)
        for _ in range(200):
            red, blue, hand = torch.rand(3, self.rows, 2, generator=random)
            picture = torch.stack([blob(red), blob(hand), blob(blue)], 1)
            now = picture * torch.tensor([0, 1, 0])[:, None, None] if self.anchored else picture
            asked = torch.randint(2, (self.rows,), generator=random)
            way = 2 * (torch.where((asked == 0)[:, None], red, blue) - hand)
            path = way[:, None] * torch.linspace(1 / STEPS, 1, STEPS)[:, None]
            pixels = torch.stack([picture, now] if self.anchored else [now], 1)
            yield {"pixels": pixels, "words": torch.stack([asked, asked + 2], 1), "path": path}


def blob(center: Tensor) -> Tensor:
    """Centers [n, 2] in 0..1 -> bright spots [n, PIXELS, PIXELS]."""
    axis = (torch.arange(PIXELS) + 0.5) / PIXELS
    y, x = ((axis - center[:, i, None]) ** 2 for i in (0, 1))
    return torch.exp(-60 * (y[:, :, None] + x[:, None, :]))


torch.manual_seed(0)
workload = spindle.Workload("anchorvla4d")
vision = workload.component("vision", Eyes())
llm = workload.component("llm", Qwen2Model(Qwen2Config(vocab_size=4, num_key_value_heads=2, **sizes(WIDTH))))
spatial = workload.component("spatial", Spatial())
head = workload.component("head", Head())


def read(batch: dict[str, Tensor]) -> Tensor:
    """The condition [b, WIDTH] that the language model makes of pictures and instruction."""
    tokens = torch.cat([vision(batch["pixels"]), llm.get_input_embeddings()(batch["words"])], 1)
    return llm(inputs_embeds=tokens).last_hidden_state[:, -1]


def denoise(path: Tensor, condition: Tensor) -> Tensor:
    """How far the head is from the noise in a noisy path."""
    noise, time = torch.randn_like(path), torch.rand_like(path[:, 0, 0])
    angle = time[:, None, None] * torch.pi / 2
    return F.mse_loss(head(angle.cos() * path + angle.sin() * noise, time, condition), noise)


@workload.task("anchored", batch_size=16, data=Reach(16, anchored=True))
def anchored(batch: dict[str, Tensor]) -> Tensor:
    """The way is in the anchor alone."""
    return denoise(batch["path"], read(batch) + spatial(batch["pixels"]))


@workload.task("plain", batch_size=16, data=Reach(16, anchored=False))
def plain(batch: dict[str, Tensor]) -> Tensor:
    """All there is to know is in one picture."""
    return denoise(batch["path"], read(batch))
