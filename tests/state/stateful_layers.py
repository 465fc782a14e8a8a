"""Layers that change more than their results."""

import functools
import itertools
from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.state.stateful import WIDTH


class Linear(nn.Module):
    """A layer to build on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)


class Normed(Linear):
    """With batch norm."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x)).tanh()
        return y


class ReadsStatistics(Normed):
    """Which it also computes with."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x))
        assert self.norm.running_mean is not None
        return y + 0.1 * self.norm.running_mean.clone()


class InstanceNormed(Linear):
    """With instance norm that keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x).view(-1, 2, WIDTH // 2)).flatten(1)
        return y


class Spectral(nn.Module):
    """Weights that go through power iteration, in the new form and the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.old = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.old(self.new(self.norm(x)).tanh())
        return y


class Centered(Linear):
    """Reads a moving mean before it moves; `way`: how it is written."""

    center: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh()
        y: Tensor = h * (1 + self.center) if self.way == "assigned" else h * (1 + self.center.clone())
        with torch.no_grad():
            mean = h.mean(0)
            if self.way == "in place":
                self.center.mul_(0.9).add_(mean, alpha=0.1)
            elif self.way == "lerp":
                self.center.lerp_(mean, 0.1)
            elif self.way == "data":
                self.center.data = self.center * 0.9 + mean * 0.1
            elif self.way == "data in place":
                self.center.data.mul_(0.9)
                self.center.detach().add_(mean, alpha=0.1)
            elif self.way == "out":
                torch.lerp(self.center, mean, 0.1, out=self.center)
            else:
                self.center = self.center * 0.9 + mean * 0.1
        return y


class Queued(Linear):
    """A queue of keys, as MoCo keeps; `way`: how they are written."""

    queue: Tensor
    place: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("queue", torch.linspace(-1, 1, 12 * WIDTH).reshape(WIDTH, 12))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        q = self.linear(x)
        logits = q @ self.queue.clone()
        with torch.no_grad():
            keys, count = q.detach().T, len(q)
            if self.way == "number":  # a number that the layer must know: runs whole
                first = int(self.place)
                self.queue[:, first : first + count] = keys
            elif self.way == "view":
                self.queue[:, :count].copy_(keys)
            else:
                self.queue.index_copy_(1, (torch.arange(count) + self.place) % 12, keys)
            self.place.add_(count).remainder_(12)
        y: Tensor = logits[:, :WIDTH].tanh()
        return y


class Codebook(Linear):
    """Codes that follow the means of what is nearest to them."""

    codes: Tensor
    sizes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH))
        self.register_buffer("sizes", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        nearest = (z.detach()[:, None] - self.codes).square().sum(-1).argmin(1)
        found = self.codes[nearest]
        with torch.no_grad():
            chosen = F.one_hot(nearest, 4).to(z.dtype)
            self.sizes.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.codes.lerp_(chosen.T @ z.detach() / self.sizes[:, None], 0.1)
        y: Tensor = (z + (found - z).detach()) * z.tanh()
        return y


class Calls(Linear):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.linear(x) / self.calls
        return y


class Checkpointed(Linear):
    """Runs an inner layer again in backward, by torch's own checkpoint."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner = inner()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, self.linear(x), use_reentrant=False)
        return y


class Stash(Linear):
    """Keeps what it computed for whoever asks, and reads none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.last, self.rows = self.linear(x), len(x)
        return self.last.tanh()


class Losses(Linear):
    """Keeps numbers in a list that nobody reads, and a table that follows from sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if width not in self.tables:
            self.tables[width] = torch.linspace(0, 1, width, dtype=torch.float64)
        y: Tensor = self.linear(x) + self.tables[width]
        self.losses.append(y.detach().mean())
        return y.tanh()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": Normed,
    "batch norm, cumulative": functools.partial(Normed, None),
    "batch norm, read": ReadsStatistics,
    "instance norm": InstanceNormed,
    "spectral norm": Spectral,
    **{f"center {way}": functools.partial(Centered, way) for way in ("in place", "assigned", "lerp", "out", "data")},
    "center data in place": functools.partial(Centered, "data in place"),
    **{f"queue {way}": functools.partial(Queued, way) for way in ("number", "view", "index")},
    "codebook": Codebook,
    "calls": Calls,
    "stash": Stash,
    "losses": Losses,
    "checkpointed batch norm": functools.partial(Checkpointed, Normed),
}

