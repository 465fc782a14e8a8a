"""Small workloads for tests, in any float type: five model families, and the odd cases that parity must survive."""

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
    Qwen2Model,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from spindle.workload import Workload

WIDTH, VOCABULARY = 16, 23


def clip_vision() -> nn.Module:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    model: nn.Module = CLIPVisionModelWithProjection(config)
    return model


def clip_text() -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=6,
        projection_dim=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: nn.Module = CLIPTextModelWithProjection(config)
    return model


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    model: nn.Module = BertModel(config)
    return model


def whisper() -> nn.Module:
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=2 * WIDTH,
        num_mel_bins=5,
        max_source_positions=6,
    )
    model: nn.Module = WhisperEncoder(config)
    return model


def qwen2() -> nn.Module:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model: nn.Module = Qwen2Model(config)
    return model


class Residual(nn.Module):
    """A hand-written block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x_BW: Tensor) -> Tensor:  # noqa: N803 - B batch, W width
        y: Tensor = x_BW + self.down(torch.tanh(self.up(self.norm(x_BW))))
        return y


class HandWritten(nn.Module):
    """A stem, a ModuleList of blocks, a head."""

    def __init__(self, inputs: int = 5, outputs: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, WIDTH)
        self.blocks = nn.ModuleList(Residual(WIDTH) for _ in range(depth))
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


class Temperature(nn.Module):
    """A single learned number, as CLIP's logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self) -> Tensor:
        return self.log_scale.exp()


