"""Models written as published code often is, each beside a plain loop: they go through their samples one by one, keep a
state, choose by what they have computed, or ask for gradients inside.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spindle
from spindle.capture import capture
from spindle.errors import SpindleWarning
from tests.plain_loops import WIDTH, Block, assert_same, looped, planned, rows, tower, workload
from tests.random_plans import widest_plan
from tests.tiny_workloads import floats

Batch = dict[str, Tensor]
Model = Callable[[], nn.Module]


class Spliced(nn.Module):
    """Words of each sample around the features of its image: LLaVA's way, with as many pieces as samples have."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.embed, self.layers = tower(), nn.Embedding(3, WIDTH), tower()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        images, spliced = self.vision(x), []
        for number, label in enumerate(y):
            words = torch.split(self.embed(torch.arange(3)), [int(label), 3 - int(label)])
            pieces = [words[0], images[number][None], words[1]] if int(label) else [words[1], images[number][None]]
            spliced.append(torch.cat(pieces))
        found: Tensor = self.layers(torch.stack(spliced)).mean(1)
        return found


class Decoding(nn.Module):
    """A decoder that is called once a sample, as Segment Anything's is, behind an encoder that takes them all."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = tower(), nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        found = []
        for image in self.encoder(x):
            for layer in self.decoder:
                image = layer(image)
            found.append(image)
        return torch.stack(found)


class Turned(nn.Module):
    """A view that is made without gradients of what has some, for hard negatives, as ALBEF does."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = tower(), tower(), tower()

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        left, right = F.normalize(self.left(x), dim=-1), F.normalize(self.right(x), dim=-1)
        with torch.no_grad():
            weights = (left @ right.T).softmax(1).clone()
            hard = weights.fill_diagonal_(0).argmax(1)
        found: Tensor = self.last(left + right[hard])
        return found


class Recurrent(nn.Module):
    """A network that goes on from where the batch before has left it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.stay = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("state", torch.zeros(4, WIDTH))
        self.state: Tensor

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        state = self.state[: len(x)].clone()
        for entering in (x, x.roll(1, 1)):
            state = torch.tanh(self.enter(entering) + self.stay(state))
        with torch.no_grad():
            self.state[: len(x)] = state
        return state


class Adaptive(nn.Module):
    """Two terms that weigh as much as their gradients are long, as VQGAN's do."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.last = tower(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        found: Tensor = self.last(self.tower(x))
        terms = (found - x).abs().mean(), found.square().mean()
        lengths = [torch.autograd.grad(term, self.last.weight, retain_graph=True)[0].norm() for term in terms]
        weighed: Tensor = found * (lengths[0] / lengths[1]).detach()
        return weighed


