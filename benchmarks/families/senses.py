"""Vision and sound families, from transformers' own configs."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
import transformers as hf
from families.base import WORDS, Batch, Family, Sample, classes, floats, ids, mask
from torch import Tensor, nn

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def sight(model: str, config: str, size: int = 16, **settings: Any) -> Callable[[], Sample]:
    """An image classifier."""

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings, num_labels=3))

        def loss(batch: Batch) -> Tensor:
            return F.cross_entropy(module(pixel_values=batch["pixels"]).logits, batch["label"])

        return Sample({"model": module}, {"pixels": floats(4, 3, size, size), "label": classes()}, loss)

    return build


def tower(model: str, config: str, field: str, inputs: dict[str, Tensor], **settings: Any) -> Callable[[], Sample]:
    """A bare encoder with a linear head on the mean of its states."""

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings))
        head = nn.Linear(32, 3)

        def loss(batch: Batch) -> Tensor:
            given = {name: batch[name] for name in inputs}
            return F.cross_entropy(head(module(**given)[field].mean(1)), batch["label"])

        return Sample({"model": module, "head": head}, {**inputs, "label": classes()}, loss)

    return build


def pair(model: str, config: str, vision: str, text: str, **settings: Any) -> Callable[[], Sample]:
    """Two towers and a contrastive loss, as one transformers model."""

    def build() -> Sample:
        parts = {"vision_config": getattr(hf, vision)(**VISION), "text_config": getattr(hf, text)(**TEXT)}
        module = getattr(hf, model)(getattr(hf, config)(**{k: v.to_dict() for k, v in parts.items()}, **settings))

        def loss(batch: Batch) -> Tensor:
            found: Tensor = module(
                input_ids=batch["ids"], pixel_values=batch["pixels"], attention_mask=batch["mask"], return_loss=True
            ).loss
            return found

        return Sample({"model": module}, {"pixels": floats(4, 3, 16, 16), "ids": ids(), "mask": mask()}, loss)

    return build


SOUND = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": WORDS,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
FAMILIES = (
    Family("SigLIP", "two towers", pair("SiglipModel", "SiglipConfig", "SiglipVisionConfig", "SiglipTextConfig")),
    Family("ViT", "vision", sight("ViTForImageClassification", "ViTConfig", **VISION)),
    Family("DINOv2", "vision", sight("Dinov2ForImageClassification", "Dinov2Config", **VISION)),
    Family(
        "Swin",
        "vision, windows",
        sight(
            "SwinForImageClassification",
            "SwinConfig",
            32,
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    Family(
        "ConvNeXt",
        "vision, convolutions",
        sight(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            32,
            num_stages=2,
            hidden_sizes=[16, 32],
            depths=[2, 3],
        ),
    ),
    Family(
        "ResNet",
        "vision, batch norm",
        sight(
            "ResNetForImageClassification",
            "ResNetConfig",
            32,
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            layer_type="basic",
        ),
    ),
    Family(
        "SegFormer",
        "vision, pyramid",
        sight(
            "SegformerForImageClassification",
            "SegformerConfig",
            32,
            num_encoder_blocks=2,
            depths=[2, 2],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        ),
    ),
    Family(
        "HuBERT",
        "speech",
        tower("HubertModel", "HubertConfig", "last_hidden_state", {"input_values": floats(4, 400)}, **SOUND),
    ),
    Family(
        "AST",
        "sound",
        tower(
            "ASTModel",
            "ASTConfig",
            "last_hidden_state",
            {"input_values": floats(4, 32, 16)},
            **{k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")},
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=32,
            num_mel_bins=16,
        ),
    ),
)