def contrastive(a: Tensor, b: Tensor, scale: Tensor | float = 5.0) -> Tensor:
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * scale
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def tokens(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lengths_mask(batch: int, length: int) -> Tensor:
    """Every sample has another number of counted positions."""
    return (torch.arange(length) <= torch.arange(batch)[:, None] % length).long()


def five_families(dtype: torch.dtype = torch.float64) -> Workload:
    """CLIP vision and text, BERT, Whisper, Qwen2 and a hand-written net on five tasks that share towers."""
    torch.manual_seed(0)
    workload = Workload("five-families")
    vision = workload.component("vision", clip_vision().to(dtype))
    text = workload.component("text", clip_text().to(dtype))
    reader = workload.component("bert", bert().to(dtype))
    ears = workload.component("whisper", whisper().to(dtype))
    lm: Any = workload.component("lm", qwen2().to(dtype))
    net = workload.component("net", HandWritten().to(dtype))
    bridge = workload.component("bridge", nn.Linear(8, WIDTH).to(dtype))
    scale = workload.component("scale", Temperature().to(dtype))
    pictures = [{"pixels": floats(6, 3, 8, 8, seed=s, dtype=dtype), "ids": tokens(6, 6, s)} for s in (1, 2)]

    @workload.task("image-text", batch_size=6, data=pictures)
    def image_text(batch: dict[str, Tensor]) -> Tensor:
        image = vision(pixel_values=batch["pixels"]).image_embeds
        words = text(input_ids=batch["ids"], attention_mask=(batch["ids"] != 0).long()).text_embeds
        return contrastive(image, words, scale())

    questions = [
        {"ids": tokens(4, 7, s), "mask": lengths_mask(4, 7), "answer": tokens(4, 1, s)[:, 0] % 3} for s in (3, 4)
    ]
    judge = workload.component("judge", nn.Linear(WIDTH, 3).to(dtype))

    @workload.task("reading", batch_size=4, data=questions, weight=0.5)
    def reading(batch: dict[str, Tensor]) -> Tensor:
        pooled = reader(input_ids=batch["ids"], attention_mask=batch["mask"]).pooler_output
        return F.cross_entropy(judge(pooled), batch["answer"])

    sounds = [{"mel": floats(5, 5, 12, seed=s, dtype=dtype), "ids": tokens(5, 6, s)} for s in (5, 6)]

    @workload.task("speech-text", batch_size=5, data=sounds)
    def speech_text(batch: dict[str, Tensor]) -> Tensor:
        heard = ears(batch["mel"]).last_hidden_state.mean(1)
        words = text(input_ids=batch["ids"], attention_mask=torch.ones_like(batch["ids"])).text_embeds
        return contrastive(judge(heard), judge(bridge(words)))

    captions = [
        {"pixels": floats(3, 3, 8, 8, seed=s, dtype=dtype), "ids": tokens(3, 6, s), "mask": lengths_mask(3, 6)}
        for s in (7, 8)
    ]

    @workload.task("captioning", batch_size=3, data=captions, weight=2.0)
    def captioning(batch: dict[str, Tensor]) -> Tensor:
        prompt = bridge(vision(pixel_values=batch["pixels"]).image_embeds)[:, None]
        states = lm(inputs_embeds=torch.cat([prompt, lm.get_input_embeddings()(batch["ids"])], 1)).last_hidden_state
        logits = states[:, :-1] @ lm.get_input_embeddings().weight.T
        wanted = batch["ids"].masked_fill(batch["mask"] == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    rows = [{"x": floats(7, 5, seed=s, dtype=dtype), "y": floats(7, 8, seed=s + 50, dtype=dtype)} for s in (9, 10)]

    @workload.task("regression", batch_size=7, data=rows)
    def regression(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(net(batch["x"]), batch["y"])

    return workload


def two_towers(dtype: torch.dtype = torch.float64) -> Workload:
    """Two hand-written towers: one contrastive task, one regression that uses a single tower. Quick to capture."""
    torch.manual_seed(0)
    workload = Workload("two-towers")
    left = workload.component("left", HandWritten(5).to(dtype))
    right = workload.component("right", HandWritten(4, depth=2).to(dtype))
    pairs = [{"a": floats(6, 5, seed=s, dtype=dtype), "b": floats(6, 4, seed=s + 10, dtype=dtype)} for s in (1, 2, 3)]

    @workload.task("match", batch_size=6, data=pairs)
    def match(batch: dict[str, Tensor]) -> Tensor:
        return contrastive(left(batch["a"]), right(batch["b"]))

    rows = [{"a": floats(5, 5, seed=s, dtype=dtype), "y": floats(5, 8, seed=s + 30, dtype=dtype)} for s in (4, 5, 6)]

    @workload.task("fit", batch_size=5, data=rows, weight=0.25)
    def fit(batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(left(batch["a"]), batch["y"])

    return workload


class CrossDecoder(nn.Module):
    """Layers that all read one memory and hand on a pair of tensors; the first makes a bias that all others read."""

    class Layer(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.query = nn.Linear(WIDTH, WIDTH)
            self.key = nn.Linear(WIDTH, WIDTH)
            self.value = nn.Linear(WIDTH, WIDTH)
            self.bias = nn.Linear(WIDTH, 1)
            self.is_first = first

        def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if bias is None:
                bias = self.bias(memory).transpose(1, 2)
            scores = self.query(x) @ self.key(memory).transpose(1, 2) + bias
            return x + scores.softmax(-1) @ self.value(memory), bias

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(index == 0) for index in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            x, bias = layer(x, memory, bias)
        return x


def encoder_decoder(dtype: torch.dtype = torch.float64) -> Workload:
    """Cross-attention in every layer, batch in the second dimension (torch's default), a batch-norm stem."""
    torch.manual_seed(0)
    workload = Workload("encoder-decoder")
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0)
    encoder = workload.component("encoder", nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(dtype))
    decoder = workload.component("decoder", CrossDecoder().to(dtype))
    stem = workload.component("stem", nn.Sequential(nn.Linear(5, WIDTH), nn.BatchNorm1d(WIDTH)).to(dtype))
    data = [
        {"x": floats(4, 3, 5, seed=s, dtype=dtype), "q": floats(4, 2, WIDTH, seed=s + 9, dtype=dtype)} for s in (1, 2)
    ]

    @workload.task("seq", batch_size=4, data=data)
    def seq(batch: dict[str, Tensor]) -> Tensor:
        x = stem(batch["x"].flatten(0, 1)).unflatten(0, (-1, 3))
        memory = encoder(x.transpose(0, 1)).transpose(0, 1)
        y: Tensor = decoder(batch["q"], memory)
        return y.square().mean()

    return workload


def frozen_tower(dtype: torch.dtype = torch.float64) -> Workload:
    """A frozen tower before a trained one, a frozen head behind it, a tower under no_grad, and a tied weight."""
    torch.manual_seed(0)
    workload = Workload("frozen")
    first = workload.component("first", HandWritten(5, WIDTH).to(dtype).requires_grad_(False))
    trained = workload.component("trained", HandWritten(WIDTH, WIDTH).to(dtype))
    last = workload.component("last", HandWritten(WIDTH, WIDTH).to(dtype).requires_grad_(False))
    teacher = workload.component("teacher", HandWritten(5, WIDTH).to(dtype))
    lower, upper = trained.blocks[0], trained.blocks[1]
    assert isinstance(lower, Residual)
    assert isinstance(upper, Residual)
    upper.up.weight = lower.up.weight
    data = [{"x": floats(4, 5, seed=s, dtype=dtype)} for s in (1, 2)]

    @workload.task("distil", batch_size=4, data=data)
    def distil(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch["x"])
        y: Tensor = last(trained(first(batch["x"])))
        loss: Tensor = (y - wanted).abs().sum()
        return loss

    return workload


def cut_language_model(dtype: torch.dtype = torch.float64) -> Workload:
    """A Qwen2 whose layers two devices may hold between them."""
    torch.manual_seed(0)
    workload = Workload("cut")
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    lm = workload.component("lm", Qwen2ForCausalLM(config).to(dtype), tensor_parallel=2)

    @workload.task("t", batch_size=4, data=[{"tokens": torch.arange(32).reshape(4, 8)}])
    def fit(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = lm(input_ids=batch["tokens"]).logits.square().mean()
        return found

    return workload


class InPlace(nn.Module):
    """Writes to views, to its input, and to a buffer that it reads afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Residual(WIDTH) for _ in range(2))
        self.register_buffer("average", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = x[:, 1] * 2
        y = self.up(x)
        y[:, :3] += 1.0
        y.mul_(0.5)
        for block in self.blocks:
            y = block(y)
        kept = y * 2
        kept[:, 1].fill_(0.25)
        with torch.no_grad():
            assert isinstance(self.average, Tensor)
            self.average.mul_(0.9).add_(kept.mean(0), alpha=0.1)
        return torch.relu_(kept + y) * self.average


def in_place(dtype: torch.dtype = torch.float64) -> Workload:
    """In-place writes to intermediates, to the batch and to a buffer."""
    torch.manual_seed(0)
    workload = Workload("in-place")
    net = workload.component("net", InPlace().to(dtype))
    head = workload.component("head", nn.Linear(WIDTH, 3).to(dtype))
    data = [
        {
            "x": floats(4, 5, seed=s, dtype=dtype),
            "label": tokens(4, 1, s)[:, 0] % 3,
            "skip": tokens(4, 1, s + 5)[:, 0] % 2,
        }
        for s in (1, 2)
    ]

    @workload.task("classify", batch_size=4, data=lambda: [{k: v.clone() for k, v in b.items()} for b in data])
    def classify(batch: dict[str, Tensor]) -> Tensor:
        label = batch["label"]
        label.masked_fill_(batch["skip"] == 1, -100)
        return F.cross_entropy(head(net(batch["x"])), label) + label.clamp(min=0).to(dtype).mean()

    return workload


FAMILIES: dict[str, Callable[[torch.dtype], Workload]] = {
    "two_towers": two_towers,
    "five_families": five_families,
    "encoder_decoder": encoder_decoder,
    "frozen_tower": frozen_tower,
    "in_place": in_place,
}
