"""Modules of random scripts. No Spindle is in here."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

WIDTH, WORDS, LENGTH = 6, 9, 4
"""Width of what towers read and give; token ids, and how many a sample has."""


class Block(nn.Module):
    """A residual layer with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + F.gelu(self.linear(self.norm(x)))
        return y


class BatchNormed(nn.Module):
    """A layer whose statistics are of the whole batch, and whose running ones change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.norm(self.linear(x)))
        return y


class Clamped(Block):
    """A layer that keeps its own weights small, in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.clamp_(-0.3, 0.3)
        return super().forward(x)


class Sized(Block):
    """A layer that takes numbers of samples by which a batch divides, and no others."""

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) in (1, 2) or len(x) % 4 == 0, "one, two, or a multiple of four"
        return super().forward(x)


class Listed(Block):
    """A layer that counts its calls in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["calls"] += 1
        return super().forward(x) / (1 + 0.1 * self.seen["calls"])


class Tower(nn.Module):
    """A stem and layers of one kind."""

    def __init__(self, make: Callable[[], nn.Module], depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Spectral(nn.Module):
    """Two layers whose weights are divided by their largest singular value, estimated anew in each forward."""

    def __init__(self, depth: int, is_old: bool) -> None:
        super().__init__()
        norm = nn.utils.spectral_norm if is_old else nn.utils.parametrizations.spectral_norm
        self.layers = nn.ModuleList(norm(nn.Linear(WIDTH, WIDTH)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Centered(nn.Module):
    """Takes off a running mean that its forward moves: in place, or by a new tensor in its place."""

    def __init__(self, is_assigned: bool, depth: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.is_assigned, self.inner = is_assigned, Tower(Block, depth)
        self.center: Tensor
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if self.is_assigned:
            self.center = self.center * 0.9 + y.detach().mean(0) * 0.1
            self.seen = self.seen + 1
        else:
            with torch.no_grad():
                self.center.mul_(0.9).add_(y.mean(0), alpha=0.1)
                self.seen += 1
        return y - self.center


class Words(nn.Module):
    """The mean of the vectors of a sample's words, and layers. `longest`: vectors that are longer are cut when read."""

    def __init__(self, depth: int, longest: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, max_norm=longest)
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids).mean(1)
        for layer in self.layers:
            x = layer(x)
        return x


class Scale(nn.Module):
    """A single learned number, as CLIP's logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self) -> Tensor:
        return self.log_scale.exp()


class Teacher(nn.Module):
    """A copy of a tower that no gradient trains, and a running mean of what it gives."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        averages: Any = swa_utils
        self.average = averages.AveragedModel(student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(WIDTH))
        self.register_buffer("steps", torch.zeros(()))
        self.center: Tensor
        self.steps: Tensor

    @property
    def tower(self) -> nn.Module:
        """The copy."""
        found: nn.Module = self.average.module
        return found

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tower(x)
        return y


def tied_head(words: nn.Module) -> nn.Module:
    """A head over words that shares its weight with their embedding."""
    head = nn.Linear(WIDTH, WORDS)
    assert isinstance(words, Words)
    head.weight = words.embedding.weight
    return head


# -- modules that do more than compute --------------------------------------------------------------------------------


class Queued(nn.Module):
    """Takes off the mean of what it gave last, which it keeps in a queue."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Tower(Block, depth)
        self.register_buffer("queue", torch.zeros(8, WIDTH))
        self.queue: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        found = y - self.queue.mean(0)
        self.queue = torch.cat([y.detach(), self.queue])[:8]
        return found


class Pointed(nn.Module):
    """A queue as in MoCo, written to where a pointer stands."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Tower(Block, depth)
        self.register_buffer("queue", torch.zeros(8, WIDTH))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.queue: Tensor
        self.pointer: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        found = y - self.queue.mean(0)
        with torch.no_grad():
            at = int(self.pointer)
            self.queue[at : at + 2] = y[:2]
            self.pointer[0] = (at + 2) % 8
        return found