# -- what is refused --------------------------------------------------------------------------------------------------


class Counter(Linear):
    """Counts its calls in a number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.linear(x) / self.calls
        return y


class Plain(Linear):
    """A moving mean in a plain tensor, or in one that the first call makes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.center: Tensor | None = torch.zeros(WIDTH, dtype=torch.float64) if way != "made" else None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        with torch.no_grad():
            if self.center is None:
                self.center = h.mean(0)
            elif self.way == "in place":
                self.center.mul_(0.9).add_(h.mean(0), alpha=0.1)
            else:
                self.center = self.center * 0.9 + h.mean(0) * 0.1
        return h - self.center.clone()


class MadeBuffer(Linear):
    """A buffer that the first call makes."""

    center: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", None)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        with torch.no_grad():
            self.center = h.mean(0) if self.center is None else self.center * 0.9 + h.mean(0) * 0.1
        return h - self.center


class WritesParameter(Linear):
    """Scales its own weight in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.linear.weight.data.mul_(1 + y.detach().mean())
        return y


class Kept(Linear):
    """Keeps what changes from call to call in something that it holds; `way`: in what."""

    total = 0.0

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.numbers, self.tensors, self.recent = (
            {"calls": 0},
            [torch.zeros(WIDTH, dtype=torch.float64)],
            deque[float](),
        )
        self.made: dict[str, Tensor] = {}
        self.counter, self.object = itertools.count(1), Holder()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        if self.way == "numbers":
            self.numbers["calls"] += 1
            return h / self.numbers["calls"]
        if self.way == "counter":
            return h / next(self.counter)
        if self.way == "object":
            self.object.calls += 1
            return h / self.object.calls
        if self.way == "total":
            Kept.total += 1.0
            return h / Kept.total
        with torch.no_grad():
            if self.way == "tensors":
                self.tensors[0].lerp_(h.mean(0), 0.1)
                return h - self.tensors[0].clone()
            if self.way == "made":
                self.made["mean"] = 0.5 * self.made.get("mean", torch.zeros_like(h[0])) + h.mean(0)
                return h - self.made["mean"]
        self.recent.append(float(h.mean()))
        return h * (1 + sum(self.recent) / len(self.recent))


class Holder:
    """Counts."""

    def __init__(self) -> None:
        self.calls = 0


class FirstBatch(Linear):
    """Divides by the spread of the first batch that it meets."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            spread = x.detach().std() + 1
            self.scale = float(spread) if self.way == "number" else spread
        y: Tensor = self.linear(x) / self.scale
        return y


OWN = r"keeps( a state of its own in attribute)? '%s' |stateful_layers.py: what it computes .* changes from call"
KEPT = ("numbers", "counter", "object", "total", "tensors", "made", "recent")
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a number": (Counter, OWN % "calls"),
    "a plain tensor": (functools.partial(Plain, "assigned"), OWN % "center"),
    "a plain tensor in place": (functools.partial(Plain, "in place"), OWN % "center"),
    "a plain tensor made by a call": (functools.partial(Plain, "made"), OWN % "center"),
    "a buffer made by a call": (MadeBuffer, f"{OWN % 'center'}|buffer 'trunk.0.center' is made by the first batch"),
    **{f"kept in {way}": (functools.partial(Kept, way), f"{OWN % way}|branches on|draws") for way in KEPT},
    **{
        f"a {way} of the first batch": (
            functools.partial(FirstBatch, way),
            r"keeps in attribute 'scale' \(line \d+ of ",
        )
        for way in ("number", "tensor")
    },
    "a parameter": (WritesParameter, "parameter '.*linear.weight'"),
}
