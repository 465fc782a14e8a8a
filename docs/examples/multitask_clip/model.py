"""Multi-task CLIP: six modalities in one joint space, five tasks that each contrast two of them.

| tower | model | layers | width |
|---|---|---|---|
| vision, depth, thermal | CLIP vision towers of 3, 1 and 1 channels | 6, 3, 3 | 96, 48, 64 |
| text | CLIP text tower | 5 | 64 |
| audio | audio spectrogram transformer | 4 | 64 |
| motion | transformer over windows of six inertial channels | 2 | 48 |

True size, with ten tasks: benchmarks/workloads/multitask_clip.yaml.

Data: 32 things; each modality shows a thing by a pattern of its own, with a little noise.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import spindle

JOINT, WORDS, THINGS = 32, 100, 32
PAIRS = {  # tasks: two modalities and a batch size
    ("text", "audio"): 32,
    ("vision", "depth"): 32,
    ("audio", "thermal"): 24,
    ("motion", "thermal"): 24,
    ("vision", "text"): 16,
}
SHAPES = {
    "vision": (3, 32, 32),
    "depth": (1, 32, 32),
    "thermal": (1, 32, 32),
    "text": (8,),
    "audio": (64, 16),  # frames, mel bins
    "motion": (16, 6),  # times, channels
}


class Pairs:
    """Batches of things seen in two modalities; every pass gives the same ones."""

    def __init__(self, first: str, second: str, rows: int) -> None:
        self.modalities, self.rows = (first, second), rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """No thing comes twice in a batch: every row has one match."""
        shown = {name: pattern(name) for name in self.modalities}
        random = torch.Generator().manual_seed(self.rows)
        for _ in range(100):
            things = torch.randperm(THINGS, generator=random)[: self.rows]
            batch = {name: looks[things] for name, looks in shown.items()}
            for name, value in batch.items():
                if name != "text":
                    batch[name] = value + 0.1 * torch.randn(value.shape, generator=random)
            yield batch


def pattern(modality: str) -> Tensor:
    """How each thing looks in a modality: [THINGS, ...]."""
    random = torch.Generator().manual_seed(sum(modality.encode()))
    shape = (THINGS, *SHAPES[modality])
    if modality == "text":  # the last word ends the sentence
        return torch.randint(2, WORDS - 1, shape, generator=random).index_fill(1, torch.tensor([7]), WORDS - 1)
    return torch.randn(shape, generator=random)


def picture_tower(width: int, layers: int, channels: int) -> CLIPVisionModelWithProjection:
    """16 patches of 8 x 8 pixels."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_channels=channels,
            image_size=32,
            patch_size=8,
            projection_dim=JOINT,
        )
    )


def text_tower(width: int, layers: int) -> CLIPTextModelWithProjection:
    """Eight words; the last one, which has the highest number, stands for the sentence."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=WORDS,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=8,
            projection_dim=JOINT,
            bos_token_id=1,
            eos_token_id=2,  # CLIP's own setting for "take the highest number"
            pad_token_id=0,
        )
    )


class Audio(nn.Module):
    """A spectrogram in 16 patches, the mean of their states, projected."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.encoder = ASTModel(
            ASTConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                patch_size=8,
                frequency_stride=8,
                time_stride=8,
                max_length=64,
                num_mel_bins=16,
            )
        )
        self.head = nn.Linear(width, JOINT)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[b, frames, bins] -> [b, JOINT]."""
        return self.head(self.encoder(spectrogram).last_hidden_state.mean(1))


class Motion(nn.Module):
    """Windows of four times, a plain transformer, the mean, projected."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.windows = nn.Conv1d(6, width, kernel_size=4, stride=4)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, JOINT)

    def forward(self, channels: Tensor) -> Tensor:
        """[b, times, channels] -> [b, JOINT]."""
        return self.head(self.encoder(self.windows(channels.transpose(1, 2)).transpose(1, 2)).mean(1))


torch.manual_seed(0)
workload = spindle.Workload("multitask-clip")
vision = workload.component("vision", picture_tower(96, 6, channels=3))
depth = workload.component("depth", picture_tower(48, 3, channels=1))
thermal = workload.component("thermal", picture_tower(64, 3, channels=1))
text = workload.component("text", text_tower(64, 5))
audio = workload.component("audio", Audio(64, 4))
motion = workload.component("motion", Motion(48, 2))
EMBED: dict[str, Callable[[Tensor], Tensor]] = {
    "vision": lambda pixels: vision(pixel_values=pixels).image_embeds,
    "depth": lambda pixels: depth(pixel_values=pixels).image_embeds,
    "thermal": lambda pixels: thermal(pixel_values=pixels).image_embeds,
    "text": lambda words: text(input_ids=words).text_embeds,
    "audio": audio,
    "motion": motion,
}


def contrast(first: str, second: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """The task that matches what is the same thing in two modalities."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        a, b = (F.normalize(EMBED[name](batch[name]), dim=-1) for name in (first, second))
        logits, match = 10 * a @ b.T, torch.arange(a.shape[0])
        return (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2

    return loss


for (first, second), rows in PAIRS.items():
    workload.task(f"{first}-{second}", batch_size=rows, data=Pairs(first, second, rows))(contrast(first, second))
