"""Vision-language families, from transformers' own configs: one model, one call, images among the words."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from models_base import Batch, Family, Sample, floats, ids
from models_senses import VISION
from models_text import GROUPED, SIZES
from torch import Tensor

IMAGE = 36  # the token that stands for a piece of the image


def prompt(num_image_tokens: int, length: int = 5, image: int = IMAGE) -> Tensor:
    """A few words, the image, some words more."""
    words = ids(length) % 30 + 3
    before, after = words[:, :2], words[:, 2:]
    return torch.cat([before, torch.full((len(words), num_image_tokens), image), after], 1)


def chat(
    model: str, config: str, num_image_tokens: int, *, pixels: tuple[int, ...] = (4, 3, 16, 16), **settings: Any
) -> Callable[[], Sample]:
    """A model that takes pixels and ids, with its own loss over the words."""

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings))

        def loss(batch: Batch) -> Tensor:
            labels = batch["ids"].masked_fill(batch["ids"] == IMAGE, -100)
            found: Tensor = module(
                input_ids=batch["ids"],
                attention_mask=torch.ones_like(batch["ids"]),
                pixel_values=batch["pixels"],
                labels=labels,
                **({"token_type_ids": (batch["ids"] == IMAGE).long()} if model.startswith(("Pali", "Gemma3")) else {}),
            ).loss
            return found

        return Sample({"model": module}, {"pixels": floats(*pixels), "ids": prompt(num_image_tokens)}, loss)

    return build


def packed(model: str, config: str, patch_values: int, **settings: Any) -> Callable[[], Sample]:
    """Qwen-VL: patches of all images lie in one row after another, and the grid says which belong together."""

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings))

        def loss(batch: Batch) -> Tensor:
            labels = batch["ids"].masked_fill(batch["ids"] == IMAGE, -100)
            found: Tensor = module(
                input_ids=batch["ids"],
                attention_mask=torch.ones_like(batch["ids"]),
                pixel_values=batch["patches"].flatten(0, 1),
                image_grid_thw=batch["grid"],
                mm_token_type_ids=(batch["ids"] == IMAGE).long(),
                labels=labels,
            ).loss
            return found

        grid = torch.tensor([[1, 4, 4]]).repeat(4, 1)
        start = torch.full((4, 1), 35)
        words = torch.cat([start, prompt(4)[:, 2:]], 1)
        return Sample({"model": module}, {"patches": floats(4, 16, patch_values), "grid": grid, "ids": words}, loss)

    return build


def by_towers(**settings: Any) -> Callable[[], Sample]:
    """Qwen2.5-VL with its tower and its language model as components, and the positions from the loader."""

    def build() -> Sample:
        whole = hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(**settings))
        eyes, lm, head = whole.model.visual, whole.model.language_model, whole.lm_head

        def loss(batch: Batch) -> Tensor:
            seen = eyes(batch["patches"].flatten(0, 1), grid_thw=batch["grid"]).pooler_output
            words = lm.get_input_embeddings()(batch["ids"])
            places = (batch["ids"] == IMAGE)[..., None].expand_as(words)
            states = lm(
                inputs_embeds=words.masked_scatter(places, seen.to(words.dtype)),
                position_ids=batch["positions"].transpose(0, 1),
            ).last_hidden_state
            labels = batch["ids"].masked_fill(batch["ids"] == IMAGE, -100)
            return F.cross_entropy(head(states[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())

        grid = torch.tensor([[1, 4, 4]]).repeat(4, 1)
        words = torch.cat([torch.full((4, 1), 35), prompt(4)[:, 2:]], 1)
        kinds = (words == IMAGE).long()
        positions = whole.model.get_rope_index(words, mm_token_type_ids=kinds, image_grid_thw=grid)[0]
        batch = {
            "patches": floats(4, 16, 3 * 2 * 16),
            "grid": grid,
            "ids": words,
            "positions": positions.transpose(0, 1),
        }
        return Sample({"eyes": eyes, "lm": lm, "head": head}, batch, loss)

    return build


TEXT = {**GROUPED, "num_hidden_layers": 2}
CLIP = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 3}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 34, "vision_start_token_id": 35, "vision_end_token_id": 33}
QWEN25: dict[str, Any] = {
    "text_config": {**TEXT, "rope_parameters": QWEN_ROPE},
    "vision_config": {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    },
    **QWEN_IDS,
}

FAMILIES = (
    Family(
        "LLaVA",
        "vision-language",
        chat(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            4,
            vision_config=CLIP,
            text_config={**TEXT, "model_type": "llama"},
            image_token_index=IMAGE,
        ),
    ),
    Family(
        "PaliGemma",
        "vision-language",
        chat(
            "PaliGemmaForConditionalGeneration",
            "PaliGemmaConfig",
            4,
            vision_config={**SIGLIP, "projection_dim": 32, "vision_use_head": False},
            text_config={**TEXT, "model_type": "gemma"},
            image_token_index=IMAGE,
            projection_dim=32,
        ),
    ),
    Family(
        "SmolVLM / Idefics 3",
        "vision-language",
        chat(
            "Idefics3ForConditionalGeneration",
            "Idefics3Config",
            4,
            pixels=(4, 1, 3, 32, 32),
            vision_config={**VISION, "image_size": 32},
            text_config={**TEXT, "model_type": "llama"},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
    ),
    Family(
        "BLIP-2",
        "vision-language, query former",
        chat(
            "Blip2ForConditionalGeneration",
            "Blip2Config",
            4,
            vision_config={**VISION, "model_type": "blip_2_vision_model"},
            qformer_config={**SIZES, "num_hidden_layers": 2, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
            text_config={**SIZES, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
    ),
    Family(
        "Qwen2-VL",
        "vision-language, packed patches",
        packed(
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            3 * 2 * 16,
            text_config={**TEXT, "rope_parameters": QWEN_ROPE},
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            **QWEN_IDS,
        ),
    ),
    Family(
        "Qwen2.5-VL",
        "vision-language, packed patches",
        packed("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", 3 * 2 * 16, **QWEN25),
    ),
    Family("Qwen2.5-VL, by towers", "the same, positions from the loader", by_towers(**QWEN25)),
)
