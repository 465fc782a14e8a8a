"""Vision-language families called whole, with batches as their processors make them: texts of any lengths, any number
of images a sample, of any size where the model takes that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers as hf
from families.base import Batch, Family, Sample, padded
from torch import Tensor, nn
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

import spindle

WORDS, IMAGE, START, END = 100, 100, 101, 102  # words are below; special tokens follow
VOCABULARY = 110
LENGTHS = ((6, 9, 4, 5), (16, 3, 4, 5), (6, 3, 9), (5, 8, 3, 7))  # words of each sample; the third is not full
IMAGES = ((1, 0, 2, 1), (0, 1, 3, 1), (1, 2, 0), (0, 0, 0, 0))  # images of each sample; the last batch has none

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def words(count: int) -> list[int]:
    """A text."""
    return [int(token) for token in torch.randint(3, WORDS, (count,))]


def prompt(image_tokens: Sequence[int], length: int) -> list[int]:
    """A word, images, more words."""
    found = words(1)
    for count in image_tokens:
        found += [START, *[IMAGE] * count, END]
    return found + words(length - 1)


def own_loss(module: nn.Module) -> Callable[[Batch], Tensor]:
    """The loss that a model computes itself."""

    def loss(batch: Batch) -> Tensor:
        found: Tensor = module(**batch).loss
        return found

    return loss


def images_of(batch: Batch) -> Tensor:
    """Images of each sample, found by their start tokens."""
    found: Tensor = (batch["input_ids"] == START).sum(1)
    return found


# -- images of one size -----------------------------------------------------------------------------------------------


def chat(
    model: str,
    config: str,
    tokens: int,
    *,
    kinds: bool = False,
    stacked: bool = False,
    needs_images: bool = False,
    **settings: Any,
) -> Callable[[], Sample]:
    """A model whose images are all of one size and give `tokens` tokens each.

    `kinds`: it also wants to know which tokens are images. `stacked`: images lie along a second dimension of
    pixel_values, padded to the most images of the batch, instead of one after another. `needs_images`: it takes no
    batch of texts alone.
    """

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings))
        size = module.config.vision_config.image_size
        size = size[0] if isinstance(size, list | tuple) else size

        def batch(images: Sequence[int], lengths: Sequence[int]) -> Batch:
            made = padded([prompt([tokens] * n, length) for n, length in zip(images, lengths, strict=True)], WORDS)
            if not any(images):
                pass  # as processors do, which then give no field of images
            elif stacked:
                seen = torch.arange(max(images)) < torch.tensor(images)[:, None]
                made["pixel_values"] = torch.randn(*seen.shape, 3, size, size) * seen[..., None, None, None]
                made["pixel_attention_mask"] = seen[..., None, None].expand(*seen.shape, size, size).clone()
            else:
                made["pixel_values"] = torch.randn(sum(images), 3, size, size)
            if kinds:
                made["token_type_ids"] = (made["input_ids"] == IMAGE).long()
            return made

        def rows(batch: Batch) -> Mapping[str, Any]:
            return {"images" if stacked else "pixel_values": images_of(batch)}

        shapes = [pair for pair in zip(IMAGES, LENGTHS, strict=True) if any(pair[0]) or not needs_images]
        batches = [batch(images, lengths) for images, lengths in shapes]
        return Sample({"model": module}, batches, own_loss(module), rows=rows)

    return build


# -- images of any size -----------------------------------------------------------------------------------------------

GRIDS = (  # rows and columns of patches of each image of each sample; the last batch has none
    (((4, 4),), (), ((8, 4), (4, 4)), ((4, 4),)),
    ((), ((4, 4),), ((12, 8), (4, 4), (4, 4)), ((4, 8),)),
    (((8, 8),), ((4, 4), (8, 4)), ()),
    ((), (), (), ()),
)


def packed_batch(grids: Sequence[Sequence[tuple[int, int]]], lengths: Sequence[int], values: int) -> Batch:
    """Patches of all images one after another, `values` numbers each; 2 x 2 of them make a token."""
    sizes = [[rows * columns for rows, columns in images] for images in grids]
    texts = [prompt([size // 4 for size in s], length) for s, length in zip(sizes, lengths, strict=True)]
    made = padded(texts, WORDS)
    if any(grids):
        made["pixel_values"] = torch.randn(sum(map(sum, sizes)), values)
        made["image_grid_thw"] = torch.tensor([(1, *grid) for images in grids for grid in images])
    made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int()
    return made


def packed_rows(batch: Batch) -> Mapping[str, Any]:
    """Images and patches of each sample."""
    images = images_of(batch)
    grid = batch.get("image_grid_thw", torch.zeros(0, 3))
    return {"image_grid_thw": images, "pixel_values": spindle.per_sample(grid.prod(1), images)}


QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 103, "vision_start_token_id": START, "vision_end_token_id": END}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
QWEN2 = {
    "text_config": {**TEXT, "rope_parameters": QWEN_ROPE},
    "vision_config": {
        "depth": 3,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "temporal_patch_size": 1,
    },
    **QWEN_IDS,
}
QWEN25 = {
    "text_config": {**TEXT, "rope_parameters": QWEN_ROPE},
    "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
    **QWEN_IDS,
}
QWEN3 = {
    "text_config": {**TEXT, "num_hidden_layers": 4, "rope_parameters": QWEN_ROPE},
    "vision_config": {**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    **QWEN_IDS,
}


def qwen(model: str, config: str, **settings: Any) -> Callable[[], Sample]:
    """Qwen-VL, its patches packed."""

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings))
        batches = [packed_batch(grids, lengths, 48) for grids, lengths in zip(GRIDS, LENGTHS, strict=True)]
        return Sample({"model": module}, batches, own_loss(module), rows=packed_rows)

    return build


PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
SIZES = (  # height and width of each image of each sample
    (((16, 16),), (), ((16, 30), (16, 16)), ((20, 20),)),
    ((), ((16, 16), (16, 30)), ((16, 16),), ((24, 32),)),
    (((32, 32),), ((16, 16), (32, 12)), ()),
    ((), (), (), ()),
)


def onevision() -> Sample:
    """LLaVA-OneVision: each image is an overview and as many tiles as its size asks for, padded to the most."""
    settings = {"vision_config": {**VISION, "model_type": "siglip_vision_model"}, "image_token_index": IMAGE}
    text = {**TEXT, "model_type": "qwen2"}
    config = hf.LlavaOnevisionConfig(
        **settings, text_config=text, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1
    )
    module = hf.LlavaOnevisionForConditionalGeneration(config)

    def tokens(size: tuple[int, int]) -> int:
        with torch.no_grad():
            found = module.model.get_image_features(
                torch.zeros(1, 5, 3, 16, 16), torch.tensor([size]), return_dict=True
            )
        return len(found.pooler_output[0])

    def batch(sizes: Sequence[Sequence[tuple[int, int]]], lengths: Sequence[int]) -> Batch:
        texts = [prompt([tokens(s) for s in images], n) for images, n in zip(sizes, lengths, strict=True)]
        made = padded(texts, WORDS)
        if any(sizes):
            made["image_sizes"] = torch.tensor([size for images in sizes for size in images])
            made["pixel_values"] = torch.randn(len(made["image_sizes"]), 5, 3, 16, 16)
        return made

    def rows(batch: Batch) -> Mapping[str, Any]:
        images = images_of(batch)
        sizes = batch.get("image_sizes", [])
        tiles = torch.tensor([image_size_to_num_patches(size, PINPOINTS, 16) for size in sizes])
        return {
            "image_sizes": images,
            "pixel_values": images,
            "tiles": spindle.per_sample(tiles, images),
        }

    batches = [batch(sizes, lengths) for sizes, lengths in zip(SIZES, LENGTHS, strict=True)]
    return Sample({"model": module}, batches, own_loss(module), rows=rows)


SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
QUERIES = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
IDEFICS: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "llama"},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": 0,
}

FAMILIES = (
    Family("Qwen2-VL", "whole, packed", qwen("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", **QWEN2)),
    Family("Qwen2.5-VL", "whole, packed", qwen("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", **QWEN25)),
    Family("Qwen3-VL", "whole, packed", qwen("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", **QWEN3)),
    Family(
        "SmolVLM",
        "whole, images padded",
        chat("SmolVLMForConditionalGeneration", "SmolVLMConfig", 4, stacked=True, **IDEFICS, vision_config={**VISION}),
    ),
    Family(
        "Idefics3",
        "whole, images padded",
        chat(
            "Idefics3ForConditionalGeneration", "Idefics3Config", 4, stacked=True, **IDEFICS, vision_config={**VISION}
        ),
    ),
    Family(
        "LLaVA",
        "whole",
        chat(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            16,
            vision_config={**VISION, "model_type": "clip_vision_model"},
            text_config={**TEXT, "model_type": "llama"},
            image_token_index=IMAGE,
        ),
    ),
    Family("LLaVA-OneVision", "whole, images of any size", onevision),
    Family(
        "PaliGemma",
        "whole",
        chat(
            "PaliGemmaForConditionalGeneration",
            "PaliGemmaConfig",
            16,
            kinds=True,
            vision_config={**SIGLIP, "projection_dim": 32, "vision_use_head": False},
            text_config={**TEXT, "model_type": "gemma"},
            image_token_index=IMAGE,
            projection_dim=32,
        ),
    ),
    Family(
        "Gemma 3, image and text",
        "whole",
        chat(
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            4,
            kinds=True,
            vision_config={**SIGLIP, "vision_use_head": False},
            text_config={
                **TEXT,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            },
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
        ),
    ),
    Family(
        "BLIP-2",
        "whole, query former",
        chat(
            "Blip2ForConditionalGeneration",
            "Blip2Config",
            4,
            needs_images=True,
            vision_config={**VISION, "model_type": "blip_2_vision_model"},
            qformer_config={
                **QUERIES,
                "num_hidden_layers": 2,
                "encoder_hidden_size": 32,
                "cross_attention_frequency": 1,
            },
            text_config={**QUERIES, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
    ),
    Family(
        "InternVL",
        "whole",
        chat(
            "InternVLForConditionalGeneration",
            "InternVLConfig",
            4,
            vision_config={**VISION},
            text_config={**TEXT, "model_type": "qwen2"},
            image_token_id=IMAGE,
        ),
    ),
)
