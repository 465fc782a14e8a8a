"""Vision-language-action families: Qwen3-VL whole and unmodified, and a diffusion transformer that reads its states and
is trained by flow matching, as in StarVLA and AnchorVLA4D.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from families.base import Batch, Family, Sample
from families.vision_language import GRIDS, LENGTHS, QWEN3, QWEN25, own_loss, packed_batch, packed_rows
from torch import Tensor, nn

WIDTH, ACTION, HORIZONS = 32, 7, (6, 6, 4, 5)


class ActionBlock(nn.Module):
    """Attention among actions and to the states of the language model, and a perceptron, scaled by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.across = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor, states: Tensor, padding: Tensor) -> Tensor:
        x = x + self.scale(time)[:, None]
        y = self.norm1(x)
        x = x + self.own(y, y, y, need_weights=False)[0]
        x = x + self.across(self.norm2(x), states, states, key_padding_mask=padding, need_weights=False)[0]
        z: Tensor = x + self.mlp(self.norm3(x))
        return z


class ActionHead(nn.Module):
    """Predicts the way from noise to actions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.time = nn.Linear(ACTION, WIDTH), nn.Linear(WIDTH, ACTION), nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList(ActionBlock() for _ in range(3))

    def forward(self, x: Tensor, time: Tensor, states: Tensor, padding: Tensor) -> Tensor:
        when = self.time(time[:, None])
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, when, states, padding)
        y: Tensor = self.leave(x)
        return y


Parts = Callable[[Any], Any]
OWN = ("actions", "noise", "time")


def policy(
    prepare: Parts = lambda vlm: vlm, *, drawn: int = 0, in_turn: bool = False, model: str = "Qwen3VL"
) -> Callable[[], Sample]:
    """Qwen-VL and the head; `prepare` freezes some of it, or puts adapters in.

    `drawn`: how many noises and times the task draws for each sample; 0: the loader gives them. `in_turn`: all samples
    with their first noise come before all with their second.
    """

    def build() -> Sample:
        config = hf.Qwen3VLConfig(**QWEN3) if model == "Qwen3VL" else hf.Qwen2_5_VLConfig(**QWEN25)
        whole = hf.Qwen3VLForConditionalGeneration if model == "Qwen3VL" else hf.Qwen2_5_VLForConditionalGeneration
        vlm, head = prepare(whole(config)), ActionHead()
        body = vlm.base_model.model.model if hasattr(vlm, "peft_config") else vlm.model

        def loss(batch: Batch) -> Tensor:
            given = {name: value for name, value in batch.items() if name not in OWN}
            states = body(**given, output_hidden_states=True).hidden_states[-1]
            actions, padding = batch["actions"], batch["attention_mask"] == 0
            if drawn > 1:
                states, actions, padding = (
                    several(value, drawn, in_turn=in_turn) for value in (states, actions, padding)
                )
            noise = torch.randn_like(actions) if drawn else batch["noise"]
            time = torch.rand(len(actions), dtype=actions.dtype) if drawn else batch["time"]
            mixed = time[:, None, None] * actions + (1 - time[:, None, None]) * noise
            return F.mse_loss(head(mixed, time, states, padding), actions - noise)

        return Sample({"vlm": vlm, "head": head}, batches(drawn=bool(drawn)), loss, rows=packed_rows)

    return build


def several(value: Tensor, count: int, *, in_turn: bool) -> Tensor:
    """Each sample `count` times."""
    return value.repeat(count, *(1,) * (value.ndim - 1)) if in_turn else value.repeat_interleave(count, 0)


def batches(*, drawn: bool) -> list[Batch]:
    """Prompts with images, and actions."""
    found = []
    for grids, lengths, horizon in zip(GRIDS, LENGTHS, HORIZONS, strict=True):
        batch = packed_batch(grids, lengths, 48)
        batch.pop("labels")
        batch["actions"] = torch.randn(len(lengths), horizon, ACTION)
        if not drawn:
            batch |= {"noise": torch.randn(len(lengths), horizon, ACTION), "time": torch.rand(len(lengths))}
        found.append(batch)
    return found


def frozen_tower(vlm: Any) -> Any:
    """The vision tower is not trained."""
    vlm.model.visual.requires_grad_(False)
    return vlm


def adapters(vlm: Any) -> Any:
    """LoRA in the attention of both towers; all else is frozen."""
    import peft

    found = peft.get_peft_model(
        vlm, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "qkv"])
    )
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return found


def lora_answers() -> Sample:
    """Qwen3-VL with adapters, called whole, with its own loss."""
    vlm = adapters(hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(**QWEN3)))
    given = [packed_batch(grids, lengths, 48) for grids, lengths in zip(GRIDS, LENGTHS, strict=True)]
    return Sample({"model": vlm}, given, own_loss(vlm), rows=packed_rows)


def frozen_answers() -> Sample:
    """Qwen3-VL with a frozen tower, called whole, with its own loss."""
    vlm = frozen_tower(hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(**QWEN3)))
    given = [packed_batch(grids, lengths, 48) for grids, lengths in zip(GRIDS, LENGTHS, strict=True)]
    return Sample({"model": vlm}, given, own_loss(vlm), rows=packed_rows)


FAMILIES = (
    Family("Qwen3-VL, frozen tower", "whole, packed", frozen_answers),
    Family("Qwen3-VL with LoRA", "whole, packed, peft", lora_answers),
    Family("Qwen3-VL + DiT", "flow matching, StarVLA's kind", policy()),
    Family("Qwen3-VL + DiT, noise drawn in the task", "flow matching", policy(drawn=1)),
    Family("Qwen3-VL + DiT, 4 noises a sample", "repeat_interleave", policy(drawn=4)),
    Family("Qwen3-VL + DiT, 4 noises in turn", "repeat, as in StarVLA", policy(drawn=4, in_turn=True)),
    Family("Qwen3-VL + DiT, frozen tower", "flow matching", policy(frozen_tower)),
    Family("Qwen3-VL + DiT, LoRA", "flow matching, peft", policy(adapters)),
    Family("Qwen2.5-VL + DiT", "flow matching, AnchorVLA4D's kind", policy(model="Qwen2_5_VL")),
)
