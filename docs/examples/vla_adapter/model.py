"""VLA-Adapter: a small policy head that reads every layer of a frozen vision-language model.

| component | model | layers | width | learns |
|---|---|---|---|---|
| dino | DINOv2 | 3 | 48 | no |
| siglip | SigLIP | 3 | 64 | no |
| projector | linear layers | | 112 -> 64 | yes |
| queries | learned tokens after the words | | 64 | yes |
| llm | Qwen2 | 4 | 64 | no: gradients pass through it, to projector and queries |
| policy | a block for each layer of the language model | 4 | 64 | yes |

One task, `action`: a picture, an instruction and the state in, the way to go out, L1 loss.
True size: benchmarks/workloads/vla_adapter.yaml.

Data: a red and a blue blob on a picture; the instruction names one of them, the action is the way there from the hand.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Qwen2Config, Qwen2Model, SiglipVisionConfig, SiglipVisionModel

import spindle

PIXELS, PATCH, WIDTH, LAYERS, QUERIES, STEPS = 16, 4, 64, 4, 6, 4


def sizes(width: int, layers: int) -> dict[str, int]:
    """Settings that all three transformers share."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 4}


class Bridge(nn.Module):
    """A block of the policy: its tokens attend to themselves, to the queries and to the picture of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.gate = nn.Parameter(torch.full((1,), 0.5))
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """[b, STEPS, WIDTH] and the states of a layer [b, n, WIDTH], queries last -> [b, STEPS, WIDTH]."""
        picture, queries = states[:, :-QUERIES], states[:, -QUERIES:]
        memory = torch.cat([x, queries, self.gate.tanh() * picture], 1)
        x = x + self.attention(self.norm(x), memory, memory, need_weights=False)[0]
        return x + self.mlp(x)


class Policy(nn.Module):
    """Chunk tokens that pass a block for each layer of the language model."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.places = nn.Linear(2, WIDTH), nn.Parameter(torch.randn(STEPS, WIDTH) / 4)
        self.blocks = nn.ModuleList(Bridge() for _ in range(LAYERS))
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))

    def forward(self, state: Tensor, layers: list[Tensor]) -> Tensor:
        """The robot's state [b, 2] and the states of each layer -> actions [b, STEPS, 2]."""
        x = self.state(state)[:, None] + self.places
        for block, states in zip(self.blocks, layers, strict=True):
            x = block(x, states)
        return self.out(x)


class Reach:
    """Batches of pictures, instructions, states and paths; every pass gives the same ones."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(1)
        for _ in range(200):
            red, blue, hand = torch.rand(3, self.rows, 2, generator=random)
            pixels = torch.stack([blob(red), blob(hand), blob(blue)], 1)
            asked = torch.randint(2, (self.rows,), generator=random)
            way = 2 * (torch.where((asked == 0)[:, None], red, blue) - hand)
            path = way[:, None] * torch.linspace(1 / STEPS, 1, STEPS)[:, None]
            yield {"pixels": pixels, "words": torch.stack([asked, asked + 2], 1), "state": hand, "path": path}


def blob(center: Tensor) -> Tensor:
    """Centers [n, 2] in 0..1 -> bright spots [n, PIXELS, PIXELS]."""
    axis = (torch.arange(PIXELS) + 0.5) / PIXELS
    y, x = ((axis - center[:, i, None]) ** 2 for i in (0, 1))
    return torch.exp(-60 * (y[:, :, None] + x[:, None, :]))


def frozen(module: nn.Module) -> nn.Module:
    """A module that does not learn."""
    return module.requires_grad_(False).eval()


torch.manual_seed(0)
workload = spindle.Workload("vla-adapter")
picture = {"image_size": PIXELS, "patch_size": PATCH}
dino = workload.component("dino", frozen(Dinov2Model(Dinov2Config(**sizes(48, 3), **picture))))
siglip = workload.component(
    "siglip", frozen(SiglipVisionModel(SiglipVisionConfig(**sizes(64, 3), **picture, vision_use_head=False)))
)
projector = workload.component("projector", nn.Sequential(nn.Linear(112, 224), nn.GELU(), nn.Linear(224, WIDTH)))
llm = workload.component(
    "llm", frozen(Qwen2Model(Qwen2Config(vocab_size=4, num_key_value_heads=2, **sizes(WIDTH, LAYERS))))
)
queries = workload.component("queries", nn.Embedding(QUERIES, WIDTH))
policy = workload.component("policy", Policy())


def read(tokens: Tensor) -> list[Tensor]:
    """What every layer of the language model makes of tokens [b, n, WIDTH]."""
    angles = llm.rotary_emb(tokens, torch.arange(tokens.shape[1])[None])
    states = []
    for layer in llm.layers:
        tokens = layer(tokens, position_embeddings=angles)
        states.append(tokens)
    return states


@workload.task("action", batch_size=32, data=Reach(32))
def action(batch: dict[str, Tensor]) -> Tensor:
    """How far the policy is from the path."""
    seen = [
        dino(pixel_values=batch["pixels"]).last_hidden_state[:, 1:],  # without the class token
        siglip(pixel_values=batch["pixels"]).last_hidden_state,
    ]
    words = llm.get_input_embeddings()(batch["words"])
    asked = queries.weight + torch.zeros_like(words[:, :1])
    tokens = torch.cat([projector(torch.cat(seen, -1)), words, asked], 1)
    return F.l1_loss(policy(batch["state"], read(tokens)), batch["path"])
