"""Families with sound, and towers that are compared with each other, with batches of changing shapes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers as hf
from families.base import Batch, Family, Sample, padded
from families.vision_language import (
    END,
    GRIDS,
    IMAGE,
    LENGTHS,
    QWEN_ROPE,
    QWEN_VISION,
    START,
    TEXT,
    VISION,
    VOCABULARY,
    own_loss,
    packed_rows,
    words,
)
from torch import Tensor

import spindle

AUDIO, AUDIO_START, AUDIO_END = 105, 106, 107

# -- one clip a sample ------------------------------------------------------------------------------------------------

SAMPLES = ((400, 300, 360, 200), (520, 240, 400, 280), (320, 320, 320))  # length of each sample's wave
SOUND: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 40,
    "mask_time_prob": 0.0,  # its masks come from numpy, which every rank would draw for itself
}


def wav2vec(**settings: Any) -> Callable[[], Sample]:
    """wav2vec 2.0 with its own CTC loss; waves and transcripts are padded."""

    def build() -> Sample:
        module = hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**{**SOUND, **settings}))

        def batch(lengths: Sequence[int], heard: Sequence[int]) -> Batch:
            known = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            labels = torch.where(torch.arange(max(heard)) < torch.tensor(heard)[:, None], 0, -100)
            labels = labels + torch.randint(3, 40, labels.shape) * (labels == 0)
            return {
                "input_values": torch.randn(known.shape) * known,
                "attention_mask": known.long(),
                "labels": labels,
            }

        batches = [batch(s, h) for s, h in zip(SAMPLES, ((4, 2, 3, 1), (5, 3, 2, 4), (3, 3, 3)), strict=True)]
        return Sample({"model": module}, batches, own_loss(module))

    return build


def whisper() -> Sample:
    """Whisper; its sound is always as long as the model's positions, transcripts are padded."""
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    module = hf.WhisperForConditionalGeneration(config)

    def batch(lengths: Sequence[int]) -> Batch:
        made = padded([words(length) for length in lengths], VOCABULARY)
        return {"input_features": torch.randn(len(lengths), 8, 20), "labels": made["labels"]}

    return Sample({"model": module}, [batch(lengths) for lengths in LENGTHS], own_loss(module))


# -- towers side by side ----------------------------------------------------------------------------------------------

TOWER = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}


def contrast(batch: Batch, module: torch.nn.Module) -> Tensor:
    """The loss over all pairs of the batch."""
    found: Tensor = module(**batch, return_loss=True).loss
    return found


def clip() -> Sample:
    """CLIP, its texts padded."""
    config = hf.CLIPConfig(vision_config={**VISION}, text_config={**TOWER, "eos_token_id": 2}, projection_dim=32)
    module = hf.CLIPModel(config)

    def batch(lengths: Sequence[int]) -> Batch:
        made = padded([[*words(length), 2] for length in lengths], VOCABULARY)
        made.pop("labels")
        return {**made, "pixel_values": torch.randn(len(lengths), 3, 16, 16)}

    return Sample({"model": module}, [batch(n) for n in LENGTHS], lambda b: contrast(b, module))


SHAPES = (
    ((4, 4), (2, 6), (3, 5), (4, 3)),
    ((6, 4), (2, 2), (5, 5), (3, 8)),
    ((4, 4), (4, 4), (4, 4)),
    ((5, 3), (4, 4), (2, 2), (6, 2)),
)


