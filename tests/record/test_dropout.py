"""Dropout in training: exact under every plan, another mask in every place; what cannot be repeated is refused."""

import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spindle
from spindle.capture import capture
from spindle.errors import SpindleWarning, WorkloadError
from spindle.runtime import parity
from spindle.runtime.controller import launched, prepare
from spindle.runtime.parity import ParityReport, Tolerance
from tests.drawn import SEEDS, drawn
from tests.random_plans import random_plan, widest_plan
from tests.tiny_workloads import VOCABULARY, WIDTH, floats, tokens

EXACT = Tolerance(1e-10, 1e-10)


class Layer(nn.Module):
    """Dropout in attention (twice: torch's module, and the function), in the perceptron, and of whole paths."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=rate, batch_first=True)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(rate), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=self.rate if self.training else 0.0)
        x = x + y.transpose(1, 2).flatten(2)
        path = (torch.rand(x.shape[0], 1, 1, dtype=x.dtype) > self.rate).to(x.dtype)
        z: Tensor = x + path * self.mlp(x)
        return z


class Net(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.dropout = nn.Dropout(rate)
        self.layers = nn.ModuleList(Layer(rate) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.words(ids))
        for layer in self.layers:
            x = layer(x)
        return x


def dropping(rate: float, **options: object) -> spindle.Workload:
    """Two tasks that share a net with dropout everywhere; one draws noise in its own function too."""
    torch.manual_seed(0)
    workload = spindle.Workload("dropping", **options)  # type: ignore[arg-type]
    net = workload.component("net", Net(rate).double())
    head = workload.component("head", nn.Linear(WIDTH, 3).double())

    @workload.task("classify", batch_size=5, data=[{"ids": tokens(5, 4, 1), "label": tokens(5, 1, 2)[:, 0] % 3}])
    def classify(batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(F.dropout(head(net(batch["ids"])[:, 0]), rate), batch["label"])

    @workload.task("denoise", batch_size=4, data=[{"ids": tokens(4, 6, 3)}], weight=0.5)
    def denoise(batch: dict[str, Tensor]) -> Tensor:
        x = net(batch["ids"])
        return F.mse_loss(
            head(x + 0.1 * torch.randn_like(x)), torch.rand(x.shape[0], 1, 1, dtype=x.dtype).expand(-1, 6, 3)
        )

    return workload


@functools.cache
def built(rate: float, *, recompute: bool = False, accumulate: int = 1, in_flight: int = 1) -> spindle.Workload:
    recomputed = ("net",) if recompute else ()
    return dropping(rate, recompute=recomputed, accumulate=accumulate, in_flight=in_flight)


def compared(workload: spindle.Workload, plan: spindle.Plan, *, steps: int = 2, seed: int = 0) -> ParityReport:
    optimizer = parity.default_optimizer
    reference = parity.run_reference(workload, steps, optimizer=optimizer, seed=seed)
    with launched(prepare(workload, plan), optimizer=optimizer, launcher="threads", seed=seed, timeout_s=30.0) as run:
        planned = parity.observed(run, steps)
    return parity.compare(reference, planned, tolerance=EXACT)


@drawn(3, rate=[0.1, 0.3, 0.5], num_ranks=range(1, 5), seed=SEEDS, recompute=(False, True))
def test_dropout_is_exact_under_every_plan(rate: float, num_ranks: int, seed: int, recompute: bool) -> None:
    """Losses, gradients and updates are those of one process to 1e-10, however the batch is cut, also computed anew."""
    workload = built(rate, recompute=recompute)
    report = compared(workload, random_plan(spindle.make_metagraph(workload), num_ranks, seed), seed=seed)
    assert report.ok, str(report)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_micro_batches_have_masks_of_their_own(in_flight: int) -> None:
    """The same batch twice in a step meets two masks, the same whether in rounds or side by side."""
    workload = built(0.3, accumulate=2, in_flight=in_flight)
    report = compared(workload, random_plan(spindle.make_metagraph(workload), 3, 1))
    assert report.ok, str(report)
    once = parity.run_reference(built(0.3), 1, optimizer=parity.default_optimizer)
    twice = parity.run_reference(workload, 1, optimizer=parity.default_optimizer)
    assert once.losses[0]["classify"] != pytest.approx(twice.losses[0]["classify"], rel=1e-6)


def standing(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def losses_of(seed: int, ranks: int = 2) -> list[dict[str, float]]:
    workload = built(0.3)
    plan = widest_plan(spindle.make_metagraph(workload), ranks)
    found = spindle.train(workload, plan, optimizer=standing, steps=3, launcher="threads", seed=seed)
    return list(found.losses)


def test_every_step_has_masks_of_its_own() -> None:
    """With weights that stand still and one batch, steps differ by their masks alone; seeds choose the stream."""
    first, again, other = losses_of(0), losses_of(0, ranks=3), losses_of(1)
    assert len({losses["classify"] for losses in first}) == 3
    for ours, theirs in zip(first, again, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert first[0]["classify"] != other[0]["classify"]


def test_training_leaves_torch_s_generator_alone() -> None:
    built(0.3)  # which seeds it
    torch.manual_seed(5)
    before = torch.get_rng_state()
    losses_of(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_with_dropout_are_split() -> None:
    """Dropout stands in no layer's way: all go by samples but the loss."""
    workload = built(0.3)
    whole = [op.name for op in capture(workload).graph if not op.splittable]
    assert whole == ["classify.loss", "denoise.loss"]


