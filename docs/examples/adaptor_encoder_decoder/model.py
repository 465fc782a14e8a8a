"""Adaptors, one encoder, one decoder: seven tasks over text, images, sound and motion in the manner of OFASys.

| component | model |
|---|---|
| embedding, encoder, decoder, head | the parts of one BART: 3 + 3 layers of 64, head tied to the embedding |
| vision | ViT, 3 layers of 48, projected |
| audio | two strided convolutions |
| motion, motion-head | multilayer perceptrons by frame |

True size: benchmarks/workloads/ofasys.yaml.

Data: 16 things, each with a name of six words, a picture, a sound and a motion.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, ViTConfig, ViTModel

import spindle

THINGS, WIDTH = 16, 64
FILLERS, COLUMNS, CORNERS, VOCABULARY = 60, 80, 90, 100  # words from 1 on, fillers, columns of tables, places
FRAMES, JOINTS = 12, 16

Batch = dict[str, Tensor]
fixed = torch.Generator().manual_seed(0)
NAMES = torch.randint(1, FILLERS, (THINGS, 6), generator=fixed)
PICTURES = torch.randn(THINGS, 3, 16, 16, generator=fixed)
SOUNDS = torch.randn(THINGS, 20, 32, generator=fixed)  # mel bins, frames
MOTIONS = torch.randn(THINGS, FRAMES, JOINTS, generator=fixed)
TRAITS = torch.randint(1, FILLERS, (THINGS, 4), generator=fixed)  # answers to four questions


def captioning(things: Tensor, random: torch.Generator) -> Batch:
    """A picture; its name."""
    return {"picture": PICTURES[things], "wanted": NAMES[things]}


def summarization(things: Tensor, random: torch.Generator) -> Batch:
    """A name among filler words; the name."""
    filler = torch.randint(FILLERS, COLUMNS, (len(things), 6, 3), generator=random)
    return {"text": torch.cat([NAMES[things][..., None], filler], -1).flatten(1), "wanted": NAMES[things]}


def speech_recognition(things: Tensor, random: torch.Generator) -> Batch:
    """A sound; its name."""
    return {"sound": SOUNDS[things], "wanted": NAMES[things]}


def grounding(things: Tensor, random: torch.Generator) -> Batch:
    """A thing in one corner of a picture and its name; which corner, twice: up or down, left or right."""
    corner = torch.randint(0, 2, (len(things), 2), generator=random)
    canvas = torch.zeros(len(things), 3, 2, 16, 2, 16)
    canvas[torch.arange(len(things)), :, corner[:, 0], :, corner[:, 1]] = PICTURES[things]
    picture = F.avg_pool2d(canvas.reshape(-1, 3, 32, 32), 2)
    return {"picture": picture, "text": NAMES[things], "wanted": CORNERS + corner + torch.tensor([0, 2])}


def text_to_sql(things: Tensor, random: torch.Generator) -> Batch:
    """A question and the columns of a table; the columns and the words of the question in turn."""
    columns = torch.randint(COLUMNS, CORNERS, (len(things), 6), generator=random)
    wanted = torch.stack([columns, NAMES[things]], -1).flatten(1)
    return {"text": torch.cat([NAMES[things], columns], 1), "wanted": wanted}


def text_to_motion(things: Tensor, random: torch.Generator) -> Batch:
    """A name and a motion under noise; the motion."""
    keep = torch.rand(len(things), 1, 1, generator=random)
    noise = torch.randn(len(things), FRAMES, JOINTS, generator=random)
    noisy = keep * MOTIONS[things] + (1 - keep) * noise
    return {"text": NAMES[things], "noisy": noisy, "keep": keep, "wanted": MOTIONS[things]}


def question_answering(things: Tensor, random: torch.Generator) -> Batch:
    """A picture and one of four questions; its answer."""
    asked = torch.randint(0, 4, (len(things), 1), generator=random)
    return {"picture": PICTURES[things], "text": FILLERS + asked, "wanted": TRAITS[things].gather(1, asked)}


class Samples:
    """Batches of a task; every pass gives the same ones."""

    def __init__(self, make: Callable[[Tensor, torch.Generator], Batch], rows: int) -> None:
        self.make, self.rows = make, rows

    def __iter__(self) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(1)
        for _ in range(100):
            yield self.make(torch.randint(0, THINGS, (self.rows,), generator=random), random)


class Vision(nn.Module):
    """Four patches of 8 x 8 pixels and a class token: [b, 3, 16, 16] -> [b, 5, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
        self.tower = ViTModel(config, add_pooling_layer=False)
        self.project = nn.Linear(48, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels to states of the encoder's width."""
        return self.project(self.tower(pixel_values=pixels).last_hidden_state)


class Audio(nn.Module):
    """Every fourth frame: [b, 20, 32] -> [b, 8, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(20, 2 * WIDTH, 3, stride=2, padding=1)
        self.second = nn.Conv1d(2 * WIDTH, WIDTH, 3, stride=2, padding=1)

    def forward(self, sound: Tensor) -> Tensor:
        """Mel frames to states of the encoder's width."""
        return self.second(F.gelu(self.first(sound))).transpose(1, 2)


torch.manual_seed(0)
bart = BartForConditionalGeneration(
    BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        max_position_embeddings=64,
        dropout=0.0,
    )
)
workload = spindle.Workload("adaptor-encoder-decoder")
embedding = workload.component("embedding", bart.model.shared)
encoder = workload.component("encoder", bart.model.encoder)
decoder = workload.component("decoder", bart.model.decoder)
head = workload.component("head", bart.lm_head)
vision = workload.component("vision", Vision())
audio = workload.component("audio", Audio())
motion = workload.component("motion", nn.Sequential(nn.Linear(JOINTS + 1, 128), nn.GELU(), nn.Linear(128, WIDTH)))
motion_head = workload.component("motion-head", nn.Linear(WIDTH, JOINTS))
ADAPTORS = {"picture": vision, "sound": audio, "text": embedding}


def read(batch: Batch) -> Tensor:
    """Whatever a batch holds, side by side through the encoder."""
    states = [adaptor(batch[field]) for field, adaptor in ADAPTORS.items() if field in batch]
    return encoder(inputs_embeds=torch.cat(states, 1)).last_hidden_state


def write(batch: Batch) -> Tensor:
    """The loss of tasks that end in words: each wanted word after the ones before it."""
    before = F.pad(batch["wanted"], (1, -1))  # word 0 starts a sentence
    states = decoder(inputs_embeds=embedding(before), encoder_hidden_states=read(batch)).last_hidden_state
    return F.cross_entropy(head(states).flatten(0, 1), batch["wanted"].flatten())


def move(batch: Batch) -> Tensor:
    """The loss of text-to-motion: clean frames from noisy ones."""
    keep = batch["keep"].expand(-1, FRAMES, -1)
    frames = motion(torch.cat([batch["noisy"], keep], -1))
    states = decoder(inputs_embeds=frames, encoder_hidden_states=read(batch)).last_hidden_state
    return F.mse_loss(motion_head(states), batch["wanted"])


for make, rows, loss in (
    (captioning, 24, write),
    (summarization, 32, write),
    (speech_recognition, 16, write),
    (grounding, 24, write),
    (text_to_sql, 32, write),
    (text_to_motion, 32, move),
    (question_answering, 24, write),
):
    workload.task(make.__name__.replace("_", "-"), batch_size=rows, data=Samples(make, rows))(loss)
