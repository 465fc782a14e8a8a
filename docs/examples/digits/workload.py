"""Five tasks over handwritten, spoken and written digits; every tower is an unmodified `transformers` model.

| task | reads | uses | loss |
|---|---|---|---|
| image-text | picture, caption | vision, text | contrastive |
| image-speech | picture, recording | vision, speech | contrastive |
| captioning | picture | vision, lm | generative: the caption, word by word |
| speech-digit | recording | speech | classification; one modality |
| language | caption | lm | generative; one modality |

Data: the 1797 handwritten digits that ship with scikit-learn (UCI "Optical recognition of handwritten digits"), 480
spoken ones in speech.npz beside this file (synthetic voices, see make_speech.py), and captions made of the labels, each
batch's padded to its longest.

    spindle plan docs/examples/digits/workload.py
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import spindle

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}", "the digit {} drawn by hand", "this is the number {}", "{} in somebody's writing")
WORDS = ("<pad>", "<start>", "<end>", *sorted({w for c in CAPTIONS for w in c.split() if w != "{}"}), *DIGITS)
PAD, START, END = 0, 1, 2
LENGTH = 8  # tokens of the longest caption
WIDTH = 64


def encode(text: str) -> list[int]:
    """Tokens of a caption: start, words, end."""
    return [START, *(WORDS.index(word) for word in text.split()), END]


def padded(texts: list[str]) -> Tensor:
    """Captions as [n, length] tokens, padded to the longest of them."""
    rows = [torch.tensor(encode(text)) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def decode(tokens: list[int]) -> str:
    """The words up to the end token."""
    words = tokens[: tokens.index(END)] if END in tokens else tokens
    return " ".join(WORDS[token] for token in words if token not in (PAD, START))


class Pictures:
    """Handwritten digits as [n, 1, 8, 8] in -1..1 with labels; the last 297 are kept for testing."""

    def __init__(self, *, test: bool = False) -> None:
        """Load from scikit-learn's own files."""
        data = load_digits()
        part = slice(1500, None) if test else slice(0, 1500)
        self.pixels = torch.tensor(data.images[part], dtype=torch.float32)[:, None] / 8 - 1
        self.digit = torch.tensor(data.target[part])


class Recordings:
    """Spoken digits as log-mel spectrograms [n, 24, 32] in -1..1 with labels; eight voices are kept for testing."""

    def __init__(self, *, test: bool = False) -> None:
        """Load the file beside this one."""
        data = np.load(Path(__file__).with_name("speech.npz"))
        part = (data["voice"] % 6 == 5) == test
        self.mel = torch.tensor(data["mel"][part], dtype=torch.float32) / 127.5 - 1
        self.digit = torch.tensor(data["digit"][part])


class Loader:
    """Endless shuffled batches of one task; every pass gives the same ones, in every process."""

    def __init__(self, task: str, batch_size: int) -> None:
        """What each task reads stands in the table above."""
        self.task, self.batch_size = task, batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Draw batches with a generator of their own."""
        random = np.random.default_rng(sum(self.task.encode()))
        pictures, recordings = Pictures(), Recordings()
        while True:
            pick = torch.from_numpy(random.integers(len(pictures.digit), size=self.batch_size))
            digit = pictures.digit[pick]
            batch = {"pixels": pictures.pixels[pick], "digit": digit}
            if "speech" in self.task:
                said = [random.choice(np.flatnonzero(recordings.digit == int(d))) for d in digit]
                batch["mel"] = recordings.mel[torch.tensor(said)]
            if self.task in ("image-text", "captioning", "language"):
                known = random.choice(CAPTIONS, size=2)  # each batch in its own words, so that lengths change
                batch["tokens"] = padded([random.choice(known).format(DIGITS[int(d)]) for d in digit])
            if self.task in ("speech-digit", "language"):
                del batch["pixels"]
            yield batch


class Speech(nn.Module):
    """A Whisper encoder with one vector a recording, and a classifier on top of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = WhisperEncoder(
            WhisperConfig(
                d_model=WIDTH,
                encoder_layers=3,
                encoder_attention_heads=4,
                encoder_ffn_dim=4 * WIDTH,
                num_mel_bins=24,
                max_source_positions=16,
            )
        )
        self.classify = nn.Linear(WIDTH, len(DIGITS))

    def forward(self, mel: Tensor) -> Tensor:
        """[b, 24, 32] -> [b, WIDTH]."""
        states: Tensor = self.encoder(mel).last_hidden_state
        return states.mean(1)


def contrastive(a: Tensor, b: Tensor, digit: Tensor) -> Tensor:
    """Match rows of a and b, [n, d] each; rows of the same digit all count as matches."""
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * 10.0
    same = (digit[:, None] == digit[None, :]).float()
    wanted = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


torch.manual_seed(0)
workload = spindle.Workload("digits")
vision = workload.component(
    "vision",
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_channels=1,
            image_size=8,
            patch_size=2,
        )
    ),
)
text = workload.component(
    "text",
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    ),
)
speech = workload.component("speech", Speech())
lm = workload.component(
    "lm",
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ),
)
project = workload.component("project", nn.Linear(WIDTH, WIDTH))


def next_word_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token after the first; padding does not count."""
    wanted = tokens[:, 1:].masked_fill(tokens[:, 1:] == PAD, -100)
    return F.cross_entropy(logits[:, -tokens.shape[1] : -1].flatten(0, 1), wanted.flatten())


def picture_prompt(pixels: Tensor) -> Tensor:
    """The picture as [b, patches, WIDTH] input embeddings of the language model."""
    return project(vision(pixel_values=pixels).last_hidden_state[:, 1:])


@workload.task("image-text", batch_size=64, data=Loader("image-text", 64))
def image_text(batch: dict[str, Tensor]) -> Tensor:
    """Pictures and their captions, contrasted."""
    image = vision(pixel_values=batch["pixels"]).pooler_output
    words = text(input_ids=batch["tokens"], attention_mask=(batch["tokens"] != PAD).long()).pooler_output
    return contrastive(image, words, batch["digit"])


@workload.task("image-speech", batch_size=64, data=Loader("image-speech", 64))
def image_speech(batch: dict[str, Tensor]) -> Tensor:
    """Pictures and the spoken digit, contrasted."""
    return contrastive(vision(pixel_values=batch["pixels"]).pooler_output, speech(batch["mel"]), batch["digit"])


@workload.task("captioning", batch_size=32, data=Loader("captioning", 32))
def captioning(batch: dict[str, Tensor]) -> Tensor:
    """The caption, word by word, after the picture."""
    prompt = picture_prompt(batch["pixels"])
    words = lm.get_input_embeddings()(batch["tokens"])
    logits = lm(inputs_embeds=torch.cat([prompt, words], 1)).logits
    return next_word_loss(logits, batch["tokens"])


@workload.task("speech-digit", batch_size=64, data=Loader("speech-digit", 64))
def speech_digit(batch: dict[str, Tensor]) -> Tensor:
    """Which digit was spoken."""
    return F.cross_entropy(speech.classify(speech(batch["mel"])), batch["digit"])


@workload.task("language", batch_size=32, data=Loader("language", 32))
def language(batch: dict[str, Tensor]) -> Tensor:
    """Captions without a picture."""
    return next_word_loss(lm(input_ids=batch["tokens"]).logits, batch["tokens"])


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What `spindle train` uses."""
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
