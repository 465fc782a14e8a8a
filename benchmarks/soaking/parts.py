"""What the soak trains: a small float64 workload whose ranks fail on request, and plans of it.

- A file asks for a fault: its name says where, its content what. The rank that comes there first takes the file away
  and fails for real: it kills, stops or ends its own process, raises, or hangs.
- Three tasks share components. One reads through a worker process, one has batches whose length changes, one takes part
  by chance. They have dropout, running statistics and an average of the weights.
"""

import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import spindle
from spindle.values.plan import Plan
from spindle.workload import Batch, Workload
from tests.faults.injected import act, own_rank
from tests.random_plans import random_plan

WIDTH, BATCH, VOCABULARY = 8, 8, 32
PASS_BATCHES = 100  # of a task's data
TASKS = ("dense", "text", "drawn")
PLACES = ("load", "forward", "backward", "optimizer", "save")
KINDS = ("killed", "stopped", "exits", "raises", "hangs", "asked to end")
GONE = "gone"


class Faults:
    """Faults that files in a folder ask for."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def ask(self, place: str, kind: str) -> None:
        """One fault, for the first rank above 0 (when loading: any) that comes to this place."""
        unfinished = Path(self.folder, ".asked")
        unfinished.write_text(kind)
        unfinished.rename(Path(self.folder, place))

    def at(self, place: str) -> None:
        """A rank is at a place; what was asked for happens."""
        file = os.path.join(self.folder, place)
        rank = own_rank()
        if rank is None or (rank == 0 and place != "load") or not os.path.exists(file):
            return
        kind = Path(file).read_text()
        os.unlink(file)
        act(kind)

    def lose_device(self) -> None:
        """From now on rank 1 of several dies wherever it starts, until `forget`."""
        Path(self.folder, GONE).touch()

    def forget(self) -> list[str]:
        """A lost device works again, and what was asked for does not happen any more; kinds of this."""
        files = [file for file in Path(self.folder).iterdir() if file.is_file()]
        kinds = [file.read_text() for file in files if file.name != GONE]
        for file in files:
            file.unlink()
        return kinds

    def start(self) -> None:
        """A rank starts."""
        if own_rank() == 1 and dist.is_initialized() and os.path.exists(os.path.join(self.folder, GONE)):
            act("killed")


class Block(nn.Module):
    """A residual block with dropout, at which a rank may fail."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.faults = faults

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # a recorder answers questions like the next one as if it computed
            computes = not self.up.weight.is_meta
        if computes:
            self.faults.at("forward")
        y: Tensor = x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))
        if computes and y.requires_grad:
            y.register_hook(self._backward)  # type: ignore[no-untyped-call]  # of torch's stubs
        return y

    def _backward(self, gradient: Tensor) -> Tensor:
        self.faults.at("backward")
        return gradient


class Optimizer(torch.optim.AdamW):
    """AdamW, in whose steps and saves a rank may fail."""

    faults: Faults

    def step(self, closure: Any = None) -> Any:
        self.faults.at("optimizer")
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        self.faults.at("save")
        return super().state_dict()


class Pictures(Dataset[Batch]):
    """Batches of numbers, each a function of its index."""

    def __len__(self) -> int:
        return PASS_BATCHES

    def __getitem__(self, index: int) -> Batch:
        made = torch.Generator().manual_seed(index)
        x = torch.randn(BATCH, WIDTH, generator=made, dtype=torch.float64)
        return {"x": x, "y": x.flip(1).tanh()}


class Texts:
    """Batches of token ids; each has a length of its own."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def __iter__(self) -> Iterator[Batch]:
        for index in range(PASS_BATCHES):
            self.faults.at("load")
            made = torch.Generator().manual_seed(1000 + index)
            length = int(torch.randint(2, 24, (1,), generator=made))
            yield {"ids": torch.randint(0, VOCABULARY, (BATCH, length), generator=made)}


def workload_of(faults: Faults, tasks: tuple[str, ...] = TASKS) -> Workload:
    """The workload with some of its tasks; all components are there in any case."""
    torch.manual_seed(0)
    workload = Workload("soak", ema=0.99, max_grad_norm=1.0)
    trunk = workload.component("trunk", nn.Sequential(*(Block(faults) for _ in range(2))).double())
    scale = workload.component("scale", nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).double())
    words = workload.component("words", nn.Embedding(VOCABULARY, WIDTH).double())
    head = workload.component("head", nn.Linear(WIDTH, WIDTH).double())

    @workload.task("dense", batch_size=BATCH, data=DataLoader(Pictures(), batch_size=None, num_workers=1))
    def dense(batch: Batch) -> Tensor:
        y: Tensor = head(trunk(scale(batch["x"])))
        return F.mse_loss(y, batch["y"])

    @workload.task("text", batch_size=BATCH, data=Texts(faults))
    def text(batch: Batch) -> Tensor:
        y: Tensor = trunk(words(batch["ids"]))
        return (y.mean(1) - 1.0).square().mean()

    @workload.task("drawn", batch_size=BATCH, data=DataLoader(Pictures(), batch_size=None), probability=0.5)
    def drawn(batch: Batch) -> Tensor:
        error: Tensor = head(batch["x"]) - batch["y"]
        return error.abs().mean()

    return workload.only(tasks)


def evaluation_of(workload: Workload) -> spindle.Evaluation:
    """A forward-only task over the same components, with the averaged weights."""
    evaluation = spindle.Evaluation(workload, ema=True)
    modules = {name: component.module for name, component in workload.components.items()}

    @evaluation.task("held_out", batch_size=BATCH, data=list(islice(Texts(Faults(Path())), 4)))
    def held_out(batch: Batch) -> Tensor:
        y: Tensor = modules["trunk"](modules["words"](batch["ids"]))
        return (y.mean(1) - 1.0).square().mean()

    return evaluation


def plan_of(workload: Workload, num_devices: int, seed: int) -> Plan:
    """A plan for CPUs: for every other seed the planner's, else one drawn at random, which moves more data."""
    if seed % 2 == 0:
        return spindle.make_plan(workload, f"1x{num_devices}:cpu")
    return random_plan(spindle.make_metagraph(workload), num_devices, seed)


def damage(checkpoint: Path, rng: random.Random) -> None:
    """Change a byte of one of its files, as a bad disk does."""
    file = rng.choice(sorted(checkpoint.iterdir()))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 0x10
    file.write_bytes(content)