def test_attention_with_dropout_warns() -> None:
    with pytest.warns(SpindleWarning, match=r"task 'classify': attention with dropout cannot use a fused kernel.*set "):
        capture(dropping(0.2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(5, WIDTH, 2, batch_first=True, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cells(x)[0]
        return y


class Drawing(nn.Module):
    """Draws in some way of its own."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(5, WIDTH), noise

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.noise(self.linear(x))
        return y


class Checkpointed(nn.Module):
    """A layer that forgets what is in it until backward."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(rate), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + checkpoint(self.mlp, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_checkpoints_of_the_model_s_own(rate: float) -> None:
    """They are exact, without dropout and with it: what is computed again draws the same."""
    torch.manual_seed(0)
    workload = spindle.Workload("checkpointed")
    stem = workload.component("stem", nn.Linear(5, WIDTH).double())
    net = workload.component("net", nn.Sequential(*(Checkpointed(rate) for _ in range(2))).double())

    @workload.task("t", batch_size=4, data=[{"x": floats(4, 5, seed=0, dtype=torch.float64)}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = net(stem(batch["x"]))
        return y.square().mean()

    report = compared(workload, widest_plan(spindle.make_metagraph(workload), 2))
    assert report.ok, str(report)


@pytest.mark.parametrize("as_block", [False, True])
def test_an_order_drawn_at_random_is_the_same_under_every_plan(as_block: bool) -> None:
    torch.manual_seed(0)
    workload = spindle.Workload("shuffled")
    net = Drawing(lambda x: x[:, torch.randperm(3)] * torch.arange(1.0, 4, dtype=x.dtype)[:, None]).double()
    model = workload.component("net", nn.ModuleDict({"inner": net}), layers=["inner"] if as_block else ())

    @workload.task("t", batch_size=4, data=[{"x": floats(4, 3, 5, seed=0, dtype=torch.float64)}])
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = model["inner"](batch["x"])
        return y.square().mean()

    assert all(op.splittable for op in capture(workload).graph if not op.name.endswith("loss"))
    report = compared(workload, widest_plan(spindle.make_metagraph(workload), 3))
    assert report.ok, str(report)


OWN = torch.Generator()
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "recurrent dropout": (
        Recurrent,
        r"draws random numbers by bernoulli_.*\(.*line \d+ of test_dropout.py\).*put nn.Dropout between",
    ),
    "a generator of one's own": (
        lambda: Drawing(lambda x: x * torch.rand(1, generator=OWN, dtype=x.dtype)),
        "draws random numbers by rand.*without a generator of your own",
    ),
    "Python's generator": (
        lambda: Drawing(lambda x: x * random.random()),
        r"draws from random in its function or model \(line \d+ of test_dropout.py\)",
    ),
    "numpy's generator": (
        lambda: Drawing(lambda x: x * float(np.random.rand())),
        r"draws from numpy.random in its function or model \(line \d+ of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("as_block", [False, True])
def test_what_cannot_be_repeated_is_refused(name: str, as_block: bool) -> None:
    """In glue and in layers alike, with what to do instead."""
    make, message = REFUSED[name]
    torch.manual_seed(0)
    net = make().double()
    workload = spindle.Workload("refused")
    model = workload.component("net", nn.ModuleDict({"inner": net}), layers=["inner"] if as_block else ())
    data = [{"x": floats(4, 3, 5, seed=0, dtype=torch.float64)}]

    @workload.task("t", batch_size=4, data=data)
    def task(batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = model["inner"](batch["x"])
        return y.square().mean()

    with pytest.raises(WorkloadError, match=message):
        capture(workload)


class Branches(nn.Module):
    """Draws, keeps a state, and asks for a number of the model, so that it runs for real to find its shapes."""

    seen: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.drop, self.how = nn.Linear(8, 8), nn.Dropout(0.3), how
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True) if how == "attention" else None
        self.register_buffer("seen", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.linear(x))
        if self.attention is not None:
            y = y + self.attention(y[:, None], y[:, None], y[:, None])[0][:, 0]
        if self.how == "state":
            with torch.no_grad():
                self.seen.lerp_(y.mean(0), 0.1)
            y = y * self.seen.clone()
        return -y if float(y.sum()) > 1e9 else y


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("how", ["plain", "state", "attention"])
@pytest.mark.parametrize("layers", [["0", "1"], []])
def test_layers_that_branch_and_draw(how: str, layers: list[str]) -> None:
    """Their draws are known though the meta device cannot run them."""
    for ranks in (2, 3):
        torch.manual_seed(0)
        workload = spindle.Workload("branches")
        trunk = workload.component("trunk", nn.Sequential(Branches(how), Branches(how)).double(), layers=layers)

        @workload.task("t", batch_size=6, data=[{"x": torch.randn(6, 8, dtype=torch.float64)} for _ in range(2)])
        def task(batch: dict[str, Tensor], trunk: nn.Module = trunk) -> Tensor:
            found: Tensor = (trunk(batch["x"]) - 1).square().mean()
            return found

        report = spindle.verify(workload, num_workers=ranks, steps=3, launcher="threads")
        assert report.ok, str(report)
