"""AT-VLA's kind: a slow stream that sees and reads, a fast one that feels, and one action expert behind both.

| component | model | layers | width | tasks |
|---|---|---|---|---|
| vision | ViT and a linear layer | 3 | 48 -> 64 | slow, contact |
| llm | Llama | 3 | 64 | slow, contact |
| planner | decoder of latent tokens | 2 | 32 | slow, contact |
| touch | convolutions on the pictures of two fingertips | | 32 | fast, contact |
| gate | linear layers: how much of touch enters each layer of the expert | | 32 | fast, contact |
| expert | decoder of action tokens | 3 | 32 | all |

`slow` has no touch, `fast` has features of the slow stream from a cache in place of pictures and words, `contact` has
both and takes part in every second step. In `contact` some samples touch nothing yet: a mask shuts their gates.
True size: benchmarks/workloads/at_vla_like.yaml.

Data: a red and a blue blob, the instruction names one, the action is the way there; what slips under the fingers
turns it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

import spindle

PIXELS, PATCH, TAXELS, WIDTH, ACTION, STEPS, LAYERS = 16, 4, 8, 64, 32, 5, 3
CACHED = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))  # what a cache holds of a way and a word


def sizes(width: int) -> dict[str, int]:
    """Settings that both transformers share."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 3, "num_attention_heads": 4}


class Eyes(nn.Module):
    """A ViT, and its patches in the width of the language model."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(**sizes(48), image_size=PIXELS, patch_size=PATCH)
        self.tower, self.project = ViTModel(config, add_pooling_layer=False), nn.Linear(48, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, 3, PIXELS, PIXELS] -> [b, patches, WIDTH]."""
        return self.project(self.tower(pixel_values=pixels).last_hidden_state[:, 1:])


class Touch(nn.Module):
    """Two fingertips into one vector; group norm, since batch norm would tie the samples to one device."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, ACTION, 3, 2), nn.ReLU()
        )
        self.out = nn.Linear(ACTION, ACTION)

    def forward(self, fingers: Tensor) -> Tensor:
        """[b, 2, TAXELS, TAXELS] -> [b, ACTION]."""
        return self.out(self.convolve(fingers).mean((2, 3)))


class Injected(nn.Module):
    """A decoder layer that takes touch in before it attends."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(ACTION, 4, 4 * ACTION, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, memory: Tensor, felt: Tensor | None = None) -> Tensor:
        """Tokens [b, n, ACTION], memory [b, m, ACTION], touch [b, ACTION] times its gate -> tokens."""
        return self.layer(x if felt is None else x + felt[:, None], memory)


class Decoder(nn.Module):
    """Tokens of its own that read a memory."""

    def __init__(self, tokens: int, layers: int, inputs: int) -> None:
        super().__init__()
        self.tokens, self.inputs = nn.Parameter(torch.randn(tokens, ACTION) / 4), nn.Linear(inputs, ACTION)
        self.layers = nn.ModuleList(Injected() for _ in range(layers))

    def forward(self, memory: Tensor, felt: list[Tensor] | None = None) -> Tensor:
        """Memory [b, m, inputs], touch by layer -> [b, tokens, ACTION]."""
        memory = self.inputs(memory)
        x = self.tokens + torch.zeros_like(memory[:, :1])
        for i, layer in enumerate(self.layers):
            x = layer(x, memory, felt[i] if felt else None)
        return x


class Reach:
    """Batches of one stream; every pass gives the same ones."""

    def __init__(self, stream: str, rows: int) -> None:
        self.stream, self.rows = stream, rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(sum(self.stream.encode()))
        for _ in range(200):
            red, blue, slip = torch.rand(3, self.rows, 2, generator=random)
            asked = torch.randint(2, (self.rows,), generator=random)
            way = 2 * torch.where((asked == 0)[:, None], red, blue) - 1
            pixels = torch.stack([blob(red, PIXELS), torch.zeros(self.rows, PIXELS, PIXELS), blob(blue, PIXELS)], 1)
            batch = {"pixels": pixels, "words": torch.stack([asked, asked + 2], 1)}
            if self.stream == "fast":
                batch = {"cached": torch.stack([way @ CACHED[:2], batch["words"].float() @ CACHED[2:]], 1)}
            if self.stream != "slow":
                touching = (torch.rand(self.rows, generator=random) < 0.7).float()
                fingers = torch.stack([blob(slip, TAXELS), blob(slip.flip(1), TAXELS)], 1)
                batch |= {"fingers": fingers * touching[:, None, None, None], "touching": touching}
                way = way + touching[:, None] * (slip - 0.5)
            yield batch | {"path": way[:, None] * torch.linspace(1 / STEPS, 1, STEPS)[:, None]}


def blob(center: Tensor, pixels: int) -> Tensor:
    """Centers [n, 2] in 0..1 -> bright spots [n, pixels, pixels]."""
    axis = (torch.arange(pixels) + 0.5) / pixels
    y, x = ((axis - center[:, i, None]) ** 2 for i in (0, 1))
    return torch.exp(-60 * (y[:, :, None] + x[:, None, :]))


torch.manual_seed(0)
workload = spindle.Workload("at-vla")
vision = workload.component("vision", Eyes())
llm = workload.component("llm", LlamaModel(LlamaConfig(vocab_size=4, **sizes(WIDTH))))
planner = workload.component("planner", Decoder(tokens=4, layers=2, inputs=WIDTH))
touch = workload.component("touch", Touch())
gate = workload.component("gate", nn.Sequential(nn.Linear(ACTION, 16), nn.SiLU(), nn.Linear(16, LAYERS), nn.Sigmoid()))
expert = workload.component("expert", Decoder(STEPS, LAYERS, inputs=WIDTH))
ends = workload.component("ends", nn.ModuleDict({"plan": nn.Linear(ACTION, WIDTH), "out": nn.Linear(ACTION, 2)}))


def see(batch: dict[str, Tensor]) -> Tensor:
    """What the slow stream gives: states of the language model and a latent plan, [b, n, WIDTH]."""
    tokens = torch.cat([vision(batch["pixels"]), llm.get_input_embeddings()(batch["words"])], 1)
    states = llm(inputs_embeds=tokens).last_hidden_state
    return torch.cat([states, ends["plan"](planner(states))], 1)


def feel(batch: dict[str, Tensor]) -> list[Tensor]:
    """Touch times its gate for each layer of the expert; nothing where nothing is touched."""
    felt = touch(batch["fingers"])
    gates = gate(felt) * batch["touching"][:, None]
    return [felt * gates[:, i, None] for i in range(LAYERS)]


@workload.task("slow", batch_size=16, data=Reach("slow", 16))
def slow(batch: dict[str, Tensor]) -> Tensor:
    """Pictures and words; no touch."""
    return F.l1_loss(ends["out"](expert(see(batch))), batch["path"])


@workload.task("fast", batch_size=32, data=Reach("fast", 32))
def fast(batch: dict[str, Tensor]) -> Tensor:
    """Touch, and what the slow stream last said, from a cache."""
    return F.l1_loss(ends["out"](expert(batch["cached"], feel(batch))), batch["path"])


@workload.task("contact", batch_size=16, data=Reach("contact", 16), every=2)
def contact(batch: dict[str, Tensor]) -> Tensor:
    """All of it."""
    return F.l1_loss(ends["out"](expert(see(batch), feel(batch))), batch["path"])
