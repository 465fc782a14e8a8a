"""Facts of a whole batch, alike in all parts of the first one: what uses them runs whole, or is refused by its line."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import spindle
from spindle.errors import SpindleWarning, WorkloadError
from tests.random_plans import widest_plan

Batch = dict[str, Tensor]
Forward = Callable[[Batch, nn.Module], Tensor]


def kinds(values: Tensor) -> int:
    """How many different values there are, which a shape tells."""
    return int(torch.unique(values).numel())


EXACT: dict[str, Forward] = {
    "a full mask": lambda batch, model: model(batch["x"]) * torch.where(batch["mask"].all(), 1.0, 0.5),
    "positions in all masks": lambda batch, model: model(batch["x"]) * batch["mask"].all(0).double().mean(),
    "the largest kind": lambda batch, model: model(batch["x"]) * (1.0 + batch["kind"].max()),
    "the share of a kind": lambda batch, model: model(batch["x"]) * (batch["kind"] == 0).double().mean(),
    "a flag of all": lambda batch, model: model(batch["x"]) * torch.where(batch["flag"].all(), 1.0, 0.5),
    "a number of kinds": lambda batch, model: model(batch["x"]) * kinds(batch["kind"]),
    "a number that Python reads": lambda batch, model: model(batch["x"]) / int(batch["length"].max()),
    "a crop": lambda batch, model: model(batch["sequence"])[:, : int(batch["length"].max())].mean(1),
    "a crop of what the model reads": lambda batch, model: model(batch["sequence"][:, : int(batch["length"].max())]),
    "numbers from the least one on": lambda batch, model: model(
        batch["x"] * (1.0 + batch["kind"] - batch["kind"].min())[:, None]
    ),
    "a threshold that a far number passes": lambda batch, model: (
        model(batch["x"]) * torch.where((batch["length"] > 512).any(), 2.0, 1.0)
    ),
    "the same on what the model reads": lambda batch, model: model(
        batch["x"] * (2.0 if bool((batch["length"] > 512).any()) else 1.0)
    ),
    "a crop that begins beyond the end": lambda batch, model: model(batch["sequence"])[
        :, : int(batch["length"].max()) + 3
    ].mean(1),
    "values of the model, none of which is large": lambda batch, model: (
        model(batch["x"]) * torch.where(((model(batch["x"]) * batch["x"]).abs() < 100.0).all(), 1.0, 0.5)
    ),
    "the largest of values with a limit": lambda batch, model: (
        model(batch["x"]) * (model(batch["x"]) * batch["x"]).abs().clamp(min=100.0).amax()
    ),
    "a count of what is in no sample": lambda batch, model: model(batch["x"]) * (1.0 + (~batch["flag"]).sum()),
}

REFUSED: dict[str, tuple[Forward, str]] = {
    "a threshold that nothing passes": (
        lambda batch, model: model(batch["x"]) * torch.where((batch["length"] > 4000).any(), 2.0, 1.0),
        r"'mul' \(line \d+ of test_batch_facts.py\) computes with 1.0 for samples .* with 2.0 for the whole batch",
    ),
    "the same as a number": (
        lambda batch, model: model(batch["x"]) * (2.0 if bool((batch["length"] > 4000).any()) else 1.0),
        r"computes with 1.0 for samples .* with 2.0 for the whole batch",
    ),
    "the same on what the model reads": (
        lambda batch, model: model(batch["x"] * (1.0 + (batch["length"] > 4000).double().mean())),
        r"computes with other numbers for samples .* than the whole batch has for them",
    ),
    "other positions": (
        lambda batch, model: model(batch["sequence"])[:, 2 if bool((batch["length"] > 4000).any()) else 1],
        r"computes with 1 for samples .* with 2 for the whole batch",
    ),
    "numbers of numpy": (
        lambda batch, model: model(batch["x"]) * np.float64(2.0 if bool((batch["length"] > 4000).any()) else 1.0),
        r"computes with np.float64\(1.0\) for samples .* with np.float64\(2.0\) for the whole batch",
    ),
    "one sample after another": (
        lambda batch, model: torch.stack(
            [row * (2.0 if bool((batch["length"] > 4000).any()) else 1.0) for row in model(batch["x"])]
        ),
        r"computes with other constants for samples .* than anywhere in the whole batch",
    ),
    "small numbers beside a mask": (
        lambda batch, model: (
            model(batch["x"])
            + torch.cat(
                [
                    torch.full((1,), torch.finfo(torch.float64).min, dtype=torch.float64),
                    torch.where((batch["length"] > 4000).any(), 1.0, 1.5).double().expand(3),
                ]
            )
        ).softmax(-1),
        r"'add' .* for samples .* the whole batch",
    ),
    "a limit that parts lack": (
        lambda batch, model: model(batch["x"]).clamp(0.01 if bool((batch["length"] > 4000).any()) else None, 3.0),
        r"'clamp' .* computes with None for samples .*, and with 0.01 for the whole batch",
    ),
    "other shapes": (
        lambda batch, model: model(batch["sequence"][:, : 2 if bool((batch["length"] > 4000).any()) else 5]).mean(1),
        r"computes with a tensor of shape \(3, 5, 4\) for samples .* \(6, 2, 4\) for the whole batch",
    ),
}

IN_LAYER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a threshold": lambda x, length: x * torch.where((length > 512).any(), 2.0, 1.0),
    "a branch": lambda x, length: x * 2 if (length > 512).any() else x,
    "a mean": lambda x, length: x * (1.0 + (length > 512).double().mean()),
    "a number of kinds": lambda x, length: x * kinds(length),
    "the longest": lambda x, length: x / int(length.max()),
    "the least": lambda x, length: x + (length - length.min())[:, None],
}

HARMLESS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by sample": lambda x, length: x * (length == 3)[:, None],
    "a mask that may go": lambda x, length: x if (length == 3).all() else x * 1.0,
    "one sample after another": lambda x, length: torch.stack([row * one for row, one in zip(x, length, strict=True)]),
}


class Layer(nn.Module):
    """A layer that asks something of the lengths in its batch."""

    def __init__(self, ask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.ask, self.linear = ask, nn.Linear(4, 4)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """Of the same shape."""
        return torch.tanh(self.linear(self.ask(x, length)))


class Layers(nn.Module):
    """Two of them."""

    def __init__(self, ask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(ask) for _ in "ab")

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """Of the same shape."""
        for layer in self.layers:
            x = layer(x, length)
        return x


def batches() -> list[Batch]:
    """Three batches; nothing of the first one differs between its parts, and in later ones some samples are unlike."""
    generator = torch.Generator().manual_seed(1)
    found = [
        {
            "x": torch.randn(6, 4, generator=generator).double(),
            "sequence": torch.randn(6, 5, 4, generator=generator).double(),
            "mask": torch.ones(6, 3, dtype=torch.bool),
            "kind": torch.zeros(6, dtype=torch.long),
            "length": torch.full((6,), 3),
            "flag": torch.ones(6, dtype=torch.bool),
        }
        for _ in range(3)
    ]
    for batch in found[1:]:
        batch["mask"][0, 1], batch["flag"][0], batch["flag"][5] = False, False, False
        batch["kind"][0], batch["kind"][4] = 2, 1
        batch["length"][0], batch["length"][4] = 6000, 4
        batch["x"][0] *= 1000
    return found


def simple(forward: Forward) -> spindle.Workload:
    """Two layers without questions, in a task that has one."""
    torch.manual_seed(0)
    workload = spindle.Workload("facts")
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in "ab")).double()
    model = workload.component("model", layers)

    @workload.task("task", batch_size=6, data=lambda: iter(batches()))
    def task(batch: Batch) -> Tensor:
        return forward(batch, model).square().mean()

    return workload


def layered(ask: Callable[[Tensor, Tensor], Tensor]) -> spindle.Workload:
    """Two layers with a question, in a task that has none."""
    torch.manual_seed(0)
    workload = spindle.Workload("facts")
    model = workload.component("model", Layers(ask).double(), layers="layers")

    @workload.task("task", batch_size=6, data=lambda: iter(batches()))
    def task(batch: Batch) -> Tensor:
        found: Tensor = model(batch["x"], batch["length"]).square().mean()
        return found

    return workload


def alone(workload: spindle.Workload) -> list[float]:
    """Losses of one process."""
    optimizer = torch.optim.SGD([p for _, p in workload.named_parameters()], lr=0.1)
    losses = []
    for batch in workload.tasks["task"].batches():
        optimizer.zero_grad()
        loss = workload.tasks["task"].function(dict(batch))
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def planned(workload: spindle.Workload, num_ranks: int, steps: int = 3) -> list[float]:
    """Losses of a run on several ranks."""
    plan = widest_plan(spindle.make_metagraph(workload), num_ranks)
    result = spindle.train(
        workload,
        plan,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        steps=steps,
        launcher="threads",
        timeout_s=30.0,
    )
    return [losses["task"] for losses in result.losses]


@pytest.mark.parametrize("fact", EXACT)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_code_between_layers_that_asks_something_of_a_batch(fact: str, num_ranks: int) -> None:
    """It runs on the whole batch: disturbed copies of the first batch show that its parts would give other answers."""
    assert planned(simple(EXACT[fact]), num_ranks) == pytest.approx(alone(simple(EXACT[fact])), rel=1e-9)


@pytest.mark.parametrize("fact", REFUSED)
def test_what_nothing_has_shown_is_refused_in_the_step_where_it_differs(fact: str) -> None:
    """The first step is right; the second names the task, the step, the line and both answers."""
    forward, sentence = REFUSED[fact]
    with pytest.raises(WorkloadError, match=f"task 'task', step 2: .*{sentence}.*Compute it in the loader"):
        planned(simple(forward), 2)


@pytest.mark.parametrize("fact", IN_LAYER)
def test_layers_that_ask_something_of_a_batch(fact: str) -> None:
    """Far numbers in one sample show that the results of others depend on it, so they run on one device."""
    workload = layered(IN_LAYER[fact])
    with pytest.warns(SpindleWarning, match="Layer mixes samples"):
        found = planned(workload, 2)
    assert found == pytest.approx(alone(layered(IN_LAYER[fact])), rel=1e-9)


@pytest.mark.parametrize("fact", HARMLESS)
def test_layers_whose_results_do_not_depend_on_the_answer_are_sharded(fact: str) -> None:
    """They are exact, and run on two devices."""
    workload = layered(HARMLESS[fact])
    layers = [metaop for metaop in spindle.make_metagraph(workload) if ".layers" in metaop.name]
    assert layers
    assert all(operator.splittable for metaop in layers for operator in metaop.operators)
    assert planned(workload, 2) == pytest.approx(alone(layered(HARMLESS[fact])), rel=1e-9)


@pytest.mark.parametrize("first", ["all texts full", "some texts full"])
def test_masks_that_transformers_leaves_out_where_all_texts_are_full(first: str) -> None:
    """A part may give layers no mask where the whole gives one; capture sees that this is the same."""

    def make() -> spindle.Workload:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            use_cache=False,
        )
        workload = spindle.Workload("masks")
        model: Any = workload.component("lm", LlamaForCausalLM(config).double())
        generator = torch.Generator().manual_seed(1)
        found = []
        for lengths in [(6, 6, 6, 6), (6, 4, 6, 6), (3, 6, 2, 6)][first == "some texts full" :]:
            ids = torch.randint(1, 30, (4, 6), generator=generator)
            mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
            found.append({"ids": ids, "mask": mask})

        @workload.task("task", batch_size=4, data=lambda: iter(found))
        def task(batch: Batch) -> Tensor:
            logits: Tensor = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
            return (logits.logsumexp(-1) * batch["mask"]).sum(1).mean()

        return workload

    wanted = alone(make())
    assert planned(make(), 3, len(wanted)) == pytest.approx(wanted, rel=1e-9)


Branch = Callable[[Tensor, str, int], Tensor]


def branching(branch: Branch) -> spindle.Workload:
    """Samples one by one, of which each has a text; the shortest text of the batch is known."""
    torch.manual_seed(0)
    workload = spindle.Workload("branches")
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in "ab")).double()
    model = workload.component("model", layers)
    lengths = ([3, 3, 3, 3, 3, 3], [3, 3, 3, 9, 9, 9], [9, 9, 9, 9, 3, 9])
    data = [{"x": torch.randn(6, 4).double(), "texts": ["a" * length for length in found]} for found in lengths]

    @workload.task("task", batch_size=6, data=lambda: iter(data))
    def task(batch: Any) -> Tensor:
        shortest = min(map(len, batch["texts"]))
        rows = zip(model(batch["x"]), batch["texts"], strict=True)
        return torch.stack([branch(row, text, shortest) for row, text in rows]).square().mean()

    return workload


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_branch_for_each_sample_may_be_taken_by_none_of_a_part(ranks: int) -> None:
    """Calls that parts of the first batch make together as often as the whole are of samples; a later part has none."""
    workload = branching(lambda row, text, _: row * 2.0 if len(text) < 5 else row)
    plan = widest_plan(spindle.make_metagraph(workload), ranks)
    report = spindle.verify(workload, plan, steps=3, launcher="threads")
    assert report.ok, report


def test_a_branch_for_all_samples_is_not_taken_for_one_of_each() -> None:
    """Which the whole makes for all of its samples, and a part for none."""
    workload = branching(lambda row, _, shortest: row * 2.0 if shortest < 5 else row)
    plan = widest_plan(spindle.make_metagraph(workload), 2)
    with pytest.raises(WorkloadError, match=r"'mul' .* is not called for samples 3 to 5 alone, and is for the whole"):
        spindle.train(workload, plan, optimizer=lambda p: torch.optim.SGD(p, 0.1), steps=3, launcher="threads")
