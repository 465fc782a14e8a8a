"""Co-training of a vision-language-action policy on actions and on questions about pictures, as StarVLA does it.

| component | model |
|---|---|
| vision | SigLIP ViT, 4 layers of 64 |
| merger | four neighboring patches become one token of the language model |
| llm | Qwen3, 6 layers of 96, embedding and head tied |
| action-head | diffusion transformer, 4 blocks of 64 that read the language model's states in turn with their own |

True size: benchmarks/workloads/vla_cotrain.yaml.

`loop.py` trains the same modules by StarVLA's own loop.

Data: 16 things, each somewhere in a picture. Given its name, the hand moves there; asked where it is, the answer
names the place.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel, get_scheduler

import spindle

THINGS, WIDTH, ACTION, VOCABULARY = 16, 96, 64, 100
STEPS, JOINTS, DRAWS = 8, 7, 4  # of an action chunk; noise draws for each sample

Batch = dict[str, Tensor]
fixed = torch.Generator().manual_seed(0)
LOOKS = torch.randn(THINGS, 3, 16, 16, generator=fixed)
NAMES = torch.randint(10, VOCABULARY, (THINGS, 4), generator=fixed)
REACH = torch.randn(4, JOINTS, generator=fixed)  # where the hand ends, by place
PLACES = torch.tensor([[1, 3], [1, 4], [2, 3], [2, 4]])  # answers: up or down, left or right


class Scenes:
    """Batches of a thing in one quarter of a picture; every pass gives the same ones."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __iter__(self) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(self.seed)
        pace = torch.linspace(0, 1, STEPS)[:, None]
        for _ in range(100):
            thing = torch.randint(0, THINGS, (self.rows,), generator=random)
            place = torch.randint(0, 4, (self.rows,), generator=random)
            picture = torch.zeros(self.rows, 3, 2, 16, 2, 16)
            picture[torch.arange(self.rows), :, place // 2, :, place % 2] = LOOKS[thing]
            scene = {"picture": picture.reshape(-1, 3, 32, 32), "name": NAMES[thing]}
            yield {**scene, "actions": pace * REACH[place][:, None], "answer": PLACES[place]}


class Merger(nn.Module):
    """A square of 4 x 4 patches becomes four tokens: [b, 16, 64] -> [b, 4, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, patches: Tensor) -> Tensor:
        """Neighbors side by side, then projected."""
        squares = patches.unflatten(1, (2, 2, 2, 2)).transpose(2, 3)
        return self.project(squares.flatten(3).flatten(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, both scaled and shifted by the time."""

    def __init__(self, *, cross: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(ACTION, elementwise_affine=False) for _ in range(2))
        width = WIDTH if cross else ACTION
        self.attention = nn.MultiheadAttention(ACTION, 4, kdim=width, vdim=width, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(ACTION, 4 * ACTION), nn.GELU(), nn.Linear(4 * ACTION, ACTION))
        self.modulation = nn.Linear(ACTION, 4 * ACTION)

    def forward(self, x: Tensor, time: Tensor, memory: Tensor | None = None) -> Tensor:
        """Reads `memory`, or itself where there is none."""
        scale, shift, mlp_scale, mlp_shift = self.modulation(time)[:, None].chunk(4, -1)
        query = self.norms[0](x) * (1 + scale) + shift
        context = query if memory is None else memory
        x = x + self.attention(query, context, context, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x) * (1 + mlp_scale) + mlp_shift)


class ActionHead(nn.Module):
    """Flow matching: the velocity that leads from noise to an action chunk."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inward = nn.Linear(JOINTS, ACTION)
        self.places = nn.Parameter(0.02 * torch.randn(STEPS, ACTION))
        self.clock = nn.Sequential(nn.Linear(16, ACTION), nn.SiLU(), nn.Linear(ACTION, ACTION))
        self.blocks = nn.ModuleList(Block(cross=index % 2 == 0) for index in range(depth))
        self.outward = nn.Linear(ACTION, JOINTS)

    def forward(self, noisy: Tensor, time: Tensor, memory: Tensor) -> Tensor:
        """[b, STEPS, JOINTS], [b], [b, tokens, WIDTH] -> [b, STEPS, JOINTS]."""
        angles = time[:, None] * torch.arange(1, 9, dtype=time.dtype)
        clock = self.clock(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.inward(noisy) + self.places
        for index, block in enumerate(self.blocks):
            x = block(x, clock, memory) if index % 2 == 0 else block(x, clock)
        return self.outward(x)


torch.manual_seed(0)
workload = spindle.Workload("vla-cotraining", max_grad_norm=1.0)
vision = workload.component(
    "vision",
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            vision_use_head=False,
        )
    ),
)
merger = workload.component("merger", Merger())
llm = workload.component(
    "llm",
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ),
)
action_head = workload.component("action-head", ActionHead(4))


def prompt(picture: Tensor, words: Tensor) -> Tensor:
    """The picture's tokens, then the words, as input embeddings."""
    seen = merger(vision(pixel_values=picture).last_hidden_state)
    return torch.cat([seen, llm.get_input_embeddings()(words)], 1)


@workload.task("action", batch_size=32, data=Scenes(32, seed=1))
def action(batch: Batch) -> Tensor:
    """Velocities at several times and noises for each sample; the language model runs once, without its head."""
    states = llm.model(inputs_embeds=prompt(batch["picture"], batch["name"])).last_hidden_state
    actions = batch["actions"].repeat_interleave(DRAWS, 0)
    noise = torch.randn_like(actions)
    time = torch.rand_like(actions[:, 0, 0])
    noisy = time[:, None, None] * actions + (1 - time[:, None, None]) * noise
    return F.mse_loss(action_head(noisy, time, states.repeat_interleave(DRAWS, 0)), actions - noise)


@workload.task("questions", batch_size=8, data=Scenes(8, seed=2), weight=0.1)
def questions(batch: Batch) -> Tensor:
    """Where the named thing is, word by word."""
    words = torch.cat([batch["name"], batch["answer"]], 1)
    logits = llm(inputs_embeds=prompt(batch["picture"], words)).logits
    return F.cross_entropy(logits[:, -3:-1].flatten(0, 1), batch["answer"].flatten())


def optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW with rates by module: StarVLA's 1e-5 for the vision-language model, 1e-4 for the action head, times 50."""
    head, rest = [], []
    for name, parameter in named_parameters:
        (head if name.startswith("action-head.") else rest).append((name, parameter))
    groups = [
        {"params": rest, "lr": 5e-4, "name": "qwen_vl_interface"},
        {"params": head, "lr": 5e-3, "name": "action_model"},
    ]
    return torch.optim.AdamW(groups, lr=1.25e-3, betas=(0.9, 0.95), weight_decay=1e-8)


def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up, then a cosine that ends at a 25th of the base rate."""
    end = {"min_lr": 5e-5}
    return get_scheduler("cosine_with_min_lr", optimizer, 5, 1000, scheduler_specific_kwargs=end)