def siglip2() -> Sample:
    """SigLIP 2 (naflex): patches of images of any shape, padded to the most of the batch."""
    vision = {k: v for k, v in VISION.items() if k != "image_size"}
    config = hf.Siglip2Config(vision_config={**vision, "num_patches": 16}, text_config={**TOWER, "projection_size": 32})
    module = hf.Siglip2Model(config)

    def batch(shapes: Sequence[tuple[int, int]], lengths: Sequence[int]) -> Batch:
        sizes = torch.tensor([rows * columns for rows, columns in shapes])
        seen = torch.arange(int(sizes.max())) < sizes[:, None]
        made = padded([words(length) for length in lengths], VOCABULARY)
        made.pop("labels")
        return {
            **made,
            "pixel_values": torch.randn(*seen.shape, 48) * seen[..., None],
            "pixel_attention_mask": seen.int(),
            "spatial_shapes": torch.tensor(shapes),
        }

    batches = [batch(shapes, lengths) for shapes, lengths in zip(SHAPES, LENGTHS, strict=True)]
    return Sample({"model": module}, batches, lambda b: contrast(b, module))


# -- sound, images and text -------------------------------------------------------------------------------------------

FRAMES = (((20,), (), (24, 40), (16,)), ((), (60,), (36, 12), (44,)), ((20,), (20,), ()), ((), (16,), (24,), ()))


def omni() -> Sample:
    """The thinker of Qwen2.5-Omni: clips of any length and images of any size among the words."""
    config = hf.Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 3,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "max_source_positions": 50,
            "n_window": 8,
            "output_dim": 32,
        },
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config={**{k: v for k, v in TEXT.items() if k != "head_dim"}, "rope_parameters": QWEN_ROPE},
        audio_token_index=AUDIO,
        image_token_index=IMAGE,
        video_token_index=103,
        vision_start_token_id=START,
        vision_end_token_id=END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
    module = hf.Qwen2_5OmniThinkerForConditionalGeneration(config)

    def tokens(frames: int) -> int:
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1

    def batch(
        frames: Sequence[Sequence[int]], grids: Sequence[Sequence[tuple[int, int]]], lengths: Sequence[int]
    ) -> Batch:
        texts = []
        for clips, images, length in zip(frames, grids, lengths, strict=True):
            text = words(1)
            for clip in clips:
                text += [AUDIO_START, *[AUDIO] * tokens(clip), AUDIO_END]
            for rows, columns in images:
                text += [START, *[IMAGE] * (rows * columns // 4), END]
            texts.append(text + words(length))
        every = torch.tensor([clip for clips in frames for clip in clips])
        heard = torch.arange(int(every.max())) < every[:, None]
        made = {
            **padded(texts, IMAGE),
            "input_features": torch.randn(len(every), 8, heard.shape[1]),
            "feature_attention_mask": heard.long(),
        }
        if any(grids):
            grid = torch.tensor([(1, *size) for images in grids for size in images])
            made |= {"pixel_values": torch.randn(int(grid.prod(1).sum()), 48), "image_grid_thw": grid}
        return made

    def rows(batch: Batch) -> Mapping[str, Any]:
        clips, frames = (batch["input_ids"] == AUDIO_START).sum(1), batch["feature_attention_mask"].sum(1)
        return {
            **packed_rows(batch),
            "input_features": clips,
            "feature_attention_mask": clips,
            "chunks": spindle.per_sample((frames + 15) // 16, clips),  # 16 frames each, the last may be shorter
            "steps": spindle.per_sample((frames + 1) // 2, clips),  # after the convolutions
            "sounds": (batch["input_ids"] == AUDIO).sum(1),  # after the pooling
        }

    batches = [batch(f, g, n) for f, g, n in zip(FRAMES, GRIDS, LENGTHS, strict=True)]
    return Sample({"model": module}, batches, own_loss(module), rows=rows)


FAMILIES = (
    Family("Qwen2.5-Omni, thinker", "whole: sound, images, text", omni),
    Family("Whisper", "speech, encoder-decoder", whisper),
    Family("wav2vec 2.0", "speech, CTC", wav2vec(layerdrop=0.0)),
    Family(
        "wav2vec 2.0 with layerdrop",
        "speech, CTC, layers left out at random",
        wav2vec(layerdrop=0.3),
        refused="layerdrop",
    ),
    Family("CLIP", "two towers", clip),
    Family("SigLIP 2, naflex", "two towers, images of any shape", siglip2),
)