class Normed(nn.Module):
    """Equal layers that keep statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(Block(), nn.BatchNorm1d(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return x


MODELS: dict[str, Model] = {
    "spliced": Spliced,
    "decoding": Decoding,
    "turned": Turned,
    "recurrent": Recurrent,
    "adaptive": Adaptive,
}


def made(model: Model, **component: object) -> spindle.Workload:
    """The model in one task, its head in another too."""

    def tasks(model: nn.Module, head: nn.Module) -> dict[str, Callable[[Batch], Tensor]]:
        return {
            "through": lambda batch: F.cross_entropy(head(model(batch["x"], batch["y"])), batch["y"]),
            "alone": lambda batch: F.cross_entropy(head(batch["x"]), batch["y"]),
        }

    return workload(lambda: {"model": model(), "head": nn.Linear(WIDTH, 3)}, tasks, of_components={"model": component})


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("name", list(MODELS))
def test_planned_is_as_in_one_process(name: str) -> None:
    """Also where a rank has other samples than were looked at."""
    options = {"layers": [""]} if name == "recurrent" else {}
    assert_same(planned(made(MODELS[name], **options)), looped(made(MODELS[name], **options)))


class Queued(nn.Module):
    """Features of earlier batches, which count from some batch on, as SwAV's do."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower()
        self.register_buffer("queue", torch.zeros(4, WIDTH))
        self.queue: Tensor

    def forward(self, x: Tensor, counts: bool) -> Tensor:
        found: Tensor = self.tower(x)
        with torch.no_grad():
            others = found.detach()
            if counts:
                others = torch.cat([self.queue, others])
            self.queue[: len(x)] = found
        return found * others.mean(0)


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
def test_code_that_a_flag_of_the_batch_switches_on() -> None:
    """Of a list of batches one that switches it on is looked at, wherever it stands."""

    def flagged() -> spindle.Workload:
        torch.manual_seed(0)
        made = spindle.Workload("flagged")
        model = made.component("model", Queued().double())
        data = [batch | {"counts": number > 0} for number, batch in enumerate(rows())]
        made.task("t", batch_size=4, data=data)(lambda batch: model(batch["x"], batch["counts"]).square().mean())
        return made

    assert_same(planned(flagged()), looped(flagged()))


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
def test_a_loop_over_samples_may_become_longer() -> None:
    """The first batches have fewer samples than a later one."""

    def listed() -> spindle.Workload:
        torch.manual_seed(0)
        made = spindle.Workload("listed")
        model, head = made.component("model", tower().double()), made.component("head", nn.Linear(WIDTH, 3).double())
        data = [
            {"xs": [floats(1 + i, WIDTH, seed=i, dtype=torch.float64) for i in range(n)], "y": torch.arange(n) % 3}
            for n in (4, 4, 6)
        ]

        def task(batch: dict[str, Any]) -> Tensor:
            return F.cross_entropy(torch.stack([head(model(x).mean(0)) for x in batch["xs"]]), batch["y"])

        made.task("t", batch_size=4, data=data)(task)
        return made

    assert_same(planned(listed()), looped(listed()))


def test_layers_called_in_a_loop_leave_the_others_layers() -> None:
    """A warning names the line of the loop."""
    with pytest.warns(SpindleWarning, match=r"layer 'model\.decoder\.0' \(line \d+ of .*\.py\) is called in a"):
        names = [metaop.name for metaop in spindle.make_metagraph(made(Decoding))]
    assert {"through.model.encoder.0", "through.model.encoder.1"} <= set(names)
    assert not any("decoder" in name for name in names)


def test_equal_layers_keep_statistics_alike() -> None:
    """Of equal layers one is looked at; a rank may look at another one when shapes change."""
    found = capture(made(Normed)).skeleton.stateful
    assert {f"model.layers.{index}.1.num_batches_tracked" for index in (0, 1)} <= found


def test_a_component_may_be_one_layer() -> None:
    """Given as the module itself."""
    torch.manual_seed(0)
    single = spindle.Workload("single")
    module = single.component("model", model := Recurrent(), layers=[model])
    single.task("t", batch_size=4, data=[{"x": torch.randn(4, WIDTH)}])(lambda batch: module(batch["x"], None).mean())
    assert single.components["model"].layers == ("",)
    assert "t.model" in [metaop.name for metaop in spindle.make_metagraph(single)]


class Choosing(nn.Module):
    """Parts that fields of a batch switch on; one also writes to a part of a buffer through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.left, self.right = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("seen", torch.zeros(4, WIDTH))
        self.seen: Tensor

    def forward(self, x: Tensor, left: bool, right: bool) -> Tensor:
        found: Tensor = self.enter(x)
        self.seen.data[:2] = self.seen[2:] + 1
        if left:
            found = found + self.left(x)
        if right:
            found = self.right(found)
        return found


@pytest.mark.filterwarnings("ignore::spindle.errors.SpindleWarning")
@pytest.mark.parametrize("order", ["lr", "-lr", "b-l"])
def test_parts_that_a_batch_switches_on(order: str) -> None:
    """l: the left one, r: the right one, b: both; no batch need have all. A part that is off gets no gradient."""

    def switched() -> spindle.Workload:
        torch.manual_seed(0)
        made = spindle.Workload("switched")
        model = made.component("model", Choosing().double())
        data = [batch | {"l": on in "lb", "r": on in "rb"} for batch, on in zip(rows(), order, strict=False)]
        made.task("t", batch_size=4, data=data)(lambda b: model(b["x"], b["l"], b["r"]).square().mean())
        return made

    plan = widest_plan(spindle.make_metagraph(switched()), 2)
    assert spindle.verify(switched(), plan, steps=4, launcher="threads").ok
