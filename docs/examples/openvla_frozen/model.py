"""OpenVLA with its vision frozen: two towers side by side, a projector, and a Llama that writes actions as words.

| component | model | layers | width | learns |
|---|---|---|---|---|
| dino | DINOv2 | 4 | 48 | no |
| siglip | SigLIP | 4 | 64 | no |
| projector | three linear layers | | 112 -> 64 | yes |
| llm | Llama | 4 | 64 | yes |

One task, `action`: a picture and an instruction in, the words of an action out, one word for each of its dimensions.
True size: docs/examples/openvla_frozen/true-size.yaml.

Data: a red and a blue blob on a picture; the instruction names one of them, the action is the way to it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

import spindle

PIXELS, PATCH, BINS, WIDTH = 24, 4, 16, 64
RED, BLUE, ACT = 0, 1, 2  # the prompt: which blob, then "what action"; words from FIRST_BIN on are parts of an action
FIRST_BIN = 8


def blob(center: Tensor) -> Tensor:
    """Centers [n, 2] in 0..1 -> bright spots [n, PIXELS, PIXELS]."""
    axis = (torch.arange(PIXELS) + 0.5) / PIXELS
    y, x = ((axis - center[:, i, None]) ** 2 for i in (0, 1))
    return torch.exp(-60 * (y[:, :, None] + x[:, None, :]))


class Reach:
    """Batches of pictures, prompts and the words of actions; every pass gives the same ones."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(1)
        for _ in range(200):
            red, blue = torch.rand(2, self.rows, 2, generator=random)
            pixels = torch.stack([blob(red), torch.zeros(self.rows, PIXELS, PIXELS), blob(blue)], 1)
            asked = torch.randint(2, (self.rows,), generator=random)
            way = torch.where((asked == RED)[:, None], red, blue)
            far = (way - 0.5).norm(dim=1, keepdim=True)
            words = FIRST_BIN + (torch.cat([way, far], 1) * BINS).long().clamp(0, BINS - 1)
            yield {"pixels": pixels, "prompt": torch.stack([asked, torch.full_like(asked, ACT)], 1), "action": words}


def sizes(width: int) -> dict[str, int]:
    """Settings that all three transformers share."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4, "num_attention_heads": 4}


def frozen(tower: nn.Module) -> nn.Module:
    """A vision tower that does not learn."""
    return tower.requires_grad_(False).eval()


torch.manual_seed(0)
workload = spindle.Workload("openvla-frozen")
picture = {"image_size": PIXELS, "patch_size": PATCH}
dino = workload.component("dino", frozen(Dinov2Model(Dinov2Config(**sizes(48), **picture))))
siglip = workload.component(
    "siglip", frozen(SiglipVisionModel(SiglipVisionConfig(**sizes(64), **picture, vision_use_head=False)))
)
projector = workload.component(
    "projector",
    nn.Sequential(nn.Linear(112, 4 * 112), nn.GELU(), nn.Linear(4 * 112, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
)
llm = workload.component("llm", LlamaForCausalLM(LlamaConfig(vocab_size=FIRST_BIN + BINS, **sizes(WIDTH))))


@workload.task("action", batch_size=32, data=Reach(32))
def action(batch: dict[str, Tensor]) -> Tensor:
    """Each word of the action after the picture, the prompt and the words before it."""
    seen = [
        dino(pixel_values=batch["pixels"]).last_hidden_state[:, 1:],  # without the class token
        siglip(pixel_values=batch["pixels"]).last_hidden_state,
    ]
    prefix = projector(torch.cat(seen, -1))
    words = llm.get_input_embeddings()(torch.cat([batch["prompt"], batch["action"]], 1))
    logits = llm(inputs_embeds=torch.cat([prefix, words], 1)).logits
    length = batch["action"].shape[1]
    return F.cross_entropy(logits[:, -length - 1 : -1].flatten(0, 1), batch["action"].flatten())


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What `spindle train` uses."""
    return torch.optim.AdamW(parameters, lr=2e-3)
