"""Small multi-task models that both sides of the runtime benchmark train: the same modules, batches and task functions.

`gather` joins what the ranks of a data-parallel run hold of a batch; in one process, and under Spindle, nothing does.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spindle.workload import Workload

Gather = Callable[[Tensor], Tensor]
VOCABULARY, WORDS, JOINT = 1024, 16, 128


def vision(width: int, layers: int, channels: int = 3) -> nn.Module:
    """A ViT on 64 x 64 pixels in 16 patches."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_channels=channels,
        image_size=64,
        patch_size=16,
        projection_dim=JOINT,
    )
    model: nn.Module = CLIPVisionModelWithProjection(config)
    return model


def text(width: int, layers: int) -> nn.Module:
    """A CLIP text tower."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=WORDS,
        projection_dim=JOINT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: nn.Module = CLIPTextModelWithProjection(config)
    return model


def encoder(width: int, layers: int, inputs: int) -> nn.Module:
    """Projected frames, a BERT encoder, their mean."""
    return Frames(width, layers, inputs)


class Frames(nn.Module):
    """An encoder of frames (audio, motion, tactile): (B, T, inputs) to (B, T, width)."""

    def __init__(self, width: int, layers: int, inputs: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.inward = nn.Linear(inputs, width)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.encoder.embeddings.word_embeddings.requires_grad_(False)
        self.head = nn.Linear(width, JOINT)

    def forward(self, frames_BTI: Tensor) -> Tensor:  # noqa: N803 - batch, time, inputs
        hidden: Tensor = self.encoder(inputs_embeds=self.inward(frames_BTI)).last_hidden_state
        joint: Tensor = self.head(hidden)
        return joint


def language(width: int, layers: int) -> Any:
    """A Qwen2-style language model."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=128,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


class Action(nn.Module):
    """A flow-matching head: (B, width) to 7 numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width + 8, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 7)
        )

    def forward(self, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        velocity: Tensor = self.net(torch.cat([state, noisy, time], -1))
        return velocity


def contrastive(a: Tensor, b: Tensor, gather: Gather) -> Tensor:
    """Symmetric InfoNCE over the whole batch."""
    a, b = gather(F.normalize(a, dim=-1)), gather(F.normalize(b, dim=-1))
    logits = 10.0 * a @ b.T
    target = torch.arange(logits.shape[0])
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def next_word(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def batches(count: int, rows: int, **shapes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Random batches; a field whose name begins with "tokens" holds word numbers."""
    made = torch.Generator().manual_seed(rows)
    return [
        {
            name: torch.randint(3, VOCABULARY, (rows, *shape), generator=made)
            if name.startswith("tokens")
            else torch.randn(rows, *shape, generator=made)
            for name, shape in shapes.items()
        }
        for _ in range(count)
    ]


def multitask_clip(gather: Gather = lambda x: x, rows: int = 8) -> Workload:
    """Six modalities, each contrasted with images or text."""
    torch.manual_seed(0)
    workload = Workload("multitask-clip")
    image = workload.component("vision", vision(256, 6))
    words = workload.component("text", text(192, 6))
    depth = workload.component("depth", vision(160, 4, channels=1))
    thermal = workload.component("thermal", vision(128, 3, channels=1))
    audio = workload.component("audio", encoder(192, 5, 40))
    motion = workload.component("motion", encoder(96, 3, 6))

    @workload.task("image-text", batch_size=rows, data=batches(2, rows, pixels=(3, 64, 64), tokens=(WORDS,)))
    def image_text(batch: dict[str, Tensor]) -> Tensor:
        left, right = image(pixel_values=batch["pixels"]), words(input_ids=batch["tokens"])
        return contrastive(left.image_embeds, right.text_embeds, gather)

    @workload.task("audio-text", batch_size=rows, data=batches(2, rows, frames=(24, 40), tokens=(WORDS,)))
    def audio_text(batch: dict[str, Tensor]) -> Tensor:
        right = words(input_ids=batch["tokens"])
        return contrastive(audio(batch["frames"]).mean(1), right.text_embeds, gather)

    @workload.task("image-depth", batch_size=rows, data=batches(2, rows, pixels=(3, 64, 64), depth=(1, 64, 64)))
    def image_depth(batch: dict[str, Tensor]) -> Tensor:
        left, right = image(pixel_values=batch["pixels"]), depth(pixel_values=batch["depth"])
        return contrastive(left.image_embeds, right.image_embeds, gather)

    @workload.task("image-thermal", batch_size=rows, data=batches(2, rows, pixels=(3, 64, 64), heat=(1, 64, 64)))
    def image_thermal(batch: dict[str, Tensor]) -> Tensor:
        left, right = image(pixel_values=batch["pixels"]), thermal(pixel_values=batch["heat"])
        return contrastive(left.image_embeds, right.image_embeds, gather)

    @workload.task("motion-text", batch_size=rows, data=batches(2, rows, frames=(24, 6), tokens=(WORDS,)))
    def motion_text(batch: dict[str, Tensor]) -> Tensor:
        right = words(input_ids=batch["tokens"])
        return contrastive(motion(batch["frames"]).mean(1), right.text_embeds, gather)

    return workload


