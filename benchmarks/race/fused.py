"""The workloads of the runtime benchmark as one who knows DistributedDataParallel writes them: each part of the model
runs once on the samples of all tasks that use it, and what ranks gather they gather in one message.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from race.models import contrastive, next_word
from torch import Tensor

Losses = dict[str, Tensor]
Batches = Mapping[str, Mapping[str, Tensor]]


def clip(parts: Any, batches: Batches) -> Losses:
    """Vision and text once each; all embeddings in one gather."""
    seen = torch.cat([batches[task]["pixels"] for task in ("image-text", "image-depth", "image-thermal")])
    read = torch.cat([batches[task]["tokens"] for task in ("image-text", "audio-text", "motion-text")])
    embedded = [
        parts["vision"](pixel_values=seen).image_embeds,
        parts["text"](input_ids=read).text_embeds,
        parts["depth"](pixel_values=batches["image-depth"]["depth"]).image_embeds,
        parts["thermal"](pixel_values=batches["image-thermal"]["heat"]).image_embeds,
        parts["audio"](batches["audio-text"]["frames"]).mean(1),
        parts["motion"](batches["motion-text"]["frames"]).mean(1),
    ]
    images, words, depth, thermal, audio, motion = gathered([F.normalize(part, dim=-1) for part in embedded])
    (image, image_d, image_t), (word, word_a, word_m) = images.chunk(3), words.chunk(3)
    pairs = {
        "image-text": (image, word),
        "audio-text": (audio, word_a),
        "image-depth": (image_d, depth),
        "image-thermal": (image_t, thermal),
        "motion-text": (motion, word_m),
    }
    return {task: contrastive(left, right, lambda x: x) for task, (left, right) in pairs.items()}


def gathered(parts: Sequence[Tensor]) -> list[Tensor]:
    """What all ranks hold of each part, in one message; a part of a third of each rank's samples stays in thirds."""
    from torch.distributed._functional_collectives import all_gather_single_autograd

    assert dist.group.WORLD is not None
    ranks, own = dist.get_world_size(), torch.cat(list(parts))
    whole = all_gather_single_autograd(own, 0, dist.group.WORLD).view(ranks, *own.shape)
    least = min(len(part) for part in parts)
    found = [part.contiguous() for part in torch.split(whole, [len(part) for part in parts], dim=1)]
    # ranks are joined inside of each task's samples
    return [part.view(ranks, -1, least, part.shape[-1]).transpose(0, 1).flatten(0, 2) for part in found]


def vla(parts: Any, batches: Batches) -> Losses:
    """The eyes once, on the images of both tasks."""
    act, answer = batches["act"], batches["answer"]
    lm = parts["lm"]
    seen = parts["vision"](pixel_values=torch.cat([act["pixels"], answer["pixels"]])).image_embeds[:, None]
    seen_act, seen_answer = seen.chunk(2)

    def read(prefix: Tensor, tokens: Tensor) -> Tensor:
        logits: Tensor = lm(inputs_embeds=torch.cat([prefix, lm.get_input_embeddings()(tokens)], 1)).logits
        return logits

    felt = parts["tactile"](act["touch"]).mean(1, keepdim=True)
    state = read(torch.cat([seen_act, felt], 1), act["tokens"])[:, -1]
    time = act["time"].sigmoid()
    noisy = time * act["move"] + (1 - time) * act["noise"]
    tokens = batches["text"]["tokens"]
    return {
        "act": F.mse_loss(parts["action"](state, noisy, time), act["move"] - act["noise"]),
        "answer": next_word(read(seen_answer, answer["tokens"])[:, 1:], answer["tokens"]),
        "text": next_word(lm(input_ids=tokens).logits, tokens),
    }


FUSED: dict[str, Callable[..., Losses]] = {"multitask-clip": clip, "vla": vla}
