"""A language model that sees and hears: pictures, sounds, and both, in the manner of Qwen-VL joined with Qwen-Audio.

| component | model |
|---|---|
| vision | CLIP ViT, 6 layers of 96 |
| resampler | four learned queries that attend to the patches |
| audio | Whisper encoder, 4 layers of 64 |
| audio-projection | means of two frames, projected |
| llm | Qwen2, 6 layers of 96, grouped-query attention |

True size: benchmarks/workloads/qwen_val_9b.yaml.

Data: 16 things, each with a picture, a sound and a description; a conversation asks for one description or for two.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import spindle

THINGS, WIDTH, QUERIES, VOCABULARY = 16, 96, 4, 120

Batch = dict[str, Tensor]
fixed = torch.Generator().manual_seed(0)
PICTURES = torch.randn(THINGS, 3, 32, 32, generator=fixed)
SOUNDS = torch.randn(THINGS, 20, 48, generator=fixed)  # mel bins, frames
DESCRIPTIONS = torch.randint(10, VOCABULARY, (THINGS, 8), generator=fixed)


class Conversations:
    """Batches of what is seen or heard, a question of three words, and its answer; every pass gives the same ones."""

    def __init__(self, senses: tuple[str, ...], rows: int) -> None:
        self.senses, self.rows = senses, rows

    def __iter__(self) -> Iterator[Batch]:
        """The answer describes what is seen, then what is heard."""
        random = torch.Generator().manual_seed(len(self.senses))
        shown = {"picture": PICTURES, "sound": SOUNDS}
        question = torch.tensor([1, 2 + len(self.senses), 2]).expand(self.rows, -1)
        for _ in range(100):
            things = {sense: torch.randint(0, THINGS, (self.rows,), generator=random) for sense in self.senses}
            said = [DESCRIPTIONS[thing] for thing in things.values()]
            yield {
                **{sense: shown[sense][thing] for sense, thing in things.items()},
                "tokens": torch.cat([question, *said], 1),
            }


class Resampler(nn.Module):
    """A fixed number of tokens from any number of patches: [b, patches, width] -> [b, QUERIES, WIDTH]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(QUERIES, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=width, vdim=width, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        """Each query gathers what it looks for."""
        queries = self.queries.expand(patches.shape[0], -1, -1)
        return self.norm(self.attention(queries, patches, patches, need_weights=False)[0])


class AudioProjection(nn.Module):
    """Half as many frames, of the language model's width: [b, frames, width] -> [b, frames / 2, WIDTH]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, WIDTH)

    def forward(self, frames: Tensor) -> Tensor:
        """Means of two neighbors, projected."""
        return self.project(frames.unflatten(1, (-1, 2)).mean(2))


torch.manual_seed(0)
workload = spindle.Workload("vision-audio-llm")
vision = workload.component(
    "vision",
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ),
)
resampler = workload.component("resampler", Resampler(96))
audio = workload.component(
    "audio",
    WhisperEncoder(
        WhisperConfig(
            d_model=64,
            encoder_layers=4,
            encoder_attention_heads=4,
            encoder_ffn_dim=256,
            num_mel_bins=20,
            max_source_positions=24,
        )
    ),
)
audio_projection = workload.component("audio-projection", AudioProjection(64))
llm = workload.component(
    "llm",
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ),
)


def perceive(batch: Batch) -> list[Tensor]:
    """What is seen and heard, as input embeddings of the language model."""
    found = []
    if "picture" in batch:
        found.append(resampler(vision(pixel_values=batch["picture"]).last_hidden_state[:, 1:]))
    if "sound" in batch:
        found.append(audio_projection(audio(batch["sound"]).last_hidden_state))
    return found


def converse(batch: Batch) -> Tensor:
    """Cross-entropy of each word of question and answer after what was perceived."""
    tokens = batch["tokens"]
    words = llm.get_input_embeddings()(tokens)
    logits = llm(inputs_embeds=torch.cat([*perceive(batch), words], 1)).logits
    return F.cross_entropy(logits[:, -tokens.shape[1] : -1].flatten(0, 1), tokens[:, 1:].flatten())


@workload.task("vision-language", batch_size=24, data=Conversations(("picture",), 24))
def vision_language(batch: Batch) -> Tensor:
    """Describe the picture."""
    return converse(batch)


@workload.task("audio-language", batch_size=16, data=Conversations(("sound",), 16))
def audio_language(batch: Batch) -> Tensor:
    """Describe the sound."""
    return converse(batch)


@workload.task("vision-audio-language", batch_size=16, data=Conversations(("picture", "sound"), 16))
def vision_audio_language(batch: Batch) -> Tensor:
    """Describe the picture, then the sound."""
    return converse(batch)
