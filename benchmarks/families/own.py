"""Hand-written families: what people write beside the libraries."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers as hf
from families.base import WORDS, Batch, Family, Sample, classes, floats, ids, mask
from families.text import GROUPED
from torch import Tensor, nn

W = 32  # width


class Residual(nn.Module):
    """A pre-norm perceptron block."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)
        self.up = nn.Linear(W, 2 * W)
        self.down = nn.Linear(2 * W, W)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
        return y


class Stack(nn.Module):
    """A stem, a ModuleList, a head."""

    def __init__(self, inputs: int, outputs: int, depth: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, W)
        self.blocks = nn.ModuleList(Residual(dropout) for _ in range(depth))
        self.head = nn.Linear(W, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def _regress(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Sample]:
    def build() -> Sample:
        module = make()

        def loss(batch: Batch) -> Tensor:
            y = module(batch["x"])
            return F.mse_loss(y.flatten(1)[:, :3], batch["y"])

        return Sample({"model": module}, {"x": floats(4, *shape), "y": floats(4, 3)}, loss)

    return build


class AdaBlock(nn.Module):
    """Diffusion transformer block: scale, shift and gate of both halves come from the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(W, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(W, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(W, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(W, 6 * W))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, y, need_weights=False)[0]
        z: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return z


class Diffusion(nn.Module):
    """Predicts the noise in patches from the time and a class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, W)
        self.time = nn.Sequential(nn.Linear(W, W), nn.SiLU(), nn.Linear(W, W))
        self.label = nn.Embedding(3, W)
        self.blocks = nn.ModuleList(AdaBlock() for _ in range(3))
        self.out = nn.Linear(W, 12)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(-torch.arange(W // 2, dtype=x.dtype) / 4)
        condition = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.label(label)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, condition)
        y: Tensor = self.out(x)
        return y


def diffusion() -> Sample:
    """Noise and time come with the batch."""
    model = Diffusion()

    def loss(batch: Batch) -> Tensor:
        keep = torch.cos(batch["time"] * torch.pi / 2)[:, None, None]
        noisy = keep * batch["x"] + (1 - keep**2).sqrt() * batch["noise"]
        return F.mse_loss(model(noisy, batch["time"], batch["label"]), batch["noise"])

    batch = {"x": floats(4, 5, 12), "noise": floats(4, 5, 12) + 0.1, "time": floats(4).sigmoid(), "label": classes()}
    return Sample({"model": model}, batch, loss)


def flow_matching() -> Sample:
    """An action head on a frozen language model's states; noise and time are drawn inside the task."""
    torch.manual_seed(1)
    lm = hf.Qwen2Model(hf.Qwen2Config(**GROUPED)).requires_grad_(False)
    head, state = Diffusion(), nn.Linear(W, W)

    def loss(batch: Batch) -> Tensor:
        seen = state(lm(input_ids=batch["ids"]).last_hidden_state.mean(1))
        noise = torch.randn_like(batch["actions"])
        time = torch.rand(noise.shape[0], dtype=noise.dtype)
        mixed = time[:, None, None] * batch["actions"] + (1 - time[:, None, None]) * noise
        x = head.embed(mixed) + seen[:, None]
        for block in head.blocks:
            x = block(x, seen + time[:, None])
        return F.mse_loss(head.out(x), batch["actions"] - noise)

    return Sample({"lm": lm, "head": head, "state": state}, {"ids": ids(), "actions": floats(4, 5, 12)}, loss)


class Coupled(nn.Module):
    """Layer of one stack; hands on its keys and values, and may read those of the other stack."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)
        self.query, self.key, self.value = (nn.Linear(W, W) for _ in range(3))
        self.mlp = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W))

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y = self.norm(x)
        query, key, value = (
            part(y).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        keys, values = key, value
        if memory is not None:
            keys, values = torch.cat([memory[0], key], 2), torch.cat([memory[1], value], 2)
        x = x + F.scaled_dot_product_attention(query, keys, values, dropout_p=0.1).transpose(1, 2).flatten(2)
        return x + self.mlp(x), (key, value)


class TwoStacks(nn.Module):
    """A prefix stack and an expert that reads the keys and values of each of its layers."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, W)
        self.actions = nn.Linear(6, W)
        self.prefix = nn.ModuleList(Coupled() for _ in range(depth))
        self.expert = nn.ModuleList(Coupled() for _ in range(depth))
        self.out = nn.Linear(W, 6)

    def forward(self, words: Tensor, actions: Tensor) -> Tensor:
        x, y = self.words(words), self.actions(actions)
        for lower, upper in zip(self.prefix, self.expert, strict=True):
            x, memory = lower(x)
            y, _ = upper(y, memory)
        z: Tensor = self.out(y)
        return z


def two_stacks() -> Sample:
    """Layers of two stacks in turn."""
    model = TwoStacks()

    def loss(batch: Batch) -> Tensor:
        return F.mse_loss(model(batch["ids"], batch["actions"]), batch["actions"])

    return Sample({"model": model}, {"ids": ids(), "actions": floats(4, 5, 6)}, loss)


class UNet(nn.Module):
    """Down, up, and a skip connection across at every level."""

    class Level(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
            self.norm = nn.GroupNorm(1, outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv2(F.silu(self.norm(self.conv1(x))))
            return y

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(self.Level(i, o) for i, o in ((3, 8), (8, 16)))
        self.middle = self.Level(16, 16)
        self.up = nn.ModuleList(self.Level(i, o) for i, o in ((32, 8), (16, 3)))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for level in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = level(torch.cat([x, skips.pop()], 1))
        return x


class Recurrent(nn.Module):
    """GRU over time, dropout between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(6, W, 2, batch_first=True, dropout=0.0)
        self.head = nn.Linear(W, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cells(x)[0][:, -1])
        return y


class ConvNet(nn.Module):
    """Convolutions and batch norm in train mode: statistics are those of the whole batch."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
            return y

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(*(self.Block() for _ in range(3)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return y


class Tied(nn.Module):
    """Words in and words out through one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, W)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(W, 4, 2 * W, batch_first=True) for _ in range(3))
        self.head = nn.Linear(W, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.full((length, length), float("-inf"), dtype=self.words.weight.dtype).triu(1)
        y = self.words(x)
        for layer in self.layers:
            y = layer(y, src_mask=causal, is_causal=True)
        z: Tensor = self.head(y)
        return z


def tied() -> Sample:
    """torch's own encoder layers under a causal mask."""
    model = Tied()

    def loss(batch: Batch) -> Tensor:
        logits = model(batch["ids"])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())

    return Sample({"model": model}, {"ids": ids()}, loss)


def lora() -> Sample:
    """Adapters of peft on a frozen language model."""
    import peft

    base = hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED))
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], bias="none")
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)

    def loss(batch: Batch) -> Tensor:
        labels = batch["ids"].masked_fill(batch["mask"] == 0, -100)
        found: Tensor = model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=labels).loss
        return found

    return Sample({"model": model}, {"ids": ids(), "mask": mask()}, loss)