class Prototypes(nn.Module):
    """Layers, then vectors that each forward first brings to length 1."""

    def __init__(self, depth: int, is_data: bool) -> None:
        super().__init__()
        self.inner, self.is_data = Tower(Block, depth), is_data
        self.vectors = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.vectors.weight
        if self.is_data:
            weight.data = F.normalize(weight.data, dim=1)
        else:
            with torch.no_grad():
                weight.copy_(F.normalize(weight, dim=1))
        y: Tensor = self.vectors(self.inner(x))
        return y


class Counting(nn.Module):
    """Its output grows with the number of calls, which it counts in Python."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner, self.calls = Tower(Block, depth), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.inner(x)
        return y * (1 + 0.1 * self.calls)


class Remembering(nn.Module):
    """Takes off a running mean that is no buffer: of what it gives, or of what it gets."""

    def __init__(self, depth: int, is_of_batch: bool) -> None:
        super().__init__()
        self.inner, self.is_of_batch = Tower(Block, depth), is_of_batch
        self.center = torch.zeros(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        with torch.no_grad():
            self.center.mul_(0.9).add_((x if self.is_of_batch else y).mean(0), alpha=0.1)
        return y - self.center


class Cumulative(nn.Module):
    """Batch norm whose running statistics are the mean of all batches, as momentum=None asks for."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner, self.norm = Tower(Block, depth), nn.BatchNorm1d(WIDTH, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.inner(x))
        return y


class _Reversed(torch.autograd.Function):
    """What it gets; its gradient turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -0.5 * gradients[0]


class Reversing(nn.Module):
    """Layers of which the first gets its gradient turned round."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), Tower(Block, depth)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(_Reversed.apply(self.first(x)))  # type: ignore[no-untyped-call]
        return y


class Checkpointed(nn.Module):
    """Layers that compute again in backward, by torch's own means."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth + 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def _hooked(depth: int) -> nn.Module:
    """Its stem's gradient is scaled by a hook."""
    made = Tower(Block, depth)
    made.stem.weight.register_hook(lambda gradient: gradient * 0.5)  # type: ignore[no-untyped-call]
    return made


def _frozen_in_part(depth: int) -> nn.Module:
    """Its stem is not trained."""
    made = Tower(Block, depth)
    made.stem.requires_grad_(False)
    return made


def _weight_normed(depth: int) -> nn.Module:
    """Weights as length and direction."""
    made = Tower(Block, depth)
    nn.utils.parametrizations.weight_norm(made.stem)
    return made


TOWERS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": lambda depth: Tower(Block, depth),
    "clamped": lambda depth: Tower(Clamped, depth),
    "sized": lambda depth: Tower(Sized, depth),
    "count_in_dict": lambda depth: Tower(Listed, depth),
    "batch_norm": lambda depth: Tower(BatchNormed, depth),
    "spectral_norm": lambda depth: Spectral(depth, is_old=False),
    "old_spectral_norm": lambda depth: Spectral(depth, is_old=True),
    "buffer_in_place": lambda depth: Centered(False, depth),
    "buffer_assigned": lambda depth: Centered(True, depth),
    "embedding": Words,
    "renormed_embedding": lambda depth: Words(depth, longest=1.5),
    "queue": Queued,
    "queue_pointer": Pointed,
    "prototypes": lambda depth: Prototypes(depth, is_data=False),
    "prototypes_data": lambda depth: Prototypes(depth, is_data=True),
    "python_counter": Counting,
    "plain_tensor": lambda depth: Remembering(depth, is_of_batch=False),
    "plain_tensor_of_batch": lambda depth: Remembering(depth, is_of_batch=True),
    "cumulative_batch_norm": Cumulative,
    "reversed_gradient": Reversing,
    "checkpointed": Checkpointed,
    "gradient_hook": _hooked,
    "frozen_in_part": _frozen_in_part,
    "weight_norm": _weight_normed,
}
"""By kind: a tower of some depth."""
READS_WORDS = ("embedding", "renormed_embedding")
CHANGING = (
    *("batch_norm", "cumulative_batch_norm", "spectral_norm", "old_spectral_norm", "buffer_in_place"),
    *("buffer_assigned", "queue", "queue_pointer", "prototypes", "prototypes_data", "renormed_embedding"),
)
"""Towers that change in forward."""
UNSAVED = ("python_counter", "count_in_dict", "plain_tensor", "plain_tensor_of_batch")
"""Towers that keep what no checkpoint holds."""
