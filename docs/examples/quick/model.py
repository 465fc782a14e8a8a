"""Two towers and three tasks in sixty lines: the model of docs/quickstart.md."""

import torch
import torch.nn.functional as F
from torch import nn

import spindle

torch.manual_seed(0)


class Block(nn.Module):
    """Norm, then a multilayer perceptron, beside a skip."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        """[b, width] -> [b, width]."""
        return x + self.mix(self.norm(x))


class Tower(nn.Module):
    """A stem and equal blocks; Spindle finds the blocks by itself."""

    def __init__(self, inputs, width, depth):
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        """[b, inputs] -> [b, width]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class Pairs:
    """Batches of pictures, sounds and labels; every pass gives the same ones."""

    def __iter__(self):
        random = torch.Generator().manual_seed(1)
        for _ in range(100):
            label = torch.randint(0, 10, (32,), generator=random)
            noise = torch.randn(32, 48, generator=random)
            pictures = F.one_hot(label, 48) + noise / 4
            yield {"picture": pictures, "sound": pictures[:, :24].roll(3, 1), "label": label}


workload = spindle.Workload("first")
vision = workload.component("vision", Tower(48, 64, 4))
sound = workload.component("sound", Tower(24, 32, 3))
classes = workload.component("classes", nn.Linear(64, 10))
bridge = workload.component("bridge", nn.Linear(32, 64))


@workload.task("classify", batch_size=32, data=Pairs())
def classify(batch):
    """Which digit a picture shows."""
    return F.cross_entropy(classes(vision(batch["picture"])), batch["label"])


@workload.task("match", batch_size=32, data=Pairs(), weight=0.5)
def match(batch):
    """A sound and its picture become alike."""
    seen, heard = vision(batch["picture"]), bridge(sound(batch["sound"]))
    return F.mse_loss(heard, seen)


@workload.task("listen", batch_size=32, data=Pairs())
def listen(batch):
    """Which digit was said."""
    return F.cross_entropy(classes(bridge(sound(batch["sound"]))), batch["label"])