@dataclass
class Encoded:
    """What a tower hands on."""

    pooled: Tensor
    states: Tensor


class Tower(nn.Module):
    """A transformer tower of ImageBind's kind: any input that a projection can turn into tokens."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, W)
        layer = nn.TransformerEncoderLayer(W, 4, 2 * W, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Encoded:
        states = self.layers(self.project(x))
        return Encoded(states.mean(1), states)


def bind() -> Sample:
    """Six senses in ImageBind, three here; each is bound to the image."""
    towers = {name: Tower(size) for name, size in (("image", 12), ("audio", 7), ("depth", 5))}

    def loss(batch: Batch) -> Tensor:
        found = {name: F.normalize(tower(batch[name]).pooled, dim=-1) for name, tower in towers.items()}
        target = torch.arange(len(batch["image"]))
        total = [F.cross_entropy(found["image"] @ found[name].T * 10, target) for name in ("audio", "depth")]
        return torch.stack(total).sum()

    batch = {"image": floats(4, 5, 12), "audio": floats(4, 6, 7), "depth": floats(4, 3, 5)}
    return Sample(dict(towers), batch, loss)


class Shared(nn.Module):
    """One layer applied many times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(6, W), Residual(0.1), nn.Linear(W, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.layer(x)
        y: Tensor = self.head(x)
        return y


def bootstrap() -> Sample:
    """A student after a teacher that is its own slow copy and gets no gradient."""
    student = Stack(6, 8)
    teacher = copy.deepcopy(student)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch["b"])
        return 1 - F.cosine_similarity(student(batch["a"]), wanted).mean()

    return Sample({"student": student, "teacher": teacher}, {"a": floats(4, 6), "b": floats(4, 6) + 0.1}, loss)


FAMILIES = (
    Family("ModuleList of blocks", "hand-written", _regress(lambda: Stack(6, 3), 6)),
    Family("DiT (adaLN)", "diffusion head", diffusion),
    Family("flow matching on a frozen LM", "action head", flow_matching),
    Family("two stacks, keys and values handed over", "pi0's kind", two_stacks),
    Family("U-Net", "skip connections", _regress(UNet, 3, 8, 8)),
    Family("GRU", "recurrent", _regress(Recurrent, 5, 6)),
    Family("conv net with BatchNorm", "statistics of the batch", _regress(ConvNet, 3, 8, 8)),
    Family("tied embeddings", "torch's encoder layers", tied),
    Family("Qwen2 with LoRA", "peft", lora),
    Family("ImageBind's kind", "three towers, dataclass outputs", bind),
    Family("one layer applied three times", "ALBERT's kind", _regress(Shared, 6)),
    Family("student and teacher", "no gradient on one side", bootstrap),
)
