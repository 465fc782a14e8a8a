"""What before.py and after.py share: a small LLaVA in a folder, LoRA on it, captioned pictures, a collator, two losses.

The folder "start" in the working directory stands for a model of the Hub: `make_start` fills it, once, with random
weights of a small shape and with a processor whose tokenizer knows a dozen words, so that nothing is downloaded.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor

START = Path("start")
COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230), "white": (240, 240, 240)}
PLACES = ("left", "right", "top", "bottom")
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
WORDS = [*SPECIAL, *COLORS, *PLACES, "a", "bar", "at", "the", "describe", ":"]


def make_start() -> Path:
    """The folder that `from_pretrained` reads; made where it is not there yet."""
    if not (START / "model.safetensors").is_file():
        _processor().save_pretrained(START)
        _model().save_pretrained(START)
    return START


def _processor() -> transformers.LlavaProcessor:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=["<image>"], **names
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _model() -> transformers.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**shape, num_hidden_layers=3, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**shape, num_hidden_layers=4, vocab_size=len(WORDS), max_position_embeddings=64)
    picture = WORDS.index("<image>")
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=picture)
    return transformers.LlavaForConditionalGeneration(config)


def load() -> tuple[PeftModel, transformers.LlavaProcessor]:
    """The model with adapters on its language model and a projector that is trained whole, and its processor."""
    folder = make_start()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(0)  # of the adapters' first values
    adapters = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, adapters), transformers.AutoProcessor.from_pretrained(folder)


def pictures() -> datasets.Dataset:
    """24 pictures of a colored bar, each with a caption; some captions are longer than others."""
    random = np.random.default_rng(0)
    shown, captions = [], []
    for index in range(24):
        color, place = list(COLORS)[index % 4], PLACES[index // 4 % 4]
        pixels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        bar = {"left": np.s_[:, :5], "right": np.s_[:, -5:], "top": np.s_[:5], "bottom": np.s_[-5:]}[place]
        pixels[bar] = COLORS[color]
        shown.append(Image.fromarray(pixels))
        captions.append(f"a {color} bar at the {place}" if index % 3 else f"{color} bar {place}")
    return datasets.Dataset.from_dict({"picture": shown, "caption": captions})


class Collator:
    """Samples become the fields of a batch, texts padded to the longest of the batch."""

    def __init__(self, processor: transformers.LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """[b] samples -> input_ids, attention_mask, labels [b, t]; pixel_values [b, 3, 16, 16]; and of the captions
        alone caption_ids, caption_mask [b, words].
        """
        captions = [sample["caption"] + " </s>" for sample in samples]
        texts = ["<s> <image> describe : " + caption for caption in captions]
        batch = self.processor(
            images=[sample["picture"] for sample in samples],
            text=texts,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        alone = self.processor.tokenizer(captions, padding=True, padding_side="right", return_tensors="pt")
        asked = (batch["input_ids"] == WORDS.index(":")).cumsum(1) == 0  # the question and its picture
        hidden = asked | (batch["input_ids"] == WORDS.index(":")) | (batch["attention_mask"] == 0)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "pixel_values": batch["pixel_values"],
            "labels": batch["input_ids"].masked_fill(hidden, -100),
            "caption_ids": alone["input_ids"],
            "caption_mask": alone["attention_mask"],
        }


def match_loss(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """Contrastive: each picture is to be nearest to its own caption, both in the language model's space."""
    llava = model.get_base_model()
    seen = llava.get_image_features(batch["pixel_values"]).pooler_output
    states = llava.get_decoder()(batch["caption_ids"], attention_mask=batch["caption_mask"]).last_hidden_state
    mask = batch["caption_mask"][:, :, None]
    words = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    images = F.normalize(torch.stack([image.mean(0) for image in seen]), dim=-1)
    return F.cross_entropy(10 * images @ words.T, torch.arange(len(words)))