def adaptor_encoder_decoder(gather: Gather = lambda x: x, rows: int = 8) -> Workload:
    """In the manner of OFASys: an adaptor a modality, one shared encoder, one shared decoder."""
    del gather
    torch.manual_seed(0)
    workload = Workload("adaptor-encoder-decoder")
    pixels = workload.component("image-adaptor", vision(128, 2))
    sound = workload.component("audio-adaptor", encoder(128, 2, 40))
    shared = workload.component("encoder", encoder(256, 6, JOINT))
    decoder: Any = workload.component("decoder", language(128, 4))

    def told(prefix: Tensor, tokens: Tensor) -> Tensor:
        found = decoder(inputs_embeds=torch.cat([prefix, decoder.get_input_embeddings()(tokens)], 1))
        return next_word(found.logits[:, prefix.shape[1] :], tokens)

    @workload.task("captioning", batch_size=rows, data=batches(2, rows, pixels=(3, 64, 64), tokens=(WORDS,)))
    def captioning(batch: dict[str, Tensor]) -> Tensor:
        seen = pixels(pixel_values=batch["pixels"]).image_embeds
        return told(shared(seen[:, None].expand(-1, 8, -1)), batch["tokens"])

    @workload.task("speech", batch_size=rows, data=batches(2, rows, frames=(24, 40), tokens=(WORDS,)))
    def speech(batch: dict[str, Tensor]) -> Tensor:
        return told(shared(sound(batch["frames"])), batch["tokens"])

    @workload.task("sound-event", batch_size=rows, data=batches(2, rows, frames=(32, 40), tokens=(4,)))
    def sound_event(batch: dict[str, Tensor]) -> Tensor:
        return told(shared(sound(batch["frames"])), batch["tokens"])

    @workload.task("language", batch_size=rows, data=batches(2, rows, tokens=(WORDS,)))
    def words(batch: dict[str, Tensor]) -> Tensor:
        return next_word(decoder(input_ids=batch["tokens"]).logits, batch["tokens"])

    return workload


def vla(gather: Gather = lambda x: x, rows: int = 8) -> Workload:
    """A vision-language-action policy, trained on actions, questions about images, and plain text."""
    del gather
    torch.manual_seed(0)
    workload = Workload("vla")
    eyes = workload.component("vision", vision(192, 6))
    touch = workload.component("tactile", encoder(96, 3, 16))
    lm: Any = workload.component("lm", language(128, 6))
    hand = workload.component("action", Action(VOCABULARY))

    def read(prefix: Tensor, tokens: Tensor) -> Tensor:
        found = lm(inputs_embeds=torch.cat([prefix, lm.get_input_embeddings()(tokens)], 1))
        logits: Tensor = found.logits
        return logits

    fields = {"pixels": (3, 64, 64), "tokens": (WORDS,), "noise": (7,), "move": (7,), "time": (1,), "touch": (24, 16)}

    @workload.task("act", batch_size=rows, data=batches(2, rows, **fields))
    def act(batch: dict[str, Tensor]) -> Tensor:
        seen = eyes(pixel_values=batch["pixels"]).image_embeds[:, None]
        felt = touch(batch["touch"]).mean(1, keepdim=True)
        state = read(torch.cat([seen, felt], 1), batch["tokens"])[:, -1]
        time = batch["time"].sigmoid()
        noisy = time * batch["move"] + (1 - time) * batch["noise"]
        return F.mse_loss(hand(state, noisy, time), batch["move"] - batch["noise"])

    @workload.task("answer", batch_size=rows, data=batches(2, rows, pixels=(3, 64, 64), tokens=(WORDS,)))
    def answer(batch: dict[str, Tensor]) -> Tensor:
        seen = eyes(pixel_values=batch["pixels"]).image_embeds[:, None]
        return next_word(read(seen, batch["tokens"])[:, 1:], batch["tokens"])

    @workload.task("text", batch_size=rows, data=batches(2, rows, tokens=(2 * WORDS,)))
    def plain(batch: dict[str, Tensor]) -> Tensor:
        return next_word(lm(input_ids=batch["tokens"]).logits, batch["tokens"])

    return workload


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "multitask-clip": multitask_clip,
    "adaptor-encoder-decoder": adaptor_encoder_decoder,
    "vla": vla,
}


def one_task(gather: Gather = lambda x: x, rows: int = 8) -> Workload:
    """The image-text task alone."""
    workload = multitask_clip(gather, rows)
    workload.tasks = {"image-text": workload.tasks["image-text"]}
    workload.components = {name: workload.components[name] for name in ("vision", "text")}
    return workload
