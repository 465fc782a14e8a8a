"""Tiny hand-written models, one for each thing that capture must get right."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny_workloads import WIDTH, Residual


class Turning(nn.Module):
    """Self-attention that takes a mask and a pair of rotary tables beside the states, by name and by position."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None, *, rotary: tuple[Tensor, Tensor], cache: None = None) -> Tensor:
        def turned(y: Tensor) -> Tensor:
            left, right = y.chunk(2, -1)
            return y * rotary[0] + torch.cat([-right, left], -1) * rotary[1]

        y = self.norm(x)
        scores = turned(self.query(y)) @ turned(self.key(y)).transpose(1, 2) / WIDTH**0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
        z: Tensor = x + scores.softmax(-1) @ self.value(y)
        return z


class Rotary(nn.Module):
    """Tables from positions and a buffer; a mask from lengths."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(WIDTH // 2) / WIDTH)
        self.layers = nn.ModuleList(Turning() for _ in range(3))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        angles = (positions[:, None] * self.frequencies.to(x.dtype)).repeat(1, 2)
        mask = (positions < lengths[:, None]).to(torch.int64)
        for layer in self.layers:
            x = layer(x, mask, rotary=(angles.cos(), angles.sin()))
        return x


@dataclass
class Output:
    """What a layer hands on."""

    states: Tensor
    memory: tuple[Tensor, Tensor]
    name: str = "layer"


class Handing(nn.Module):
    """Gives a dataclass that holds a tuple; takes the other stack's tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.query, self.norm = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
        )

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None) -> Output:
        y = self.norm(x)
        own = self.key(y), self.value(y)
        keys, values = own if memory is None else (torch.cat([m, o], 1) for m, o in zip(memory, own, strict=True))
        return Output(x + F.softmax(self.query(y) @ keys.transpose(1, 2), -1) @ values, own)


class Coupled(nn.Module):
    """Two stacks; each layer of the second reads keys and values of its partner in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Handing() for _ in range(3))
        self.second = nn.ModuleList(Handing() for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for lower, upper in zip(self.first, self.second, strict=True):
            below = lower(x)
            x = below.states
            y = upper(y, below.memory).states
        return y


class Counting(nn.Module):
    """Keeps running statistics in buffers, in glue and in layers."""

    average: Tensor
    calls: Tensor

    class Layer(nn.Module):
        level: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = Residual(WIDTH)
            self.register_buffer("level", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x) + self.level
            with torch.no_grad():
                self.level += 0.1 * y.mean(0)
            return y

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        with torch.no_grad():
            self.average.mul_(0.5).add_(x.mean(0))
            self.calls += 1
        return x - self.average


class Branching(nn.Module):
    """Its glue branches on values, which no recording can follow; a layer inside it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(Residual(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rounds = int(x.shape[1] * 0 + x.detach().abs().max().ceil().clamp(max=1))
        for _ in range(rounds):
            for layer in self.layers:
                x = layer(x)
        y: Tensor = self.head(x)
        return y


class Choosy(nn.Module):
    """A layer whose own work depends on values: rows above zero go another way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        chosen = y[..., 0] > 0
        result = torch.empty_like(x)
        for expert, rows in ((self.one, chosen), (self.other, ~chosen)):
            if bool(rows.any()):
                result[rows] = expert(y[rows])
        return x + result


class Experts(nn.Module):
    """Layers that send rows to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(Choosy() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


class Demanding(nn.Module):
    """Takes grids of 2 x 3 alone, as models of images do, and branches on them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, WIDTH)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        if grid.tolist() != [[2, 3]] * len(grid):
            raise ValueError("a picture has 2 x 3 patches")
        y: Tensor = self.linear(x).mean(1)
        return y


class Loose(nn.Module):
    """Layers as plain attributes, which no rule finds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Residual(WIDTH), Residual(WIDTH)
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(self.stem(x))))
        return y
